"""Models and data of a user, tiny, as `mmkd init` is given them."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import ViTConfig, ViTModel

from scripts.make_tiny_models import make_model, save, sentences
from tests.alignment.tiny_tokenizers import CHATML, byte_level
from tests.classes import NAMES, make_clip, picture, pixels
from tests.helpers import VISION
from tests.vlms import make_llava
from tests.vlms import picture as noise

ROWS = 24


@pytest.fixture(scope="session")
def models(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every kind of model that a task asks for."""
    folder = tmp_path_factory.mktemp("models")
    other = byte_level(300, ("<|im_start|>", "<|im_end|>", "<pad>"), CHATML, eos_token="<|im_end|>", pad_token="<pad>")
    ViTModel(ViTConfig(**VISION), add_pooling_layer=False).save_pretrained(folder / "vit")
    pixels().save_pretrained(folder / "vit")
    return {
        **tiny,
        "other": save(make_model(rows=len(other), seed=5), other, folder / "other"),
        "large_vlm": make_llava(folder / "large_vlm", seed=1, layers=3),
        "small_vlm": make_llava(folder / "small_vlm", seed=2),
        "clip": make_clip(folder / "clip"),
        "vit": folder / "vit",
    }


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's chats, prompts, picture questions and class folders, and nothing else."""
    asked, told = sentences(ROWS, seed=1), sentences(ROWS, seed=2)
    write_rows(
        tmp_path / "chats.jsonl",
        [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in zip(asked, told, strict=True)
        ],
    )
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in asked])
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in told])
    (tmp_path / "photos").mkdir()
    rows = []
    for number, (question, answer) in enumerate(zip(asked, told, strict=True)):
        noise(number).save(tmp_path / "photos" / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"image": f"photos/{number}.png", "conversations": turns})
    (tmp_path / "vqa.json").write_text(json.dumps(rows))
    random = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "classes" / name / f"{number}.png").write_bytes(picture(label, random))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
