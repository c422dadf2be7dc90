"""Tiny classification data, students and teachers that tests share."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast, ViTConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmkd.methods.dho.dho_trainer import DHOConfig, DHOTrainer
from mmkd.models.dual_head import DualHeadForImageClassification
from mmkd.teachers.class_signals import ClassSignals, Embeddings
from tests.helpers import VISION

NAMES = ["red", "green", "blue"]


def picture(label: int, random: np.random.Generator) -> bytes:
    """A PNG of 8 x 8 pixels, noisy, in the colour of its class."""
    pixels = random.integers(0, 120, (8, 8, 3))
    pixels[..., label % 3] += 100
    if label > 2:
        pixels //= 2
    buffer = io.BytesIO()
    Pictures.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def pictures(per_class: int, seed: int = 0, classes: int = len(NAMES)) -> Dataset:
    """Rows of `image` (bytes) and `label`, class after class."""
    random = np.random.default_rng(seed)
    labels = [label for label in range(classes) for _ in range(per_class)]
    images = [{"bytes": picture(label, random), "path": None} for label in labels]
    features = Features({"image": Image(decode=False), "label": Value("int64")})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def pixels() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 8, "width": 8})


def vit(**settings: Any) -> Any:
    torch.manual_seed(0)
    return DualHeadForImageClassification.from_backbone(ViTConfig(**VISION), NAMES, **settings)


def answers(rows: int, classes: int = len(NAMES)) -> torch.Tensor:
    """Logits of a teacher that knows `pictures` roughly."""
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(rows) * len(NAMES) // rows
    return logits + 3 * torch.nn.functional.one_hot(labels, classes)


CLASS_TERMS: dict[str, Any] = {
    "stage_heads": 2,
    "mixing": "learned",
    "gate_balance": "none",
    "gate_top_k": 2,
    "text_ce_weight": 1.0,
    "vl_align_weight": 1.0,
    "vl_align_filter": True,
    "feature_mse_weight": 0.5,
    "aspects": ["Is it red?", "Is it dark?"],
}
"""Terms of `dho` that are means over rows, whichever rows are read together."""

BATCH_TERMS = {**CLASS_TERMS, "gate_balance": "kl", "image_contrast_weight": 1.0, "caption_weight": 1.0}
BATCH_TERMS |= {"feature_mse_form": "log"}
"""Those that compare the rows of a batch, too, whichever rows share a device."""


def several_logits(rows: int = 36, teachers: int = 3) -> torch.Tensor:
    """Logits of teachers of which each is better than the one before."""
    noise = torch.randn(rows, teachers, len(NAMES), generator=torch.Generator().manual_seed(5))
    return noise + torch.arange(teachers)[:, None] * answers(rows)[:, None]


def class_signals(rows: int = 36, **parts: Any) -> ClassSignals:
    """What a teacher says of the rows of `dho`: logits, embeddings of 12 numbers, and captions."""
    random = torch.Generator().manual_seed(2)
    images, captions = (torch.randn(rows, 12, generator=random) for _ in range(2))
    text = torch.randn(len(NAMES), 12, generator=random)
    return ClassSignals(**{"logits": answers(rows), "embeddings": Embeddings(images, text, captions), **parts})


def signals_of_terms(rows: int = 36) -> ClassSignals:
    """What `CLASS_TERMS` are about: several teachers and answers to aspects, too."""
    aspects = torch.rand(rows, 2, generator=torch.Generator().manual_seed(0))
    return class_signals(rows, logits=several_logits(rows), aspects=aspects)


def dho(folder: Path | str, trainer: dict[str, Any] | None = None, **settings: Any) -> DHOTrainer:
    """A trainer of a tiny ViT on 36 pictures; keys are fields of DHOConfig, `trainer` holds other arguments."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "unlabeled_batch_size": 4,
        "labels_per_class": 4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments: dict[str, Any] = {
        "model": vit(),
        "teacher": answers(36),
        "train_dataset": pictures(12),
        "eval_dataset": pictures(4, seed=1),
        "processing_class": pixels(),
        **(trainer or {}),
    }
    return DHOTrainer(args=DHOConfig(**{**defaults, **settings}), **arguments)


def class_recipe(folder: Path, names: list[str] = NAMES, caption: bool = False, **keys: Any) -> Path:
    """A recipe with its data, teacher and student's config in one folder."""
    for split, per_class, seed in (("train", 12, 0), ("validation", 4, 1), ("test", 4, 2)):
        rows = pictures(per_class, seed, len(names))
        if caption:
            words = [f"a {names[label]} photo of the picture {number}" for number, label in enumerate(rows["label"])]
            rows = rows.add_column("words", words)  # pyright: ignore[reportCallIssue]
        rows.to_parquet(str(folder / f"{split}.parquet"))
    make_clip(folder / "clip", names)
    vit().config.backbone_config.save_pretrained(folder / "student")
    pixels().save_pretrained(folder / "student")
    data = {
        "source": "parquet",
        "data_files": {split: str(folder / f"{split}.parquet") for split in ("train", "validation", "test")},
        "splits": {split: split for split in ("train", "validation", "test")},
        "image": "image",
        "class_names": names,
        "prompts": ["a photo of a {}.", "a picture of the {}."],
        **({"caption": "words"} if caption else {}),
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    run = {
        "method": "dho",
        "teacher": str(folder / "clip"),
        "student": str(folder / "student"),
        "student_init": "random",
        "data": str(folder / "data.yaml"),
        "labels_per_class": 2,
        "per_device_train_batch_size": 2,
        "unlabeled_batch_size": 4,
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **keys,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def make_clip(folder: Path, names: list[str] = NAMES, seed: int = 3) -> Path:
    """A folder with a random CLIP of 8 x 8 images and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<unk>", "<bos>", "a", "photo", "of", "picture", "the", ".", *names, "<eos>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    ends = [("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A <eos>", special_tokens=ends
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    tower = {key: VISION[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    text = {"vocab_size": len(words), "num_hidden_layers": 1, "max_position_embeddings": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": len(words) - 1}
    config = CLIPConfig(text_config={**tower, **text, **ids}, vision_config=VISION, projection_dim=12)
    torch.manual_seed(seed)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(processor, fast).save_pretrained(folder)
    return folder
