"""mmkd-train and mmkd from the outside: what a user types and what comes back."""

import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.commands.main import main
from mmkd.commands.quick_imports import quick_imports
from mmkd.recipe.flags import recipe_of
from scripts.make_tiny_models import sentences
from tests.forked import Forked, run_forked
from tests.helpers import environment

ROOT = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def workplace(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with a text corpus, a data recipe and `recipe.yaml`, a KD run of the tiny models."""
    for split, seed in (("train", 0), ("eval", 1)):
        rows = [json.dumps({"text": text}) for text in sentences(32, seed=seed)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    data: dict[str, Any] = {"name": "words", "license": "CC0-1.0", "source": "json", "columns": {"text": "text"}}
    data |= {
        "data_files": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "splits": {"train": "train", "eval": "eval"},
    }
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(data))
    write_recipe(tmp_path, method="kd", student=str(tiny["student"]), teacher=str(tiny["teacher"]))
    return tmp_path


def write_recipe(folder: Path, name: str = "recipe.yaml", **keys: Any) -> None:
    common = {
        "data": "words.yaml",
        "output_dir": "run",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    (folder / name).write_text(yaml.safe_dump({**common, **keys}))


@pytest.fixture
def mmkd(workplace: Path) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_forked(["-m", "mmkd.commands.main", *arguments], workplace)

    return run


def logged(folder: Path, name: str = "loss") -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_train_writes_a_model_that_transformers_loads(workplace: Path) -> None:
    """In a process that imports all that it needs, where those of the other tests begin with it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = [sys.executable, "-m", "mmkd.commands.main", "train", "recipe.yaml"]
    done = subprocess.run(command, cwd=workplace, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("step ") and " kl " in line and " tokens/s " in line]) == 4
    assert [line for line in lines if line.startswith("evaluation after step 4 ")]
    assert "it/s" not in done.stderr
    AutoModelForCausalLM.from_pretrained(workplace / "run")
    assert AutoTokenizer.from_pretrained(workplace / "run").chat_template
    results = json.loads((workplace / "run" / "eval_results.json").read_text())
    assert {"eval_kl", "eval_perplexity", "eval_top1_agreement"} <= set(results)


@pytest.mark.parametrize("method", ["sft", "taid"])
def test_the_other_methods_train(mmkd: Run, workplace: Path, tiny: dict[str, Path], method: str) -> None:
    write_recipe(
        workplace, "other.yaml", method=method, student_init="prune", student_layers=2, teacher=str(tiny["teacher"])
    )
    done = mmkd("train", "other.yaml", "--output_dir", "other")
    assert done.returncode == 0, done.stderr
    assert len(logged(workplace / "other")) == 4
    assert json.loads((workplace / "other" / "config.json").read_text())["num_hidden_layers"] == 2


