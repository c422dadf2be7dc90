"""Bi- and cross-encoders of sentence-transformers, and what they say of pairs."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel

from mmkd.data.sentence_pairs import SentencePairs
from mmkd.errors import UserError, first_line

# Pickled weights could run code when they are read.
_SAFE = {"use_safetensors": True}
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError)


def load_bi_encoder(name: str, role: str, *, device: Any, **hub: Any) -> Any:
    """A model of sentence-transformers; a plain encoder gets mean pooling.

    Raises UserError where it cannot be loaded, or sentence-transformers is not installed.
    """
    encoders = _package()
    try:
        return encoders.SentenceTransformer(name, device=str(device), model_kwargs=dict(_SAFE), **hub)
    except _UNREADABLE as error:
        raise UserError(f"The {role} {name!r} cannot be loaded: {first_line(error)}") from error


def load_cross_encoder(name: str, role: str, *, device: Any, max_length: int, **hub: Any) -> Any:
    """A cross-encoder with one score per pair; one that has none gets a new head. Raises UserError as above."""
    encoders = _package()
    try:
        settings = {"max_length": max_length, "device": str(device), "model_kwargs": dict(_SAFE)}
        return encoders.CrossEncoder(name, num_labels=1, **settings, **hub)
    except _UNREADABLE as error:
        raise UserError(f"The {role} {name!r} cannot be loaded: {first_line(error)}") from error


def _package() -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        raise UserError(
            "trans_encoder trains models of sentence-transformers, which is not installed: pip install mmkd[encoders]."
        ) from error
    return sentence_transformers


def take_weights(encoder: Any, folder: str) -> None:
    """Gives an encoder the weights of a saved one of the same base model; its pooling or head stays its own."""
    base = encoder[0].model
    saved = AutoModel.from_pretrained(folder, use_safetensors=True).state_dict()
    prefix = "" if set(saved) & set(base.state_dict()) else f"{base.base_model_prefix}."
    base.load_state_dict({f"{prefix}{name}": weight for name, weight in saved.items()}, strict=False)


@torch.no_grad()
def cosines(encoder: Any, pairs: SentencePairs, batch_size: int) -> NDArray[np.float32]:
    """The cosine of the two embeddings of every pair."""
    sides = [
        encoder.encode(list(side), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
        for side in (pairs.first, pairs.second)
    ]
    return np.asarray((sides[0].astype(np.float32) * sides[1]).sum(-1), np.float32)


def probabilities(encoder: Any, pairs: SentencePairs, batch_size: int) -> NDArray[np.float32]:
    """The sigmoid of the cross-encoder's score of every pair."""
    given = list(zip(pairs.first, pairs.second, strict=True))
    # The sigmoid belongs to the method: a published cross-encoder may apply another function, or none.
    scores = encoder.predict(given, batch_size=batch_size, show_progress_bar=False, activation_fn=torch.nn.Sigmoid())
    return np.asarray(scores, np.float32)
