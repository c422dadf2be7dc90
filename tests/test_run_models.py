"""Student and teacher of a run: loaded as its keys say, and the run stays what it was."""

import logging
from pathlib import Path

import pytest
import torch
import yaml

from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from mmkd.recipe.run_models import load_student
from scripts.make_tiny_models import sentences


@pytest.fixture
def recipe(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A KD run over a few texts that says how its student is loaded."""
    (tmp_path / "train.txt").write_text("\n".join(sentences(8)))
    data = {"name": "words", "source": "text", "data_files": {"train": "train.txt"}, "splits": {"train": "train"}}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(data))
    keys = {"method": "kd", "student": str(tiny["student"]), "teacher": str(tiny["teacher"])}
    keys |= {"data": str(tmp_path / "words.yaml"), "output_dir": str(tmp_path / "run"), "report_to": "none"}
    keys |= {"bf16": False, "model_init_kwargs": {"attn_implementation": "eager"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "recipe.yaml"


def test_a_run_that_was_built_can_be_built_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # trl's logger keeps its messages to itself.
    monkeypatch.setattr(logging.getLogger("trl"), "propagate", True)
    run = recipe_of(recipe).parse()
    for _ in range(2):
        trainer = build_trainer(run)
        assert trainer.model.config._attn_implementation == "eager"
        assert run.training.model_init_kwargs == {"attn_implementation": "eager"}
    # trl says of settings that it does not read that they have no effect.
    assert not [record for record in caplog.records if "model_init_kwargs" in record.getMessage()]


@pytest.mark.parametrize("init", ["pretrained", "random", "prune"])
def test_a_student_is_the_same_whenever_it_is_made(recipe: Path, init: str) -> None:
    flags = ["--student_layers", "1"] if init == "prune" else []
    run = recipe_of(recipe, ["--student_init", init, *flags]).parse()
    first, second = (load_student(run).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
