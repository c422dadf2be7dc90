"""Tiny models and data under the names that pages use: a folder wins over a Hub id of the same name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences
from tests.vlms import make_llava, make_tower

Maker = Callable[[Path], object]


def chat_model(seed: int, layers: int = 2, width: int = 32, padding: int = 0) -> Maker:
    """A tiny Llama with a chat template; `padding` rows of its vocabulary stand for no token."""

    def make(folder: Path) -> object:
        tokenizer = make_tokenizer()
        return save(make_model(layers, width, len(tokenizer) + padding, seed), tokenizer, folder)

    return make


def other_tokenizer(seed: int) -> Maker:
    """A tiny Llama with another vocabulary."""

    def make(folder: Path) -> object:
        tokenizer = make_tokenizer(vocab_size=280)
        return save(make_model(rows=len(tokenizer), seed=seed), tokenizer, folder)

    return make


def clip(folder: Path) -> object:
    from tests.classes import make_clip

    return make_clip(folder)


def resnet(folder: Path) -> object:
    """A tiny ResNet with its image processor."""
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    return ConvNextImageProcessorPil(size={"shortest_edge": 16}).save_pretrained(folder)


def dinov2(folder: Path) -> object:
    """A tiny DINOv2 with its image processor."""
    from tests.towers import dino_tower, pixels_of

    dino_tower().save_pretrained(folder)
    return pixels_of(12).save_pretrained(folder)


def chats(rows: int = 48) -> Maker:
    """A data set of conversations, as a folder of JSON lines."""

    def make(folder: Path) -> object:
        folder.mkdir(parents=True)
        for split, seed in (("train", 0), ("test", 1)):
            questions, answers = sentences(rows, seed=seed), sentences(rows, seed=seed + 10)
            turns = [
                {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
                for question, answer in zip(questions, answers, strict=True)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
        return folder

    return make


def chat_file(path: Path) -> object:
    """What stands for a reader's own file."""
    made = chats(24)(path.with_suffix(""))
    return (Path(str(made)) / "train.jsonl").rename(path)


def texts(rows: int = 48) -> Maker:
    """A corpus, as a folder of JSON lines."""

    def make(folder: Path) -> object:
        folder.mkdir(parents=True)
        for split, seed in (("train", 0), ("eval", 1)):
            lines = [json.dumps({"text": text}) + "\n" for text in sentences(rows, seed=seed)]
            (folder / f"{split}.jsonl").write_text("".join(lines))
        return folder

    return make


def encoder(folder: Path) -> None:
    """A BERT of random weights, which sentence-transformers pools by the mean."""
    from transformers import BertConfig, BertModel

    from tests.alignment.tiny_tokenizers import wordpiece

    tokenizer = wordpiece(200)
    tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token = "[UNK]", "[CLS]", "[SEP]"
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), intermediate_size=16, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


STAND_INS: dict[str, Maker] = {
    ".cache/mmkd/SmolLM2-135M-Instruct": chat_model(1, layers=30, width=16),
    ".cache/mmkd/gemma-3-270m": other_tokenizer(3),
    ".cache/mmkd/python_docs": texts(),
    "HuggingFaceTB/SmolLM2-135M-Instruct": chat_model(2),
    "HuggingFaceTB/SmolLM2-360M-Instruct": chat_model(1, layers=3, width=48),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": chat_model(1, layers=3, width=48),
    "Qwen/Qwen2.5-0.5B-Instruct": chat_model(2),
    "Qwen/Qwen2.5-1.5B-Instruct": chat_model(1, layers=3, width=48),
    "Qwen/Qwen2.5-3B-Instruct": chat_model(1, layers=3, width=48),
    "Qwen/Qwen2.5-7B-Instruct": chat_model(1, layers=3, width=48, padding=8),
    "google/gemma-3-270m-it": other_tokenizer(3),
    "google/gemma-3-1b-it": other_tokenizer(4),
    "google/siglip-base-patch16-224": make_tower,
    "google/siglip-so400m-patch14-384": lambda folder: make_tower(folder, hidden_size=24, num_hidden_layers=3),
    "facebook/dinov2-large": dinov2,
    "openai/clip-vit-base-patch32": clip,
    "openai/clip-vit-large-patch14": clip,
    "Qwen/Qwen2.5-VL-3B-Instruct": make_llava,
    "Qwen/Qwen2.5-VL-7B-Instruct": lambda folder: make_llava(folder, seed=1, layers=3),
    "microsoft/resnet-18": resnet,
    "llava-hf/llava-1.5-7b-hf": lambda folder: make_llava(folder, seed=1, layers=3),
    "sentence-transformers/all-MiniLM-L6-v2": encoder,
    "trl-lib/Capybara": chats(),
    "your_chats.jsonl": chat_file,
}
"""By the name in a page's text. Add a line for a model or data set that a page names."""

PREPARED = {".cache/mmkd/SmolLM2-135M-Instruct", ".cache/mmkd/python_docs"}
"""What the recipes of the quickstart use."""


def make_stand_ins(text: str, folder: Path) -> list[str]:
    """Makes what a page names, under a folder; returns the names."""
    # Shipped recipes name what `mmkd prepare` makes.
    named = [name for name in STAND_INS if name in text or (name in PREPARED and "quickstart" in text)]
    for name in named:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        STAND_INS[name](folder / name)
    return named
