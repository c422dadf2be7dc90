"""Student and teacher on the same held-out tokens: how far apart they are, and how well they know what they know."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.methods.sft import SFTBaselineConfig, SFTBaselineTrainer
from mmkd.preparation.collation import VisionViews
from mmkd.preparation.vision_checks import processor_of_teacher
from mmkd.teachers.batch import ONLY, Batch, View

BINS = 15
"""Of equal width, as in Guo et al. (2017)."""


@dataclass(frozen=True)
class ComparedBatch:
    """Held-out rows as the student sees them, and as the teacher does."""

    ours: View
    theirs: View


@dataclass(frozen=True)
class Beliefs:
    """A model's beliefs at the supervised positions of one row."""

    log_probs: Float[Tensor, "token vocab"]
    labels: Int[Tensor, "token"]

    @property
    def top(self) -> Int[Tensor, "token"]:
        return self.log_probs.argmax(-1)

    @property
    def right(self) -> Bool[Tensor, "token"]:
        return self.top == self.labels

    @property
    def confidence(self) -> Float[Tensor, "token"]:
        return self.log_probs.amax(-1).exp()


def batches(
    model: Any, processing_class: Any, rows: Dataset, max_length: int, teacher: Any = None, served: bool = False
) -> Iterator[ComparedBatch]:
    """The rows one by one, tokenised, masked and cut as method sft does it; chats are supervised on the answers.

    With `served` those with images also say what a server is asked about them. Raises UserError for a template in
    which nobody can tell what the assistant says, and where student and teacher would be supervised on different
    tokens.
    """
    device = model.device
    with tempfile.TemporaryDirectory() as folder:
        config = SFTBaselineConfig(
            folder,
            per_device_eval_batch_size=1,
            max_length=max_length,
            assistant_only_loss="messages" in rows.column_names,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        trainer = SFTBaselineTrainer(
            model, args=config, train_dataset=rows, eval_dataset=rows, processing_class=processing_class
        )
        views = trainer.student_side.views
        if isinstance(views, VisionViews) and teacher is not None:
            processor = processor_of_teacher(teacher.processing_class, teacher.name)
            trainer.data_collator = replace(trainer.data_collator, views=views.with_teachers({ONLY: processor}))
        if isinstance(views, VisionViews) and served:
            asked = views.with_teachers({}, served=[ONLY])
            trainer.data_collator = replace(trainer.data_collator, views=asked)
        # The trainer takes it, and batches, to the first GPU.
        model.to(device)
        for batch in trainer.get_eval_dataloader():
            batch: Batch = batch.to(device)
            batch.check_answers()
            yield ComparedBatch(batch.student, batch.teacher_view())


@torch.no_grad()
def beliefs_of(model: Any, view: View, vocab_size: int | None = None) -> Beliefs:
    """What a model believes at the supervised positions of a batch, over the first `vocab_size` tokens."""
    logits = model(**{**view.inputs, "use_cache": False}).logits[:, :-1][view.supervised]
    log_probs = logits[:, :vocab_size].float().log_softmax(-1)
    return Beliefs(log_probs, view.labels[:, 1:][view.supervised].to(log_probs.device))


class TokenAgreement:
    """Sums over tokens of how student and teacher differ."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.tokens = self.rows = 0

    def add(self, student: Beliefs, teacher: Beliefs) -> None:
        """Adds the tokens of a row."""
        difference = teacher.log_probs - student.log_probs
        # 0 * inf where a token is impossible for one of them.
        forward = (teacher.log_probs.exp() * difference).nan_to_num(nan=0.0).sum(-1)
        reverse = (student.log_probs.exp() * -difference).nan_to_num(nan=0.0).sum(-1)
        differences = {
            "kl": forward,
            "reverse_kl": reverse,
            "top1_agreement": student.top == teacher.top,
            "flips_to_wrong": teacher.right & ~student.right,
            "flips_to_right": student.right & ~teacher.right,
            "student_accuracy": student.right,
            "teacher_accuracy": teacher.right,
        }
        for name, values in differences.items():
            self.sums[name] = self.sums.get(name, 0.0) + values.double().sum().item()
        self.tokens += len(student.labels)
        self.rows += 1

    def result(self) -> dict[str, float]:
        """Means per token: KLs in nats, the others shares."""
        means = {name: total / max(1, self.tokens) for name, total in self.sums.items()}
        flips = {"flips": means["flips_to_wrong"] + means["flips_to_right"]} if means else {}
        return {**means, **flips, "tokens": self.tokens, "rows": self.rows}


class Calibration:
    """How often a model is right where it is so confident: the expected calibration error (Guo et al., 2017)."""

    def __init__(self, bins: int = BINS) -> None:
        self.count, self.right, self.confidence = (torch.zeros(bins, dtype=torch.float64) for _ in range(3))

    def add(self, confidence: Float[Tensor, "item"], right: Bool[Tensor, "item"]) -> None:
        """Adds predictions, each with the probability that the model gave it."""
        bins = len(self.count)
        # (0, 1/bins] is the first bin.
        index = ((confidence.double().cpu() * bins).ceil().long() - 1).clamp(0, bins - 1)
        for total, values in (
            (self.right, right),
            (self.confidence, confidence),
            (self.count, torch.ones_like(right)),
        ):
            total.index_add_(0, index, values.double().cpu())

    def result(self) -> dict[str, Any]:
        """ECE, mean confidence and accuracy, and per bin the share, confidence and accuracy for a diagram."""
        total = self.count.sum().clamp(min=1)
        filled = self.count.clamp(min=1)
        bins = torch.stack([self.count / total, self.confidence / filled, self.right / filled], 1).tolist()
        return {
            "ece": ((self.right - self.confidence).abs().sum() / total).item(),
            "confidence": (self.confidence.sum() / total).item(),
            "accuracy": (self.right.sum() / total).item(),
            "bins": [dict(zip(("share", "confidence", "accuracy"), row, strict=True)) for row in bins],
        }
