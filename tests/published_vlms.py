"""Checkpoints of published vision-language models without their weights, from the files in fixtures/published_vlms."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.models import Model
from transformers import AutoConfig, AutoModelForImageTextToText

ROOT = Path(__file__).parent / "fixtures" / "published_vlms"

FAMILIES = {folder.parent.name: folder.parent.parent.name for folder in sorted(ROOT.glob("*/*/config.json"))}
"""Name of a model -> the folder of its family."""

HUB = {
    "Qwen3-VL": "Qwen",
    "Qwen2.5-VL": "Qwen",
    "SmolVLM2": "HuggingFaceTB",
    "InternVL3_5": "OpenGVLab",
    "gemma-3": "google",
    "llava-onevision": "llava-hf",
}
"""The beginning of a model's name -> its owner on the Hub."""


def hub_id(name: str) -> str:
    return next(f"{owner}/{name}" for start, owner in HUB.items() if name.startswith(start))


def write_checkpoint(name: str, folder: Path) -> Path:
    """The folder, with all files of a model's checkpoint but the weights, and a tokenizer of single bytes."""
    family = ROOT / FAMILIES[name]
    folder.mkdir(parents=True)
    for file in (*family.glob("*.jinja"), *family.glob("*config.json"), *(family / name).iterdir()):
        shutil.copy(file, folder / file.name)
    tokens = json.loads((family / "tokens.json").read_text(encoding="utf-8"))
    _tokenizer(tokens).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens["config"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _tokenizer(tokens: dict[str, Any]) -> Tokenizer:
    """A tokenizer that writes text in bytes, with the model's special tokens under their own ids."""
    model, taken = _MODELS[tokens["kind"]](tokens), {**tokens["special"], **tokens["added"]}
    tokenizer = Tokenizer(model)
    if tokens["kind"] == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens["special"]])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens["added"]])
    assert {token: tokenizer.token_to_id(token) for token in taken} == taken
    return tokenizer


def _byte_level(tokens: dict[str, Any]) -> Model:
    taken = {**tokens["special"], **tokens["added"]}
    free = (index for index in range(10**6) if index not in taken.values())
    letters = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), free, strict=False))
    # An added token of the model's own vocabulary has the id that it has there, and ids between may be missing.
    return models.BPE(vocab={**letters, **taken}, merges=[])


def _byte_fallback(tokens: dict[str, Any]) -> Model:
    first, newline = tokens["first_byte"], tokens["newlines"]
    lines = {"\n" * count: newline + count - 1 for count in range(1, 5)}
    bytes_ = {f"<0x{byte:02X}>": first + byte for byte in range(256)}
    merges = [("\n" * count, "\n") for count in range(1, 4)]
    vocab = {**lines, **bytes_, **tokens["special"]}
    return models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")


_MODELS = {"byte_level": _byte_level, "byte_fallback": _byte_fallback}


def write_tiny_model(name: str, folder: Path, seed: int) -> Path:
    """As `write_checkpoint`, with random weights in few layers of little width, and all else as the model has it."""
    write_checkpoint(name, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # Qwen2.5-VL's file has the language model's settings beside those of the tower.
    _narrow(config.get("text_config", config), config["vision_config"])
    path.write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        # Gemma's begins with zeros, which let no image through.
        for weights_name, weights in model.named_parameters():
            if "mm_input_projection_weight" in weights_name:
                weights.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def _narrow(text: dict[str, Any], vision: dict[str, Any]) -> None:
    text |= {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    text.pop("layer_types", None)
    rope = text.get("rope_scaling") or {}
    if "mrope_section" in rope:
        rope["mrope_section"] = [2, 3, 3]
    vision |= {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.2}
    if "depth" in vision:
        vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"deepstack_visual_indexes": [0]} if "deepstack_visual_indexes" in vision else {}
        vision |= {"fullatt_block_indexes": [1]} if "fullatt_block_indexes" in vision else {}
    else:
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2}
