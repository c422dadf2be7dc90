"""Train the teacher of trainers/dho/fashion_mnist*.yaml: a small CLIP, on images and captions of Fashion-MNIST.

The images are those of captions.parquet, which no student sees. Every caption is one of the templates below with the
name of the class. The teacher is not trained to classify; classes are predicted with prompts (zero-shot). Takes a
minute on one core. Writes a CLIPModel with its processor and prints the zero-shot accuracy on validation.parquet. Also
writes the student's config (a ResNet of 0.3 M parameters) and image processor to a folder of their own.
"""

import argparse
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    ResNetConfig,
)

from mmkd.data.classification import ClassificationRecipe
from mmkd.teachers.classifiers import TransformersEmbedder, ZeroShotTeacher

from .fashion_mnist import OUTPUT_DIR as MNIST

OUTPUT_DIR, STUDENT_DIR = Path(".cache/mmkd/fashion_clip"), Path(".cache/mmkd/fashion_student")

CAPTIONS = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a {} on a black background.",
    "a small photo of one {}.",
    "a {}, seen from the front.",
    "a shop's picture of a {}.",
)
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def make_fashion_clip(
    data: Path, output_dir: Path, student_dir: Path, images: int = 2_000, epochs: int = 20, seed: int = 0
) -> None:
    """Trains and writes the teacher and the student's config; the teacher's folder appears only when complete."""
    torch.manual_seed(seed)
    rows = load_dataset("parquet", data_files=str(data / "captions.parquet"), split="train")
    recipe = ClassificationRecipe.load("classification/fashion_mnist")
    model, processor = build(recipe.class_names)
    train(model, processor, rows.select(range(images)), recipe.class_names, epochs, seed)
    student().save_pretrained(student_dir)
    processor.image_processor.save_pretrained(student_dir)
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    shutil.rmtree(output_dir, ignore_errors=True)
    partial.rename(output_dir)
    held_out = load_dataset("parquet", data_files=str(data / "validation.parquet"), split="train")
    teacher = ZeroShotTeacher(TransformersEmbedder(model, processor), recipe.class_names, recipe.prompts)
    correct = teacher.logits([image.convert("RGB") for image in held_out["image"]]).argmax(-1)
    accuracy = (correct == torch.tensor(held_out["label"])).float().mean()
    print(f"{output_dir}: zero-shot accuracy {accuracy:.3f} on {len(held_out)} validation images")


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_fashion_clip.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=MNIST)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR)
    parser.add_argument("--student_dir", type=Path, default=STUDENT_DIR)
    parser.add_argument("--images", type=int, default=2_000, help="captioned images to train on")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    make_fashion_clip(
        options.data, options.output_dir, options.student_dir, options.images, options.epochs, options.seed
    )


def build(class_names: tuple[str, ...]) -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIP with random weights for 28 x 28 images, with a tokenizer of the captions' words."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    texts = [caption.format(name) for caption in CAPTIONS for name in class_names]
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<bos>", *words, "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    ends = [("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=24,
    )
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.286] * 3,
        image_std=[0.353] * 3,
    )
    config = CLIPConfig(
        text_config={
            **TOWER,
            "num_hidden_layers": 2,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 24,
            "pad_token_id": 0,
            "bos_token_id": vocabulary["<bos>"],
            "eos_token_id": vocabulary["<eos>"],
        },
        vision_config={**TOWER, "num_hidden_layers": 3, "image_size": 28, "patch_size": 7},
        projection_dim=64,
    )
    return CLIPModel(config), CLIPProcessor(pixels, fast)


def student() -> ResNetConfig:
    """A small ResNet without a first pooling, for 28 x 28 images."""
    return ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1],
        layer_type="basic",
        downsample_in_first_stage=True,
    )


def train(model: CLIPModel, processor: Any, rows: Any, class_names: tuple[str, ...], epochs: int, seed: int) -> None:
    """CLIP's own contrastive loss on batches of 128 images, each with one of its captions."""
    pixels: Float[Tensor, "row 3 28 28"] = processor(
        images=[image.convert("RGB") for image in rows["image"]], return_tensors="pt"
    )["pixel_values"]
    labels, choose, batch = list(rows["label"]), random.Random(seed), 128
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * (len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(labels))[: len(labels) // batch * batch].split(batch):
            captions = [choose.choice(CAPTIONS).format(class_names[labels[row]]) for row in chosen.tolist()]
            inputs = processor(text=captions, padding=True, return_tensors="pt")
            loss = model(pixel_values=pixels[chosen], **inputs, return_loss=True).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1} of {epochs}: loss {total / (len(labels) // batch):.3f}", flush=True)
    model.eval()
