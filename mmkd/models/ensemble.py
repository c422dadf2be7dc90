"""Ensemble of models with the same tokenizer as one causal LM, whose log-probs are their mean."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmkd.errors import UserError
from mmkd.seams.transformers_seam import set_attention

from .load import load_processing_class, tokenizer_of
from .quantised_students import load_as_trained


class Ensemble(PreTrainedModel, GenerationMixin):
    """A causal LM whose log-probs are the mean of its members', renormalised: their geometric mean.

    Use it for inference in place of any causal LM of transformers, for example in lm-eval:
    `HFLM(pretrained=Ensemble(models), tokenizer=...)`. It generates without a KV cache. All members have the same
    weight and the same tokens. Tokens from `vocab_size` on (by default the smallest number of rows), which only pad a
    vocabulary, get no probability. Raises UserError for fewer than two members.
    """

    def __init__(self, models: Sequence[PreTrainedModel], vocab_size: int | None = None) -> None:
        if len(models) < 2:
            raise UserError(f"An ensemble needs two models or more, not {len(models)}.")
        config = copy.deepcopy(models[0].config)
        rows = min(model.config.get_text_config().vocab_size for model in models)
        if vocab_size is not None and not 1 <= vocab_size <= rows:
            raise UserError(f"vocab_size is {vocab_size}, but a member has only {rows} rows: their tokenizers differ.")
        config.get_text_config().vocab_size = vocab_size or rows
        config.tie_word_embeddings = False
        # It has no attention itself; members keep their own implementation.
        set_attention(config, "eager")
        super().__init__(config)
        self.generation_config = copy.deepcopy(models[0].generation_config)
        self.members = nn.ModuleList(models)
        self.eval()

    @torch.no_grad()
    def forward(
        self, input_ids: Int[Tensor, "batch position"], attention_mask: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Log-probs as logits, in fp32 or better; `kwargs` go to every member."""
        size = self.config.get_text_config().vocab_size
        total: Any = 0
        for member in self.members:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs, "use_cache": False}
            logits = member(**inputs).logits[..., :size]
            total = total + logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        # A geometric mean of distributions sums to less than 1, hence the second softmax.
        return CausalLMOutputWithPast(logits=(total / len(self.members)).log_softmax(-1))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generation as in transformers, always without a cache."""
        generation: Any = super()
        return generation.generate(*args, **{**kwargs, "use_cache": False})

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises UserError, as an ensemble has no weights of its own."""
        raise UserError("An ensemble has no weights of its own: save its members, and load it with load_ensemble.")


def load_ensemble(names: Sequence[str], **kwargs: Any) -> Ensemble:
    """The ensemble of models named by Hub ids or folders; `kwargs` go to `load_model`.

    Raises UserError when their tokenizers differ: `mmkd transfer-tokenizer` gives models the same one.
    """
    size = shared_vocabulary({name: load_processing_class(name) for name in names})
    return Ensemble([load_as_trained(name, **kwargs) for name in names], size)


def shared_vocabulary(processing_classes: Mapping[str, Any]) -> int:
    """The size of the vocabulary that models have in common, by their names. Raises UserError when they differ."""
    vocabularies = {name: tokenizer_of(each).get_vocab() for name, each in processing_classes.items()}
    first, *others = vocabularies
    for name in others:
        if vocabularies[name] != vocabularies[first]:
            raise UserError(
                f"{name} and {first} have different vocabularies, so their log-probs are not of the same tokens. "
                f"Give one of them the other's: mmkd transfer-tokenizer {name} {first} FOLDER, then distil it.",
                because="meaning",
            )
    return max(vocabularies[first].values()) + 1
