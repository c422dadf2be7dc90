"""Encoders of sentences of sentence-transformers, as dual encoders of pairs of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmkd.errors import UserError, first_line

from .dual_encoder import DualEncoder, Inputs
from .load import dtype_named

SENTENCE_SCALE = 20.0
"""What sentence-transformers' losses multiply cosines by."""


class SentenceEncoder(DualEncoder):
    """A model of sentence-transformers; both sides of a pair are texts."""

    has_images = False

    def __init__(self, model: Any, name: str = ""):
        self.model, self.name = model, name

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
        """20, as sentence-transformers' losses have it."""
        return torch.tensor(SENTENCE_SCALE, device=next(self.model.parameters()).device)

    def save(self, folder: str | Path) -> None:
        """Writes the model as sentence-transformers loads it."""
        self.model.save_pretrained(str(folder))


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
    settings = {} if dtype == "auto" else {"model_kwargs": {"dtype": dtype_named(dtype, role)}}
    try:
        model = SentenceTransformer(name, device=str(device), **settings, **hub)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"The {role} {name!r} cannot be loaded: {first_line(error)}") from error
    return SentenceEncoder(model, name)
