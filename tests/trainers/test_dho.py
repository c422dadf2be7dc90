"""DHO in training: heads, labels, ratios, the choice of alpha and beta, baselines, bad input, and the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    pipeline,
)

from mmkd.commands.main import main
from mmkd.data.class_rows import ClassRows, SemiSupervisedSampler, augmented
from mmkd.data.classification import HIDDEN, hide_labels
from mmkd.errors import UserError
from mmkd.losses.dual_head_losses import distillation_loss, search_interpolation, supervised_loss
from mmkd.methods.dho import dho_dry_run as classification
from mmkd.methods.dho.class_evaluation import CHOICE
from mmkd.methods.dho.dho_trainer import DHOConfig
from mmkd.precision import NATIVE_BF16
from mmkd.preflight.doctor import examine
from mmkd.preflight.facts import Finding
from mmkd.recipe.flags import recipe_of
from mmkd.teachers.classifiers import TransformersEmbedder
from mmkd.training.method import METHODS
from tests.classes import NAMES, answers, class_recipe, dho, pictures, pixels, vit
from tests.helpers import losses_of


def batch_of(trainer: Any) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def test_a_batch_holds_labelled_and_unlabelled_rows_in_their_numbers(tmp_path: Path) -> None:
    trainer = dho(tmp_path, per_device_train_batch_size=3, unlabeled_batch_size=5)
    for batch in trainer.get_train_dataloader():
        assert (batch["labels"] != HIDDEN).tolist() == [True] * 3 + [False] * 5
        assert batch["teacher_logits"].shape == (8, 3)


def test_an_epoch_sees_every_unlabelled_row_and_deals_labels_in_rounds() -> None:
    labels = np.array([0, 1, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN])
    sampler = SemiSupervisedSampler(labels, labeled_batch=2, unlabeled_batch=3, seed=0)
    first = list(sampler)
    assert len(first) == len(sampler) == 10
    unlabeled = first[2:5] + first[7:10]
    assert set(unlabeled) == {2, 3, 4, 5, 6}
    assert sorted(first[:2]) == sorted(first[5:7]) == [0, 1]
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_the_teachers_answers_stay_with_their_rows(tmp_path: Path) -> None:
    trainer = dho(tmp_path)
    train, known = trainer.train_dataset, answers(36)
    for batch in trainer.get_train_dataloader():
        for image, row in zip(batch["pixel_values"], batch["teacher_logits"], strict=True):
            number = int((known == row).all(1).nonzero())
            assert torch.equal(train[number]["pixel_values"], image)


def test_the_loss_is_that_of_the_paper(tmp_path: Path) -> None:
    trainer = dho(tmp_path, max_steps=1, ce_weight=0.3, temperature=3.0)
    batch = batch_of(trainer)
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model, batch)
    outputs = trainer.model(batch["pixel_values"])
    shown = batch["labels"] != HIDDEN
    ce = supervised_loss(outputs.ce_logits[shown], batch["labels"][shown]).mean()
    kd = distillation_loss(outputs.kd_logits, batch["teacher_logits"], 3.0)
    torch.testing.assert_close(loss, 0.3 * ce + 0.7 * (kd[shown].mean() + kd[~shown].mean()))


def test_each_loss_moves_its_own_head_only(tmp_path: Path) -> None:
    for objective, idle in (("ce", "kd_head"), ("kd", "ce_head")):
        trainer = dho(tmp_path, objective=objective)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
        assert not any(name.startswith(idle) for name in moved)
        assert {"ce_head.weight", "kd_head.weight"} & moved


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    whole = dho(tmp_path / "whole", per_device_train_batch_size=4, unlabeled_batch_size=8)
    parts = dho(tmp_path / "parts", gradient_accumulation_steps=2)
    for trainer in (whole, parts):
        trainer.train()
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-4)  # pyright: ignore[reportArgumentType]
    norms = [losses_of(trainer, "grad_norm") for trainer in (parts, whole)]  # pyright: ignore[reportArgumentType]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_ranks_change_nothing(tmp_path: Path, ranks: Any) -> None:
    test = {"test_dataset": pictures(3, seed=2)}
    alone: Any = dho(tmp_path / "alone", test, per_device_train_batch_size=4, unlabeled_batch_size=8)
    alone.train()
    expected = [
        [entry["loss"], entry["grad_norm"], entry["ce"]] for entry in alone.state.log_history if "loss" in entry
    ]
    found = ranks["dho ddp"]
    for rank in found:
        assert rank["steps"] == [pytest.approx(step, rel=1e-3) for step in expected]
        assert rank["test"] == losses_of(alone, "test_accuracy")
        assert rank["choice"] == [alone.model.config.alpha, alone.model.config.beta]
    assert found[0]["weights"] == found[1]["weights"]


def test_alpha_and_beta_are_chosen_on_validation_rows_and_saved(tmp_path: Path) -> None:
    validation, test = pictures(4, seed=1), pictures(4, seed=2)
    trainer: Any = dho(tmp_path, {"eval_dataset": validation, "test_dataset": test})
    trainer.train()
    output = trainer.predict(trainer.eval_dataset)
    ce, kd = map(torch.as_tensor, output.predictions)
    found = search_interpolation(ce, kd, torch.tensor(validation["label"]))
    assert (trainer.model.config.alpha, trainer.model.config.beta) == (found.alpha, found.beta)
    written = json.loads((tmp_path / CHOICE).read_text())
    assert (written["alpha"], written["beta"], written["split"], written["rows"]) == (
        found.alpha,
        found.beta,
        "validation",
        12,
    )
    assert len(written["grid"]) == 147
    assert [*written["grid"][1].values()] == pytest.approx(found.grid[1])
    assert losses_of(trainer, "test_accuracy")
    trainer.save_model()
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert (again.config.alpha, again.config.beta) == (found.alpha, found.beta)


def test_rows_are_measured_in_the_form_that_the_constructor_takes(tmp_path: Path) -> None:
    rows = pictures(4, seed=2)
    trainer: Any = dho(tmp_path, {"test_dataset": rows})
    accuracy = trainer.evaluate(rows)["eval_accuracy"]
    assert accuracy == trainer.evaluate(trainer.test_dataset)["eval_accuracy"]
    assert accuracy == trainer.predict(rows).metrics["test_accuracy"]


def test_the_test_rows_choose_nothing(tmp_path: Path) -> None:
    chosen = []
    for seed in (2, 3):
        test = pictures(4, seed=seed)
        shuffled = Dataset.from_dict({"image": test["image"], "label": test["label"][::-1]}, features=test.features)
        trainer: Any = dho(tmp_path, {"test_dataset": test if seed == 2 else shuffled})
        trainer.train()
        chosen.append((trainer.choice, [value.sum().item() for value in trainer.model.parameters()]))
    assert chosen[0] == chosen[1]


def test_given_alpha_and_beta_need_no_validation(tmp_path: Path) -> None:
    trainer = dho(tmp_path, {"eval_dataset": None}, alpha=0.0, beta=4.0)
    trainer.train()
    assert (trainer.model.config.alpha, trainer.model.config.beta) == (0.0, 4.0)
    assert not (tmp_path / CHOICE).exists()


@pytest.mark.parametrize(("objective", "alpha"), [("ce", 1), ("kd", 0), ("single_head", 1)])
def test_baselines_predict_with_one_head(tmp_path: Path, objective: str, alpha: float) -> None:
    trainer: Any = dho(tmp_path, {"test_dataset": pictures(3, seed=2)}, objective=objective)
    trainer.train()
    assert (trainer.model.config.alpha, trainer.model.config.beta) == (alpha, 1.0)
    assert not (tmp_path / CHOICE).exists()
    assert len(losses_of(trainer, "gradient_cosine")) == (4 if objective == "single_head" else 0)
    assert ("ce" in trainer.state.log_history[0]) == (objective != "kd")
    assert ("kd_unlabeled" in trainer.state.log_history[0]) == (objective != "ce")


def test_baselines_take_the_same_number_of_steps(tmp_path: Path) -> None:
    steps = {objective: len(dho(tmp_path, objective=objective).get_train_dataloader()) for objective in ("dho", "ce")}
    assert steps == {"dho": 6, "ce": 6}


def test_the_gradients_cosine_is_that_of_the_features(tmp_path: Path) -> None:
    trainer: Any = dho(tmp_path, max_steps=1)
    batch = batch_of(trainer)
    labeled = batch["labels"] != HIDDEN
    outputs = trainer.model(batch["pixel_values"])
    label = torch.nn.functional.one_hot(batch["labels"][labeled], 3)
    softened = (outputs.kd_logits / 2).softmax(-1) - (batch["teacher_logits"] / 2).softmax(-1)
    ce = (outputs.ce_logits.softmax(-1)[labeled] - label) @ trainer.model.ce_head.weight
    kd = softened[labeled] @ trainer.model.kd_head.weight
    expected = torch.nn.functional.cosine_similarity(ce.flatten(), kd.flatten(), dim=0).item()
    trainer.train()
    assert losses_of(trainer, "gradient_cosine") == [pytest.approx(expected, rel=1e-3, abs=1e-4)]


def test_the_conflict_is_measured_in_its_own_steps(tmp_path: Path) -> None:
    trainer: Any = dho(tmp_path, conflict_steps=2)
    trainer.train()
    assert ["gradient_cosine" in entry for entry in trainer.state.log_history[:4]] == [False, True, False, True]


def test_the_conflict_is_drawn(tmp_path: Path, caplog: Any) -> None:
    dho(tmp_path / "drawn", plot_conflict=True).train()
    with Image.open(tmp_path / "drawn" / "gradient_conflict.png") as plot:
        red, _, blue = np.asarray(plot.convert("RGB")).astype(int).reshape(-1, 3).T
        # The line; frame, zero and text are black.
        assert (blue > red + 50).sum() > 100
    short: Any = dho(tmp_path / "short", max_steps=2, logging_steps=3, plot_conflict=True)
    short.train()
    assert short.choice is not None
    assert not (tmp_path / "short" / "gradient_conflict.png").exists()


def test_the_student_learns(tmp_path: Path) -> None:
    test = {"test_dataset": pictures(10, seed=5)}
    trainer: Any = dho(tmp_path, test, max_steps=40, learning_rate=3e-3, keep_rows=True)
    trainer.train()
    assert losses_of(trainer, "test_accuracy")[0] > 0.8


def test_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    whole: Any = dho(tmp_path / "whole", max_steps=8)
    whole.train()
    dho(tmp_path / "cut", max_steps=8, save_strategy="steps", save_steps=4).train()
    resumed: Any = dho(tmp_path / "cut", max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert losses_of(resumed)[4:] == pytest.approx(losses_of(whole)[4:], rel=1e-5)


def test_kept_rows_are_the_rows(tmp_path: Path) -> None:
    kept, fresh = (dho(tmp_path, keep_rows=keep).train_dataset for keep in (True, False))
    for _ in range(2):
        assert torch.equal(kept[3]["pixel_values"], fresh[3]["pixel_values"])
    assert 3 in kept._kept
    assert not fresh._kept


def test_augmentation_keeps_size_and_changes_pixels() -> None:
    rows = ClassRows(pictures(1), pixels(), augmentation="crop_flip")
    image = rows.raw(0)
    torch.manual_seed(0)
    others = [augmented(image, "crop_flip") for _ in range(4)]
    assert all(other.size == image.size for other in others)
    assert len({other.tobytes() for other in others}) > 1


def test_fewer_labels_are_among_more() -> None:
    labels = [row % 3 for row in range(60)]
    one, four = (hide_labels(labels, NAMES, count, None, 7) != HIDDEN for count in (1, 4))
    assert one.sum() == 3
    assert four.sum() == 12
    assert (four | ~one).all()
    assert ((hide_labels(labels, NAMES, None, 0.1, 7) != HIDDEN).sum()) == 6
    assert (hide_labels(labels, NAMES, 4, None, 7) == hide_labels(labels, NAMES, 4, None, 7)).all()
    assert (hide_labels(labels, NAMES, 4, None, 7) != hide_labels(labels, NAMES, 4, None, 8)).any()


# Bad input


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"alpha": 1.5, "beta": 1.0}, "alpha is 1.5"),
        ({"alpha": 0.5, "beta": 0.0}, "beta is 0.0"),
        ({"alpha": 0.5}, "alpha and beta go together"),
        ({"alphas": [0.5, 2.0]}, r"alphas\[1\] is 2.0; give a number from 0 to 1"),
        ({"betas": [-1.0]}, r"betas\[0\] is -1.0; give a number above 0"),
        ({"betas": []}, "at least one of each"),
        ({"objective": "ce", "alpha": 0.5, "beta": 1.0}, "predicts with one"),
        ({"ce_weight": 1.2}, "ce_weight is 1.2"),
        ({"ce_weight": 1.0}, "leaves a head without a loss"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"unlabeled_batch_size": 0}, "unlabeled_batch_size is 0"),
        ({"labels_per_class": 0}, "labels_per_class is 0; give 1 or more"),
        ({"labels_per_class": 1, "label_fraction": 0.1}, "exclude each other"),
        ({"label_fraction": 0.0}, "label_fraction is 0.0"),
        ({"objective": "both"}, "objective is 'both'"),
        ({"keep_rows": True, "augmentation": "flip"}, "keep_rows keeps what augmentation"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DHOConfig(str(tmp_path), report_to="none", **settings)


def test_an_empty_unlabelled_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no unlabelled row"):
        dho(tmp_path, labels_per_class=None)
    dho(tmp_path, labels_per_class=None, objective="ce").train()


def test_a_class_without_labelled_images_is_refused(tmp_path: Path) -> None:
    rows = pictures(12).filter(lambda row: row["label"] != 2)
    with pytest.raises(ValueError, match="Class 'blue' has no labelled row"):
        dho(tmp_path, {"train_dataset": rows, "teacher": answers(24)})
    with pytest.raises(ValueError, match="Class 'red' has 12 rows"):
        dho(tmp_path, labels_per_class=13)


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    rows = pictures(12)
    more = Dataset.from_dict({"image": rows["image"], "label": [7, *rows["label"][1:]]}, features=rows.features)
    with pytest.raises(ValueError, match="label 7, but the student knows 3 classes"):
        dho(tmp_path, {"train_dataset": more})


def test_several_classes_per_row_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [[0, 1], [1, 0]]})
    with pytest.raises(ValueError, match="several classes per row"):
        dho(tmp_path, {"train_dataset": rows})


def test_teachers_of_other_classes_or_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="answers with 5 classes, the data has 3"):
        dho(tmp_path, {"teacher": answers(36, 5)})
    with pytest.raises(ValueError, match="logits of 35 rows, and 36"):
        dho(tmp_path, {"teacher": answers(36)[1:]})
    with pytest.raises(ValueError, match="NaN or infinity"):
        dho(tmp_path, {"teacher": answers(36).index_fill(0, torch.tensor(3), torch.nan)})
    with pytest.raises(ValueError, match="needs a teacher"):
        dho(tmp_path, {"teacher": None})


def test_a_choice_without_validation_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chosen on validation rows, and there are none"):
        dho(tmp_path, {"eval_dataset": None})


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    rows = pictures(12)
    images = [*rows["image"]]
    images[5] = {"bytes": b"no picture", "path": "broken.png"}
    broken = Dataset.from_dict({"image": images, "label": rows["label"]}, features=rows.features)
    with pytest.raises(ValueError, match=r"Row 5 of train \(broken.png\) cannot be read as an image"):
        _ = [dho(tmp_path, {"train_dataset": broken}).train_dataset[row] for row in range(6)]


# The command line


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its data, teacher and student's config in one folder."""
    return class_recipe(tmp_path_factory.mktemp("recipe"))


