"""Rows with images that cannot be used: refused with a reason, or left out, counted and of no consequence."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value

from mmkd.commands.main import main
from mmkd.data.image_columns import UNDECODED
from mmkd.errors import UserError
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.preparation.row_names import STORED_IMAGES, RowNames, row_key
from tests.families import made, model_of
from tests.helpers import Build, losses_of
from tests.vlms import make_llava, picture, vision_rows

LONG = " long" * 100
"""With its images behind it, a prompt that max_length 128 cuts within them."""


@pytest.fixture(scope="session")
def vlms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vlms")
    return {"teacher": make_llava(folder / "teacher", seed=1), "student": make_llava(folder / "student", seed=2)}


def rows_with(tmp_path: Path, kinds: list[str]) -> Dataset:
    """Rows of one image each: good, missing, broken, or with its image behind a long text."""
    data = vision_rows([1] * len(kinds))
    rows: list[dict[str, Any]] = []
    for number, kind in enumerate(kinds):
        path = tmp_path / f"{number}.png"
        picture(100 * number).save(path)
        if kind == "missing":
            path.unlink()
        elif kind == "broken":
            path.write_bytes(path.read_bytes()[:60])
        row: Any = data[number]
        messages = row["messages"]
        if kind == "long":
            messages[0]["content"] = [{"type": "text", "text": LONG}, {"type": "image", "text": None}]
        rows.append({"messages": messages, "images": [str(path)]})
    features = data.features
    return Dataset.from_list(rows).cast(features)


@pytest.fixture
def recipe(tmp_path: Path, vlms: dict[str, Path]) -> Path:
    """A recipe of one good and one of each bad row, eight times over, as JSON and image files."""
    messages = rows_with(tmp_path, ["good", "missing", "broken", "long"] * 2)["messages"]
    lines = [{"messages": one, "images": [str(tmp_path / f"{number}.png")]} for number, one in enumerate(messages)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": "json", "data_files": {"train": str(tmp_path / "rows.jsonl")}, "splits": {"train": "train"}}
    data["columns"] = {"messages": "messages", "images": "images"}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    keys = {
        "method": "llava_kd",
        "teacher": str(vlms["teacher"]),
        "student": str(vlms["student"]),
        "data": str(tmp_path / "data.yaml"),
        "output_dir": str(tmp_path / "run"),
        "assistant_only_loss": True,
        "max_length": 128,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "bf16": False,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def test_bad_rows_are_counted_through_the_command_line(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["train", str(recipe), "--on_bad_row", "skip"]) == 0
    state = json.loads((recipe.parent / "run" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "unreadable_rows" in entry]
    # Eight rows, two of each kind, twice.
    assert [logged[-1][name] for name in ("unreadable_rows", "overlong_rows")] == [8, 4]
    assert logged[0]["unreadable_rows"] < logged[-1]["unreadable_rows"]
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    for reason in ("FileNotFoundError", "truncated", "would cut it within its images"):
        assert any("Skipped a row: Row " in one and reason in one for one in said), reason


@pytest.mark.parametrize(
    "kind, reason",
    [("missing", "FileNotFoundError"), ("broken", "truncated"), ("long", "cut it within its images")],
)
def test_bad_rows_are_refused_by_default(
    build: Build, vlms: dict[str, Path], tmp_path: Path, kind: str, reason: str
) -> None:
    models = {"model": str(vlms["student"]), "teacher": str(vlms["teacher"])}
    trainer = build(
        LLaVAKDTrainer,
        rows_with(tmp_path, ["good"] * 3 + [kind]),
        trainer=models,
        assistant_only_loss=True,
        max_length=128,
    )
    name = r"^Row 3 of the train data \(from 0, after filters and shuffle\)"
    with pytest.raises(UserError, match=f"{name}.*{reason}.*on_bad_row: skip"):
        trainer.train()


@pytest.mark.parametrize("cls", [LLaVAKDTrainer, KDTrainer, SFTBaselineTrainer, ALMTrainer])
def test_what_is_left_out_changes_nothing(build: Build, vlms: dict[str, Path], tmp_path: Path, cls: Any) -> None:
    """The loss and gradient of two good rows, alone and between two bad ones."""
    models = {"model": str(vlms["student"]), "teacher": None if cls is SFTBaselineTrainer else str(vlms["teacher"])}
    found = []
    for kinds in (["good", "missing", "broken", "good"], ["good", "good"]):
        numbers = [number for number, kind in enumerate(kinds) if kind == "good"] if len(kinds) == 4 else [0, 3]
        data = rows_with(tmp_path, ["good"] * 4 if len(kinds) == 2 else kinds).select(
            range(4) if len(kinds) == 4 else numbers
        )
        trainer = build(
            cls, data, trainer=models, assistant_only_loss=True, max_length=128, max_steps=1, on_bad_row="skip"
        )
        trainer.train()
        found.append([losses_of(trainer)[0], losses_of(trainer, "grad_norm")[0], losses_of(trainer, "ce")[0]])
        assert losses_of(trainer, "unreadable_rows") == [len(kinds) - 2]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4, atol=1e-6)


def test_evaluation_counts_its_own(
    build: Build, vlms: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"model": str(vlms["student"]), "teacher": str(vlms["teacher"])}
    trainer: Any = build(
        LLaVAKDTrainer,
        rows_with(tmp_path, ["good"] * 4),
        trainer=models,
        assistant_only_loss=True,
        max_length=128,
        on_bad_row="skip",
    )
    (tmp_path / "eval").mkdir()
    bad = rows_with(tmp_path / "eval", ["good", "broken", "good", "missing"])
    evaluated = trainer.evaluate(eval_dataset=bad)
    assert evaluated["eval_unreadable_rows"] == 2
    assert evaluated["eval_overlong_rows"] == 0
    assert "Skipped a row: Row 3 of the eval data (from 0, after filters and shuffle) has an image" in caplog.text


def test_nothing_but_bad_rows_is_an_error(build: Build, vlms: dict[str, Path], tmp_path: Path) -> None:
    models = {"model": str(vlms["student"]), "teacher": str(vlms["teacher"])}
    with pytest.raises(ValueError, match=r"None of the first 4 rows can be used.*FileNotFoundError"):
        build(
            LLaVAKDTrainer,
            rows_with(tmp_path, ["missing"] * 4),
            trainer=models,
            assistant_only_loss=True,
            max_length=128,
            on_bad_row="skip",
        )
    with pytest.raises(ValueError, match="choose one of error, skip"):
        build(LLaVAKDTrainer, vision_rows([1]), on_bad_row="ignore")


def test_rows_are_known_by_their_words_and_pictures() -> None:
    data = vision_rows([1, 1, 1])
    words = data[0]["messages"]
    files = [{"bytes": content, "path": None} for content in (b"abc", b"xyz", b"a longer one")]
    rows: Any = Dataset.from_list([{"messages": words, "images": [one]} for one in files]).cast(
        Features({**data.features, "images": UNDECODED})
    )
    names = RowNames()
    names.add({"mine": rows.select([2, 0]), "other": rows}, "eval")
    assert [names.of(row).split(" (")[0] for row in rows] == [
        "Row 1 of the mine data",
        "Row 1 of the other data",
        "Row 0 of the mine data",
    ]
    decoded = {**rows[1], "images": [picture(0)], STORED_IMAGES: rows[1]["images"]}
    assert names.of(decoded).startswith("Row 1 of the other data")
    assert names.of({**rows[1], "messages": words[:1]}) == "A row"
    # Keys tell images apart by their sizes only, so that all rows with a key are named.
    names = RowNames()
    names.add(rows, "train")
    assert names.of_key(row_key(decoded)).startswith("Row 0 or 1 of the train data")
    assert names.of_key(row_key(rows[2])).startswith("Row 2 of the train data")


def test_rows_with_more_images_than_places_are_named(build: Build, vlms: dict[str, Path], tmp_path: Path) -> None:
    rows: Any = list(rows_with(tmp_path, ["good"] * 2).cast_column("images", UNDECODED))
    rows[1]["images"] *= 2
    data = Dataset.from_list(rows, features=vision_rows([1]).features)
    trainer = build(SFTBaselineTrainer, data, trainer={"model": str(vlms["student"]), "teacher": None}, max_length=128)
    with pytest.raises(UserError, match=r"Row 1 of the train data .* has 2 images and 1 placeholders for them"):
        trainer.train()


# Pictures that can be read, and that a processor refuses all the same


def picture_rows(kinds: list[str]) -> Dataset:
    """Rows whose picture is good, a line of 900 x 2 pixels (wider than Qwen2.5-VL takes), or not there."""
    files = {"good": picture(0), "line": picture(0).resize((900, 2)), "missing": None}
    prompt, completion = [{"role": "user", "content": "the cat"}], [{"role": "assistant", "content": "sat"}]
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": message, "completion": message, "images": List(Image())})
    encoded = {kind: None if file is None else Image().encode_example(file) for kind, file in files.items()}
    rows = [{"prompt": prompt, "completion": completion, "images": [encoded[kind]]} for kind in kinds]
    return Dataset.from_list(rows, features=features)


@pytest.fixture(scope="module")
def qwen() -> dict[str, Any]:
    make, processor = made("Qwen2.5-VL")
    processors = {"processing_class": processor, "teacher_processing_class": processor}
    return {"model": model_of(make, 0), "teacher": model_of(make, 1), **processors}


def test_what_a_processor_refuses_is_left_out(build: Build, qwen: dict[str, Any]) -> None:
    bad = picture_rows(["good", "line", "missing", "good"])
    settings: dict[str, Any] = {"max_length": None, "max_steps": 1, "on_bad_row": "skip"}
    trainer: Any = build(KDTrainer, bad, trainer=qwen, **settings)
    trainer.train()
    assert losses_of(trainer, "unreadable_rows") == [2]
    assert trainer.evaluate(eval_dataset=bad)["eval_unreadable_rows"] == 2
    with pytest.raises(ValueError, match=r"None of the first 2 rows can be used.*900 x 2 pixels"):
        build(KDTrainer, picture_rows(["line"] * 2), trainer=qwen, **settings)


def test_what_a_processor_refuses_is_named(build: Build, qwen: dict[str, Any]) -> None:
    name = r"Row 1 of the train data .* has an image that the student's processor refuses: "
    reason = name + r"images\[0\], 900 x 2 pixels: .*on_bad_row: skip"
    with pytest.raises(ValueError, match=reason):
        build(KDTrainer, picture_rows(["good", "line"]), trainer=qwen, max_length=None, max_steps=1).train()
