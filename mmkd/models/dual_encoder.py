"""Dual encoders: models that embed images and texts, or texts alone, in one space, whatever package they are of."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

from mmkd.errors import UserError, first_line
from mmkd.seams.deepspeed_seam import without_zero3
from mmkd.seams.processor_seam import loading_for_images

from .load import load_model

OPEN_CLIP = "open_clip:"
"""What the name of a model of the open_clip package begins with, as in `open_clip:ViT-B-32/laion2b_s34b_b79k`."""

OPEN_CLIP_CONFIG = "open_clip_config.json"
SENTENCE_CONFIG = "modules.json"

PAIR_HEADS = "distillation_heads"
"""The name of modules that a model has during its training only."""

_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError)

Inputs = Mapping[str, Tensor]
"""What a model reads of a batch of images or of texts, on any device."""


class DualEncoder(ABC):
    """One model that embeds images and texts in one space, with what prepares them; features are not normalised.

    `model` is the module that trains, and that the package it is of loads again after `save`.
    """

    model: Any
    name: str
    sigmoid: bool = False
    """Whether it is trained with SigLIP's loss, a decision about each pair, rather than with CLIP's."""

    has_images: bool = True
    """Whether it embeds images; otherwise both sides of a pair are texts."""

    @abstractmethod
    def prepare_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the model reads of pictures. Raises UserError for a model of texts alone."""

    @abstractmethod
    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model reads of texts; what is beyond its longest text is cut off."""

    @abstractmethod
    def encode_images(self, inputs: Inputs) -> Float[Tensor, "image width"]:
        """Features of prepared images."""

    @abstractmethod
    def encode_texts(self, inputs: Inputs) -> Float[Tensor, "text width"]:
        """Features of prepared texts."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of the features."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the model, and what prepares its inputs, as its package loads them."""

    def restore(self, folder: str | Path) -> None:
        """Loads the weights that `save` wrote; transformers' Trainer does it for transformers' models."""
        raise NotImplementedError

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by, with its gradient; 20 for encoders of sentences, which have none."""
        return self.model.logit_scale.exp().squeeze()

    @property
    def logit_bias(self) -> Float[Tensor, ""] | None:
        """The number that SigLIP adds to its logits; None for CLIP."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.squeeze()

    @property
    def trunk(self) -> Any:
        """The module of the model that a training may hang modules of its own on."""
        return self.model

    @property
    def loss_parameters(self) -> list[Tensor]:
        """Those parameters that a loss reads, and no feature: the scale of logits, then their bias."""
        named = (getattr(self.model, name, None) for name in ("logit_scale", "logit_bias"))
        return [parameter for parameter in named if parameter is not None]

    def side_of(self, name: str) -> str:
        """The tower that a parameter or module of the model belongs to by its name: image, text or none."""
        if name.startswith(("vision_model", "visual")):
            return "image"
        return "text" if name.startswith("text") else "none"

    def start_scale(self, scale: float) -> None:
        """Sets the number that cosines are multiplied by."""
        with torch.no_grad():
            self.model.logit_scale.fill_(math.log(scale))

    def limit_scale(self, most: float) -> None:
        """Keeps the scale at or below a number."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(most))

    def for_preparing(self) -> "DualEncoder":
        """One that prepares inputs and holds no weights, for other processes."""
        light = copy.copy(self)
        light.model = SimpleNamespace(config=getattr(self.model, "config", None))
        return light

    def prepares_as(self, other: "DualEncoder") -> bool:
        """Whether both make the same inputs of images and texts."""
        return False

    @property
    def parameter_count(self) -> int:
        """All its parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def placed(self, inputs: Inputs) -> dict[str, Tensor]:
        """Inputs on the model's device, and pixels in its type."""
        weight = next(self.model.parameters())
        return {
            name: tensor.to(weight.device, weight.dtype) if tensor.is_floating_point() else tensor.to(weight.device)
            for name, tensor in inputs.items()
        }


class TransformersDualEncoder(DualEncoder):
    """A model of transformers: CLIP, SigLIP, SigLIP2, a VisionTextDualEncoder, or one with their methods."""

    def __init__(self, model: Any, processor: Any, name: str = ""):
        if not all(hasattr(model, part) for part in ("get_image_features", "get_text_features", "logit_scale")):
            raise UserError(
                f"{name or type(model).__name__} is a {type(model).__name__}, which does not embed images and texts "
                "in one space. Take a dual encoder such as CLIP, SigLIP, SigLIP2 or a VisionTextDualEncoder.",
                because="meaning",
            )
        self.model, self.processor, self.name = model, processor, name
        self.sigmoid = getattr(model, "logit_bias", None) is not None

    def prepare_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the model reads of pictures."""
        return dict(self.processor.image_processor(images=list(images), return_tensors="pt"))

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model reads of texts; what is beyond its longest text is cut off."""
        # SigLIP was trained on texts of one length and reads its answer off the last position.
        padding = "max_length" if self.sigmoid else True
        settings = {"padding": padding, "truncation": True, "max_length": self._longest, "return_tensors": "pt"}
        return dict(self.processor.tokenizer(list(texts), **settings))

    def prepares_as(self, other: DualEncoder) -> bool:
        """Whether both have the same image processor, and the same tokenizer with texts of one length."""
        if not isinstance(other, TransformersDualEncoder) or self.sigmoid != other.sigmoid:
            return False
        ours, theirs = self.processor, other.processor
        written = [_written(processor.tokenizer) for processor in (ours, theirs)]
        same_images = ours.image_processor.to_dict() == theirs.image_processor.to_dict()
        return self._longest == other._longest and same_images and None not in written and written[0] == written[1]

    def encode_images(self, inputs: Inputs) -> Float[Tensor, "image width"]:
        """Features of prepared images."""
        return self.model.get_image_features(**self.placed(inputs)).pooler_output

    def encode_texts(self, inputs: Inputs) -> Float[Tensor, "text width"]:
        """Features of prepared texts."""
        return self.model.get_text_features(**self.placed(inputs)).pooler_output

    @property
    def width(self) -> int:
        """Channels of the features."""
        config = self.model.config
        projected = getattr(config, "projection_dim", None) or getattr(config.text_config, "projection_size", None)
        return projected or config.text_config.hidden_size

    @property
    def _longest(self) -> int:
        """Tokens of the longest text."""
        table = getattr(self.model.config.text_config, "max_position_embeddings", None)
        longest = self.processor.tokenizer.model_max_length
        return longest if table is None else min(table, longest)

    def save(self, folder: str | Path) -> None:
        """Writes the model and its processor, as transformers loads them."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def _written(tokenizer: Any) -> str | None:
    """All of a tokenizer in one string; None for one that is not written so."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return None if fast is None else fast.to_str()


