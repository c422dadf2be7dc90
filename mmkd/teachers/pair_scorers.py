"""Teachers that read both sides of a pair at once: rerankers, and models asked whether the two belong together.

Their score is the logit of a probability that the pair belongs together.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer

from mmkd.cache.identity import weights_sha256
from mmkd.errors import UserError, first_line
from mmkd.models.load import load_model
from mmkd.precision import name_of_dtype
from mmkd.seams.processor_seam import loading_for_images

Side = Image.Image | str
"""The first of a pair; the second is a text."""

IMAGE_QUESTION = "Does this text describe the picture? {text}\nAnswer with yes or no."
TEXT_QUESTION = "Do these two texts belong together?\n1. {first}\n2. {text}\nAnswer with yes or no."
_ROLE = "ranking_teacher"
_ANSWERS = {True: ("Yes", "yes", " Yes", " yes", "YES"), False: ("No", "no", " No", " no", "NO")}


class PairScorer(ABC):
    """Scores pairs; `reads_images` says whether the first of a pair may be a picture."""

    reads_images: bool = False

    def __init__(self, name: str, batch_size: int):
        self.name, self.batch_size = name, batch_size

    @abstractmethod
    def score(self, pairs: Sequence[tuple[Side, str]]) -> Float[Tensor, "pair"]:
        """The logit that each pair belongs together, in fp32 on the CPU; all are finite."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the scores, as plain values."""


class LocalScorer(PairScorer):
    """A model in this process."""

    def __init__(self, name: str, model: Any, batch_size: int, revision: str | None = None):
        super().__init__(name, batch_size)
        self.model, self.revision = model.eval().requires_grad_(False), revision

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Side, str]]) -> Float[Tensor, "pair"]:
        """The logit that each pair belongs together, in fp32 on the CPU. Raises UserError for one that is NaN."""
        # The same in and out of a training with mixed precision.
        with torch.autocast(self.model.device.type, enabled=False):
            parts = [
                self.logits(pairs[first : first + self.batch_size]).float().cpu()
                for first in range(0, len(pairs), self.batch_size)
            ]
        scores = torch.cat([torch.zeros(0), *parts])
        if not scores.isfinite().all():
            raise UserError(f"{self.name} gives NaN or infinity for a pair; it cannot teach an order.")
        return scores

    @abstractmethod
    def logits(self, pairs: Sequence[tuple[Any, str]]) -> Float[Tensor, "pair"]:
        """Those of one batch."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the scores, as plain values."""
        return {
            "scorer": self.name,
            "kind": type(self).__name__,
            "weights": weights_sha256(self.name, self.revision),
            "dtype": name_of_dtype(self.model.dtype),
        }


