"""One recipe is one run: what its keys are, and the trainer they describe."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import get_peft_config

from mmkd.data.load_data import load_data
from mmkd.errors import UserError
from mmkd.models.load import tokenizer_of
from mmkd.results.own_teacher import SELF
from mmkd.seams.transformers_seam import installed_trackers, tracker_classes
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.several import parts_of
from mmkd.training.base import DistillationTrainer
from mmkd.training.config import DistillationConfig
from mmkd.training.method import METHODS
from mmkd.training.run_trainer import RunTrainer

from .first_look import check_output_dir
from .recipe import Run
from .run_models import check_student, load_student, load_teacher, student_processing_class, teacher_processing_class
from .run_record import RunRecord
from .run_teacher import absent_teacher, own_rows_of, reads_teacher, several_teachers, without_unreadable

# Of the trackers, those whose callbacks refuse to be made without their package.
_CHECKED = {"azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune"}
_CHECKED |= {"swanlab", "tensorboard", "trackio", "wandb"}
# What to install for a tracker whose package has another name, or is an extra of ours.
_PACKAGES = {name: f"'mmkd[{name}]'" for name in ("mlflow", "tensorboard", "trackio", "wandb")}
_PACKAGES |= {"comet_ml": "comet-ml", "azure_ml": "azureml-sdk"}


def build_trainer(run: Run) -> RunTrainer:
    """The trainer of a run, with student, teacher and data loaded and checked."""
    build = METHODS[run.arguments.method].build or build_token_trainer
    trainer: RunTrainer = build(run)
    trainer.add_callback(RunRecord(run))
    return trainer


def check_surroundings(run: Run) -> None:
    """Raises UserError for a tracker that is not installed and an output_dir that cannot be written."""
    _check_trackers(run.training.report_to)
    check_output_dir(run.training.output_dir)


def _check_trackers(report_to: Any) -> None:
    known, here = tracker_classes(), set(installed_trackers())
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in {*known, "all", "none"}:
            raise UserError(f"report_to is {name!r}; choose one of none, all, {', '.join(sorted(known))}.")
        if name in _CHECKED and name not in here:
            package = _PACKAGES.get(name, name)
            raise UserError(
                f"report_to is {name}, which is not installed: pip install {package}, or set report_to: none."
            )
        if name == "mlflow" or (name == "all" and "mlflow" in here):
            _check_mlflow()


def _check_mlflow() -> None:
    """Raises UserError where MLflow would refuse its store, which it says only when training begins."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient().search_experiments(max_results=1)
    except (MlflowException, ImportError) as error:
        reason = str(error).split(". ")[0].strip().removesuffix(".")
        raise UserError(
            f"report_to is mlflow, which cannot open its store: {reason}. Set MLFLOW_TRACKING_URI to a server "
            "(http://localhost:5000). To write files here set MLFLOW_TRACKING_URI=file:runs/mlflow and "
            "MLFLOW_ALLOW_FILE_STORE=true. For a local database install the whole MLflow: pip install mlflow."
        ) from error


def build_token_trainer(run: Run) -> DistillationTrainer:
    """The trainer of a run over tokens."""
    check_student(run)
    arguments, training = run.arguments, run.training
    data = load_rows_of(run)
    model: Any = None
    if arguments.teacher is not None and (reads_teacher(arguments) or arguments.student is None):
        model = SELF if run.itself else load_teacher(run, arguments.teacher)
    student = load_student(run, None if run.itself else model)
    teacher: Any = model if reads_teacher(arguments) else None
    if arguments.teachers is not None:
        teacher = several_teachers(run, tokenizer_of(student_processing_class(run)))
    elif not reads_teacher(arguments):
        teacher = absent_teacher(run, tokenizer_of(student_processing_class(run)))
    asked = zip(run.by_teacher().values(), parts_of(teacher), strict=True)
    data = without_unreadable(
        data, [(teacher_run, part.cache) for teacher_run, part in asked if isinstance(part, CachedTeacher)]
    )
    adapter: Any = get_peft_config(run.student)
    if adapter is not None:
        # What the adapter belongs to; PEFT would load it onto the newest revision. New weights have none.
        adapter.revision = run.student.model_revision if arguments.student_init == "pretrained" else None
    method = METHODS[arguments.method]
    tokenizers: Any = None
    if not method.one_vocabulary:
        named = {name: own for name, own in run.by_teacher().items() if own.arguments.teacher is not None}
        tokenizers = {
            name: student_processing_class(own) if own.itself else teacher_processing_class(own)
            for name, own in named.items()
        }
        tokenizers = tokenizers if arguments.teachers is not None else tokenizers.get("")
    return method.trainer(
        model=student,
        teacher=teacher,
        args=_without_loading(training),
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=student_processing_class(run),
        teacher_processing_class=tokenizers,
        peft_config=adapter,
    )


def _without_loading(training: DistillationConfig) -> DistillationConfig:
    """The settings of a trainer whose student is loaded: trl would warn that it leaves out how to load it."""
    if training.model_init_kwargs is None:
        return training
    training = copy.copy(training)
    training.model_init_kwargs = None
    return training


def load_rows_of(run: Run, also: Sequence[str] = ()) -> DatasetDict:
    """The rows of a run's data recipe; of the run of one of several teachers, those that concern it.

    `also` are columns of the source that are kept under their own names, as are those that a teacher's view reads.
    """
    arguments = run.arguments
    train, held_out = arguments.max_train_rows, arguments.max_eval_rows
    also = [*dict.fromkeys((*also, *run.columns_read))]
    return own_rows_of(run, load_data(arguments.data, max_train_rows=train, max_eval_rows=held_out, also=also))


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint: its trainer_state.json, written last, can be read. None if there is none."""
    complete: list[tuple[int, Path]] = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if _is_complete(folder):
            complete.append((int(folder.name.rpartition("-")[2]), folder))
    return max(complete, default=(0, None))[1]


def resume_point(training: DistillationConfig) -> str | None:
    """The checkpoint to go on from, None to start afresh.

    `resume_from_checkpoint: true` is the newest complete one, if any. Raises UserError when a fresh start would mix
    with an earlier run's checkpoints, or when the named checkpoint is not complete.
    """
    output_dir, requested = training.output_dir or "", training.resume_from_checkpoint
    newest = last_checkpoint(output_dir)
    if not requested or str(requested).lower() == "false":
        if newest is not None:
            raise UserError(
                f"{output_dir} holds the checkpoint {newest.name} of an earlier run. Go on from it with "
                "--resume_from_checkpoint true, or name another output_dir, or delete the folder."
            )
        return None
    if str(requested).lower() == "true":
        return None if newest is None else str(newest)
    if not _is_complete(Path(requested)):
        raise UserError(f"{requested} is no complete checkpoint: it has no readable trainer_state.json.")
    return str(requested)


def _is_complete(checkpoint: Path) -> bool:
    state = checkpoint / "trainer_state.json"
    try:
        return state.is_file() and isinstance(json.loads(state.read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        return False
