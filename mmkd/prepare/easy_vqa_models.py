"""Train the small models that a LLaVA student starts from on a CPU.

A CLIP tower learns shapes and colours, and two Llamas learn easy-VQA's questions and answers about descriptions in
words. Writes DATA/models/{tower,large,small} in some minutes on one core. All models are trained on the training
pictures and questions only. A folder that exists is kept.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mmkd.models.llava import IMAGE_TOKEN

from .easy_vqa import COLORS, OUTPUT_DIR, SHAPES

SIDE, PATCH = 64, 8
SIZES = {"large": (64, 2), "small": (32, 1)}
"""Width and layers of the language models: the teacher's and the students'."""


def make_tower(data: Path, folder: Path, steps: int = 1000, batch: int = 32) -> float:
    """Trains and saves the tower; returns its accuracy for shape and colour together in its last batches."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=0.06,
    )
    tower = CLIPVisionModel(config)
    side = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, crop_size=side)
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    images = [Image.open(row["images"][0]).convert("RGB") for row in rows]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    captions = [row["messages"][1]["content"][0]["text"].split() for row in rows]
    colors = torch.tensor([COLORS.index(caption[1]) for caption in captions])
    shapes = torch.tensor([SHAPES.index(caption[2]) for caption in captions])
    head = nn.Linear(64, len(COLORS) + len(SHAPES))
    right: list[float] = []

    def loss(rows: Tensor) -> Tensor:
        patches = tower(pixels[rows]).last_hidden_state[:, 1:]
        color, shape = head(torch.cat([patches.mean(1), patches.amax(1)], -1)).split([len(COLORS), len(SHAPES)], -1)
        both = (color.argmax(-1) == colors[rows]) & (shape.argmax(-1) == shapes[rows])
        right.append(both.float().mean().item())
        return nn.functional.cross_entropy(color, colors[rows]) + nn.functional.cross_entropy(shape, shapes[rows])

    train([*tower.parameters(), *head.parameters()], len(rows), steps, batch, loss)
    tower.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(right[-20:]) / 20


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE in which every word of the data is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def descriptions(data: Path) -> list[tuple[str, str]]:
    """Prompts with a description in words in place of the picture, and their answers."""
    files = {name: (data / f"{name}.jsonl").read_text().splitlines() for name in ("captions", "train")}
    parts: dict[str, list[Any]] = {name: [json.loads(line) for line in lines] for name, lines in files.items()}
    shown = {row["images"][0]: row["messages"][1]["content"][0]["text"] for row in parts["captions"]}
    pairs = []
    for row in [*parts["captions"], *parts["train"]]:
        if row["images"][0] in shown:
            question, answer = (row["messages"][turn]["content"][-1]["text"] for turn in (0, 1))
            pairs.append((f"USER: {shown[row['images'][0]]}\n{question} ASSISTANT:", f" {answer}</s>"))
    return pairs


def make_language_model(
    texts: list[tuple[str, str]], tokenizer: Any, size: str, folder: Path, steps: int = 800
) -> float:
    """Trains and saves one language model; returns the share of correct tokens in its last batches.

    It learns whole texts, as language models do, so that its head is meaningful outside of answers too.
    """
    torch.manual_seed(0)
    width, layers = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        # The attention of vLLM on a CPU requires heads of width 32 or more.
        num_attention_heads=width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    encoded = [(tokenizer.encode(prompt), tokenizer.encode(answer)) for prompt, answer in texts]
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    ids = torch.zeros(len(encoded), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(encoded):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    right: list[float] = []

    def loss(rows: Tensor) -> Tensor:
        logits = model(input_ids=ids[rows]).logits[:, :-1]
        target = labels[rows][:, 1:]
        right.append((logits.argmax(-1) == target)[target != -100].float().mean().item())
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)

    train(list(model.parameters()), len(ids), steps, 128, loss)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(right[-20:]) / 20


def train(parameters: list[nn.Parameter], rows: int, steps: int, batch: int, loss: Any, rate: float = 3e-3) -> None:
    """AdamW with a one-cycle learning rate over random batches."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        value = loss(torch.randint(rows, (batch,), generator=generator))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def complete(folder: Path, make: Any) -> None:
    """Makes a folder unless it exists; only a complete folder gets its name."""
    if folder.is_dir():
        print(f"{folder}: kept")
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    accuracy = make(partial)
    partial.rename(folder)
    print(f"{folder}: {accuracy:.1%} correct on its last training batches")


def make_easy_vqa_models(data: Path) -> None:
    """Writes the models that are missing to DATA/models."""
    complete(data / "models" / "tower", lambda folder: make_tower(data, folder))
    texts = descriptions(data)
    tokenizer = make_tokenizer([prompt + answer for prompt, answer in texts])
    for size in SIZES:
        complete(
            data / "models" / size,
            lambda folder, size=size: make_language_model(texts, tokenizer, size, folder),
        )


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_easy_vqa_models.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=OUTPUT_DIR)
    make_easy_vqa_models(parser.parse_args(arguments).data)
