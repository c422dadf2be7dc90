"""Models of open_clip: plain CLIPs become ones of transformers, others are computed by the open_clip package."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPProcessor

from mmkd.errors import UserError, first_line
from mmkd.files import write_file

from .dual_encoder import (
    OPEN_CLIP,
    OPEN_CLIP_CONFIG,
    PAIR_HEADS,
    DualEncoder,
    Inputs,
    TransformersDualEncoder,
    file_of,
)
from .load import dtype_named
from .open_clip_format import OPEN_CLIP_WEIGHTS, is_plain_clip, read_open_clip

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


class OpenClipDualEncoder(DualEncoder):
    """A model of the open_clip package, which must be installed to load it again."""

    def __init__(self, model: Any, transform: Any, tokenizer: Any, description: dict[str, Any], name: str = ""):
        self.model, self.transform, self.tokenizer, self.name = model, transform, tokenizer, name
        self.description = description
        self.sigmoid = getattr(model, "logit_bias", None) is not None

    def prepare_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the model reads of pictures."""
        return {"image": torch.stack([self.transform(image) for image in images])}

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model reads of texts; what is beyond its longest text is cut off."""
        return {"text": self.tokenizer(list(texts))}

    def encode_images(self, inputs: Inputs) -> Float[Tensor, "image width"]:
        """Features of prepared images."""
        return self.model.encode_image(**self.placed(inputs))

    def encode_texts(self, inputs: Inputs) -> Float[Tensor, "text width"]:
        """Features of prepared texts."""
        return self.model.encode_text(**self.placed(inputs))

    def side_of(self, name: str) -> str:
        """The tower that a parameter or module of the model belongs to by its name: image, text or none."""
        if name.startswith("visual"):
            return "image"
        return "none" if name.startswith("logit_") else "text"

    @property
    def width(self) -> int:
        """Channels of the features."""
        return int(self.description["model_cfg"]["embed_dim"])

    def save(self, folder: str | Path) -> None:
        """Writes weights and config as open_clip loads them with `local-dir:FOLDER`."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        weights = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.model.state_dict().items()
            if not name.startswith(PAIR_HEADS)
        }
        save_file(weights, str(target / OPEN_CLIP_WEIGHTS), metadata={"format": "pt"})
        inner: Any = getattr(self.tokenizer, "tokenizer", None)
        if hasattr(inner, "save_pretrained"):
            inner.save_pretrained(target)
        write_file(target / OPEN_CLIP_CONFIG, json.dumps(self.description, indent=2))

    def restore(self, folder: str | Path) -> None:
        """Loads the weights that `save` wrote into the model."""
        weights = load_file(str(Path(folder) / OPEN_CLIP_WEIGHTS))
        heads = {name: own for name, own in self.model.state_dict().items() if name.startswith(PAIR_HEADS)}
        self.model.load_state_dict({**weights, **heads})


def load_open_clip(name: str, *, role: str, dtype: str, device: str | torch.device, **hub: Any) -> DualEncoder:
    """The dual encoder of open_clip's files in a folder or a Hub repository, or of a name that open_clip knows.

    Raises UserError when it cannot be loaded, and where it takes the open_clip package and that is not installed.
    """
    wanted = torch.float32 if dtype == "auto" else dtype_named(dtype, role)
    path = None if name.startswith(OPEN_CLIP) else file_of(name, OPEN_CLIP_CONFIG, **hub)
    if path is None:
        return _of_package(name.removeprefix(OPEN_CLIP), name, role, wanted, device)
    if not is_plain_clip(json.loads(path.read_text()).get("model_cfg", {})):
        schema = "local-dir" if Path(name).is_dir() else "hf-hub"
        return _of_package(f"{schema}:{name}", name, role, wanted, device)
    weights = file_of(name, OPEN_CLIP_WEIGHTS, **hub)
    if weights is None:
        raise UserError(f"The {role} {name!r} has an {OPEN_CLIP_CONFIG} and no {OPEN_CLIP_WEIGHTS} beside it.")
    model, images = read_open_clip(path.parent, weights)
    processor: Any = CLIPProcessor(images, _tokenizer(name, role, **hub))
    return TransformersDualEncoder(model.to(device=device, dtype=wanted), processor, name)


def _tokenizer(name: str, role: str, **hub: Any) -> Any:
    """The tokenizer of a folder or repository. Raises UserError where it has none."""
    if not any(file_of(name, file, **hub) is not None for file in _TOKENIZER_FILES):
        raise UserError(
            f"The {role} {name!r} has no tokenizer beside its open_clip weights. For one with CLIP's own vocabulary, "
            'save that of CLIP there: AutoTokenizer.from_pretrained("openai/clip-vit-base-patch32")'
            ".save_pretrained(FOLDER)."
        )
    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The {role} {name!r} has no loadable tokenizer ({first_line(error)}).") from error


def _of_package(
    architecture: str, name: str, role: str, dtype: torch.dtype, device: str | torch.device
) -> DualEncoder:
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"The {role} {name} is a model of open_clip that transformers has no class for: pip install "
            "open_clip_torch."
        ) from error
    pretrained = None
    if ":" not in architecture:
        architecture, _, pretrained = architecture.partition("/")
    try:
        model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=pretrained or None)
        tokenizer, config = open_clip.get_tokenizer(architecture), open_clip.get_model_config(architecture)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"The {role} {name!r} cannot be loaded: {first_line(error)}") from error
    preprocess = {"mean": list(model.visual.image_mean), "std": list(model.visual.image_std)}
    return OpenClipDualEncoder(
        model.to(device, dtype), transform, tokenizer, {"model_cfg": config, "preprocess_cfg": preprocess}, name
    )
