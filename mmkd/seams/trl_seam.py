"""What mmkd borrows of TRL beyond its documentation."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.chat_template_utils import clone_chat_template
from trl.trainer import sft_trainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from .trainer_seam import HookedTrainer

_preparation: Any = sft_trainer


def prepare_rows(
    dataset: Any,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: SFTConfig,
    packing: bool,
    formatting_func: Callable[[dict], str] | None,
    split: str,
    *,
    chat_template: str | None,
    completion_only: bool,
) -> Any:
    """The rows as `SFTTrainer._prepare_dataset` makes them: tokens and labels, cut, packed and shuffled.

    TRL offers this to trainers only, and a trainer wants a model. The method reads three attributes of its trainer.
    """
    reader: Any = SimpleNamespace(
        _tokenizer=getattr(processing_class, "tokenizer", processing_class),
        chat_template=chat_template,
        completion_only_loss=completion_only,
    )
    return SFTTrainer._prepare_dataset(reader, dataset, processing_class, args, packing, formatting_func, split)


def first_process_first() -> AbstractContextManager:
    """In it, one process prepares rows, then one of each machine, then the others, which find them in the cache.

    accelerate has one of the two, and nests neither in the other.
    """
    return _preparation.global_then_local_main_first()


@contextmanager
def preparing_alone() -> Iterator[None]:
    """In it, this process prepares rows that no other prepares, and waits for none.

    TRL's preparation always waits for all processes, by a function that its module holds.
    """
    before = _preparation.global_then_local_main_first
    _preparation.global_then_local_main_first = nullcontext
    try:
        yield
    finally:
        _preparation.global_then_local_main_first = before


class HookedSFTTrainer(HookedTrainer, SFTTrainer):
    """TRL's SFTTrainer, whose preparation of rows a subclass can replace."""

    def prepared(
        self, rows: Any, args: SFTConfig, packing: bool, formatting_func: Callable[[dict], str] | None, split: str
    ) -> Any:
        """The rows of a split as the collator takes them; called once for each before training, and by `evaluate`."""
        raise NotImplementedError

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        return self.prepared(dataset, args, packing, formatting_func, dataset_name)


def clone_template(processing_class: Any, source: str) -> None:
    """Gives a tokenizer the chat template of another, with its EOS and added tokens, as `clone_chat_template` does.

    TRL does so together with a model, whose embeddings it resizes and rounds up to a multiple of 64 by filling tokens.
    """
    clone_chat_template(_Resized(), processing_class, source)  # pyright: ignore[reportArgumentType]


class _Resized:
    """What `clone_chat_template` needs of a model."""

    vocab_size = 0
    config = SimpleNamespace(get_text_config=SimpleNamespace)

    def can_generate(self) -> bool:
        return False

    def resize_token_embeddings(self, new_num_tokens: int, pad_to_multiple_of: int | None) -> None:
        step = pad_to_multiple_of or 1
        self.vocab_size = -(-new_num_tokens // step) * step
