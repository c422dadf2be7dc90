"""A dual encoder that is evaluated: where it lies, of which package it is, and what makes a result its own."""

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import MODEL_MAPPING, AutoConfig

from mmkd.cache.identity import weights_sha256
from mmkd.models.dual_encoder import (
    OPEN_CLIP,
    OPEN_CLIP_CONFIG,
    SENTENCE_CONFIG,
    file_of,
    kind_of_encoder,
    load_dual_encoder,
)

from .model import EvalModel, find_model


@dataclass(frozen=True)
class EncoderModel(EvalModel):
    """One dual encoder."""

    @cached_property
    def kind(self) -> str:
        """Its package: transformers, sentence or open_clip."""
        return kind_of_encoder(self.path, revision=self.revision)

    @property
    def has_images(self) -> bool:
        """Whether it embeds images, and not texts alone."""
        return self.kind != "sentence"

    @cached_property
    def weights(self) -> str:
        """sha256 of what decides its answers: of open_clip's, the weights themselves."""
        if self.kind == "transformers":
            return super().weights
        if self.kind == "sentence":
            return weights_sha256(self.path, self.revision)
        digest = hashlib.sha256()
        for name, tensor in sorted(load_dual_encoder(self.path).model.state_dict().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()


def find_encoder(name: str, **hub: Any) -> EncoderModel:
    """The dual encoder of a run's folder, of another folder, a Hub id, or `open_clip:NAME`.

    Raises UserError as `find_model` does.
    """
    if name.startswith(OPEN_CLIP) or _is_open_clip(name):
        return EncoderModel(name, name, **hub)
    model = find_model(name, **hub)
    return EncoderModel(**{field.name: getattr(model, field.name) for field in fields(EvalModel)})


def is_encoder(model: EvalModel) -> bool:
    """Whether a model embeds images and texts, or sentences, and writes nothing."""
    if model.adapter or model.members:
        return False
    if file_of(model.path, SENTENCE_CONFIG, revision=model.revision) is not None:
        return True
    try:
        config = AutoConfig.from_pretrained(model.path, **model.hub)
    except (OSError, ValueError):
        # What is wrong with it is said where it is loaded.
        return False
    kind = MODEL_MAPPING.get(type(config), None)
    return hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")


def _is_open_clip(name: str) -> bool:
    return (Path(name) / OPEN_CLIP_CONFIG).is_file() and not (Path(name) / "config.json").is_file()
