"""student_init: prune in a recipe, and `mmkd prune`: what is measured, searched, kept and reported."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.preflight.empty_models import empty_student
from mmkd.preflight.facts import student_side
from mmkd.publish.summary import _start
from mmkd.recipe.calibration_rows import calibration_batches, has_rows
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from mmkd.recipe.run_models import load_student, load_teacher, student_processing_class
from mmkd.recipe.run_pruning import FOUND
from scripts.make_tiny_models import sentences
from tests.forked import run_ranks
from tests.vlms import make_llava, vision_rows


@pytest.fixture
def recipe(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A KD run whose student is cut out of the teacher, with texts to train on and others held out."""
    (tmp_path / "train.txt").write_text("\n".join(sentences(12)))
    (tmp_path / "held_out.txt").write_text("\n".join(sentences(6, seed=9)))
    files = {"train": "train.txt", "eval": "held_out.txt"}
    data = {"name": "words", "source": "text", "data_files": files, "splits": {"train": "train", "eval": "eval"}}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(data))
    keys: dict[str, Any] = {"method": "kd", "teacher": str(tiny["teacher"]), "student_init": "prune"}
    keys |= {"data": str(tmp_path / "words.yaml"), "output_dir": str(tmp_path / "run"), "report_to": "none"}
    keys |= {"bf16": False, "max_steps": 1, "max_length": 32, "prune_calibration_rows": 6}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "recipe.yaml"


def student_of(recipe: Path, flags: Sequence[str]) -> Any:
    run = recipe_of(recipe, flags).parse()
    assert run.arguments.teacher is not None
    return load_student(run, load_teacher(run, run.arguments.teacher))


WIDTHS = ["--student_hidden_size", "16", "--student_intermediate_size", "24"]


@pytest.mark.parametrize("importance", ["weights", "activations", "gradients"])
@pytest.mark.parametrize("layers", ["even", "block_influence", "loss"])
def test_every_importance_makes_a_student_that_trains(recipe: Path, importance: str, layers: str) -> None:
    flags = ["--prune_importance", importance, "--prune_layer_importance", layers, "--student_layers", "2", *WIDTHS]
    trainer = build_trainer(recipe_of(recipe, flags).parse())
    config = trainer.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 16, 24)
    trainer.train()


def test_importance_decides_what_stays(recipe: Path) -> None:
    students = [student_of(recipe, [*WIDTHS, "--prune_importance", name]) for name in ("weights", "activations")]
    again = student_of(recipe, [*WIDTHS, "--prune_importance", "activations"])
    weights = [student.model.embed_tokens.weight for student in (*students, again)]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_calibration_rows_are_of_the_training_data(recipe: Path) -> None:
    run = recipe_of(recipe, WIDTHS).parse()
    tokenizer = student_processing_class(run)
    seen: set[str] = set()
    for batch in calibration_batches(run, tokenizer, 6):
        assert batch["labels"][batch["attention_mask"] == 0].eq(-100).all()
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen.add(tokenizer.decode(row[mask.bool()]))
    assert len(seen) == 6
    train, held_out = set(sentences(12)), set(sentences(6, seed=9))
    texts = {text.removesuffix(tokenizer.eos_token).strip() for text in seen}
    assert texts <= {text.strip() for text in train}
    assert not texts & held_out
    assert has_rows(run, "eval")


def test_target_params_are_met_and_kept_for_a_run_that_goes_on(recipe: Path) -> None:
    flags = ["--target_params", "40k", "--prune_importance", "activations"]
    student = student_of(recipe, flags)
    whole = AutoModelForCausalLM.from_pretrained(yaml.safe_load(recipe.read_text())["teacher"]).num_parameters()
    assert student.num_parameters() <= 40_000 < whole
    record = recipe.parent / "run" / FOUND
    content = json.loads(record.read_text())
    assert content["candidates"][0]["parameters"] == student.num_parameters()
    losses = [each["loss"] for each in content["candidates"]]
    assert losses == sorted(losses)
    # The next time nothing is searched: what is written there counts.
    content["sizes"] |= {"intermediate_size": 8}
    record.write_text(json.dumps(content))
    assert student_of(recipe, flags).config.intermediate_size == 8
    # With another target it is searched again.
    assert student_of(recipe, ["--target_params", "50k"]).num_parameters() > student.num_parameters() * 0.9


