"""What arrives in trackers, read back from what each of them keeps on this machine."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmkd.commands.main import main
from mmkd.publish.runs import read_log
from tests.test_cli import one_line
from tests.test_cli import workplace as workplace

REPORTS = ("loss", "kl", "ce", "top1_agreement", "student_entropy", "teacher_entropy")


@pytest.fixture
def logged(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`logged(tracker)`: the log of a training that reported to a tracker, evaluated after it."""
    monkeypatch.chdir(workplace)

    def train(tracker: str) -> list[dict[str, Any]]:
        assert main(["train", "recipe.yaml", "--report_to", tracker, "--max_steps", "2"]) == 0
        return read_log(workplace / "run")

    return train


def expected(log: list[dict[str, Any]], train: str, evaluation: str) -> dict[str, float]:
    """The last value of each report, by its name in a tracker."""
    steps = [entry for entry in log if "loss" in entry]
    evaluated = [entry for entry in log if "eval_loss" in entry]
    values = {train + name: steps[-1][name] for name in (*REPORTS, "supervised_tokens_per_second")}
    return values | {evaluation + name: evaluated[-1][f"eval_{name}"] for name in (*REPORTS, "perplexity")}


def test_tensorboard(logged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "board")
    wanted = expected(logged("tensorboard"), "train/", "eval/")
    events = accumulators.EventAccumulator("board").Reload()
    seen = {name: events.Scalars(name)[-1].value for name in wanted}
    assert seen == pytest.approx(wanted, rel=1e-6)


def test_trackio(logged: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Into one run: the evaluation comes after the training has ended."""
    trackio_utils = pytest.importorskip("trackio.utils")
    sqlite_storage = pytest.importorskip("trackio.sqlite_storage")
    for module in (trackio_utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    wanted = expected(logged("trackio"), "train/", "eval/")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, metrics from metrics order by id").fetchall()
    seen: dict[str, float] = {}
    for _, metrics in rows:
        seen |= json.loads(metrics)
    assert {name: seen[name] for name in wanted} == pytest.approx(wanted)
    assert len({name for name, _ in rows}) == 1


def test_mlflow(logged: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Into one run; MLflow has the names of the log."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    wanted = expected(logged("mlflow"), "", "eval_")
    (run,) = mlflow.MlflowClient((tmp_path / "mlruns").as_uri()).search_runs(["0"])
    assert {name: run.data.metrics[name] for name in wanted} == pytest.approx(wanted)
    assert run.info.status == "FINISHED"


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: blocks of 32 KiB, with checksum, length and kind before each part of a record."""
    content, block, place, parts = path.read_bytes(), 1 << 15, 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, or the last of several parts.
        if kind in (1, 4):
            yield parts
            parts = b""


def test_wandb(logged: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wanted = expected(logged("wandb"), "train/", "eval/")
    assert wandb.run is None
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    seen: dict[str, float] = {}
    for content in wandb_records(path):
        record = protocol.Record.FromString(content)
        seen |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
    assert {name: seen[name] for name in wanted} == pytest.approx(wanted)


def test_a_tracker_that_is_not_here_names_the_extra(
    workplace: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("transformers.integrations.integration_utils.get_available_reporting_integrations", list)
    for name in ("wandb", "tensorboard", "trackio", "mlflow"):
        said = one_line(workplace, capsys, report_to=name)
        assert f"pip install 'mmkd[{name}]', or set report_to: none" in said


def test_a_store_that_mlflow_refuses_is_said_before_training(
    workplace: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(workplace)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:mlruns")
    assert "MLFLOW_ALLOW_FILE_STORE=true" in one_line(workplace, capsys, report_to="mlflow")
