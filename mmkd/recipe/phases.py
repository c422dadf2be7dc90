"""What a run does besides training: whether it trains at all, its last evaluation, and what it publishes."""

from pathlib import Path

from transformers.trainer_utils import IntervalStrategy

from mmkd.errors import UserError
from mmkd.training.method import METHODS
from mmkd.training.run_trainer import RunTrainer

from .recipe import Run
from .run_summary import print_summary

# What transformers and TRL know and a recipe has no use for, with what to do instead.
_UNUSED = {
    "do_predict": "nothing predicts after a training. Use `mmkd eval` on the finished run, and remove it",
    "teacher_model_init_kwargs": "it is for Python. Set teacher_dtype, teacher_attn_implementation, teacher_revision "
    "or teacher_load_in_4bit",
    "include_for_metrics": "it is for compute_metrics, which is set in Python only. Remove it",
    "batch_eval_metrics": "it is for compute_metrics, which is set in Python only. Remove it",
}


def check_phases(run: Run) -> None:
    """Raises UserError where a recipe asks for what running it would not do."""
    for key, advice in _UNUSED.items():
        if run.keys.get(key) not in (None, False):
            raise UserError(f"{key} has no effect in a recipe: {advice}.")
    training = run.training
    student, init = run.arguments.student, run.arguments.student_init
    method = METHODS[run.arguments.method]
    # A method without rounds that leaves a whole student publishes that.
    leaves_adapter = run.student.use_peft and not (method.leaves_whole_student and method.drive is None)
    if training.push_to_hub and leaves_adapter and init != "pretrained":
        raise UserError(
            f"push_to_hub would publish an adapter of new weights (student_init: {init}), which nobody else has. "
            "Remove push_to_hub, and publish the merged student with `mmkd push` after training.",
            because="not built",
        )
    if training.push_to_hub and leaves_adapter and student is not None and Path(student).is_dir():
        raise UserError(
            f"push_to_hub would publish an adapter of {student}, a folder here that nobody else has. Train it on a "
            "Hub id, or publish the merged student with `mmkd push`.",
            because="meaning",
        )
    strategy = IntervalStrategy(training.eval_strategy)
    if run.keys.get("do_eval") is False and strategy != IntervalStrategy.NO:
        raise UserError(
            f"do_eval is false, but eval_strategy is {strategy.value}, which evaluates. Set eval_strategy: no to skip "
            "evaluation, or remove do_eval.",
            because="meaning",
        )
    stages = run.keys.get("stages")
    own = [keys for keys in stages.values() if isinstance(keys, dict)] if isinstance(stages, dict) else []
    if trains(run) and not any(keys.get("do_train") is False for keys in own):
        return
    if stages or method.drive is not None:
        raise UserError(
            "do_train is false, and this recipe consists of several trainings, each of which needs the one before. "
            "Evaluate what they left with `mmkd eval`, or remove do_train.",
            because="meaning",
        )
    if not training.do_eval:
        raise UserError(
            "do_train is false, so that nothing would happen. Set do_eval: true to evaluate the student as it is, or "
            "use `--dry_run`, which reads everything and trains nothing.",
            because="meaning",
        )
    if str(training.resume_from_checkpoint or "false").lower() != "false":
        raise UserError(
            "do_train is false, so that there is nothing to resume. Set `student` to the checkpoint's folder to "
            "evaluate it, and remove resume_from_checkpoint.",
            because="meaning",
        )


def trains(run: Run) -> bool:
    """Whether the run trains; `do_train: false` evaluates the student as it is."""
    return run.keys.get("do_train") is not False


def evaluate_alone(trainer: RunTrainer, run: Run) -> None:
    """Evaluates the student without training it. Raises UserError for data without held-out rows."""
    if trainer.eval_dataset is None:
        raise UserError(
            f"do_train is false, and the data recipe {run.arguments.data} holds no rows out to evaluate on. Give it "
            "eval_rows or a split `eval`.",
            because="meaning",
        )
    trainer.save_metrics("eval", trainer.evaluate())


def finish(trainer: RunTrainer, run: Run) -> None:
    """Saves the trained student and its state, evaluates it unless the training has just done so, and publishes it.

    Says what was trained at what cost.
    """
    trainer.save_model()
    trainer.save_state()
    if trainer.eval_dataset is not None and run.keys.get("do_eval") is not False:
        metrics = trainer.last_evaluation()
        trainer.save_metrics("eval", trainer.evaluate() if metrics is None else metrics)
    if run.training.push_to_hub:
        trainer.push_to_hub()
    print_summary(trainer)