def test_sizes_that_were_found_are_those_of_one_model_and_one_target(recipe: Path) -> None:
    def planned(target: str) -> int:
        run = recipe_of(recipe, ["--target_params", target]).parse()
        model: Any = empty_student(run, student_side(run))
        return model.config.intermediate_size

    student_of(recipe, ["--target_params", "40k"])
    record = recipe.parent / "run" / FOUND
    content = json.loads(record.read_text())
    content["sizes"] |= {"intermediate_size": 8}
    record.write_text(json.dumps(content))
    assert planned("40k") == 8
    assert planned("50k") != 8
    content["keys"]["source"] = "another/model"
    record.write_text(json.dumps(content))
    assert planned("40k") != 8
    assert student_of(recipe, ["--target_params", "40k"]).config.intermediate_size != 8


def on_ranks(recipe: Path, jobs: dict[str, Any], **variables: str) -> list[dict[str, Any]]:
    """What each of two ranks saw of the jobs of pruned_ranks.py."""
    folder = recipe.parent
    run_ranks(2, ["-m", "tests.recipe.pruned_ranks", str(recipe), str(folder), json.dumps(jobs)], variables)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def check_ranks(recipe: Path, jobs: dict[str, Any], saw: list[dict[str, Any]]) -> None:
    for name, (how, flags) in jobs.items():
        first, second = (rank[name] for rank in saw)
        assert (first["measured"], second["measured"]) == (1, 0), name
        # The first rank reads weights for all where they are sharded.
        assert first["weights"] == second["weights"] or how == "fsdp2", name
        assert first["losses"] == second["losses"], name
        own = recipe_of(recipe, [*flags, "--output_dir", str(recipe.parent / f"{name}-alone")])
        alone = build_trainer(own.with_(per_device_train_batch_size=4).parse())
        alone.train()
        losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
        assert first["losses"] == pytest.approx(losses, rel=1e-3), name


SPREAD = [*WIDTHS, "--prune_importance", "activations", "--prune_layer_importance", "block_influence"]
SPREAD += [
    "--student_layers",
    "2",
    "--learning_rate",
    "1e-2",
    "--per_device_train_batch_size",
    "2",
    "--logging_steps",
    "1",
]


def test_several_ranks_prune_once_and_have_the_same_student(recipe: Path) -> None:
    found = ["--target_params", "40k", "--prune_importance", "activations"]
    found += ["--per_device_train_batch_size", "2", "--logging_steps", "1"]
    lora = ["--use_peft", "--lora_dropout", "0"]
    jobs = {"given": ("ddp", SPREAD), "found": ("ddp", found), "lora": ("ddp", [*SPREAD, *lora])}
    jobs["sharded"] = ("fsdp2", SPREAD)
    check_ranks(recipe, jobs, on_ranks(recipe, jobs))


@pytest.mark.slow
def test_zero3_cuts_up_a_student_that_was_pruned_whole(recipe: Path) -> None:
    pytest.importorskip("deepspeed")
    lora = ["--use_peft", "--lora_dropout", "0"]
    jobs = {"zero2": ("zero2", SPREAD), "zero3": ("zero3", SPREAD), "lora3": ("zero3", [*SPREAD, *lora])}
    saw = on_ranks(recipe, jobs, DS_ACCELERATOR="cpu")
    for name in jobs:
        assert [rank[name]["measured"] for rank in saw] == [1, 0], name
        assert saw[0][name]["losses"] == saw[1][name]["losses"], name
    assert saw[0]["zero3"]["losses"][0] == pytest.approx(saw[0]["zero2"]["losses"][0], rel=1e-3)


def test_a_latency_that_all_meet_takes_nearly_all_of_the_model(recipe: Path) -> None:
    student_of(recipe, ["--target_latency", "1e6"])
    content = json.loads((recipe.parent / "run" / FOUND).read_text())
    assert all(each["ms_per_token"] < 1e6 for each in content["candidates"])


def test_plan_counts_the_student_that_will_be(recipe: Path) -> None:
    run = recipe_of(recipe, [*WIDTHS, "--prune_importance", "activations", "--student_layers", "2"]).parse()
    empty: Any = empty_student(run, student_side(run))
    assert empty.device.type == "meta"
    student = student_of(recipe, [*WIDTHS, "--student_layers", "2"])
    assert empty.num_parameters() == student.num_parameters()
    searched = recipe_of(recipe, ["--target_params", "40k"]).parse()
    assert empty_student(searched, student_side(searched)).num_parameters() <= 40_000