def test_an_adapter_names_the_revision_of_its_model(workplace: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(workplace)
    assert (
        main(["train", "recipe.yaml", "--use_peft", "true", "--model_revision", "v1", "--output_dir", "adapter"]) == 0
    )
    assert json.loads((workplace / "adapter" / "adapter_config.json").read_text())["revision"] == "v1"


def test_flags_win_over_the_recipe(mmkd: Run, workplace: Path) -> None:
    done = mmkd("train", "recipe.yaml", "--max_steps", "2", "--divergence", "jsd", "--output_dir", "short")
    assert done.returncode == 0, done.stderr
    assert len(logged(workplace / "short")) == 2


@pytest.mark.parametrize(
    ("keys", "flags", "reason"),
    [
        ({"temprature": 2}, [], "sets 'temprature', which method kd does not know. Did you mean 'temperature'?"),
        ({"model": "a/b"}, [], "sets 'model', which method kd does not know. Here it is 'student'."),
        ({}, ["--dataset_name", "a/b"], "--dataset_name is no flag of method kd. Here it is 'data'."),
        ({"kernel": "liger"}, [], "sets 'kernel', which method kd does not know. mmkd 0.1 had it,"),
        ({}, ["--kernel", "torch"], "--kernel is no flag of method kd. mmkd 0.1 had it,"),
        ({}, ["--divergense", "jsd"], "--divergense is no flag of method kd. Did you mean 'divergence'?"),
        ({"method": "taidd"}, [], "Did you mean 'taid'?"),
        ({"student_init": "scratch"}, [], "student_init is 'scratch'"),
        ({}, ["max_steps=2"], "max_steps=2 is no flag of method kd; write --key value"),
        ({}, ["--max_step", "2"], "--max_step is no flag of method kd. Did you mean 'max_steps'?"),
        ({"student": None}, [], "There is no student"),
        ({"teacher": None}, [], "Method kd needs a teacher"),
        ({"student_layers": 2}, [], "go together"),
        ({"student_init": "random", "load_in_4bit": True}, [], "A quantised student has no weights to train"),
        ({"load_in_8bit": True}, [], "A quantised student has no weights to train: set use_peft: true"),
        ({"temperature": 0}, [], "temperature is 0"),
        ({"data": "no_such_data"}, [], "no_such_data"),
        ({"student": "nowhere/at/all"}, [], "there is no such folder"),
        ({}, ["--accelerate_config", "zero9"], "zero9"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    workplace: Path, keys: dict[str, Any], flags: list[str], reason: str, capsys: Any, monkeypatch: Any
) -> None:
    recipe = yaml.safe_load((workplace / "recipe.yaml").read_text()) | keys
    recipe = {key: value for key, value in recipe.items() if value is not None}
    (workplace / "bad.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(workplace)
    assert main(["train", "bad.yaml", *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("mmkd: ")
    assert reason in last
    assert not (workplace / "run").exists()


def test_a_missing_recipe_names_what_there_is(mmkd: Run) -> None:
    done = mmkd("train", "kd/quikstart.yaml")
    assert done.returncode == 2
    assert "kd/quickstart.yaml" in done.stderr
    assert "nearest is 'recipe.yaml'" in mmkd("train", "recipie.yaml").stderr


def test_dry_run_reports_and_trains_nothing(mmkd: Run, workplace: Path) -> None:
    done = mmkd("train", "recipe.yaml", "--dry_run")
    assert done.returncode == 0, done.stderr
    for word in ("student", "teacher", "supervised", "optimizer steps", "memory: at least", "first batch, row 1"):
        assert word in done.stdout
    # The part that is learnt is marked as by `mmkd data preview`, and padding is not shown.
    assert "[[" in done.stdout.partition("first batch")[2]
    assert "<|pad|>" not in done.stdout
    assert not (workplace / "run").exists()


def test_recipes_and_env(mmkd: Run, workplace: Path) -> None:
    names = mmkd("recipes", "ls").stdout.split()
    assert "trainers/taid/quickstart.yaml" in names
    assert "data_recipes/python_docs.yaml" in names
    assert "method: kd" in mmkd("recipes", "show", "kd/quickstart").stdout
    assert mmkd("recipes", "cp", "kd/quickstart", "mine.yaml").returncode == 0
    assert "method: kd" in (workplace / "mine.yaml").read_text()
    assert mmkd("recipes", "cp", "kd/quickstart", "mine.yaml").returncode == 2
    versions = mmkd("env").stdout
    assert "transformers 5" in versions
    assert "torch 2" in versions


def test_a_killed_run_resumes_with_the_same_losses(mmkd: Run, workplace: Path) -> None:
    """kill -9 after a checkpoint, and a checkpoint that was being written when the end came."""
    flags = ["--method", "taid", "--max_steps", "12"]
    whole = mmkd("train", "recipe.yaml", *flags, "--output_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    saving = [*flags, "--save_strategy", "steps", "--save_steps", "3"]
    process = Forked(["-m", "mmkd.commands.main", "train", "recipe.yaml", *saving], workplace)
    state = workplace / "run" / "checkpoint-3" / "trainer_state.json"
    deadline = time.monotonic() + 120
    while not state.is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = workplace / "run" / "checkpoint-99"
    newest.mkdir()
    (newest / "trainer_state.json").write_text('{"global_step": 9')
    fresh = mmkd("train", "recipe.yaml", *saving)
    assert fresh.returncode == 2
    assert "--resume_from_checkpoint true" in fresh.stderr
    resumed = mmkd("train", "recipe.yaml", *saving, "--resume_from_checkpoint", "true")
    assert resumed.returncode == 0, resumed.stderr
    assert logged(workplace / "run") == logged(workplace / "whole")
    assert logged(workplace / "run", "taid_t") == logged(workplace / "whole", "taid_t")


def interrupt(workplace: Path, *flags: str) -> tuple[int, str]:
    """Starts a long run, interrupts it once it trains, and gives its exit status and errors."""
    arguments = ["-m", "mmkd.commands.main", "train", "recipe.yaml", "--max_steps", "100000", *flags]
    output, errors = workplace / "output", workplace / "errors"
    with output.open("w") as written, errors.open("w") as complained:
        process = Forked(arguments, workplace, None, written, complained)
    while "/100000" not in output.read_text() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return process.wait(60), errors.read_text()


def test_interrupting_saves_a_checkpoint_and_says_how_to_go_on(workplace: Path) -> None:
    status, errors = interrupt(workplace, "--save_strategy", "steps", "--save_steps", "100000")
    assert status == 130
    assert "--resume_from_checkpoint true" in errors
    (checkpoint,) = (workplace / "run").glob("checkpoint-*")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] > 0


def test_interrupting_a_run_that_saves_nothing(workplace: Path) -> None:
    status, errors = interrupt(workplace)
    assert status == 130
    assert "Nothing was saved yet" in errors


def test_launching_through_accelerate(mmkd: Run, workplace: Path) -> None:
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": True, "num_processes": 1}
    (workplace / "accelerate.yaml").write_text(yaml.safe_dump(config))
    recipe = yaml.safe_load((workplace / "recipe.yaml").read_text()) | {"num_processes": 1, "mixed_precision": "no"}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = mmkd("train", "recipe.yaml", "--accelerate_config", "accelerate.yaml", "--num_processes", "1")
    assert done.returncode == 0, done.stderr
    assert len(logged(workplace / "run")) == 4


# Values of keys and flags


def one_line(workplace: Path, capsys: Any, *flags: str, **keys: Any) -> str:
    """What is said of the recipe with other keys and flags, which is refused in one line."""
    write_recipe(workplace, "bad.yaml", **(yaml.safe_load((workplace / "recipe.yaml").read_text()) | keys))
    capsys.readouterr()
    assert main(["train", "bad.yaml", *flags]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmkd: ")]
    return said


def test_a_value_of_another_type_is_one_line(workplace: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(workplace)
    for name, value, reason in [
        ("learning_rate", "abc", "learning_rate is 'abc', which is no number (float)."),
        ("learning_rate", [1.0], "learning_rate is [1.0], which is no number (float)."),
        ("max_steps", 2.5, "max_steps is 2.5, which is no whole number (int)."),
        ("save_steps", True, "save_steps is True, which is no number (float)."),
        ("dataset_num_proc", "two", "dataset_num_proc is 'two', which is no whole number (int)."),
        ("bf16", "maybe", "bf16 is 'maybe', which is neither true nor false."),
        ("save_strategy", False, "save_strategy is False: YAML reads no, off, yes and on as truth values. Put"),
        (
            "optim",
            "adamwtorch",
            "(--help_keys optim lists them). Did you mean 'adamw_torch'?",
        ),
        ("teacher_tail", "buckets", "choose one of bucket, unbiased, renormalise. Did you mean 'bucket'?"),
        ("max_steps", None, "max_steps is null, and it needs a value. Leave it out for its default, -1."),
        ("teacher", 135, "teacher is 135, which is no text."),
        ("data", ["a.jsonl", "b.jsonl"], "data is ['a.jsonl', 'b.jsonl'], and it takes one source of rows."),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps is 0; give 1 or more."),
        ("fsdp", "full_shard", "fsdp does not shard a run here. Remove it and set accelerate_config: fsdp2"),
        ("fsdp_config", {"version": 2}, "fsdp_config does not shard a run here."),
        ("env", ["A=1"], "write a mapping of variables to values"),
    ]:
        assert reason in one_line(workplace, capsys, **{name: value}), name
    (workplace / "a.jsonl").touch()
    for flags, reason in [
        (["--learning_rate", "abc"], "learning_rate is 'abc', which is no number (float)."),
        (["--max-steps=2.5"], "max_steps is 2.5, which is no whole number (int)."),
        (["--bf16", "maybe"], "bf16 is 'maybe', which is neither true nor false."),
        (["--teacher_tail", "buckets"], "choose one of bucket, unbiased, renormalise. Did you mean 'bucket'?"),
        (["--data", "a.jsonl", "b.jsonl"], "--data takes one source of rows, and b.jsonl is another."),
        (["--learning_rate"], "--learning_rate stands there without a value: write --learning_rate VALUE."),
        (["--fsdp", "full_shard"], "accelerate_config: fsdp2"),
        (["--model_init_kwargs", "{a"], "--model_init_kwargs is no JSON"),
        (
            ["--save_strategy=steps", "--load_best_model_at_end=1"],
            "--load_best_model_at_end requires",
        ),
    ]:
        assert reason in one_line(workplace, capsys, *flags), flags
    assert not (workplace / "run").exists()


def test_none_and_null_mean_nothing_there(workplace: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(workplace)
    write_recipe(workplace, "other.yaml", method="kd", student="s", teacher="t", teacher_cache="c", max_train_rows=3)
    for word in ("null", "none", "None"):
        flags = ["--teacher_cache", word, f"--max_train_rows={word}", "--max_length", word]
        run = recipe_of("other.yaml", flags).parse()
        assert (run.arguments.teacher_cache, run.arguments.max_train_rows, run.training.max_length) == (None,) * 3
    assert (
        recipe_of("other.yaml", ["--teacher_cache", "none", "--teacher_cache", "d"]).parse().arguments.teacher_cache
        == "d"
    )
    write_recipe(workplace, "other.yaml", method="kd", student="s", teacher="t", teacher_cache="none")
    assert recipe_of("other.yaml").parse().arguments.teacher_cache is None
    # To trackers the word means something else.
    assert recipe_of("other.yaml", ["--report_to", "none"]).parse().training.report_to == []


def test_one_value_of_a_list_is_a_list(workplace: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(workplace)
    write_recipe(workplace, "other.yaml", method="kd", student="s", teacher="t", trainable="connector")
    assert recipe_of("other.yaml").parse().training.trainable == ["connector"]


def test_places_and_trackers_are_looked_at_before_models(workplace: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(workplace)
    (workplace / "file").write_text("")
    (workplace / "folder").mkdir()
    (workplace / "model").mkdir()
    for keys, reason in [
        ({"report_to": "clearml"}, "report_to is clearml, which is not installed: pip install clearml, or set"),
        ({"report_to": ["wanb"]}, "report_to is 'wanb'; choose one of none, all, "),
        ({"output_dir": "file/run"}, "file is a file. Name another."),
        ({"student": "my model"}, "The student 'my model' cannot be loaded"),
        ({"student": "model"}, "The student 'model' cannot be loaded: the folder holds nothing;"),
    ]:
        monkeypatch.setattr("transformers.integrations.integration_utils.get_available_reporting_integrations", list)
        assert reason in one_line(workplace, capsys, **keys)
    (workplace / "model" / "adapter_config.json").write_text("{}")
    assert "the folder holds an adapter: merge it" in one_line(workplace, capsys, teacher="model")
    for recipe, reason in [
        ("folder", "'folder' is a folder; it holds no .yaml file."),
        (".", "is a folder; name a recipe in it, such as"),
        ("empty.yaml", "is no recipe: it must hold"),
        ("list.yaml", "is no recipe: it must hold"),
    ]:
        (workplace / "empty.yaml").write_text("")
        (workplace / "list.yaml").write_text("- method\n- data\n")
        assert main(["train", recipe]) == 2
        assert reason in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_package_that_a_setting_needs_is_one_line(workplace: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(workplace)
    said = one_line(workplace, capsys, attn_implementation="flash_attention_2")
    assert "FlashAttention2" in said
    assert "MMKD_TRACEBACK=1" in said
    monkeypatch.setenv("MMKD_TRACEBACK", "1")
    with pytest.raises(ImportError):
        main(["train", "bad.yaml"])


def test_an_error_of_ours_keeps_its_traceback_and_says_where_to_report_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(*arguments: Any) -> int:
        return len(list(zip([1], [1, 2], strict=True)))

    monkeypatch.setattr("mmkd.commands.train.train", broken)
    with pytest.raises(ValueError, match="argument 2 is longer") as raised:
        main(["train", "kd/quickstart"])
    assert "please report it" in raised.value.__notes__[0]
    assert "mmkd:" not in capsys.readouterr().err


def test_imports_are_not_searched_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    with quick_imports():
        # Everything was imported before.
        assert gc.isenabled()
    monkeypatch.delitem(sys.modules, "transformers.trainer")
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert frozen == [False]
