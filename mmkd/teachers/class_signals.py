"""What teachers of classes say of every training row: logits, and of a CLIP-like one embeddings."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.errors import UserError


@dataclass(frozen=True)
class Embeddings:
    """A CLIP-like teacher's features, as the model gives them."""

    images: Float[Tensor, "row width"]
    text: Float[Tensor, "class width"]
    """Of each class: the mean of its prompts' features."""
    captions: Float[Tensor, "row width"] | None = None
    """Of the caption of each row, where the data have any."""

    @property
    def width(self) -> int:
        """Numbers of a feature."""
        return self.images.shape[1]


@dataclass(frozen=True)
class ClassSignals:
    """What is known of every training row before training."""

    logits: Float[Tensor, "row *teacher class"] | None = None
    """Of several teachers, one after the other in the middle."""
    embeddings: Embeddings | None = None
    aspects: Float[Tensor, "row question"] | None = None
    """The probability that a vision-language model says yes to each question."""
    weights: tuple[float, ...] = ()
    """Of several teachers."""

    @property
    def teachers(self) -> int:
        """How many teachers gave logits."""
        return 0 if self.logits is None else 1 if self.logits.ndim == 2 else self.logits.shape[1]

    @property
    def by_row(self) -> dict[str, Tensor]:
        """What besides logits is said of each row, under its name in a batch."""
        said = {"teacher_aspects": self.aspects}
        if self.embeddings is not None:
            said |= {"teacher_images": self.embeddings.images, "teacher_captions": self.embeddings.captions}
        return {name: values for name, values in said.items() if values is not None}


def check_texts(text: Float[Tensor, "class width"], class_names: tuple[str, ...]) -> None:
    """Raises UserError where the teacher's text features of two classes are the same: no image is nearer to one."""
    unit = torch.nn.functional.normalize(text.float(), dim=-1)
    same = (unit @ unit.T > 1 - 1e-6).triu(1).nonzero()
    if len(same):
        first, second = (class_names[number] for number in same[0].tolist())
        raise UserError(
            f"The teacher's texts of the classes {first!r} and {second!r} have the same features, so no image is "
            "nearer to one of them. Give them other class_names or prompts: its tokenizer may not know these words.",
            because="meaning",
        )
