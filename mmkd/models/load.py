"""Models and tokenizers from recipe fields: type, quantisation, text or vision auto class, safetensors only."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from mmkd.errors import UserError, first_line
from mmkd.precision import native_dtype, product_dtype, say_float32
from mmkd.results.parameters import ADAPTER
from mmkd.seams.deepspeed_seam import without_zero3
from mmkd.seams.processor_seam import loading_for_images

# Their first position is the one after that of padding.
_COUNTS_FROM_PADDING = {
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
# Without positions, or with a table that grows.
_WITHOUT_TABLE = {"jamba", "xglm"}
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def load_model(
    name: str, role: str = "model", *, device: str | torch.device | None = None, auto_class: Any = None, **kwargs: Any
) -> PreTrainedModel:
    """The causal LM or VLM of a Hub id or a local folder, from safetensors; `kwargs` go to `from_pretrained`.

    `auto_class` loads another kind of model.

    `dtype` may be a name such as "bfloat16"; `trust_remote_code` is off unless passed. A model that is to compute on
    `device` comes in a type that the device multiplies (`mmkd.precision`). `role` names the model in errors. Raises
    ValueError when nothing loadable is there.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if isinstance(kwargs.get("dtype"), str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = dtype_named(kwargs["dtype"], role)
    hub = {key: kwargs[key] for key in ("revision", "trust_remote_code", "token", "cache_dir") if key in kwargs}
    _refuse_pickled_adapter(Path(name), role)
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        vision = hasattr(config, "vision_config")
        auto_class = auto_class or (AutoModelForImageTextToText if vision else AutoModelForCausalLM)
        # Quantised weights have no type to choose.
        chosen = device if "quantization_config" not in kwargs and not hasattr(config, "quantization_config") else None
        if chosen is not None:
            kwargs["dtype"] = computed_dtype(kwargs.get("dtype", "auto"), config, chosen)
        model, info = auto_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **kwargs)
    except _UNREADABLE as error:
        raise UserError(f"The {role} {name!r} cannot be loaded: {_hint(name)} ({first_line(error)})") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"The {role} {name!r} lacks {len(missing)} of the weights that its config promises ({missing[0]}, ...); "
            "they would be random. Its weight files are incomplete, or its config belongs to another model."
        )
    if chosen is not None and product_dtype(model.dtype, chosen) != model.dtype:
        # The config names no type, so that only the weights told which one it is.
        say_float32()
        model.float()
    return model


def _refuse_pickled_adapter(folder: Path, role: str) -> None:
    """Raises UserError for an adapter that transformers would read by unpickling it."""
    safe, pickled = (folder / name for name in (ADAPTER, "adapter_model.bin"))
    if pickled.is_file() and not safe.is_file():
        raise UserError(
            f"The {role} {str(folder)!r} has its adapter in {pickled.name}, a pickle, which is never opened: reading "
            f"it could run code. Save it as {safe.name}."
        )


def empty_model(name: str, role: str = "model", **hub: Any) -> PreTrainedModel:
    """The model of a Hub id or a local folder on the meta device: its modules, without weights.

    `hub` are revision and trust_remote_code. Raises UserError where there is no config that transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        auto_class: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        # DeepSpeed would copy weights to cut them, and there are none.
        with without_zero3(), torch.device("meta"):
            return auto_class.from_config(config, trust_remote_code=hub.get("trust_remote_code", False))
    except _UNREADABLE as error:
        raise UserError(f"The {role} {name!r} cannot be loaded: {_hint(name)} ({first_line(error)})") from error


def quantised_to(bits: int | None, device: str | torch.device) -> BitsAndBytesConfig | None:
    """How frozen weights are quantised to 4 (NF4) or 8 bits; None, as they are, without bits."""
    if bits is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=native_dtype(device),
    )


def computed_dtype(
    wanted: str | torch.dtype, config: PreTrainedConfig, device: str | torch.device
) -> str | torch.dtype:
    """`wanted`, or float32 where the type that it stands for is one that the device's CPU only emulates.

    auto stands for the config's type. The change is said once.
    """
    saved = config.dtype if wanted == "auto" else wanted
    dtype = getattr(torch, saved) if isinstance(saved, str) else saved
    if dtype is None or product_dtype(dtype, device) == dtype:
        return wanted
    say_float32()
    return torch.float32


def load_processing_class(name: str, role: str = "model", **kwargs: Any) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The processor of a VLM, else the tokenizer. Raises UserError when there is none."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    try:
        config = AutoConfig.from_pretrained(name, **kwargs)
        if not hasattr(config, "vision_config"):
            return AutoTokenizer.from_pretrained(name, **kwargs)
        with loading_for_images():
            return AutoProcessor.from_pretrained(name, **kwargs)
    except _UNREADABLE as error:
        raise UserError(
            f"The {role} {name!r} has no loadable tokenizer: {_hint(name)} ({first_line(error)})"
        ) from error


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def image_token_of(processing_class: Any) -> int | None:
    """The id of the token that stands for one piece of an image among a row's tokens; None for text alone."""
    # Gemma's processors give the name to the token that begins an image, which stands for it in the text.
    if getattr(processing_class, "boi_token", None) is not None:
        return getattr(tokenizer_of(processing_class), "image_token_id", None)
    return getattr(processing_class, "image_token_id", None)


def positions_of(config: PreTrainedConfig) -> int | None:
    """The longest context that a model is made for, in tokens, if its config has a limit."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and text.model_type in _COUNTS_FROM_PADDING:
        positions -= (text.pad_token_id or 0) + 1
    return positions


def learns_positions(config: PreTrainedConfig) -> bool:
    """Whether a model keeps a vector for each position, so that it has none beyond the longest context."""
    text = config.get_text_config()
    # Rotary embeddings and ALiBi are computed for any position.
    computed = getattr(text, "rope_parameters", None) is not None or getattr(text, "alibi", False)
    return positions_of(config) is not None and not computed and text.model_type not in _WITHOUT_TABLE


def dtype_named(name: str, role: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"The {role}'s dtype {name!r} is none of torch's; use auto, float32, bfloat16 or float16.")
    return dtype


def _hint(name: str) -> str:
    if not name:
        return "it was not loaded from anywhere, so name it: pass its tokenizer as an argument;"
    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        return "the folder holds an adapter: merge it into its model (PEFT's merge_and_unload) and name the result;"
    if folder.is_dir():
        return f"the folder holds {', '.join(sorted(p.name for p in folder.iterdir())[:5]) or 'nothing'};"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return "there is no such folder;"
    return "it is neither a local folder nor reachable as a Hub id (check the spelling, the network and your login);"
