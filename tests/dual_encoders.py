"""Tiny random dual encoders of each family, as folders that load with their tokenizer and image processor."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    Siglip2Processor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("circle", "square", "triangle", "star")
WORDS = ("<pad>", "<unk>", "<bos>", "a", "photo", "of", "picture", "the", ".", *COLOURS, *SHAPES, "<eos>")
LONGEST = 12
"""Tokens of the longest text of every model here."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, whose end token is the highest."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    ends = [("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A <eos>", special_tokens=ends
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **special)


def _towers(layers: int, width: int, image_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    tower |= {"num_attention_heads": 2, "initializer_range": 0.3}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": len(WORDS) - 1}
    text = {**tower, "vocab_size": len(WORDS), "max_position_embeddings": LONGEST, **ids}
    return {**tower, "image_size": image_size, "patch_size": 4}, text


def make_clip(
    folder: Path, seed: int = 0, layers: int = 1, width: int = 16, image_size: int = 8, **settings: Any
) -> Path:
    """A folder with a random CLIP; `settings` are of its config, such as projection_dim."""
    vision, text = _towers(layers, width, image_size)
    torch.manual_seed(seed)
    config = CLIPConfig(vision_config=vision, text_config=text, **{"projection_dim": width, **settings})
    CLIPModel(config).save_pretrained(folder)
    crop = {"height": image_size, "width": image_size}
    images = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop)
    CLIPProcessor(images, word_tokenizer()).save_pretrained(folder)
    return folder


def make_siglip(folder: Path, seed: int = 0, layers: int = 1, width: int = 16, image_size: int = 8) -> Path:
    """A folder with a random SigLIP, as SigLIP2 of fixed sizes is one too."""
    vision, text = _towers(layers, width, image_size)
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, "projection_size": width}))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2.0)
    model.save_pretrained(folder)
    images = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    SiglipProcessor(images, word_tokenizer()).save_pretrained(folder)
    return folder


def make_naflex(folder: Path, seed: int = 0, layers: int = 1, width: int = 16, patches: int = 4) -> Path:
    """A folder with a random SigLIP2 of images of any shape, in at most so many patches."""
    vision, text = _towers(layers, width, 8)
    torch.manual_seed(seed)
    vision = {**vision, "num_patches": patches}
    model = Siglip2Model(Siglip2Config(vision_config=vision, text_config={**text, "projection_size": width}))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2.0)
    model.save_pretrained(folder)
    images = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=patches)
    Siglip2Processor(images, word_tokenizer()).save_pretrained(folder)
    return folder


def make_pair_of_towers(folder: Path, seed: int = 0, layers: int = 1, width: int = 16, image_size: int = 8) -> Path:
    """A folder with a VisionTextDualEncoder of a random ViT and a random BERT."""
    vision, text = _towers(layers, width, image_size)
    torch.manual_seed(seed)
    both = VisionTextDualEncoderConfig.from_vision_text_configs(ViTConfig(**vision), BertConfig(**text))
    both.projection_dim = width
    VisionTextDualEncoderModel(both).save_pretrained(folder)
    images = ViTImageProcessorPil(size={"height": image_size, "width": image_size})
    VisionTextDualEncoderProcessor(images, word_tokenizer()).save_pretrained(folder)
    return folder


def make_sentence_encoder(folder: Path, seed: int = 0, layers: int = 1, width: int = 16) -> Path:
    """A folder with a random BERT as a model of sentence-transformers, pooled by the mean."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    _, text = _towers(layers, width, 8)
    torch.manual_seed(seed)
    BertModel(BertConfig(**text)).save_pretrained(folder / "bert")
    word_tokenizer().save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=LONGEST)
    SentenceTransformer(modules=[transformer, Pooling(width)], device="cpu").save_pretrained(str(folder))
    return folder


def caption(number: int) -> str:
    """A caption; the first 24 differ."""
    return f"a {COLOURS[number % len(COLOURS)]} {SHAPES[number // len(COLOURS) % len(SHAPES)]}"


def photo(number: int, side: int = 12) -> Image.Image:
    """A picture of noise."""
    noise = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())