def load_dual_encoder(
    name: str,
    *,
    role: str = "model",
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    **hub: Any,
) -> DualEncoder:
    """The dual encoder of a Hub id or a folder, whichever package it is of; `open_clip:NAME` is one of open_clip.

    `hub` are revision and trust_remote_code. Raises UserError for what is no dual encoder, and for one that cannot
    be loaded whole.
    """
    hub = {key: value for key, value in hub.items() if value is not None}
    # DeepSpeed cuts a student up when it wraps it; a teacher is small enough to stay whole.
    with without_zero3():
        return _loaded(name, role, dtype, device, attn_implementation, hub)


def _loaded(
    name: str,
    role: str,
    dtype: str,
    device: str | torch.device,
    attn_implementation: str | None,
    hub: dict[str, Any],
) -> DualEncoder:
    kind = kind_of_encoder(name, **hub)
    if kind == "open_clip":
        from .open_clip_encoder import load_open_clip

        return load_open_clip(name, role=role, dtype=dtype, device=device, **hub)
    if kind == "sentence":
        from .sentence_encoder import load_sentence_encoder

        return load_sentence_encoder(name, role=role, dtype=dtype, device=device, **hub)
    # Says of what is no dual encoder that it is none.
    encoder_config(name, role, **hub)
    settings = {"dtype": dtype, "attn_implementation": attn_implementation, **hub}
    model: Any = load_model(name, role, device=device, auto_class=AutoModel, **settings)
    return TransformersDualEncoder(model.to(device), encoder_processor(name, role, **hub), name)


def new_dual_encoder(name: str, *, role: str = "student", **hub: Any) -> DualEncoder:
    """A dual encoder of transformers with random weights, of the sizes in the config of a Hub id or a folder."""
    hub = {key: value for key, value in hub.items() if value is not None}
    if kind_of_encoder(name, **hub) != "transformers":
        raise UserError(
            f"student_init: random makes a model of the config of {name}, which is none of transformers. Name a "
            "CLIP, SigLIP or VisionTextDualEncoder, or begin with the weights of the model.",
            because="not built",
        )
    with without_zero3():
        model = AutoModel.from_config(encoder_config(name, role, **hub))
    return TransformersDualEncoder(model, encoder_processor(name, role, **hub), name)


def kind_of_encoder(name: str, **hub: Any) -> str:
    """Of which package a dual encoder is: transformers, open_clip or sentence.

    A folder or repository that holds files of transformers and of open_clip is one of transformers.
    """
    if name.startswith(OPEN_CLIP):
        return "open_clip"
    if file_of(name, SENTENCE_CONFIG, **hub) is not None:
        return "sentence"
    if file_of(name, "config.json", **hub) is None and file_of(name, OPEN_CLIP_CONFIG, **hub) is not None:
        return "open_clip"
    return "transformers"


def file_of(name: str, file: str, **hub: Any) -> Path | None:
    """A file of a folder or a Hub repository; None where it has none, or cannot be asked."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, file, revision=hub.get("revision")))
    except (EntryNotFoundError, OSError, ValueError):
        return None


def encoder_config(name: str, role: str, **hub: Any) -> Any:
    """The config of a dual encoder of transformers. Raises UserError for a model of another kind."""
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except _UNREADABLE as error:
        raise UserError(f"The {role} {name!r} cannot be loaded: {first_line(error)}") from error
    if not (hasattr(config, "text_config") and hasattr(config, "vision_config")):
        raise UserError(
            f"The {role} {name} is a {config.model_type}, which does not embed images and texts in one space. Take a "
            "dual encoder such as CLIP, SigLIP or a VisionTextDualEncoder, or a model of sentence-transformers for "
            "pairs of texts.",
            because="meaning",
        )
    return config


def encoder_processor(name: str, role: str, **hub: Any) -> Any:
    """The processor of a dual encoder of transformers. Raises UserError when there is none."""
    try:
        with loading_for_images():
            processor = AutoProcessor.from_pretrained(name, **hub)
    except _UNREADABLE as error:
        raise UserError(f"The {role} {name!r} has no loadable processor ({first_line(error)}).") from error
    if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
        raise UserError(
            f"The {role} {name!r} has a {type(processor).__name__} and no processor of images and texts. Save its "
            "image processor and its tokenizer together in that folder."
        )
    return processor