def train(recipe: Path, output: Path, *flags: str) -> int:
    return main(["train", str(recipe), "--output_dir", str(output), *flags])


def test_a_recipe_trains_chooses_tests_and_saves(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(recipe, tmp_path / "run") == 0
    assert "Asking the teacher about 36 rows, once" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / CHOICE).read_text())["rows"] == 12
    for name in ("eval_results.json", "test_results.json", "preprocessor_config.json", "model.safetensors"):
        assert (tmp_path / "run" / name).is_file()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == dict(enumerate(NAMES))


def test_the_teacher_is_asked_once_for_all_runs(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    cache = str(tmp_path / "logits")
    assert train(recipe, tmp_path / "one", "--teacher_cache", cache) == 0
    capsys.readouterr()
    assert train(recipe, tmp_path / "two", "--teacher_cache", cache, "--labels_per_class", "4") == 0
    assert "Asking the teacher" not in capsys.readouterr().err
    alone = yaml.safe_load(recipe.read_text())
    del alone["teacher"]
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
    assert train(tmp_path / "alone.yaml", tmp_path / "three", "--teacher_cache", cache) == 0
    assert train(recipe, tmp_path / "four", "--teacher_cache", cache, "--max_train_rows", "30") == 2
    assert "made with another rows" in capsys.readouterr().err


def test_a_later_stage_is_checked_before_the_first_is_trained(recipe: Path) -> None:
    check = METHODS["dho"].check
    assert check is not None
    check(recipe_of(str(recipe), []).parse())
    with pytest.raises(UserError, match="no unlabelled row"):
        check(recipe_of(str(recipe), ["--labels_per_class", "12"]).parse())


def test_its_logits_can_be_built_before_any_training(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    build, cache = ["cache", "build", str(recipe)], ["--teacher_cache", str(tmp_path / "logits")]
    assert main([*build, *cache, "--dry_run", "true"]) == 0
    assert "teacher's pass" in capsys.readouterr().out
    assert not (tmp_path / "logits").exists()
    assert main([*build, *cache]) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'logits'}\n")
    assert train(recipe, tmp_path / "run", *cache) == 0
    assert "Asking the teacher" not in capsys.readouterr().err
    assert main(build) == 2
    assert "`teacher_cache` (the folder to write)" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "expected"), [("0", torch.float32), ("1", torch.bfloat16)])
