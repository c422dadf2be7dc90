"""Dual encoders that learn from others: losses, accumulation, ranks, families, resuming, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPModel

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.losses.contrastive_losses import Targets, affinity, clip, feature_mse, icl, logit_kl, similarities, unit
from mmkd.methods.clip_kd.clip_trainer import TeacherEncoder
from mmkd.models.dual_encoder import load_dual_encoder
from mmkd.models.pair_heads import pair_head
from mmkd.preparation.pair_batches import PairSampler
from tests.dual_encoders import (
    caption,
    make_clip,
    make_naflex,
    make_pair_of_towers,
    make_sentence_encoder,
    make_siglip,
    photo,
)
from tests.forked import on_two_ranks
from tests.pairs import (
    ADAPTER,
    EVERY_TERM,
    MASKED,
    ORDERS,
    SCORED,
    WordsInCommon,
    captioned,
    clip_kd,
    student_and_teacher,
    sums_of,
    text_pairs,
)


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
    alone.save_model()
    assert rank["weights"] == pytest.approx(sums_of(Path(alone.args.output_dir)), rel=1e-5, abs=1e-5)
    for name in ("eval_loss", "eval_image_to_text_recall", "eval_text_to_image_recall_teacher", "eval_icl_loss"):
        assert rank["evaluated"][name] == pytest.approx(expected[name], rel=1e-4), name


def test_two_ranks_train_as_one(ranks: Any, tmp_path: Path) -> None:
    alone = clip_kd(tmp_path, {"eval_dataset": captioned(11)}, **EVERY_TERM, **ORDERS)
    alone.train()
    expected = alone.evaluate()
    for rank in ranks["clip_kd ddp"]:
        as_alone(rank, alone, expected)


@pytest.mark.parametrize(
    ("name", "settings", "given"),
    [
        ("fsdp2 lora", {**EVERY_TERM, **ORDERS}, {"peft_config": LoraConfig(**ADAPTER)}),
        ("fsdp2 lora resumed", {**EVERY_TERM, **ORDERS}, {"peft_config": LoraConfig(**ADAPTER)}),
        ("masked ddp", {**MASKED, "per_device_train_batch_size": 8}, {}),
        ("cached ddp", {**EVERY_TERM, **ORDERS, **SCORED}, {"pair_scorer": WordsInCommon()}),
    ],
)
def test_shards_adapters_masks_caches_and_scorers_on_two_ranks(
    ranks: Any, name: str, settings: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    """The cache has the teacher that is asked here."""
    torch.manual_seed(0)
    alone = clip_kd(tmp_path, {"eval_dataset": captioned(11), **given}, **settings)
    alone.train()
    expected = alone.evaluate()
    if settings.get("ranking") and "ranking_teacher" in settings:
        assert expected["eval_ranking_loss"] > 0
    for rank in ranks[f"clip_kd {name}"]:
        as_alone(rank, alone, expected)
        assert rank["share"] == pytest.approx(0.5 if "fsdp2" in name else 1, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_zero_trains_as_one_process(tmp_path: Path, how: str, adapted: bool) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not among mmkd's dependencies")
    settings = {**EVERY_TERM, **ORDERS, "logit_scale": 50.0, "max_logit_scale": 40.0}
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **settings}
    job = {"method": "clip_kd", "how": how, "settings": parts, **({"lora": ADAPTER} if adapted else {})}
    saw = on_two_ranks({"job": job}, tmp_path, DS_ACCELERATOR="cpu")["job"]
    torch.manual_seed(0)
    given = {"peft_config": LoraConfig(**ADAPTER)} if adapted else {}
    alone = clip_kd(tmp_path, {"eval_dataset": captioned(11), **given}, **settings)
    alone.train()
    expected = alone.evaluate()
    for rank in saw:
        as_alone(rank, alone, expected)


@pytest.mark.slow
def test_four_ranks_train_as_one(tmp_path: Path) -> None:
    alone = clip_kd(tmp_path, {"eval_dataset": captioned(11)}, **EVERY_TERM, **ORDERS)
    alone.train()
    expected = alone.evaluate()
    jobs: dict[str, Any] = {
        name: {"method": "clip_kd", "how": "ddp", "settings": {**sizes, **EVERY_TERM, **ORDERS}}
        for name, sizes in {
            "whole": {"per_device_train_batch_size": 2},
            "parts": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        }.items()
    }
    for rank in (saw for job in on_two_ranks(jobs, tmp_path, ranks=4).values() for saw in job):
        as_alone(rank, alone, expected)


# Families


@pytest.mark.parametrize("make", [make_siglip, make_naflex, make_pair_of_towers])
def test_students_of_each_family_learn_in_parts_as_whole(make: Any, tmp_path: Path) -> None:
    runs = []
    for batch, accumulation in ((8, 1), (4, 2)):
        student = load_dual_encoder(str(make(tmp_path / "own")))
        # Dropout draws other numbers in batches of another size.
        student.model.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else None)
        for module in student.model.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trainer: Any = clip_kd(tmp_path, {"model": student}, **sizes, **EVERY_TERM)
        trainer.train()
        runs.append(steps_of(trainer))
    assert runs[0] == [pytest.approx(step, rel=1e-4) for step in runs[1]]


def test_dropout_draws_the_same_numbers_for_a_part_again(tmp_path: Path) -> None:
    student = load_dual_encoder(str(make_clip(tmp_path / "own")))
    student.model.visual_projection = torch.nn.Sequential(torch.nn.Dropout(0.5), student.model.visual_projection)
    trainer: Any = clip_kd(tmp_path, {"model": student}, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    batch = [trainer.collate([trainer.train_dataset[row] for row in rows]) for rows in (range(4), range(4, 8))]
    trainer.get_batch_samples(iter(batch), 2, torch.device("cpu"))
    trainer.model.train()
    torch.manual_seed(5)
    seen: list[Tensor] = []
    encode = trainer.encode
    trainer.encode = lambda *given: seen.append((said := encode(*given)).images.detach()) or said
    for part in batch:
        trainer.compute_loss(trainer.model, part)
    students = [features for features in seen if features.shape[1] == 16]
    assert len(students) == 4
    assert torch.equal(torch.cat(students[:2]), torch.cat(students[2:]))
    assert not torch.equal(students[0], encode(student, batch[0]["student"]).images)


def test_encoders_of_sentences_learn_and_resume(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    folders = make_sentence_encoder(tmp_path / "s"), make_sentence_encoder(tmp_path / "t", seed=1, width=20)
    runs = []
    for name in ("whole", "cut"):
        student, teacher = (load_dual_encoder(str(folder)) for folder in folders)
        for module in student.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        given = {"model": student, "teachers": teacher, "train_dataset": text_pairs(24), "eval_dataset": text_pairs(8)}
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, **EVERY_TERM}
        trainer: Any = clip_kd(tmp_path / name, given, **settings)
        if name == "cut":
            shutil.copytree(tmp_path / "whole" / "out" / "checkpoint-1", tmp_path / "cut" / "out" / "checkpoint-1")
        trainer.train(resume_from_checkpoint=name == "cut")
        runs.append(steps_of(trainer))
    assert runs[0] == [pytest.approx(step, rel=1e-5) for step in runs[1]]
    assert "eval_image_to_text_recall" in trainer.evaluate()
    trainer.save_model()
    left = load_dual_encoder(str(tmp_path / "cut" / "out"))
    inputs = left.prepare_texts(["a red circle"])
    with torch.no_grad():
        trainer.student.model.eval()
        torch.testing.assert_close(left.encode_texts(inputs), trainer.student.encode_texts(inputs))


def test_a_frozen_tower_and_a_fixed_scale_stay(tmp_path: Path) -> None:
    trainer: Any = clip_kd(tmp_path, freeze="image", train_logit_scale=False, logit_scale=30.0, icl_weight=0.0)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("text_model") for name in changed)
    assert not any(name.startswith(("vision", "visual", "logit_scale")) for name in changed)
    assert trainer.student.logit_scale.item() == pytest.approx(30.0)


def test_the_scale_is_limited_and_several_teachers_share_the_loss(tmp_path: Path) -> None:
    teachers = {"a": TeacherEncoder(student_and_teacher(tmp_path)[1], 3.0), "b": student_and_teacher(tmp_path)[1]}
    trainer: Any = clip_kd(tmp_path, {"teachers": teachers}, logit_scale=50.0, max_logit_scale=40.0)
    assert trainer.shares == {"a": 0.75, "b": 0.25}
    trainer.train()
    # It is limited after each step, and later ones may lower it.
    assert 39 < trainer.student.logit_scale.item() < 40.001
    assert {"logit_kl_loss_a", "icl_loss_b"} <= trainer.state.log_history[0].keys()


def test_captions_are_drawn_by_epoch_and_counted_where_they_are_the_same(tmp_path: Path) -> None:
    rows = Dataset.from_list(
        [{"image": photo(row), "text": [caption(row), f"the {caption(row)}"]} for row in range(8)]
    )
    own: Any = clip_kd(tmp_path, {"train_dataset": rows}).train_dataset
    drawn = [[own[row, epoch].caption for row in range(8)] for epoch in range(4)]
    assert len({tuple(epoch) for epoch in drawn}) > 1
    assert drawn == [[own[row, epoch].caption for row in range(8)] for epoch in range(4)]
    runs = {}
    for same in ("negative", "positive", "ignore"):
        trainer: Any = clip_kd(tmp_path, {"train_dataset": captioned(16, captions=3)}, same_caption=same, max_steps=1)
        trainer.train()
        runs[same] = trainer.state.log_history[0]
    assert runs["negative"]["same_captions"] > 0.5
    assert runs["ignore"]["clip_loss"] < runs["negative"]["clip_loss"]
    # Equal captions have equal features, over which a softmax spreads anyway.
    assert runs["positive"]["clip_loss"] == pytest.approx(runs["negative"]["clip_loss"], rel=1e-5)


def test_without_a_teacher_pairs_teach(tmp_path: Path) -> None:
    trainer: Any = clip_kd(tmp_path, {"teachers": None}, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["clip_loss"], rel=1e-5)
    with pytest.raises(UserError, match="there is no teacher to learn from"):
        clip_kd(tmp_path, {"teachers": None}, icl_weight=1.0)


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        (captioned(8), {"per_device_train_batch_size": 1}, "A batch of one pair has nothing to compare it with"),
        (captioned(6), {}, "There are 6 pairs to learn, and a step takes 8"),
        (captioned(8, captions=1), {}, "All pairs have one caption, 'a red circle'"),
        (Dataset.from_dict({"text": ["a"] * 8}), {}, "have no pictures"),
        (captioned(8).remove_columns("text"), {}, "none of the 8 train rows has one picture and a caption"),
        (text_pairs(8), {"freeze": "image"}, "these are pairs of texts"),
        (captioned(8), {"temperature": float("nan")}, "temperature"),
        (captioned(8), {"clip_weight": 0.0, **dict.fromkeys(list(EVERY_TERM)[1:5], 0.0)}, "All terms have weight 0"),
        (captioned(8), {"same_caption": "maybe"}, "same_caption"),
    ],
)
def test_what_cannot_be_is_refused(rows: Dataset, settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        clip_kd(tmp_path, {"train_dataset": rows}, **settings)


def test_an_encoder_of_sentences_sees_no_pictures(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    teacher = load_dual_encoder(str(make_sentence_encoder(tmp_path / "sentences")))
    with pytest.raises(UserError, match="encoder of sentences and the data has pictures"):
        clip_kd(tmp_path, {"teachers": teacher})


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
