"""Teacher[Signal]: who speaks, and in which kind of signal."""

from abc import ABC, abstractmethod
from copy import copy
from typing import Generic, Self, TypeVar

from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor
from transformers import ProcessorMixin

from .batch import View
from .signals import DenseSignal

Signal = TypeVar("Signal", covariant=True)


class Teacher(ABC, Generic[Signal]):
    """Something that answers a batch with a signal about its supervised tokens.

    A method names the signals it accepts; a teacher whose `signal_type` is none of them is refused when the trainer is
    built.
    """

    signal_type: type
    can_temper: bool = True
    """Whether its probabilities are known at temperatures other than 1."""
    processor: ProcessorMixin | None = None
    """With which a served teacher reads images; None where that is the student's."""

    @property
    def served(self) -> bool:
        """Whether it is asked over HTTP, about pictures and not about a processor's tensors (`View.served`)."""
        return False

    def read_alike(self, inputs: View) -> list[int] | None:
        """How many of each row's first tokens the teacher reads as they are; None where it reads all of all rows."""
        return None

    @abstractmethod
    def prepare(self, accelerator: Accelerator) -> None:
        """Takes its place on the accelerator's device; called once, before the first question."""

    @abstractmethod
    def ask(self, inputs: View, supervised: Bool[Tensor, "batch position"]) -> Signal:
        """The signal about the tokens predicted at the `supervised` positions, in row-major order, without gradient.

        `inputs` are the model's inputs as a mapping, and what else is known of the batch. `supervised` has one
        position less than they do, since the last position predicts nothing.
        """


class DenseTeacher(Teacher[DenseSignal]):
    """A teacher that answers with hidden states and head, wherever its model runs."""

    signal_type = DenseSignal
    vocab_size: int
    """The first tokens that it speaks of."""
    softcap: float | None

    def over_tokens(self, vocab_size: int) -> Self:
        """The same teacher over the first tokens only."""
        teacher = copy(self)
        teacher.vocab_size = vocab_size
        return teacher

    @abstractmethod
    def nothing(self) -> DenseSignal:
        """The signal about no token at all, without asking."""
