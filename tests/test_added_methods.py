"""A method of each kind costs its own files and one line: those of `tests/added`, found as an installed package's."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.training.method import METHODS, Method, Methods
from scripts.make_tiny_models import sentences
from tests.classes import NAMES, make_clip, pictures, pixels, vit

ADDED = Path(__file__).parent / "added"
TOKENS, DRIVER, CLASSES = "symmetric_kl", "in_passes", "soft_labels"
OWN_KEY = {TOKENS: "forward_share", DRIVER: "passes", CLASSES: "softness"}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package of the three methods is installed."""
    monkeypatch.syspath_prepend(str(ADDED))
    vars(METHODS).pop("_added", None)
    yield
    vars(METHODS).pop("_added", None)


@pytest.fixture(scope="module")
def recipes(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recipe of each method on tiny models."""
    folder = tmp_path_factory.mktemp("recipes")
    rows = [{"prompt": a, "completion": f" {b}"} for a, b in zip(sentences(16), sentences(16, seed=1), strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.yaml").write_text(
        yaml.safe_dump({"source": "json", "data_files": {"train": str(folder / "rows.jsonl")}})
    )
    make_clip(folder / "clip")
    vit().config.backbone_config.save_pretrained(folder / "vit")
    pixels().save_pretrained(folder / "vit")
    pictures(4).to_parquet(str(folder / "pictures.parquet"))
    classes = {"source": "parquet", "data_files": {"train": str(folder / "pictures.parquet")}}
    classes |= {"splits": {"train": "train"}, "image": "image", "class_names": NAMES, "prompts": ["a photo of a {}."]}
    (folder / "classes.yaml").write_text(yaml.safe_dump(classes))
    shared = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    shared |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    texts = {"data": str(folder / "texts.yaml"), "bf16": False, "max_length": 64}
    texts |= {"student": str(tiny["student"]), "teacher": str(tiny["teacher"])}
    images = {"data": str(folder / "classes.yaml"), "student": str(folder / "vit"), "teacher": str(folder / "clip")}
    found = {}
    for method, own in ((TOKENS, texts), (DRIVER, texts), (CLASSES, images)):
        found[method] = folder / f"{method}.yaml"
        found[method].write_text(yaml.safe_dump({"method": method, **own, **shared}))
    return found


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_what_a_package_adds_comes_after_what_mmkd_has() -> None:
    assert list(METHODS)[:2] == ["sft", "kd"]
    assert {*list(METHODS)[-3:]} == {TOKENS, DRIVER, CLASSES}
    assert [METHODS[name].predicts for name in OWN_KEY] == ["tokens", "tokens", "classes"]


@pytest.mark.parametrize("method", [TOKENS, DRIVER, CLASSES])
def test_every_command_knows_it(method: str, recipes: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    recipe, output = str(recipes[method]), ["--output_dir", str(tmp_path / "run")]
    assert main(["train", recipe, "--help_keys"]) == 0
    assert f"--{OWN_KEY[method]}" in capsys.readouterr().out
    assert main(["train", recipe, "--dry_run", *output]) == 0
    said = capsys.readouterr().out
    assert {TOKENS: "first batch, row 1", DRIVER: "2 passes", CLASSES: "12 rows of 3 classes"}[method] in said
    assert main(["doctor", recipe, *output]) == 0
    assert "Sound:" in capsys.readouterr().out
    assert main(["plan", recipe, "--gpu", "L4", *output]) == 0
    assert ("bytes of weights" if method == CLASSES else "GiB on one device") in capsys.readouterr().out
    assert main(["train", recipe, "--learing_rate", "1", *output]) == 2
    assert f"no flag of method {method}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [TOKENS, CLASSES])
def test_it_trains_and_goes_on_from_a_checkpoint(method: str, recipes: dict[str, Path], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", str(recipes[method]), "--output_dir", str(whole)]) == 0
    shutil.copytree(whole / "checkpoint-1", cut / "checkpoint-1")
    resume = ["--resume_from_checkpoint", "true"]
    assert main(["train", str(recipes[method]), "--output_dir", str(cut), *resume]) == 0
    assert len(losses(whole)) == 2
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    assert weights(cut) == weights(whole)
    record = json.loads((whole / "run.json").read_text())
    assert (record["method"], record["data"]["source"]) == (method, "parquet" if method == CLASSES else "json")


def test_a_driver_skips_what_is_trained(recipes: dict[str, Path], tmp_path: Path) -> None:
    command = ["train", str(recipes[DRIVER]), "--output_dir", str(tmp_path), "--learning_rate", "0.01"]
    assert main(command) == 0
    first, second = tmp_path / "pass-1", tmp_path / "pass-2"
    before, written = weights(second), (first / "model.safetensors").stat().st_mtime_ns
    assert weights(tmp_path) == before != weights(first)
    (second / "model.safetensors").unlink()
    shutil.rmtree(second / "checkpoint-2")
    assert main(command) == 0
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert weights(tmp_path) == before


def test_a_predictor_of_classes_says_all_that_tokens_do_not() -> None:
    method = METHODS[CLASSES]
    with pytest.raises(TypeError, match=r"soft_labels predicts classes.*give it check, plan"):
        Method(**{**vars(method), "check": None, "plan": None})


def test_commands_about_tokens_refuse_a_predictor_of_classes(recipes: dict[str, Path], capsys: Any) -> None:
    for command in (["cache", "build"], ["compare"]):
        assert main([*command, str(recipes[CLASSES])]) == 2
        assert "predicts classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([("kd", "theirs")], "The package theirs adds a method 'kd', and so does mmkd itself"),
        ([("new", "theirs"), ("new", "others")], "The package others adds a method 'new', and so does theirs"),
    ],
)
def test_two_methods_of_one_name_are_refused(
    points: list[tuple[str, str]], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [SimpleNamespace(name=name, dist=SimpleNamespace(name=package)) for name, package in points]
    monkeypatch.setattr("mmkd.training.method.entry_points", lambda group: found)
    with pytest.raises(UserError, match=reason):
        list(Methods({"kd": "mmkd.methods.kd:METHOD"}))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("mmkd_toys.nowhere:METHOD", "cannot be imported"),
        ("mmkd_toys.symmetric_kl:NOTHING", "cannot be imported"),
        ("mmkd_toys.symmetric_kl:METHOD", "which is no `Method` of that name"),
        ("mmkd_toys.symmetric_kl:SymmetricKLTrainer", "which is no `Method` of that name"),
    ],
)
def test_a_package_whose_method_is_none_is_named(place: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    monkeypatch.setattr(
        "mmkd.training.method.entry_points", lambda group: [EntryPoint(name="new", value=place, group=group)]
    )
    with pytest.raises(UserError, match=reason):
        Methods({})["new"]