def test_the_command_writes_a_student_and_says_why(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recipe.parent / "pruned"
    flags = [*WIDTHS, "--student_layers", "2", "--prune_importance", "activations"]
    flags += ["--prune_layer_importance", "block_influence"]
    assert main(["prune", str(recipe), "--output", str(folder), *flags]) == 0
    assert "Perplexity on" in capsys.readouterr().out
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    report = json.loads((folder / "prune_report.json").read_text())
    assert report["parameters"]["after"]["all"] == model.num_parameters()
    assert report["layers"]["text"]["kept"] == sorted(report["layers"]["text"]["kept"])
    scores = report["layers"]["text"]["scores"]
    kept = [scores[layer] for layer in report["layers"]["text"]["kept"]]
    assert min(kept) >= max(scores[layer] for layer in report["layers"]["text"]["removed"])
    (width,) = [each for each in report["units"] if each["kind"] == "hidden"]
    assert (width["before"], len(width["kept"])) == (48, 16)
    assert report["perplexity"]["before"] != report["perplexity"]["after"]
    page = (folder / "prune_report.md").read_text()
    assert "block influence" in page
    assert "perplexity, before training" in page
    assert main(["prune", str(recipe), "--output", str(folder), *flags]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_command_prunes_a_model_without_a_recipe(
    recipe: Path, tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recipe.parent / "pruned"
    texts = ["--data", str(recipe.parent / "train.txt")]
    assert main(["prune", str(tiny["teacher"]), "--output", str(folder), "--student_layers", "1", *texts]) == 0
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1
    for flags, message in (
        (["--student_layers", "1"], "name them with --data"),
        ([*texts], "go together"),
        ([*texts, "--student_init", "pretrained"], "prunes nothing"),
        ([*texts, "--target_params", "many"], "write a number such as"),
        ([*texts, "--target_params", "1k", "--target_latency", "3"], "set one of them"),
    ):
        assert main(["prune", str(tiny["teacher"]), "--output", str(folder / "other"), *flags]) == 2
        assert message in capsys.readouterr().err
        assert not (folder / "other").exists()


def test_a_vision_language_model_is_pruned_by_what_it_does_with_pictures(tmp_path: Path) -> None:
    source = make_llava(tmp_path / "llava", layers=3)
    vision_rows([1] * 6).to_parquet(tmp_path / "rows.parquet")
    flags = ["--data", str(tmp_path / "rows.parquet"), "--student_hidden_size", "16", "--student_layers", "2"]
    flags += ["--student_vision_intermediate_size", "8", "--student_vision_num_attention_heads", "1"]
    flags += ["--prune_importance", "activations", "--prune_layer_importance", "loss", "--prune_calibration_rows", "4"]
    assert main(["prune", str(source), "--output", str(tmp_path / "pruned"), *flags]) == 0
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned")
    assert model.config.text_config.hidden_size == 16
    assert model.config.vision_config.num_attention_heads == 1
    report = json.loads((tmp_path / "pruned" / "prune_report.json").read_text())
    assert {"vision_tower", "connector", "language_model"} < report["parameters"]["after"].keys()
    assert {each["kind"] for each in report["units"]} >= {"hidden", "vision_hidden", "vision_ffn"}


@pytest.mark.parametrize("flags", [["--prune_importance", "activations"], ["--target_params", "1k"], WIDTHS])
def test_keys_of_pruning_go_with_pruning(recipe: Path, flags: list[str]) -> None:
    with pytest.raises(UserError, match="go together"):
        recipe_of(recipe, ["--student_init", "pretrained", "--student", "x", *flags]).parse()


def test_the_card_says_what_was_pruned_by_what() -> None:
    keys: dict[str, Any] = {"student_init": "prune", "teacher": "big/model", "student_layers": [4]}
    assert _start([keys]) == "big/model, pruned to layers [4]"
    keys |= {"target_params": "0.5B", "prune_importance": "activations", "prune_layer_importance": "block_influence"}
    assert _start([keys]) == (
        "big/model, pruned to layers [4], target_params 0.5B, chosen by activations and block influence of layers on "
        "64 training rows"
    )
