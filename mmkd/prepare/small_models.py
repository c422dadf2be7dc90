"""How the small models are trained that recipes on a CPU begin with: towers, tokenizers and language models."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
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

Conversation = list[tuple[str, str]]
"""What is asked and what is answered, turn by turn, as a model reads it."""


@dataclass(frozen=True)
class LanguageModelSize:
    """How large a language model is, and how long it learns."""

    width: int
    layers: int
    heads: int
    steps: int = 800
    batch: int = 128
    answers: float = 0.0
    """By how much answers count beside whole texts."""


def new_tower(side: int, patch: int, layers: int) -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """A CLIP tower of width 32 with random weights for square pictures, and its image processor."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
        initializer_range=0.06,
    )
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, crop_size={"height": side, "width": side})
    return CLIPVisionModel(config), processor


def captioned(data: Path, processor: CLIPImageProcessorPil) -> tuple[Float[Tensor, "picture 3 side side"], list[str]]:
    """The pixels of the pictures that have captions, and these."""
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    images = [Image.open(row["images"][0]).convert("RGB") for row in rows]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return pixels, [row["messages"][1]["content"][0]["text"] for row in rows]


def make_tokenizer(
    texts: list[str], vocab_size: int = 512, special: Sequence[str] = ("<pad>", "</s>", IMAGE_TOKEN)
) -> Any:
    """A byte-level BPE of the texts; with the default size every word of the small tasks' data is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def descriptions(data: Path) -> list[Conversation]:
    """Conversations with a description in words in place of the picture."""
    files = {name: (data / f"{name}.jsonl").read_text().splitlines() for name in ("captions", "train")}
    parts: dict[str, list[Any]] = {name: [json.loads(line) for line in lines] for name, lines in files.items()}
    shown = {row["images"][0]: row["messages"][1]["content"][0]["text"] for row in parts["captions"]}
    texts = []
    for row in [*parts["captions"], *parts["train"]]:
        if row["images"][0] in shown:
            said = [message["content"][-1]["text"] for message in row["messages"]]
            said[0] = f"{shown[row['images'][0]]}\n{said[0]}"
            turns = zip(said[::2], said[1::2], strict=True)
            texts.append([(f"USER: {question} ASSISTANT:", f" {answer}</s>") for question, answer in turns])
    return texts


def make_language_model(texts: list[Conversation], tokenizer: Any, size: LanguageModelSize, folder: Path) -> float:
    """Trains and saves one language model; returns the share of correct tokens in its last batches.

    It learns whole texts, as language models do, so that its head is meaningful outside of answers too.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    encoded = [[(tokenizer.encode(prompt), tokenizer.encode(answer)) for prompt, answer in turns] for turns in texts]
    longest = max(sum(len(prompt) + len(answer) for prompt, answer in turns) for turns in encoded)
    ids = torch.zeros(len(encoded), longest, dtype=torch.long)
    labels, answers = torch.full_like(ids, -100), torch.full_like(ids, -100)
    for row, turns in enumerate(encoded):
        said = [token for prompt, answer in turns for token in prompt + answer]
        answered = [token for prompt, answer in turns for token in [-100] * len(prompt) + answer]
        ids[row, : len(said)] = labels[row, : len(said)] = torch.tensor(said)
        answers[row, : len(said)] = torch.tensor(answered)
    right: list[float] = []

    def loss(rows: Tensor) -> Tensor:
        logits = model(input_ids=ids[rows]).logits[:, :-1]
        target = labels[rows][:, 1:]
        right.append((logits.argmax(-1) == target)[target != -100].float().mean().item())
        value = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        if not size.answers:
            return value
        own = answers[rows][:, 1:].flatten()
        return value + size.answers * nn.functional.cross_entropy(logits.flatten(0, 1), own, ignore_index=-100)

    train(list(model.parameters()), len(ids), size.steps, size.batch, loss)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(right[-20:]) / 20


def make_language_models(data: Path, sizes: Mapping[str, LanguageModelSize]) -> None:
    """Writes the language models that are missing to DATA/models, by name."""
    texts = descriptions(data)
    tokenizer = make_tokenizer(["".join(prompt + answer for prompt, answer in turns) for turns in texts])
    for name, size in sizes.items():
        complete(
            data / "models" / name,
            lambda folder, size=size: make_language_model(texts, tokenizer, size, folder),
        )


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
