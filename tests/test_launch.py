"""Several processes from one command: presets, checkpoints in shards, and ranks that die."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from mmkd.commands.main import main
from mmkd.commands.train import PRESETS
from mmkd.recipe.run import last_checkpoint
from tests.forked import Forked
from tests.test_cli import workplace as workplace


def edit(folder: Path, **keys: Any) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | keys
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def steps(run: Path) -> list[list[float]]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [[entry[name] for name in ("loss", "kl", "grad_norm")] for entry in log if "loss" in entry]


def launched(folder: Path, *flags: str) -> Forked:
    """A run of two ranks, which are started anew by the process that accelerate launches them from."""
    arguments = ["-m", "mmkd.commands.main", "train", "recipe.yaml", "--num_processes", "2", *flags]
    with open(folder / "errors", "w") as errors:
        return Forked(arguments, folder, stderr=errors)


def test_fsdp2_is_one_process_and_its_checkpoints_become_one_student(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preset as it is shipped, where one rank alone reads the weights."""
    monkeypatch.chdir(workplace)
    assert main(["train", "recipe.yaml", "--output_dir", "alone"]) == 0
    edit(workplace, accelerate_config="fsdp2", mixed_precision="no", per_device_train_batch_size=2)
    edit(workplace, save_strategy="steps", save_steps=2)
    process = launched(workplace)
    assert process.wait() == 0, (workplace / "errors").read_text()
    expected, found = (steps(workplace / run) for run in ("alone", "run"))
    assert found == [pytest.approx(step, rel=1e-4) for step in expected]
    assert main(["consolidate", "run/checkpoint-4", "whole"]) == 0
    students = [AutoModelForCausalLM.from_pretrained(workplace / run) for run in ("alone", "run", "whole")]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [student(input_ids=ids).logits for student in students]
    torch.testing.assert_close(logits[1], logits[2], rtol=0, atol=0)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    assert main(["consolidate", "run", "other"]) == main(["consolidate", "run/checkpoint-4", "whole"]) == 2


def train_until_saved(workplace: Path) -> Forked:
    """A long run of two ranks that has written a checkpoint."""
    edit(workplace, accelerate_config="ddp", mixed_precision="no", max_steps=100_000)
    edit(workplace, save_strategy="steps", save_steps=5, save_total_limit=1)
    process = launched(workplace)
    start = time.monotonic()
    while last_checkpoint(workplace / "run") is None and time.monotonic() < start + 120:
        time.sleep(0.2)
    return process


@pytest.mark.slow
def test_interrupting_ranks_says_how_to_go_on(workplace: Path) -> None:
    process = train_until_saved(workplace)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    errors = (workplace / "errors").read_text()
    assert "stopped by SIGINT" in errors
    assert "--resume_from_checkpoint true" in errors
    assert "Traceback" not in errors


def test_a_rank_that_dies_ends_the_run(workplace: Path) -> None:
    process = train_until_saved(workplace)
    ranks = [one for one in psutil.Process(process.pid).children(recursive=True) if one.environ().get("RANK") == "1"]
    ranks[0].kill()
    assert process.wait(60) == 137
    assert "rank 1 was killed by signal 9" in (workplace / "errors").read_text()
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in ranks)


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["single_gpu", "--num_processes", "2"], "is for one process"),
        (["fsdp2", "--num_processes", "0"], "num_processes is 0"),
        (["ddp", "--num_processes", "3", "--num_machines", "2"], "the same number"),
        (["fsdp2", "--num_processes", "4096"], "Set num_processes"),
        (["zero3", "--num_processes", "1"], "zero3 needs"),
    ],
)
def test_presets_that_do_not_fit(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: list[str], reason: str
) -> None:
    monkeypatch.chdir(workplace)
    assert main(["train", "recipe.yaml", "--accelerate_config", *flags]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_what_accelerate_knows(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    path = Path(main.__code__.co_filename).parent / "_presets" / f"{name}.yaml"
    assert ClusterConfig.from_yaml_file(str(path)).num_processes == (1 if name == "single_gpu" else 8)