def test_half_types_are_computed_where_the_cpu_has_them(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, value: str, expected: torch.dtype
) -> None:
    monkeypatch.setenv(NATIVE_BF16, value)
    monkeypatch.setattr("mmkd.precision._warned", [])
    loaded, load = [], TransformersEmbedder.load

    def recorded(*args: Any, **kwargs: Any) -> TransformersEmbedder:
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(TransformersEmbedder, "load", recorded)
    assert train(recipe, tmp_path / "run", "--teacher_dtype", "bfloat16", "--bf16", "true") == 0
    assert [embedder.model.dtype for embedder in loaded] == [expected]
    record = json.loads(next((tmp_path / "run").glob("*/class_logits.json")).read_text())
    assert record["identity"]["dtype"] == str(expected).removeprefix("torch.")
    assert caplog.text.count("is computed in float32") == (value == "0")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--labels_per_clas", "3"], "Did you mean 'labels_per_class'?"),
        (["--alpha", "2", "--beta", "1"], "alpha is 2"),
        (["--teacher_server", "http://localhost:1"], "does not read teacher_server"),
        (["--use_peft", "true"], "trains the whole student"),
        (["--teacher_kind", "tip_adaptr"], "masked. Did you mean 'tip_adapter'?"),
        (["--head_init", "text"], "the teacher's width"),
    ],
)
def test_bad_flags_say_what_to_do(recipe: Path, tmp_path: Path, capsys: Any, flags: list[str], says: str) -> None:
    assert train(recipe, tmp_path / "run", *flags) == 2
    assert says in capsys.readouterr().err


