"""LLaVA-style students: a vision tower, a new projector and any causal LM as one standard transformers model."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mmkd.errors import UserError
from mmkd.seams.transformers_seam import empty_like, save_under_published_names

from .load import load_model

IMAGE_TOKEN = "<image>"

# Towers with a class token before the patches, and towers without one.
_CLASS_TOKEN = ("clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
_PLAIN = ("siglip_vision_model", "siglip2_vision_model")

CHAT_TEMPLATE = (
    "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ASSISTANT:' }}{% generation %}{{ ' ' ~ said(message['content']) ~ eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' ~ said(message['content']) }}"
    "{% else %}{{ said(message['content']) ~ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
"""The template of LLaVA-1.5, for language models whose own template has no images; its only special token is eos."""


def assemble_llava(
    vision_tower: str | Path,
    language_model: str | Path,
    *,
    vision_feature_layer: int = -2,
    chat_template: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> LlavaForConditionalGeneration:
    """A LlavaForConditionalGeneration of two pretrained models with a new two-layer projector between them.

    `vision_feature_layer` is the layer of the tower whose patches are used (-2 as in LLaVA-1.5, -1 for the last). If
    the language model has no unused row for `<image>`, its embeddings are extended. `llava_processor` makes the
    processor. Raises UserError for a tower whose layout of tokens is unknown.
    """
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    text = load_model(str(language_model), "language model", dtype=dtype, **hub)
    if hasattr(text.config, "vision_config"):
        raise UserError(
            f"{language_model} is a vision-language model already; use it as the student itself.", because="meaning"
        )
    tower = _vision_tower(vision_tower, dtype, hub)
    tokenizer = _tokenizer(language_model, chat_template, hub)
    embeddings: Any = text.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        text.resize_token_embeddings(len(tokenizer))  # pyright: ignore[reportCallIssue]
    image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=image_token,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=_select_strategy(tower.config),
        image_seq_length=_patches(tower.config),
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    model = empty_like(LlavaForConditionalGeneration, config, dtype)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(text.base_model.state_dict())
    head: Any = text.get_output_embeddings()
    if head.bias is not None:
        raise UserError(
            f"The lm_head of {language_model} has a bias, which LLaVA's has not; use another model.",
            because="upstream",
        )
    model.lm_head.load_state_dict(head.state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    save_under_published_names(model)
    return model


def llava_processor(
    vision_tower: str | Path,
    language_model: str | Path,
    *,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> LlavaProcessor:
    """The processor of `assemble_llava` for the same two models: the tower's images, the language model's tokens.

    `chat_template` is Jinja text; by default the language model's own if it places images, else that of LLaVA-1.5.
    """
    hub = {"trust_remote_code": trust_remote_code}
    config = _vision_config(AutoConfig.from_pretrained(vision_tower, **hub))
    tokenizer = _tokenizer(language_model, chat_template, hub)
    strategy = _select_strategy(config)
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(vision_tower, **hub),
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy=strategy,
        # "default" drops the class token, and the processor subtracts it from this number.
        num_additional_image_tokens=int(strategy == "default"),
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )


def _vision_config(config: Any) -> Any:
    return getattr(config, "vision_config", config)


def _vision_tower(name: str | Path, dtype: torch.dtype, hub: dict[str, Any]) -> PreTrainedModel:
    """The vision tower of a model such as CLIP, or the model itself if it is a vision tower."""
    whole = AutoModel.from_pretrained(name, dtype=dtype, use_safetensors=True, **hub)
    tower = getattr(whole, "vision_model", whole) if hasattr(whole.config, "vision_config") else whole
    _select_strategy(tower.config)
    return tower


def _select_strategy(config: Any) -> Literal["default", "full"]:
    """LLaVA's name for the selection of patches: "default" drops the class token, "full" keeps all tokens."""
    kind = config.model_type
    if kind in _PLAIN:
        return "full"
    if kind in _CLASS_TOKEN and not getattr(config, "num_register_tokens", 0):
        return "default"
    raise UserError(
        f"The vision tower is a {kind!r}"
        + (" with register tokens" if kind in _CLASS_TOKEN else "")
        + f", whose layout of tokens mmkd does not know. Use one of {', '.join((*_CLASS_TOKEN, *_PLAIN))}, without "
        "registers.",
        because="not built",
    )


def _patches(config: Any) -> int:
    return (config.image_size // config.patch_size) ** 2


def _tokenizer(name: str | Path, chat_template: str | None, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with an image token and a template with images."""
    tokenizer: Any = AutoTokenizer.from_pretrained(name, **hub)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    own = tokenizer.chat_template
    tokenizer.chat_template = chat_template or (own if own is not None and IMAGE_TOKEN in own else CHAT_TEMPLATE)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
