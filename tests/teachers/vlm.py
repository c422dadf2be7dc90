"""A tiny random vision-language model (Idefics3), which vLLM serves on a CPU without torchvision."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
)

from scripts.make_tiny_models import make_tokenizer

IMAGE_TOKENS = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Pixels: of a tile, and of the longest edge that an image is cut into tiles from.
TILE, EDGE = 32, 64
PATCH, SCALE = 8, 2


def make_processor(tokenizer: Any = None) -> Idefics3Processor:
    """Cuts an image into tiles of 32 pixels and a global one, each worth 4 image tokens."""
    tokenizer = tokenizer or make_tokenizer()
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
    tokenizer.add_tokens(IMAGE_TOKENS + rows, special_tokens=True)
    tokenizer.chat_template = None
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": EDGE}, max_image_size={"longest_edge": TILE})
    return Idefics3Processor(
        image_processor, tokenizer, image_seq_len=(TILE // PATCH // SCALE) ** 2, chat_template=CHAT_TEMPLATE
    )


def make_vlm(folder: Path, tokenizer: Any = None) -> Path:
    """The folder of a saved model and processor, 0.1 M parameters."""
    processor = make_processor(tokenizer)
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            # vLLM's attention on a CPU wants a head of 32 or more.
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
            "initializer_range": 0.2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SCALE,
    )
    # The configuration's own default lies outside this vocabulary.
    config.pad_token_id = tokenizer.pad_token_id
    Idefics3ForConditionalGeneration(config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_image(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """Random coloured squares of 8 pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height // 8, width // 8, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy())
