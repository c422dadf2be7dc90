"""Tiny LLaVA models and rows with images, for tests of vision-language students."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from mmkd.models.llava import assemble_llava, llava_processor
from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences
from tests.helpers import VISION


def make_tower(folder: Path, **sizes: Any) -> Path:
    """A random CLIP tower with its image processor: 4 patches of 4 pixels unless told otherwise."""
    torch.manual_seed(7)
    config = CLIPVisionConfig(**{**VISION, "initializer_range": 0.3, **sizes})
    CLIPVisionModel(config).save_pretrained(folder)
    side: Any = config.image_size
    crop = {"height": side, "width": side}
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder)
    return folder


def make_llava(folder: Path, seed: int = 0, layers: int = 2, width: int = 32, **tower: Any) -> Path:
    """A random LLaVA model of a tower and a tiny Llama; equal towers have equal weights."""
    parts = make_tower(folder / "tower", **tower), folder / "llm"
    tokenizer = make_tokenizer()
    save(make_model(layers=layers, width=width, rows=len(tokenizer), seed=seed), tokenizer, parts[1])
    torch.manual_seed(seed)
    model = assemble_llava(*parts)
    with torch.no_grad():
        # A fresh projector hardly lets images through.
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    llava_processor(*parts).save_pretrained(folder)
    return folder


def picture(seed: int) -> PILImage.Image:
    """16 x 16 pixels of noise."""
    pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return PILImage.fromarray(pixels.numpy())


def vision_rows(images: list[int], seed: int = 0) -> Dataset:
    """Conversations with so many images each, in one user message."""
    questions, answers = sentences(len(images), seed=seed), sentences(len(images), seed=seed + 1)
    rows = []
    for number, count in enumerate(images):
        content = [{"type": "image", "text": None}] * count + [{"type": "text", "text": questions[number]}]
        said = [{"type": "text", "text": answers[number]}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
        rows.append({"messages": messages, "images": [picture(100 * number + i) for i in range(count)]})
    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())},
    )
    return Dataset.from_list(rows, features=features)