class RerankerScorer(LocalScorer):
    """A cross-encoder of sentence-transformers, or any sequence classifier with one logit, over pairs of texts."""

    def __init__(self, name: str, model: Any, tokenizer: Any, batch_size: int = 32, revision: str | None = None):
        super().__init__(name, model, batch_size, revision)
        self.tokenizer = tokenizer
        if model.config.num_labels != 1:
            raise UserError(
                f"ranking_teacher {name} has {model.config.num_labels} logits; a reranker has one, which says how "
                "well two texts belong together. Take a cross-encoder such as cross-encoder/ms-marco-MiniLM-L6-v2.",
                because="meaning",
            )

    def logits(self, pairs: Sequence[tuple[Any, str]]) -> Float[Tensor, "pair"]:
        """Those of one batch; texts too long for the model are cut off."""
        firsts, seconds = ([pair[side] for pair in pairs] for side in (0, 1))
        longest = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        inputs = self.tokenizer(
            firsts, seconds, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        return self.model(**inputs.to(self.model.device)).logits[:, 0]


class QuestionScorer(LocalScorer):
    """A VLM, or an LLM for pairs of texts, that is asked a yes-or-no question: log p(yes) - log p(no).

    The answer is the first token. `question` holds {text}, and {first} where both are texts.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        question: str | None = None,
        batch_size: int = 8,
        revision: str | None = None,
    ):
        super().__init__(name, model, batch_size, revision)
        self.processor, self.question = processor, question
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.reads_images = hasattr(processor, "image_processor")
        self.tokenizer.padding_side = "left"
        first = {answer: _first_tokens(self.tokenizer, words) for answer, words in _ANSWERS.items()}
        # Some tokenizers begin a word with a token that both share.
        self.tokens = {answer: sorted(first[answer] - first[not answer]) for answer in first}
        if not all(self.tokens.values()):
            raise UserError(
                f"With the tokenizer of ranking_teacher {name}, yes and no begin with the same token, so that its "
                "answer cannot be read off its first token. Take another model.",
                because="meaning",
            )
        if not any(getattr(part, "chat_template", None) for part in (self.tokenizer, processor)):
            raise UserError(
                f"ranking_teacher {name} has no chat template, so that it cannot be asked. Take an instruct model.",
                because="meaning",
            )

    def logits(self, pairs: Sequence[tuple[Any, str]]) -> Float[Tensor, "pair"]:
        """Those of one batch."""
        scores = self.model(**self._inputs(pairs).to(self.model.device)).logits[:, -1].float()
        yes, no = (scores[:, self.tokens[answer]].logsumexp(-1) for answer in (True, False))
        return yes - no

    def _inputs(self, pairs: Sequence[tuple[Any, str]]) -> Any:
        if isinstance(pairs[0][0], str):
            asked = [(self.question or TEXT_QUESTION).format(first=first, text=text) for first, text in pairs]
            texts = [self._prompt([{"role": "user", "content": question}]) for question in asked]
            return self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        asked = [(self.question or IMAGE_QUESTION).format(text=text) for _, text in pairs]
        contents = [[{"type": "image"}, {"type": "text", "text": question}] for question in asked]
        texts = [self._prompt([{"role": "user", "content": content}]) for content in contents]
        images = [[picture] for picture, _ in pairs]
        return self.processor(text=texts, images=images, padding=True, return_tensors="pt")

    def _prompt(self, messages: list[dict[str, Any]]) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the scores, as plain values."""
        question = self.question or (IMAGE_QUESTION if self.reads_images else TEXT_QUESTION)
        return {**super().identity, "question": question}


def load_pair_scorer(
    name: str,
    *,
    question: str | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    **hub: Any,
) -> LocalScorer:
    """The reranker, VLM or LLM of a Hub id or a folder. Raises UserError for a model that is none of them."""
    hub = {key: value for key, value in hub.items() if value is not None}
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"ranking_teacher {name!r} cannot be loaded: {first_line(error)}") from error
    architecture = next(iter(config.architectures or []), "")
    revision = hub.get("revision")
    if architecture.endswith("ForSequenceClassification"):
        if question is not None:
            raise UserError(
                f"ranking_question is for models that answer in words, and {name} is a reranker. Remove it.",
                because="meaning",
            )
        model: Any = load_model(
            name, _ROLE, auto_class=AutoModelForSequenceClassification, dtype=dtype, device=device, **hub
        )
        return RerankerScorer(name, model, AutoTokenizer.from_pretrained(name, **hub), batch_size, revision)
    if not architecture.endswith(("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")):
        raise UserError(
            f"ranking_teacher {name} is a {architecture or config.model_type}. Take a reranker (a sequence classifier "
            "with one logit), or a language or vision-language model that can be asked.",
            because="meaning",
        )
    model = load_model(name, _ROLE, dtype=dtype, device=device, **hub)
    with loading_for_images():
        processor = AutoProcessor.from_pretrained(name, **hub)
    return QuestionScorer(name, model, processor, question, batch_size, revision)


def _first_tokens(tokenizer: Any, words: Sequence[str]) -> set[int]:
    return {tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words}