def test_tip_adapter_trains_through_the_command_line(recipe: Path, tmp_path: Path) -> None:
    assert train(recipe, tmp_path / "run", "--teacher_kind", "tip_adapter") == 0


def test_dry_run_asks_a_few_rows_and_trains_nothing(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(recipe, tmp_path / "run", "--dry_run") == 0
    text = capsys.readouterr().out
    assert "6 labelled, 30 unlabelled" in text
    assert "zero_shot" in text
    assert not (tmp_path / "run").exists()


def test_a_dry_run_judges_the_teacher_on_rows_of_all_classes() -> None:
    """Files lie class after class, and a teacher that always says the first one is right on a third of them."""
    rows = np.repeat(np.arange(3), 400)
    places = classification._sampled(rows)
    assert len(places) == classification._JUDGED
    right = rows[places] == 0
    text = classification._accuracy(right)
    assert text == f"{right.mean():.0%} of 256 rows drawn at random right (95 % interval 24% to 35%)"
    assert (classification._sampled(np.where(rows == 1, rows, HIDDEN)) // 400 == 1).all()
    assert "no row has a label" in classification._accuracy(right[:0])
    assert classification._accuracy(np.ones(10, bool)).endswith("interval 72% to 100%)")


def examined(recipe: Path, **keys: Any) -> list[Finding]:
    changed = {**yaml.safe_load(recipe.read_text()), "output_dir": str(recipe.parent / "none"), **keys}
    path = recipe.with_name("examined.yaml")
    path.write_text(yaml.safe_dump({key: value for key, value in changed.items() if value is not None}))
    return examine(recipe_of(str(path)).parse())


def test_doctor_and_plan_know_recipes_of_classes(recipe: Path, capsys: Any) -> None:
    assert main(["doctor", str(recipe)]) == 0
    text = capsys.readouterr().out
    for words in ("3 classes, 12 labelled rows of each", "6 rows are learnt with their label, 30 without", "36 of 36"):
        assert words in text
    assert "Sound: 0 problems, 0 warnings" in text
    assert main(["plan", str(recipe), "--gpu", "L4", "--price", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "6 rows on each" in text
    assert "steps of the run 2" in text
    assert "once over 36 rows" in text
    flops = 2 * 6 * sum(part.numel() for name, part in vit().named_parameters() if part.ndim > 1)
    assert float(text.split("TFLOPs per optimizer step ")[1].split()[0]) * 1e12 > flops
    assert main(["plan", str(recipe), "--memory", "0.0001"]) == 1


@pytest.mark.parametrize(
    ("keys", "name", "says"),
    [
        ({"use_peft": True}, "settings", "trains the whole student"),
        ({"data": "classification/not_there"}, "data", "not_there"),
        ({"labels_per_class": None}, "labels", "There is no unlabelled row"),
        ({"labels_per_class": 40}, "labels", "so labels_per_class 40 cannot be"),
        ({"teacher": "not/there/at/all"}, "teacher", "not/there/at/all"),
        ({"teacher_kind": "classifier"}, "teacher", "classes"),
        ({"teacher": "STUDENT"}, "teacher", "does not embed images and texts in one space"),
        ({"student": "not/there/at/all"}, "student", "has no loadable image processor"),
    ],
)
def test_doctor_names_what_a_run_of_classes_cannot_use(
    recipe: Path, keys: dict[str, Any], name: str, says: str
) -> None:
    keys = {key: str(recipe.parent / "student") if value == "STUDENT" else value for key, value in keys.items()}
    problems = [one for one in examined(recipe, **keys) if one.severity == "problem"]
    assert [one.name for one in problems] == [name]
    assert says in problems[0].message


def test_doctor_names_pictures_that_cannot_be_read(recipe: Path, tmp_path: Path) -> None:
    rows = pictures(12)
    cells = [*rows["image"][:4], {"bytes": b"no picture", "path": "broken.png"}, *rows["image"][5:]]
    broken = Dataset.from_dict({"image": cells, "label": rows["label"]}, features=rows.features)
    broken.to_parquet(str(tmp_path / "train.parquet"))
    data = yaml.safe_load((recipe.parent / "data.yaml").read_text())
    data["data_files"]["train"] = str(tmp_path / "train.parquet")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    (one,) = [one for one in examined(recipe, data=str(tmp_path / "data.yaml")) if one.severity == "problem"]
    assert one.name == "images"
    assert "Row 4 of" in one.message


# Texts


@pytest.fixture(scope="module")
def text_recipe(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of texts of two classes, a tiny BERT and an LLM that is asked."""
    folder = tmp_path_factory.mktemp("texts")
    for split, rows in (("train", 20), ("validation", 6), ("test", 6)):
        written = [{"text": f"a {'good' if row % 2 else 'bad'} one, {row}", "label": row % 2} for row in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, written)))
    tokenizer = AutoTokenizer.from_pretrained(tiny["teacher"])
    tokenizer.save_pretrained(folder / "student")
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    BertConfig(vocab_size=len(tokenizer), **sizes).save_pretrained(folder / "student")
    data = {
        "source": "json",
        "data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
        "splits": {split: split for split in ("train", "validation", "test")},
        "text": "text",
        "class_names": ["bad", "good"],
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    run = yaml.safe_load(
        "{method: dho, teacher_kind: question, student_init: random, labels_per_class: 2, max_steps: 2, "
        "per_device_train_batch_size: 2, unlabeled_batch_size: 4, save_strategy: 'no', report_to: none}"
    )
    names = {"teacher": tiny["teacher"], "student": folder / "student", "data": folder / "data.yaml"}
    run |= {key: str(path) for key, path in names.items()}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def test_a_text_student_learns_from_an_llm(text_recipe: Path, tmp_path: Path) -> None:
    assert train(text_recipe, tmp_path / "run") == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "bad", 1: "good"}
    answer: Any = pipeline("text-classification", str(tmp_path / "run"), device="cpu")("a good one", top_k=None)
    assert sum(one["score"] for one in answer) == pytest.approx(1)


def test_texts_have_no_prompts(text_recipe: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(text_recipe, tmp_path / "run", "--teacher_kind", "zero_shot") == 2
    assert "texts need classifier or question" in capsys.readouterr().err
