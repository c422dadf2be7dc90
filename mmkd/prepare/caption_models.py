"""Write the models that trainers/clip_kd/captions*.yaml begin with: CLIPs of three sizes with random weights.

The teacher's, and students of a fourth and of a tenth of its parameters. All have the same tokenizer, whose words are
those of the training captions, and pictures of 32 x 32 pixels. Writes OUTPUT/{teacher,quarter,tenth}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from .emoji_names import OUTPUT_DIR as EMOJI
from .picture_captions import OUTPUT_DIR as CAPTIONS

OUTPUT_DIR = CAPTIONS / "models"
SIDE, PATCH, LONGEST, VOCABULARY = 32, 8, 32, 1200


@dataclass(frozen=True)
class Size:
    """How large both towers of a model are."""

    width: int
    image_layers: int
    text_layers: int
    heads: int
    projected: int


SIZES = {
    "teacher": Size(128, 4, 3, heads=4, projected=128),
    "quarter": Size(64, 4, 2, heads=4, projected=64),
    "tenth": Size(40, 3, 2, heads=2, projected=40),
}


def make_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the captions' words, whose last token of a text is its end, as CLIP reads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    # Where the end is token 2, transformers reads a text at the token with the highest number, as CLIP's first configs
    # want it; here that is not its last one.
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(captions), trainer)
    ends: Any = [(token, tokenizer.token_to_id(token)) for token in special[2:]]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=LONGEST,
    )


def make_clip(size: Size, tokenizer: PreTrainedTokenizerFast) -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIP with random weights, and its processor."""
    towers = {"hidden_size": size.width, "intermediate_size": 4 * size.width, "num_attention_heads": size.heads}
    config = CLIPConfig(
        text_config={
            **towers,
            "num_hidden_layers": size.text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": LONGEST,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            **towers,
            "num_hidden_layers": size.image_layers,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        projection_dim=size.projected,
    )
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return CLIPModel(config), CLIPProcessor(pixels, tokenizer)


def training_captions(emoji: Path, captions: Path) -> list[str]:
    """The captions of all training pictures."""
    files = [emoji / "train.parquet", *(captions / f"{name}_train.parquet" for name in ("easy_vqa", "fashion_mnist"))]
    return load_dataset("parquet", data_files=[str(file) for file in files], split="train")["text"][:]  # pyright: ignore


def make_caption_models(emoji: Path = EMOJI, captions: Path = CAPTIONS, output_dir: Path = OUTPUT_DIR) -> None:
    """Writes the models that are missing; a folder gets its name when it is complete."""
    tokenizer = make_tokenizer(training_captions(emoji, captions))
    for name, size in SIZES.items():
        folder = output_dir / name
        if folder.is_dir():
            continue
        torch.manual_seed(0)
        model, processor = make_clip(size, tokenizer)
        partial = folder.with_name(f".{name}.partial")
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        partial.rename(folder)
        print(f"{folder}: {model.num_parameters():,} parameters")
