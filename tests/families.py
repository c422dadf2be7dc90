"""Tiny random vision-language models of the families that mmkd names, each with its own processor and image tokens."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from scripts.make_tiny_models import make_tokenizer
from tests.teachers.vlm import make_processor as idefics3_processor

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "head_dim": 16,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "initializer_range": 0.2,
}


@contextmanager
def as_served() -> Iterator[None]:
    """Models made in here have heads of 32, the least that vLLM's attention on a CPU takes."""
    sizes = [(TEXT, {"hidden_size": 64, "head_dim": 32}), (QWEN_TOWER, {"out_hidden_size": 64})]
    before = [dict(settings) for settings, _ in sizes]
    for settings, served in sizes:
        settings.update(served)
    NEWLINES.extend("\n" * count for count in range(1, 5))
    try:
        yield
    finally:
        NEWLINES.clear()
        for (settings, _), own in zip(sizes, before, strict=True):
            settings.update(own)


NEWLINES: list[str] = []
"""What vLLM's Gemma 3 looks for in a vocabulary."""
VIDEO = {
    "Qwen2_5_VLProcessor": "Qwen2VLVideoProcessor",
    "Qwen3VLProcessor": "Qwen3VLVideoProcessor",
    "LlavaOnevisionProcessor": "LlavaOnevisionVideoProcessor",
    "InternVLProcessor": "InternVLVideoProcessor",
}
NAMED = ("boi_token", "eoi_token", "image_token", "video_token")
NAMED += ("start_image_token", "end_image_token", "context_image_token")


def save_for_vllm(model: PreTrainedModel, processor: Any, folder: Path) -> Path:
    """The folder of a model and a processor that vLLM's environment can load, the video processor included."""
    model.save_pretrained(folder)
    if model.config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model"):
        rename_tower(folder / "model.safetensors")
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template)
    names = {name: token for name in NAMED if (token := getattr(processor.tokenizer, name, None))}
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "extra_special_tokens": names}))
    kind, pixels = type(processor).__name__, processor.image_processor
    kept = ("image_seq_length", "image_seq_len", "num_image_tokens", "vision_feature_select_strategy")
    own = {name: getattr(processor, name) for name in kept if hasattr(processor, name)}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind, **own}))
    if kind in VIDEO:
        sizes = ("patch_size", "merge_size", "temporal_patch_size")
        frames = {name: value for name in sizes if (value := getattr(pixels, name, None)) is not None}
        video = {"video_processor_type": VIDEO[kind], "processor_class": kind, "size": dict(pixels.size), **frames}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def rename_tower(weights: Path) -> None:
    """Gives the weights of a CLIP or SigLIP tower the names of published models, the only ones that vLLM knows.

    SigLIP's pooling head, which no feature of an image goes through, is left out, as it is there.
    """
    tower = re.compile(r"vision_tower\.(?=embeddings|encoder|post_layernorm)")
    kept = {name: tensor for name, tensor in load_file(weights).items() if "vision_tower.head." not in name}
    named = {tower.sub("vision_tower.vision_model.", name): tensor for name, tensor in kept.items()}
    save_file(named, weights, {"format": "pt"})


def mrope() -> list[int]:
    """How many of half a head's channels turn with time, height and width."""
    sixteenth = TEXT["head_dim"] // 16
    return [2 * sixteenth, 3 * sixteenth, 3 * sixteenth]


def tokenizer_with(*special: str, **named: str) -> Any:
    """The tiny tokenizer with more special tokens, some of them known to it by a name."""
    tokenizer: Any = make_tokenizer()
    tokenizer.add_tokens([*special, *named.values()], special_tokens=True)
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.chat_template = None
    return tokenizer


def template(image: str) -> str:
    """A chat template that writes this for an image."""
    return (
        "{% for message in messages %}<|{{ message['role'] }}|>"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'][0]['text'] }}<|end|>"
        "{% endgeneration %}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def text_config(tokenizer: Any, **settings: Any) -> dict[str, Any]:
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**TEXT, "vocab_size": len(tokenizer), **ids, **settings}


def without_videos(cls: Any) -> Any:
    """A processor class that needs no video processor, which none of transformers' is without torchvision."""
    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": lambda *_: None})


def qwen_tokenizer() -> Any:
    return tokenizer_with(
        "<|vision_start|>", "<|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>"
    )


def qwen_ids(tokenizer: Any) -> dict[str, Any]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


QWEN_TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>")


def qwen2_5_vl() -> tuple[Any, Any]:
    """Pixels in any number, positions in three dimensions."""
    tokenizer = qwen_tokenizer()
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    processor = without_videos(Qwen2_5_VLProcessor)(images, tokenizer, chat_template=QWEN_TEMPLATE)
    rope = {"rope_type": "default", "mrope_section": mrope(), "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config=text_config(tokenizer, rope_parameters=rope),
        vision_config={
            **QWEN_TOWER,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **qwen_ids(tokenizer),
    )
    return lambda: Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    """The same, and features of the tower's middle layers in the first layers of the language model."""
    tokenizer = qwen_tokenizer()
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    processor = without_videos(Qwen3VLProcessor)(images, tokenizer, chat_template=QWEN_TEMPLATE)
    rope = {"rope_type": "default", "mrope_section": mrope(), "rope_theta": 10000.0, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=text_config(tokenizer, rope_parameters=rope),
        vision_config={
            **QWEN_TOWER,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **qwen_ids(tokenizer),
    )
    return lambda: Qwen3VLForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    """Tiles and the whole image, with a token at the end of every line."""
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    side = {"height": 8, "width": 8}
    images = LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=[[8, 8], [8, 16], [16, 8], [16, 16]])
    processor = without_videos(LlavaOnevisionProcessor)(
        images, tokenizer, num_image_tokens=4, vision_feature_select_strategy="full", chat_template=template("<image>")
    )
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", **TOWER, "image_size": 8, "patch_size": 4},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[8, 8], [8, 16], [16, 8], [16, 16]],
        vision_feature_layer=-1,
    )
    return lambda: LlavaOnevisionForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    """Idefics3, which SmolVLM is as well: tiles with their rows and columns in words."""
    processor: Any = idefics3_processor()
    processor.chat_template = template("<image>")
    tokenizer = processor.tokenizer
    config = Idefics3Config(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    config.pad_token_id = tokenizer.pad_token_id
    return lambda: Idefics3ForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    """Tiles without a word between them."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tokenizer_with(**named)
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=2)
    processor = without_videos(InternVLProcessor)(
        images, tokenizer, image_seq_length=4, chat_template=template("<IMG_CONTEXT>")
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    return lambda: InternVLForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """A fixed number of tokens per image, which see one another in both directions."""
    tokenizer = tokenizer_with(
        *NEWLINES, boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft>"
    )
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template("<start_of_image>"))
    config = Gemma3Config(
        text_config=text_config(tokenizer, sliding_window=64),
        vision_config={**TOWER, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft>"),
    )
    return lambda: Gemma3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Callable[[], PreTrainedModel], ProcessorMixin]]] = {
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "LLaVA-OneVision": llava_onevision,
    "Idefics3": idefics3,
    "InternVL": internvl,
    "Gemma 3": gemma3,
}
"""Name -> (a maker of random models, their processor)."""


def made(name: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    """A family's maker of models and its processor, whose tokenizer has the same template."""
    make, processor = FAMILIES[name]()
    processor.tokenizer.chat_template = processor.chat_template
    return make, processor


def model_of(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return make().eval()
