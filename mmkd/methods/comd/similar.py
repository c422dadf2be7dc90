"""Pictures that look alike, by what a vision-language model's own tower sees in them."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor

from mmkd.errors import UserError

from .instructions import open_image

_BATCH = 64


class SimilarImages:
    """Finds the pictures of a pool that look most like one of them; `load` gives a model and its processor.

    Raises UserError for a model without get_image_features.
    """

    def __init__(self, paths: Sequence[str], load: Callable[[], tuple[Any, Any]]):
        self.paths = list(dict.fromkeys(paths))
        self._places = {path: place for place, path in enumerate(self.paths)}
        self._load = load

    def near(self, path: str, count: int) -> list[str]:
        """The `count` pictures that look most like one of the pool, itself left out, the nearest first."""
        similarity = self.features @ self.features[self._places[path]]
        similarity[self._places[path]] = -torch.inf
        nearest = similarity.topk(min(count, len(self.paths) - 1)).indices.tolist()
        return [self.paths[place] for place in nearest]

    @cached_property
    def features(self) -> Float[Tensor, "image width"]:
        """Unit vectors: the mean over a picture's visual tokens, the mean of all pictures taken away."""
        model, processor = self._load()
        if not hasattr(model, "get_image_features"):
            raise UserError(
                f"new_image: similar compares pictures by the student's vision tower, but {type(model).__name__} has "
                "no get_image_features. Set new_image: parent.",
                because="not built",
            )
        model = model.eval().to(PartialState().device)
        features = [
            self._features(model, processor, self.paths[i : i + _BATCH]) for i in range(0, len(self.paths), _BATCH)
        ]
        # What all pictures share says nothing of one.
        centred = torch.cat(features) - torch.cat(features).mean(0)
        return torch.nn.functional.normalize(centred, dim=-1)

    @torch.no_grad()
    def _features(self, model: Any, processor: Any, paths: Sequence[str]) -> Tensor:
        rows = []
        # Processors may cut pictures of different sizes into different numbers of tiles.
        for path in paths:
            pixels = processor.image_processor(images=[open_image(path)], return_tensors="pt")
            inputs = {name: value.to(model.device) for name, value in pixels.items() if isinstance(value, Tensor)}
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            seen = model.get_image_features(**inputs)
            tokens = getattr(seen, "pooler_output", seen)
            tokens = torch.cat(list(tokens)) if isinstance(tokens, list | tuple) else tokens
            rows.append(tokens.reshape(-1, tokens.shape[-1]).float().mean(0))
        return torch.stack(rows).cpu()
