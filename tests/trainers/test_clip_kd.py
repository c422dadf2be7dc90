"""Dual encoders that learn from others: losses, accumulation, ranks, families, resuming, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import CLIPModel

from mmkd.commands.main import main
from mmkd.losses.contrastive_losses import Targets, affinity, clip, feature_mse, icl, logit_kl, similarities, unit
from mmkd.models.dual_encoder import load_dual_encoder
from mmkd.models.pair_heads import pair_head
from mmkd.preparation.pair_batches import PairSampler
from tests.dual_encoders import caption, make_clip, make_siglip, photo
from tests.helpers import on_two_ranks
from tests.pairs import EVERY_TERM, captioned, clip_kd


def steps_of(trainer: Any) -> list[list[float]]:
    return [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "grad_norm" in entry]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def first_batch(trainer: Any) -> dict[str, Any]:
    keys = list(PairSampler(len(trainer.train_dataset), trainer.pairs_per_step, 3))[: trainer.pairs_per_step]
    return trainer.collate([trainer.train_dataset[key] for key in keys])


def test_the_loss_is_that_of_its_terms(tmp_path: Path) -> None:
    trainer: Any = clip_kd(tmp_path, max_steps=1, **EVERY_TERM)
    batch = first_batch(trainer)
    student, teacher = trainer.student, trainer.teachers[""]
    raw = student.encode_images(batch["student"]["first"]), student.encode_texts(batch["student"]["second"])
    theirs = batch["teachers"][""]
    told = unit(teacher.encode_images(theirs["first"])), unit(teacher.encode_texts(theirs["second"]))
    assert raw[0].shape[1] != told[0].shape[1]
    ours, wanted = similarities(unit(raw[0]), unit(raw[1])), similarities(*told)
    head = pair_head(student, "")
    across = unit(head.images(raw[0])), unit(head.texts(raw[1]))
    expected = 0.7 * clip(ours, student.logit_scale, Targets.of(ours))
    expected = expected + 0.5 * logit_kl(ours, wanted, student.logit_scale, teacher.logit_scale)
    expected = expected + 0.1 * affinity(ours, wanted, 5.0, 5.0)
    expected = expected + 3.0 * feature_mse(*across, *told) + 0.4 * icl(*across, *told, head.scale)
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("layout", [(2, 4), (1, 8)])
def test_accumulated_batches_are_whole_ones(layout: tuple[int, int], tmp_path: Path) -> None:
    runs = []
    for batch, accumulation in ((8, 1), layout):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer: Any = clip_kd(tmp_path, **sizes, **EVERY_TERM)
        trainer.train()
        runs.append((steps_of(trainer), weights(trainer.model)))
    assert len(runs[0][0]) == 3
    assert runs[0][0] == [pytest.approx(step, rel=1e-5) for step in runs[1][0]]
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(tensor, runs[1][1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_teacher_is_learnt(tmp_path: Path) -> None:
    trainer: Any = clip_kd(tmp_path, {"eval_dataset": captioned(8)}, max_steps=30, optim="adamw_torch")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert {"eval_image_to_text_recall", "eval_text_to_image_recall_teacher", "eval_clip_loss"} <= after.keys()
    assert after["eval_logit_kl_loss"] < 0.9 * before["eval_logit_kl_loss"]


def as_alone(rank: dict[str, Any], alone: Any, expected: dict[str, float]) -> None:
    """Whether a rank saw what a process by itself sees."""
    assert rank["steps"] == [pytest.approx(step, rel=1e-4) for step in steps_of(alone)]
    sums = [float(parameter.detach().double().sum()) for parameter in alone.model.parameters()]
    assert rank["weights"] == pytest.approx(sums, rel=1e-5, abs=1e-5)
    for name in ("eval_loss", "eval_image_to_text_recall", "eval_text_to_image_recall_teacher", "eval_icl_loss"):
        assert rank["evaluated"][name] == pytest.approx(expected[name], rel=1e-4), name


def test_two_ranks_train_as_one(ranks: Any, tmp_path: Path) -> None:
    alone = clip_kd(tmp_path, {"eval_dataset": captioned(11)}, **EVERY_TERM)
    alone.train()
    expected = alone.evaluate()
    for rank in ranks["clip_kd ddp"]:
        as_alone(rank, alone, expected)


@pytest.mark.slow
def test_four_ranks_train_as_one(tmp_path: Path) -> None:
    alone = clip_kd(tmp_path, {"eval_dataset": captioned(11)}, **EVERY_TERM)
    alone.train()
    expected = alone.evaluate()
    jobs: dict[str, Any] = {
        name: {"method": "clip_kd", "how": "ddp", "settings": {**sizes, **EVERY_TERM}}
        for name, sizes in {
            "whole": {"per_device_train_batch_size": 2},
            "parts": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        }.items()
    }
    for rank in (saw for job in on_two_ranks(jobs, tmp_path, ranks=4).values() for saw in job):
        as_alone(rank, alone, expected)


# Recipes


def written(folder: Path, **keys: Any) -> Path:
    """A recipe of a tiny student and teacher on pictures in files."""
    make_clip(folder / "student", seed=0)
    make_siglip(folder / "teacher", seed=1, width=20, image_size=12)
    rows = []
    for number in range(28):
        photo(number).save(folder / f"{number}.png")
        rows.append({"image": str(folder / f"{number}.png"), "text": [caption(number), f"the {caption(number)}"]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"name": "noise", "source": "json", "data_files": {"train": str(folder / "rows.jsonl")}, "eval_rows": 4}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    recipe = {
        "method": "clip_kd",
        "teacher": str(folder / "teacher"),
        "student": str(folder / "student"),
        "data": str(folder / "data.yaml"),
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **keys}))
    return folder / "recipe.yaml"


def test_a_recipe_is_checked_planned_and_trained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = str(written(tmp_path, save_open_clip=True))
    assert main(["doctor", recipe]) == 0
    told = capfd.readouterr().out
    assert "24 pictures with captions to learn, 4 to measure on" in " ".join(told.split())
    assert main(["plan", recipe, "--gpu", "L4"]) == 0
    assert "pairs of a step" in capfd.readouterr().out
    assert main(["train", recipe, "--dry_run"]) == 0
    assert "2 optimizer steps of 8 pairs" in " ".join(capfd.readouterr().out.split())
    assert main(["train", recipe]) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert {"clip_loss", "logit_kl_loss", "feature_mse_loss", "icl_loss", "same_captions"} <= logged[0].keys()
    evaluated = next(entry for entry in state["log_history"] if "eval_loss" in entry)
    assert {"eval_image_to_text_recall", "eval_text_to_image_recall_teacher", "eval_clip_loss"} <= evaluated.keys()
    loaded: Any = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    left, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    again = load_dual_encoder(str(tmp_path / "out" / "open_clip"))
    assert all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in left.state_dict().items())
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    assert main(["train", recipe, "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    resumed = [entry for entry in state["log_history"] if "loss" in entry]
    assert resumed[1]["loss"] == pytest.approx(logged[1]["loss"], rel=1e-5)
    assert resumed[1]["grad_norm"] == pytest.approx(logged[1]["grad_norm"], rel=1e-4)
