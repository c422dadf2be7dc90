"""The teacher of a run, in whichever form it answers, and whether a cache is of the teacher and data that it names."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import ProcessorMixin

from mmkd.alignment.vocab import shared_tokens
from mmkd.cache.hub import local_cache
from mmkd.cache.identity import is_same_teacher, weights_sha256
from mmkd.cache.store import Cache
from mmkd.data.data_recipe import DataRecipe
from mmkd.errors import UserError
from mmkd.models.heads import LMHead
from mmkd.models.load import tokenizer_of
from mmkd.precision import name_of_dtype
from mmkd.results.own_teacher import SELF
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.head_checks import FinalNorm
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.served_head import final_norm_of_checkpoint, head_of_checkpoint
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.several import SeveralTeachers
from mmkd.teachers.vllm_client import VLLMClient
from mmkd.training.method import METHODS

from .arguments import RunArguments
from .main_process import from_main_process
from .recipe import Run
from .run_models import load_teacher, teacher_processing_class

logger = logging.getLogger(__name__)


def server_teacher(run: Run, urls: list[str], student: Any) -> ServerTeacher | HiddenServerTeacher:
    """A teacher behind these URLs, for a student with this tokenizer. Raises UserError where their tokens differ.

    Where `teacher_server_signal` is auto, the servers are asked what they run.
    """
    arguments = run.arguments
    # Without the teacher's own tokenizer the servers are asked whether theirs is the student's.
    tokenizer: Any = student
    processing_class: Any = None
    tokens = len(student)
    own = not METHODS[arguments.method].one_vocabulary
    if arguments.teacher is not None:
        processing_class = teacher_processing_class(run)
        tokenizer = tokenizer_of(processing_class)
        tokens = len(tokenizer) if own else shared_tokens(student, tokenizer)
    elif own:
        raise UserError(
            f"Method {arguments.method} reads the data with the teacher's tokenizer, too, which a server does not "
            "give. Set `teacher` to its Hub id or folder; only tokenizer and, for hidden states, head are loaded."
        )
    settings: dict[str, Any] = {
        "model": arguments.teacher_server_model,
        # What the student does not know, a padding row of the teacher's say, is left in the tail, or has no logit.
        "vocab_size": tokens,
        "teacher": arguments.teacher,
        "tokenizer": tokenizer,
        "processor": processing_class if isinstance(processing_class, ProcessorMixin) else None,
        "max_length": run.training.teacher_length,
        "concurrency": arguments.teacher_concurrency,
        "timeout": arguments.teacher_timeout,
    }
    if server_signal(run, urls) == "top_k":
        return ServerTeacher(urls, k=arguments.teacher_top_k, **settings)
    head, norm = served_head(run, urls)
    recheck = arguments.teacher_server_recheck
    return HiddenServerTeacher(urls, head, dtype=wire_dtype(run, head), norm=norm, recheck=recheck, **settings)


def server_signal(run: Run, urls: list[str]) -> str:
    """What the servers of a run are asked for: what `teacher_server_signal` says, or what they run."""
    arguments = run.arguments
    if arguments.teacher_server_signal != "auto":
        return arguments.teacher_server_signal
    with server_client(run, urls) as client:
        return client.signal()


def served_head(run: Run, urls: list[str]) -> tuple[LMHead, FinalNorm | None]:
    """The head of the teacher that the servers run, of `teacher` or else of what they have loaded; its norm."""
    arguments, training = run.arguments, run.training
    name = arguments.teacher
    if name is None:
        with server_client(run, urls) as client:
            name = client.check().root
    revision, trust = arguments.teacher_revision, training.trust_remote_code
    head = head_of_checkpoint(name, revision, arguments.teacher_dtype, trust, training.device)
    return head, final_norm_of_checkpoint(name, revision, trust)


def wire_dtype(run: Run, head: LMHead) -> torch.dtype:
    """The type in which the servers of a run send hidden states; warns where the head reads them in a shorter one."""
    named, read = run.arguments.teacher_server_dtype, head.weight.dtype
    wire = read if named == "auto" else getattr(torch, named)
    if wire.itemsize > read.itemsize:
        logger.warning(
            "teacher_server_dtype is %s, but the teacher's head is in %s, and hidden states are rounded to that. Set "
            "teacher_dtype: %s to compute with them as they are sent, or teacher_server_dtype: auto to send less.",
            named,
            name_of_dtype(read),
            named,
        )
    return wire


def server_client(run: Run, urls: list[str], image_token_id: int | None = None) -> VLLMClient:
    """A client of the teacher's servers."""
    arguments = run.arguments
    return VLLMClient(
        urls,
        arguments.teacher_server_model,
        concurrency=arguments.teacher_concurrency,
        timeout=arguments.teacher_timeout,
        image_token_id=image_token_id,
    )


def reads_teacher(arguments: RunArguments) -> bool:
    """Whether the teacher's weights are loaded to train, since neither a cache nor a server answers for it."""
    return arguments.teacher_cache is None and arguments.teacher_server is None


def absent_teacher(run: Run, student: Any) -> CachedTeacher | ServerTeacher | HiddenServerTeacher:
    """The teacher that answers from a run's cache or servers, for a student with this tokenizer."""
    arguments = run.arguments
    if arguments.teacher_cache is not None:
        teacher = CachedTeacher(local_cache(arguments.teacher_cache), arguments.teacher_tail)
        check_cache(run, teacher.cache)
        return teacher
    assert arguments.teacher_server is not None
    return server_teacher(run, arguments.teacher_server, student)


