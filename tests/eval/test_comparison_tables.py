"""How the tables of a comparison are printed."""

import io
import re
import sys

import pytest

from mmkd.results.tables import show, table_console

METRIC = {"mean": 308.028, "std": 25.06, "values": [283.0, 333.1], "title": "perplexity", "higher_is_better": False}
ROW = {
    "name": "student, untrained",
    "role": "student",
    "parameters": 134_515_008,
    "tokens": [30_600],
    "metrics": {"perplexity": METRIC, "kl": METRIC, "top1_agreement": METRIC},
    "tasks": {},
    "retention": {},
    "gain_over_sft": {},
    "flips": {},
    "cost": {"unit": "CPU-hours", "hours": 0.1, "tokens_per_second": 474.0, "teacher_tokens": 688},
    "cache": None,
}
MACHINE = {"device": "cpu", "processor": "CPU", "threads": 1, "versions": {"torch": "2.13.0"}}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "widest"), [(Terminal, 80), (io.StringIO, 120)])
def test_tables_fit_the_terminal(stream: type[io.StringIO], widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    printed = stream()
    monkeypatch.setattr(sys, "stdout", printed)
    show({"rows": [ROW], "seeds": [0, 1], "machine": MACHINE}, table_console())
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed.getvalue()).splitlines()
    width = max(map(len, lines))
    assert width <= widest
    assert stream is Terminal or width > 80
    assert "1 thread, torch" in " ".join(lines)
