"""Encoders of sentences of sentence-transformers, as dual encoders of pairs of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmkd.errors import UserError, first_line

from .dual_encoder import PAIR_HEADS, DualEncoder, Inputs
from .load import dtype_named

SENTENCE_SCALE = 20.0
"""What sentence-transformers' losses multiply cosines by."""


class SentenceEncoder(DualEncoder):
    """A model of sentence-transformers; both sides of a pair are texts."""

    has_images = False

    def __init__(self, model: Any, name: str = ""):
        self.model, self.name = model, name
        self.scale = SENTENCE_SCALE

    def prepare_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Raises UserError: it reads texts alone."""
        raise UserError(
            f"{self.name or 'The model'} is an encoder of sentences and sees no images. Take a dual encoder such as "
            "CLIP or SigLIP, or data with two texts per row.",
            because="meaning",
        )

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model reads of texts; what is beyond its longest text is cut off."""
        inputs = self.model.preprocess(list(texts))
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

    def encode_images(self, inputs: Inputs) -> Float[Tensor, "image width"]:
        """Raises UserError, as `prepare_images`."""
        self.prepare_images([])
        raise AssertionError

    def encode_texts(self, inputs: Inputs) -> Float[Tensor, "text width"]:
        """Features of prepared texts."""
        return self.model(self.placed(inputs))["sentence_embedding"]

    @property
    def width(self) -> int:
        """Channels of the features."""
        return int(self.model.get_embedding_dimension())

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """20, as sentence-transformers' losses have it, unless it was set."""
        return torch.tensor(self.scale, device=next(self.model.parameters()).device)

    @property
    def trunk(self) -> Any:
        """The model of transformers inside; sentence-transformers calls the modules around it one after the other."""
        return self.model[0].auto_model

    def start_scale(self, scale: float) -> None:
        """Sets the number that cosines are multiplied by."""
        self.scale = scale

    def limit_scale(self, most: float) -> None:
        """Nothing: it is not trained."""

    def for_preparing(self) -> DualEncoder:
        """Itself: sentence-transformers prepares texts with the model."""
        return self

    def save(self, folder: str | Path) -> None:
        """Writes the model as sentence-transformers loads it."""
        self.model.save_pretrained(str(folder))

    def restore(self, folder: str | Path) -> None:
        """Loads the weights that `save` wrote into the model."""
        weights = load_sentence_encoder(str(folder), role="checkpoint", dtype="auto", device="cpu").model.state_dict()
        heads = {name: own for name, own in self.model.state_dict().items() if PAIR_HEADS in name}
        self.model.load_state_dict({**weights, **heads})


def load_sentence_encoder(
    name: str, *, role: str, dtype: str, device: str | torch.device, **hub: Any
) -> SentenceEncoder:
    """The model of sentence-transformers of a Hub id or a folder.

    Raises UserError when it cannot be loaded, and where sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            f"The {role} {name} is a model of sentence-transformers: pip install mmkd[encoders]."
        ) from error
    settings: dict[str, Any] = {"use_safetensors": True}
    settings |= {} if dtype == "auto" else {"dtype": dtype_named(dtype, role)}
    try:
        model = SentenceTransformer(name, device=str(device), model_kwargs=settings, **hub)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"The {role} {name!r} cannot be loaded: {first_line(error)}") from error
    return SentenceEncoder(model, name)
