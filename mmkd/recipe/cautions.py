"""What the literature warns of in a run: said by doctor and when training begins, kept in the record for the card."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.generation.thoughts import OPEN, template_thinks
from mmkd.training.config import DistillationConfig
from mmkd.training.method import BASELINE_METHOD

from .recipe import Run
from .run_models import student_processing_class, teacher_processing_class

LONG = 512
"""Tokens of a long rollout, of which the last ones stand far from the prompt."""


@dataclass(frozen=True)
class Caution:
    """A warning of a paper that is about the settings of a run."""

    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.message} {self.advice}"


def cautions_of(run: Run) -> list[Caution]:
    """The warnings about a run, whose tokenizers are loaded for that; none for methods without tokens."""
    if not isinstance(run.training, DistillationConfig):
        return []
    cautions = dict.fromkeys(_of_rollouts(run.training))
    # The teacher of a baseline only measures.
    teaches = run.arguments.method != BASELINE_METHOD
    alone = [own for own in run.by_teacher().values() if teaches and _is_about_templates(own)]
    student = student_processing_class(run) if alone else None
    for own in alone:
        needed = not own.itself and own.training.on_policy_fraction
        cautions |= dict.fromkeys(about_teacher(own, student, teacher_processing_class(own) if needed else None))
    return list(cautions)


def _is_about_templates(run: Run) -> bool:
    return run.itself or run.training.view is not None or _is_judged_by_another(run)


def _is_judged_by_another(run: Run) -> bool:
    return bool(run.training.on_policy_fraction) and run.arguments.teacher is not None and not run.itself


def about_teacher(run: Run, student: Any, teacher: Any) -> Iterator[Caution]:
    """The warnings about the only teacher of a run; of both models the tokenizer or processor, or None."""
    thinks = _thinks(student, getattr(run.training, "chat_template_path", None))
    if thinks and (run.itself or run.training.view is not None):
        whom = "is the student itself" if run.itself else "reads another prompt (teacher_view)"
        yield Caution(
            f"The student's chat template has a {OPEN} block, and its teacher {whom}. Thinking models lost up to 17 % "
            "of their accuracy in privileged self-distillation (arXiv:2607.05184).",
            "Measure the student before and after on tasks that it could solve (mmkd eval), or use a student that "
            "does not think.",
        )
    if teacher is not None and _is_judged_by_another(run) and thinks != _thinks(teacher):
        one, other = ("student", "teacher") if thinks else ("teacher", "student")
        yield Caution(
            f"The {one}'s chat template has a {OPEN} block and the {other}'s has none. On-policy distillation helps "
            "where teacher and student think alike, and fails where they do not (arXiv:2604.13016).",
            "Take a teacher of the student's kind, or first train the student on the teacher's answers (mmkd cache "
            "build --job generate). mmkd teachers rank compares teachers.",
        )


def _of_rollouts(training: DistillationConfig) -> Iterator[Caution]:
    uniform = getattr(training, "rollout_token_weights", "uniform") == "uniform"
    if training.on_policy_fraction and training.rollout_max_tokens > LONG and uniform and training.weighs_tokens:
        yield Caution(
            f"Answers of up to {training.rollout_max_tokens} tokens count the same at every token. The further an "
            "answer has strayed from what the teacher would write, the less its judgement of the next token is worth "
            "(position bias, arXiv:2606.22600).",
            "Try rollout_token_weights: importance or prefix, or a lower rollout_max_tokens.",
        )


def _thinks(processing_class: Any, template_path: str | None = None) -> bool:
    """Whether answers have a place for thoughts, by the chat template."""
    if template_path is not None and Path(template_path).is_file():
        return OPEN in Path(template_path).read_text(encoding="utf-8")
    return processing_class is not None and template_thinks(processing_class)
