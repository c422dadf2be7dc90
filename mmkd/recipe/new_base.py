"""New weights that an adapter is trained on: a student of `student_init` saved beside it, so that it can be loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from mmkd.cache.identity import file_sha256
from mmkd.errors import UserError
from mmkd.files import new_folder
from mmkd.results.adapter_base import BASE
from mmkd.results.parameters import ADAPTER
from mmkd.seams.deepspeed_seam import without_zero3

from .arguments import MAKING_KEYS
from .prune_arguments import UNPRUNED
from .recipe import Run

RECORD = "made_of.json"
"""In the folder of the new weights: the keys and files that they follow from."""

_KEYS = ("student", *MAKING_KEYS)
_TRAINED = (ADAPTER, "checkpoint-*")


def new_base(run: Run, make: Callable[[], PreTrainedModel], processing_class: Callable[[], Any]) -> Path:
    """The folder of the new weights of a run's student, made by `make` once, on one process.

    A run that goes on finds them there. Raises UserError where its folder holds an adapter of other new weights.
    """
    output, state = Path(run.training.output_dir or "."), PartialState()
    folder, wanted = output / BASE, _made_of(run)
    # The first process of each machine, one after the other: machines may share a disk or not.
    if state.is_main_process:
        _make(folder, wanted, output, make, processing_class)
    state.wait_for_everyone()
    if state.is_local_main_process:
        _make(folder, wanted, output, make, processing_class)
    state.wait_for_everyone()
    return folder


def _make(
    folder: Path,
    wanted: dict[str, Any],
    output: Path,
    make: Callable[[], PreTrainedModel],
    processing_class: Callable[[], Any],
) -> None:
    record = folder / RECORD
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == wanted:
        return
    if folder.exists() and any(any(output.glob(pattern)) for pattern in _TRAINED):
        raise UserError(
            f"{output} holds an adapter of other new weights ({folder}) than this recipe makes now: its keys, or the "
            f"models that it names, have changed. Name another output_dir, or delete {output}."
        )
    # One process alone makes them, where ZeRO-3 would have all ranks take part.
    with without_zero3():
        model = make()
    with new_folder(folder) as scratch:
        model.save_pretrained(scratch)
        processing_class().save_pretrained(scratch)
        (scratch / RECORD).write_text(json.dumps(wanted, indent=1), encoding="utf-8")


def _made_of(run: Run) -> dict[str, Any]:
    """The keys that the new weights follow from, and the files of local models, as JSON reads them again."""
    arguments, student = run.arguments, run.student
    # Keys of pruning that say nothing, which folders of earlier versions do not name.
    keys = {name: value for name in _KEYS if (value := getattr(arguments, name)) != UNPRUNED.get(name)}
    keys |= {"model_revision": student.model_revision, "dtype": student.dtype, "seed": run.training.seed}
    if arguments.student is None:
        keys |= {"teacher": arguments.teacher, "teacher_revision": arguments.teacher_revision}
        keys |= {"teacher_dtype": arguments.teacher_dtype}
    # A folder may hold other weights by now.
    models = [Path(keys[name]) for name in ("student", "student_vision_tower", "teacher") if keys.get(name)]
    files = sorted(path for model in models if model.is_dir() for path in model.iterdir())
    keys["files"] = {
        str(path): file_sha256(path) for path in files if path.suffix == ".safetensors" or path.name == "config.json"
    }
    return json.loads(json.dumps({name: value for name, value in keys.items() if value is not None}))
