"""Vision towers that learn the features of others: losses, scales, resuming, ranks, and the tower that is left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.losses.feature_losses import cosine, mse
from mmkd.methods.tower_kd.tower_config import TERMS, TowerKDConfig
from mmkd.methods.tower_kd.tower_losses import on_grid
from mmkd.methods.tower_kd.tower_trainer import HEADS_FILE, TeacherTower
from mmkd.models.tower_heads import head_of_teacher
from mmkd.models.vision_towers import look
from tests.classes import pictures
from tests.helpers import losses_of
from tests.towers import TEACHER, clip_tower, dino_tower, pixels_of, teachers, tower_kd

EVERY_TERM: dict[str, Any] = {f"{term}_weight": 0.5 for term in TERMS}


def steps_of(trainer: Any) -> list[list[float]]:
    return [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "grad_norm" in entry]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_loss_is_that_of_its_terms(tmp_path: Path) -> None:
    trainer: Any = tower_kd(tmp_path, normalize_features="none", adaptor="linear", summary_mse_weight=0.5, max_steps=1)
    batch = trainer.collate([trainer.train_dataset[number] for number in range(4)])
    head, teacher = head_of_teacher(trainer.model, ""), trainer.towers[""]
    ours, theirs = (look(tower, batch["pixel_values"]) for tower in (trainer.model, teacher))
    adapted = head(ours)
    patches, targets = adapted.patches.flatten(0, 2), theirs.patches.flatten(0, 2)
    expected = 0.9 * cosine(patches, targets).mean() + 0.1 * mse(patches, targets).mean()
    expected = (
        expected + cosine(adapted.summary, theirs.summary).mean() + 0.5 * mse(adapted.summary, theirs.summary).mean()
    )
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_that_is_its_teacher_learns_nothing_of_relations(tmp_path: Path) -> None:
    only: dict[str, Any] = {**dict.fromkeys(EVERY_TERM, 0.0), "patch_relation_weight": 1.0}
    same = {"model": clip_tower(), "teachers": TeacherTower(clip_tower(), pixels_of(8))}
    trainer: Any = tower_kd(tmp_path, same, normalize_features="none", **only)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_accumulated_batches_are_whole_ones(several: bool, tmp_path: Path) -> None:
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        given = {"teachers": teachers()} if several else {}
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, **EVERY_TERM}
        trainer: Any = tower_kd(tmp_path, given, **settings)
        trainer.train()
        runs.append(steps_of(trainer))
    assert len(runs[0]) == 3
    assert runs[0] == [pytest.approx(step, rel=1e-4) for step in runs[1]]


def test_two_ranks_train_as_one(ranks: Any, tmp_path: Path) -> None:
    given = {"teachers": teachers(), "eval_dataset": pictures(3, seed=1)}
    alone: Any = tower_kd(tmp_path, given, per_device_train_batch_size=4, **EVERY_TERM)
    alone.train()
    expected = alone.evaluate()
    for rank in ranks["tower_kd ddp"]:
        assert rank["steps"] == [pytest.approx(step, rel=1e-4) for step in steps_of(alone)]
        for name in ("eval_loss", "eval_patch_cosine_clip", "eval_summary_cosine_dino"):
            assert rank["evaluated"][name] == pytest.approx(expected[name], rel=1e-4), name
    assert ranks["tower_kd ddp"][0]["weights"] == ranks["tower_kd ddp"][1]["weights"]


def test_a_resumed_run_is_the_whole_one_and_its_tower_a_tower(tmp_path: Path) -> None:
    whole = tower_kd(tmp_path / "whole", {"teachers": teachers()}, save_strategy="steps", save_steps=1)
    whole.train()
    whole.save_model()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "cut" / "checkpoint-1")
    cut = tower_kd(tmp_path / "cut", {"teachers": teachers()}, save_strategy="steps", save_steps=1)
    cut.train(resume_from_checkpoint=True)
    assert steps_of(cut) == [pytest.approx(step, rel=1e-6) for step in steps_of(whole)]
    assert all(torch.equal(tensor, weights(cut.model)[name]) for name, tensor in weights(whole.model).items())
    # The heads are in checkpoints, and neither there nor in the result among the weights of the tower.
    assert (tmp_path / "whole" / "checkpoint-2" / HEADS_FILE).is_file()
    assert not (tmp_path / "whole" / HEADS_FILE).exists()
    left, info = AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert isinstance(left, CLIPVisionModel)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert AutoImageProcessor.from_pretrained(tmp_path / "whole").size["height"] == 8
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.allclose(look(left, pixels).patches, look(whole.model.eval(), pixels).patches)


def test_a_scaled_teacher_has_equal_variances(tmp_path: Path) -> None:
    trainer: Any = tower_kd(tmp_path, {"teachers": teachers()}, per_device_train_batch_size=5)
    trainer.measure_scales()
    rows = trainer.train_dataset
    batch = trainer.collate([rows[number] for number in range(len(rows))])
    for view in trainer.ask(batch).values():
        patches = view.patches.flatten(0, 2)
        assert torch.allclose(patches.mean(0), torch.zeros(1), atol=1e-4)
        assert torch.allclose(patches.var(0), torch.ones(1), atol=1e-3)


def test_a_coarser_grid_is_the_mean_of_what_it_covers() -> None:
    fine = torch.arange(16.0).reshape(1, 4, 4, 1)
    middle = on_grid(fine, 2, 2)
    assert middle.mean() == pytest.approx(fine.mean().item())
    assert middle[0, 0, 0, 0] < middle[0, 0, 1, 0] < middle[0, 1, 0, 0]
    assert on_grid(fine, 4, 4) is fine


def test_the_last_layer_stays_where_an_earlier_one_is_trained(tmp_path: Path) -> None:
    only: dict[str, Any] = {"summary_cosine_weight": 0.0}
    trainer: Any = tower_kd(tmp_path, {"student_layer": -2}, **only)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert any(".0." in name for name in changed)
    assert not any("encoder.layers.1." in name for name in changed)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict.fromkeys(EVERY_TERM, 0.0), "All terms have weight 0"),
        ({"adaptor": "linear", "adaptor_width": 8}, "adaptor_width is of adaptor: mlp"),
        ({"frequency_band": "high"}, "frequency_band"),
        ({"label_smoothing_factor": 0.1}, "there are none"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        TowerKDConfig(output_dir=str(tmp_path), **settings)


# Recipes


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two teachers on a folder of pictures."""
    for number, row in enumerate(pictures(8)):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(row["image"]["bytes"])  # pyright: ignore
    for name, tower, side in (
        ("student", clip_tower(), 8),
        ("clip", clip_tower(1, **TEACHER), 8),
        ("dino", dino_tower(2), 12),
    ):
        tower.save_pretrained(tmp_path / name)
        pixels_of(side).save_pretrained(tmp_path / name)
    keys: dict[str, Any] = {
        "method": "tower_kd",
        "teachers": {
            "clip": {"teacher": str(tmp_path / "clip"), "weight": 3},
            "dino": {"teacher": str(tmp_path / "dino")},
        },
        "student": str(tmp_path / "student"),
        "data": str(tmp_path / "photos"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def test_every_command_knows_a_recipe(recipe: Path, capsys: Any) -> None:
    name, folder = str(recipe), str(recipe.parent / "run")
    assert main(["doctor", name]) == 0
    said = capsys.readouterr().out
    assert "different pictures to learn" in said
    assert "3 x 3 patches" in said
    assert main(["plan", name, "--gpu", "L4"]) == 0
    assert "of it for teachers" in capsys.readouterr().out
    assert main(["train", name, "--dry_run"]) == 0
    assert "75% of the loss" in " ".join(capsys.readouterr().out.split())
    assert not Path(folder).exists()
    assert main(["train", name]) == 0
    measured = json.loads((recipe.parent / "run" / "eval_results.json").read_text())
    assert {"eval_loss", "eval_patch_cosine_clip", "eval_summary_cosine_dino"} <= measured.keys()
    assert main(["report", folder]) == 0
    assert "cosine to the patches of clip" in (recipe.parent / "run" / "report.md").read_text()
    assert main(["push", folder, "--repo", "org/name", "--dry_run"]) == 0
    card = (recipe.parent / "run" / "push" / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card
    assert 'AutoImageProcessor.from_pretrained("org/name")' in card
    assert "| summary_cosine_dino |" in card
    assert main(["cache", "build", name]) == 2
    assert "predicts features" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"use_peft": True}, "trains the whole tower"),
        ({"teacher_top_k": 3}, "does not read teacher_top_k"),
        ({"teachers": None, "teacher_cache": "cache", "student": "x"}, "does not read teacher_cache"),
        ({"student_init": "prune", "student_intermediate_size": 4}, "does not read student_intermediate_size"),
    ],
)
def test_keys_of_tokens_are_refused(keys: dict[str, Any], reason: str, recipe: Path, capsys: Any) -> None:
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **keys}))
    assert main(["train", str(recipe)]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
