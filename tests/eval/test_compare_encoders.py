"""`mmkd compare` of dual encoders: CLIP alone as the baseline, each term as a control, intervals over queries."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.commands.main import main
from mmkd.data.caption_source import load_captions
from mmkd.errors import UserError
from mmkd.eval.baselines import make_baseline
from mmkd.methods.clip_kd.clip_comparison import COMPARISON
from mmkd.models.dual_encoder import load_dual_encoder
from mmkd.models.dual_features import recall_of
from mmkd.recipe.recipe import Recipe
from tests.classes import pictures
from tests.dual_encoders import caption, make_clip, photo


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A recipe of tiny CLIPs on twenty pictures, eight of which are held out, with classes to measure on."""
    files = {}
    for name, numbers in {"train": range(12), "eval": range(12, 20)}.items():
        rows = []
        for number in numbers:
            photo(number).save(tmp_path / f"{number}.png")
            rows.append({"image": str(tmp_path / f"{number}.png"), "text": caption(number)})
        files[name] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"name": "photos", "source": "json", "data_files": files, "splits": {name: name for name in files}}
    (tmp_path / "photos.yaml").write_text(yaml.safe_dump(data))
    pictures(3).to_parquet(str(tmp_path / "colours.parquet"))
    parts = dict.fromkeys(("train", "test"), str(tmp_path / "colours.parquet"))
    colours = {"name": "colours", "source": "parquet", "data_files": parts, "image": "image"}
    colours |= {"class_names": ["red", "green", "blue"]}
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(colours))
    return {
        "method": "clip_kd",
        "teacher": str(make_clip(tmp_path / "teacher", seed=1)),
        "student": str(make_clip(tmp_path / "student", width=8)),
        "data": str(tmp_path / "photos.yaml"),
        "zero_shot_data": [str(tmp_path / "colours.yaml")],
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
    }


def compared(recipe: dict[str, Any], *words: str) -> dict[str, dict[str, Any]]:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["compare", "recipe.yaml", "--output", "out", *words]) == 0
    comparison = json.loads(Path("out", "comparison.json").read_text())
    assert (comparison["baseline"], comparison["items"]) == ("CLIP alone", "pairs")
    return {row["name"]: row for row in comparison["rows"]}


def test_clip_alone_and_each_term_stand_beside_the_student(recipe: dict[str, Any]) -> None:
    rows = compared(recipe, "--seeds", "0", "1", "--controls", "icl", "--icl_weight", "2")
    assert {row["role"] for row in rows.values()} == {"teacher", "baseline", "control", "student"}
    student = next(row for row in rows.values() if row["role"] == "student")
    assert student["metrics"].keys() == rows["teacher"]["metrics"].keys() >= {"recall", "zero_shot"}
    held_out = load_captions(recipe["data"]).held_out
    assert held_out is not None
    for row in rows.values():
        for number, folder in enumerate(row["folders"]):
            told = recall_of(load_dual_encoder(folder), held_out).values
            ways = [told[f"{way}_recall@1"] for way in ("image_to_text", "text_to_image")]
            assert row["metrics"]["recall"]["values"][number] == pytest.approx(sum(ways) / 2)
            assert row["metrics"]["image_to_text_recall@5"]["values"][number] == told["image_to_text_recall@5"]
    gain = student["gain_over_sft"]["recall"]
    assert gain["gain"] == pytest.approx(
        student["metrics"]["recall"]["mean"] - rows["CLIP alone"]["metrics"]["recall"]["mean"]
    )
    assert gain["low"] <= gain["gain"] <= gain["high"]
    assert rows["CLIP alone"]["cost"]["teacher_tokens"] == 0
    assert student["cost"]["teacher_tokens"] == 8
    baseline = yaml.safe_load(Path("out", "sft-baseline.yaml").read_text())
    assert baseline["teacher"] is None
    assert "icl_weight" not in baseline or baseline["icl_weight"] is None
    control = yaml.safe_load(next(Path("out", "controls").glob("icl-0-*")).read_text())
    assert (control["icl_weight"], control["logit_kl_weight"], control["feature_mse_weight"]) == (2, 0, 0)


def test_equal_time_trains_clip_alone_for_longer(recipe: dict[str, Any]) -> None:
    compared(recipe, "--seeds", "0", "--equal", "time")
    factors = json.loads(Path("out", "comparison.json").read_text())["steps_times"]
    assert min(min(own) for own in factors.values()) == 1


def test_data_that_hold_nothing_out_are_refused(recipe: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    data = yaml.safe_load(Path(recipe["data"]).read_text())
    del data["splits"]["eval"]
    Path("all.yaml").write_text(yaml.safe_dump(data))
    Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, "data": "all.yaml"}))
    assert main(["compare", "recipe.yaml", "--output", "out", "--seeds", "0"]) == 2
    assert "holds no pairs out" in " ".join(capsys.readouterr().err.split())


def test_what_orders_answers_is_of_the_teacher_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    orders = {"ranking": "cprd", "ranking_negatives": 2, "hard_negatives": "teacher", "hard_negatives_count": 2}
    own = Recipe.of({**recipe, **orders, "clip_weight": 0.0}, tmp_path / "recipe.yaml")
    baseline = make_baseline(own, tmp_path / "baseline.yaml", tmp_path)
    assert (baseline.keys["ranking"], baseline.keys["hard_negatives"], baseline.keys["clip_weight"]) == (
        "none",
        "none",
        1,
    )
    settings: Any = baseline.parse().training
    assert settings.weights_with(False)["clip"] == 1
    (alone,) = COMPARISON.controls["ranking"].candidates(own, tmp_path)
    assert alone["hard_negatives"] == "none"
    assert "ranking" not in alone
    (alone,) = COMPARISON.controls["logit_kl"].candidates(own, tmp_path)
    assert (alone["ranking"], alone["logit_kl_weight"], alone["icl_weight"]) == ("none", 1, 0)
    with pytest.raises(UserError, match="sets none"):
        COMPARISON.controls["ranking"].candidates(Recipe.of(recipe, tmp_path / "recipe.yaml"), tmp_path)
