"""mmkd plan: what does not depend on the machine, and what it says and refuses through the CLI."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.commands.main import main
from mmkd.preflight import facts
from mmkd.preflight import plan as plans
from mmkd.preflight.count import Passes
from mmkd.preflight.dry_run import longest_row
from mmkd.preflight.estimate import ModelCosts, Shape, Work, estimate_memory, memory_of
from mmkd.preflight.hardware import DEVICES, choose_device
from mmkd.preflight.plan import seconds_of
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import build_token_trainer
from mmkd.units import readable_size
from scripts.make_tiny_models import sentences
from tests.vlms import make_llava, vision_rows

PASSES = Passes(100.0, 200.0, 64.0, 8.0, 4)
STUDENT = ModelCosts(1000.0, 250.0, 1000.0, 90.0, 16, 32, PASSES)
TEACHER = ModelCosts(6000.0, 0.0, 0.0, 120.0, 24, 32, replace(PASSES, backward=0.0, saved=0.0))
WORK = Work(Shape(2, 64, 40.0, 0.0, 0.0, 1.0), STUDENT, TEACHER, 10.0, 20.0, 8.0, False)


def test_sharding_divides_what_it_shards() -> None:
    whole = memory_of(WORK, "ddp", 4)
    assert sum(whole.values()) == 1000 + 1000 + 2000 + 6000 + 64 + 30
    assert memory_of(WORK, "zero2", 4) == whole | {"gradients": 250, "optimizer": 500}
    sharded = {"student weights": 250, "teacher weights": 1500, "gathered layers": 240}
    assert memory_of(WORK, "zero3", 4) == whole | {"gradients": 250, "optimizer": 500} | sharded
    assert memory_of(WORK, "fsdp2", 4) == memory_of(WORK, "zero3", 4)
    for strategy in ("ddp", "zero2", "zero3", "fsdp2"):
        assert memory_of(WORK, strategy, 1) == whole


def test_checkpointing_trades_memory_for_a_forward_pass() -> None:
    again = replace(WORK, checkpointing=True)
    assert again.activations == 8 + 64 / 4
    assert again.flops == WORK.flops + PASSES.forward
    assert WORK.flops == 100 + 200 + 100 + 2 * 40 * 32 * (6 * 16 + 2 * 24)
    assert replace(WORK, teacher=None).flops == 100 + 200 + 2 * 40 * 32 * 6 * 16


def test_time_grows_with_what_is_computed_and_sent() -> None:
    device = replace(DEVICES["H100"], flops=1e3, utilisation=0.5, link=1e3)
    assert seconds_of(WORK, "ddp", 1, 2, device) == (2 * WORK.flops / 500, 0)
    # A ring sends each gradient twice, whatever the accumulation.
    assert seconds_of(WORK, "ddp", 4, 2, device)[1] == 2 * 0.75 * 1
    # Sharded weights are gathered for every pass of every micro-batch.
    assert seconds_of(WORK, "zero3", 4, 2, device)[1] == pytest.approx(2 * 0.75 * (2 + 6 + 1))


def test_the_device_is_the_least_that_has_the_memory() -> None:
    assert choose_device(None, 30, None).name == "A100-40GB"
    assert choose_device(None, 30, None).memory == 30 * 2**30
    assert choose_device("L4", 16, 0.2) == replace(DEVICES["L4"], memory=16 * 2**30, utilisation=0.2)
    assert choose_device("here", None, None).flops > 1e8
    for arguments, reason in [
        (("H800", None, None), "not known; choose one of L4"),
        ((None, None, None), "--memory"),
        ((None, -1.0, None), "GiB of one device"),
        (("L4", None, 1.5), "at most 1"),
    ]:
        with pytest.raises(ValueError, match=reason):
            choose_device(*arguments)


@pytest.fixture
def recipe(tiny: dict[str, Path], tmp_path: Path) -> Any:
    pairs = zip(sentences(24, seed=1), sentences(24, seed=2), strict=True)
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"name": "rows", "source": "json", "data_files": {"train": "rows.jsonl"}, "eval_rows": 4}
    columns = {"columns": {"messages": {"column": "messages"}}}
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(source | columns))

    def write(**keys: Any) -> str:
        common = {"method": "kd", "student": str(tiny["student"]), "teacher": str(tiny["teacher"])}
        common |= {"data": str(tmp_path / "rows.yaml"), "output_dir": str(tmp_path / "run"), "max_length": 64}
        common |= {"assistant_only_loss": True, "report_to": "none"}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(common | keys))
        return str(tmp_path / "recipe.yaml")

    return write


def said(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_plan_says_memory_time_cache_and_cost(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = set(tmp_path.rglob("*"))
    path = recipe(num_train_epochs=2, per_device_train_batch_size=2)
    assert main(["plan", path, "--gpus", "2", "--memory", "24", "--price", "1000000"]) == 0
    text = said(capsys)
    for column in ("ddp zero2 zero3 fsdp2", "teacher weights", "fits yes yes yes yes", "steps of the run 10 10 10 10"):
        assert column in text
    assert "cost of the run" in text
    assert "A teacher_cache takes" in text
    # It plans, and writes nothing.
    assert set(tmp_path.rglob("*")) == before | {tmp_path / "recipe.yaml"}


def test_a_plan_with_a_server_says_what_it_sends(recipe: Any, capsys: pytest.CaptureFixture) -> None:
    path = recipe(per_device_train_batch_size=2, teacher_server=["http://127.0.0.1:9"], teacher_server_signal="hidden")
    assert main(["plan", path, "--memory", "24"]) == 0
    (tokens,) = re.findall(r"2 x (\d+) tokens on each", text := said(capsys))
    # Twice so many states of 48 numbers in float32.
    assert f"The servers send {readable_size(2 * int(tokens) * 48 * 4)} per optimizer step as hidden" in text
    assert "top_k" not in text
    assert main(["plan", path, "--memory", "24", "--teacher_server_signal", "auto"]) == 0
    assert re.search(r"as hidden, .* Gbit/s .* or .* per optimizer step as top_k", said(capsys))


def test_a_plan_that_fits_nowhere_says_what_would_help(recipe: Any, capsys: pytest.CaptureFixture) -> None:
    path = recipe(activation_checkpointing=False, per_device_train_batch_size=8)
    assert main(["plan", path, "--memory", "0.001"]) == 1
    text = said(capsys)
    assert "fits no" in text
    for way in ("a teacher_cache:", "activation_checkpointing: true:", "per_device_train_batch_size: 1:", "LoRA"):
        assert way in text


def test_a_cached_or_served_teacher_is_not_in_the_process(recipe: Any, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", recipe(teacher_cache="runs/none"), "--gpu", "L4"]) == 0
    text = said(capsys)
    assert "teacher weights" not in text
    assert "A teacher_cache takes" in text


@pytest.mark.parametrize("keys", [{}, {"use_peft": True}, {"student": None, "student_init": "prune"}])
def test_all_commands_tell_one_estimate(
    recipe: Any, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = recipe(use_cpu=True, bf16=False, **keys, **({"student_layers": [1]} if "student_init" in keys else {}))
    works: list[Work] = []
    monkeypatch.setattr(plans, "memory_of", lambda work, *how: works.append(work) or memory_of(work, *how))
    assert main(["plan", path, "--gpu", "here"]) == 0
    parts = {name: readable_size(size) for name, size in memory_of(works[0], "ddp", 1).items()}
    assert {"student weights", "gradients", "optimizer", "teacher weights", "activations", "loss"} <= {*parts}
    capsys.readouterr()
    main(["doctor", path])
    assert ", ".join(f"{name} {size}" for name, size in parts.items()) in said(capsys)
    assert main(["train", path, "--dry_run"]) == 0
    told = dict(re.findall(r"memory: ([\w ]+?) +│ +([\d.]+ \w+)", capsys.readouterr().out))
    assert told.pop("at least") == readable_size(sum(memory_of(works[0], "ddp", 1).values()))
    assert told == parts


def test_a_dry_run_counts_the_longest_row_of_all(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recipe.read(recipe(use_cpu=True, bf16=False)).parse()
    trainer = build_token_trainer(run)
    longest = longest_row(trainer)
    monkeypatch.setattr(facts, "TRAIN_ROWS", 1)
    sampled, whole = estimate_memory(run), estimate_memory(run, longest)
    assert estimate_memory(run, 1) == sampled
    assert sampled["activations"] < whole["activations"]


def test_pictures_count(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = []
    for number, row in enumerate(vision_rows([1, 2] * 6)):
        data: Any = row
        path = tmp_path / f"{number}.png"
        data["images"][0].save(path)
        lines.append(json.dumps({"messages": data["messages"], "images": [str(path)] * len(data["images"])}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = {"name": "rows", "source": "json", "data_files": {"train": "rows.jsonl"}, "eval_rows": 2}
    columns = {"columns": {"messages": "messages", "images": "images"}}
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(source | columns))
    models = {"student": str(make_llava(tmp_path / "student")), "teacher": str(make_llava(tmp_path / "teacher"))}
    assert main(["plan", recipe(**models, max_length=128), "--gpu", "L4"]) == 0
    assert "fits yes" in said(capsys)

    # Through the switch a gradient goes through the teacher too.
    keys = {"method": "llava_kd", "trainable": ["vision_tower", "connector", "language_model"], "max_length": 128}
    plain, switched = (
        estimate_memory(Recipe.read(recipe(**models, **keys, **switch)).parse())
        for switch in ({}, {"switch": {"weight": 1.0}})
    )
    assert {name for name in plain if plain[name] != switched[name]} == {"activations"}
    assert 1.5 * plain["activations"] < switched["activations"] < 4 * plain["activations"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--memory", "24", "--gpus", "0"], "at least one"),
        (["--gpu", "H800"], "choose one of"),
        ([], "Say what the run shall fit"),
        (["--memory", "24", "--learning_rat", "1"], "learning_rate"),
    ],
)
def test_plans_that_cannot_be(recipe: Any, flags: list[str], reason: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", recipe(), *flags]) == 2
    assert reason in capsys.readouterr().err
