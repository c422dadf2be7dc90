"""Messages of other packages: which are kept back because a user can do nothing about them, and who writes them."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SHOW_ALL = "MMKD_WARNINGS"
"""Variable of the environment that, set to `all`, shows every message of every package."""


@dataclass(frozen=True)
class Message:
    """A message that is kept back."""

    text: str
    """How it begins."""
    source: str
    """The module whose source has it; of what is logged also the name of its logger."""
    reason: str
    category: type[Warning] | None = None
    """Of a warning; None: it is logged."""
    value: str = ""
    """What must follow, where the message has other values that a user should see."""

    @property
    def printed(self) -> str:
        """How it begins, with its value."""
        return self.text + self.value


MESSAGES = (
    Message(
        "Failed to load CPU gemm_4bit_forward",
        "bitsandbytes.backends.cpu.ops",
        "Logged on import, also where nothing is quantised. Without the kernel, products on a CPU are only slower.",
    ),
    Message(
        "`is_gradient_checkpointing` is deprecated",
        "transformers.modeling_utils",
        "PEFT reads the old name of a property that transformers has renamed.",
        FutureWarning,
    ),
    Message(
        "The new embeddings will be initialized from a multivariate normal distribution",
        "transformers.modeling_utils",
        "Says how the rows of a new image token are made; a recipe has no key for it and needs none.",
    ),
    Message(
        "There were missing keys in the checkpoint model loaded: ",
        "transformers.trainer",
        "A head that is tied to the embeddings is saved with them, once.",
        value="['lm_head.weight']",
    ),
    Message(
        "The tokenizer has new PAD/BOS/EOS tokens",
        "transformers.trainer_utils",
        "The student's config is aligned with its own tokenizer, which is what a run wants. Where generation is made "
        "to stop at another token than before, mmkd says so itself.",
    ),
    Message(
        "Token indices sequence length is longer than the specified maximum",
        "transformers.tokenization_utils_base",
        "Rows are tokenised whole and cut to max_length afterwards; mmkd says what is cut, and refuses rows that are "
        "longer than the positions of a model.",
    ),
)


_LIBRARIES = ("", "transformers", "datasets", "huggingface_hub", "accelerate", "trl", "peft")


def handlers_writing_to(*streams: Any) -> Iterator["logging.StreamHandler[Any]"]:
    """The handlers of messages that write to one of these streams.

    Libraries write to the standard error that was there when they were imported, wherever `sys.stderr` leads later.
    """
    for name in _LIBRARIES:
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler and handler.stream in streams:
                yield handler


class _Filter(logging.Filter):
    """Keeps back the table's messages of the logger that it is added to."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(text.startswith(message.printed) for message in MESSAGES if message.source == record.name)


_FILTER = _Filter()


def keep_back_messages() -> None:
    """Keeps the table's messages back from now on, unless the environment asks for all."""
    shows_all = os.environ.get(SHOW_ALL, "").lower() == "all"
    for message in MESSAGES:
        logger = logging.getLogger(message.source)
        if message.category is not None:
            if not shows_all:
                warnings.filterwarnings("ignore", re.escape(message.printed), message.category)
        elif shows_all:
            logger.removeFilter(_FILTER)
        else:
            logger.addFilter(_FILTER)
