"""The steps of transformers' generation one at a time, for who chooses each token itself.

`generate` takes a function in the place of its own loop, and hands it everything it has prepared. What the loop then
calls per token is private.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig


class Decoding:
    """A model that goes on with a batch of prompts token by token, with its cache, as `generate` would.

    Args:
        model: it must generate with settings of its own switched off.
        inputs: what it reads of the prompts, padded on the left.
        config: how long answers get, where they end, and what becomes of scores.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], config: GenerationConfig):
        self.model = model
        self.ids: Int[Tensor, "batch position"]
        self._processors: Any = None
        self._criteria: Any = None
        self._config: Any = None
        self._options: dict[str, Any] = {}

        def prepared(
            model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **options: Any
        ) -> Tensor:
            self.ids, self._processors, self._criteria = input_ids, logits_processor, stopping_criteria
            self._config = options.pop("generation_config")
            self._options = options
            return input_ids

        model.generate(**inputs, generation_config=config, custom_generate=prepared, synced_gpus=False)
        self._begun = False

    def logits(self) -> Float[Tensor, "batch vocab"]:
        """The model's logits of the next token of every row, in fp32."""
        if self._begun:
            inputs = self.model.prepare_inputs_for_generation(
                self.ids, next_sequence_length=1 if self._options["use_cache"] else None, **self._options
            )
            # Experts run in the way that suits single tokens, as in `generate`.
            with self.model._optimize_model_for_decode():
                outputs = self.model(**inputs, return_dict=True)
        else:
            outputs = self.model._prefill(self.ids, self._config, self._options)
            self._begun = True
        self._options = self.model._update_model_kwargs_for_generation(outputs, self._options)
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)

    def processed(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """Logits as the settings change them: temperature, top-p, tokens that must not be said."""
        return self._processors(self.ids, logits)

    def append(self, tokens: Int[Tensor, "batch"]) -> None:
        """Goes on with these tokens."""
        self.ids = torch.cat([self.ids, tokens[:, None].to(self.ids)], dim=-1)

    def ended(self) -> Bool[Tensor, "batch"]:
        """Which rows end with what was appended last, by the settings."""
        return self._criteria(self.ids, None)