def several_teachers(run: Run, student: Any) -> SeveralTeachers:
    """The teachers of a run that names several, for a student with this tokenizer."""
    arguments, teachers = run.arguments, {}
    assert isinstance(arguments.teachers, dict)
    for name, teacher_run in run.by_teacher().items():
        if not reads_teacher(teacher_run.arguments):
            teachers[name] = absent_teacher(teacher_run, student)
        elif teacher_run.itself:
            teachers[name] = SELF
        else:
            teachers[name] = load_teacher(teacher_run, str(teacher_run.arguments.teacher))
    weights = {name: float(keys.get("weight", 1)) for name, keys in arguments.teachers.items()}
    views = {name: teacher_run.training.view for name, teacher_run in run.by_teacher().items()}
    column = arguments.teacher_column
    return SeveralTeachers(teachers, None if column else weights, column, views)


def teacher_identity(run: Run, download: bool = True) -> dict[str, Any]:
    """Which teacher a run names, by name and weights; those of a Hub id only where they may be downloaded for it."""
    arguments = run.arguments
    assert arguments.teacher is not None
    name, revision = arguments.teacher, arguments.teacher_revision
    here = Path(name).is_dir() or (download and arguments.teacher_server is None)
    return {"name": name, "revision": revision, "weights": weights_sha256(name, revision) if here else None}


def check_cache(run: Run, cache: Cache) -> None:
    """Raises UserError when a cache was built of another teacher, in another type, or on other data than named."""
    identity, arguments = cache.manifest.identity, run.arguments
    if arguments.teacher is not None:
        # Reading all weights takes minutes where the teacher is large.
        ours = from_main_process(run.training, lambda: teacher_identity(run, download=False))
        if not is_same_teacher(ours, identity["teacher"]):
            raise UserError(
                f"The cache {cache.folder} is of the teacher {identity['teacher']['name']!r} (weights "
                f"{identity['teacher']['weights']}), the recipe names {ours['name']!r} ({ours['weights']}). Correct "
                "`teacher`, or build a cache of it.",
                because="meaning",
            )
    _check_dtype(arguments.teacher_dtype, cache)
    fingerprint, *earlier = DataRecipe.load(arguments.data).fingerprints
    if identity["data"]["fingerprint"] not in (fingerprint, *earlier):
        raise UserError(
            f"The cache {cache.folder} was built on the data {identity['data']['name']!r} with the fingerprint "
            f"{identity['data']['fingerprint']}, the recipe's data has {fingerprint}. Use that data, or build a cache "
            "with this recipe.",
            because="meaning",
        )


def _check_dtype(dtype: str, cache: Cache) -> None:
    stored = cache.manifest.identity["teacher"]["dtype"]
    # A server does not say in which type it computes; auto asks for nothing. float32 is what a CPU that only emulates
    # half types computes of a recipe that asks for them.
    if dtype != "auto" and stored not in (None, "float32") and getattr(torch, dtype, dtype) != getattr(torch, stored):
        raise UserError(
            f"The cache {cache.folder} was computed by a teacher in {stored}, the recipe's teacher_dtype is {dtype}. "
            f"Set teacher_dtype: {stored} (or auto), or build a cache with teacher_dtype: {dtype} in another folder.",
            because="meaning",
        )


def own_rows_of(run: Run, data: DatasetDict) -> DatasetDict:
    """The rows that concern a run; raises UserError where rows of several teachers do not name theirs."""
    if run.own_rows is None:
        return data
    return DatasetDict({split: rows.select(_own_numbers(run, rows, str(split))) for split, rows in data.items()})


def _own_numbers(run: Run, rows: Dataset, split: str) -> list[int]:
    if run.own_rows is None:
        return list(range(len(rows)))
    column, name = run.own_rows
    if column not in rows.column_names:
        raise UserError(
            f"teacher_column is {column!r}, which the {split} rows lack; they have {', '.join(rows.column_names)}. "
            "Map it in the data recipe."
        )
    return [number for number, value in enumerate(rows[column]) if value == name]


def without_unreadable(data: DatasetDict, caches: Sequence[tuple[Run, Cache]]) -> DatasetDict:
    """The rows without those that nobody could read when the caches were built, each by the run of its teacher."""
    unreadable: dict[str, set[int]] = {}
    for run, cache in caches:
        for split, skipped in cache.manifest.skipped.items():
            bad = [row for row, entry in skipped.items() if entry.key is None]
            if not bad or split not in data:
                continue
            own = _own_numbers(run, data[split], split)
            if len(own) != cache.manifest.total_rows[split]:
                raise UserError(
                    f"The cache {cache.folder} leaves out rows that could not be read, by their number among "
                    f"{cache.manifest.total_rows[split]} rows of {split}; the run has {len(own)}. Give the same "
                    "max_train_rows and max_eval_rows as for the build.",
                    because="meaning",
                )
            unreadable.setdefault(split, set()).update(own[row] for row in bad)
    for split, bad in unreadable.items():
        data[split] = data[split].select([row for row in range(len(data[split])) if row not in bad])
    return data
