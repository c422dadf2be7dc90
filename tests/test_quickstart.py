"""The quickstart's orchestration: what a machine gets, where two halves are, and that none is left running."""

import io
import json
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from scripts import quickstart
from scripts.quickstart import SIZES, Half, Phase, choose_size, exists, measured, run_halves, smaller, trained


def half(tmp_path: Path, name: str, *programs: str, phases: list[Phase] | None = None) -> Half:
    commands = [[sys.executable, "-c", program] for program in programs]
    log = tmp_path / f"{name}.log"
    return Half(name, commands, log, phases or [Phase("working", 1.0, exists(tmp_path / "never"))])


def console() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, width=120), written


def test_slower_machines_get_a_smaller_text_half_that_fits() -> None:
    assert choose_size(1e12, 540) == SIZES[0]
    for speed in (190e9, 60e9, 36e9):
        assert choose_size(speed, 540).seconds(speed) <= 540
    assert [choose_size(speed, 540).flops for speed in (190e9, 60e9, 36e9)] == sorted(
        (choose_size(speed, 540).flops for speed in (190e9, 60e9, 36e9)), reverse=True
    )
    # There is nothing smaller.
    assert choose_size(1e9, 540) == SIZES[-1]
    assert sorted(SIZES, key=lambda size: -size.flops) == list(SIZES)


def test_what_a_smaller_half_leaves_out_is_said() -> None:
    words = smaller(SIZES[-1])
    assert "8 steps of 2 x 256 tokens in place of 30 of 4 x 256" in words
    assert words.endswith("4 held-out pages in place of 18, without taid.")
    assert "without" not in smaller(SIZES[1])


def test_the_size_of_an_interrupted_run_is_gone_on_with(tmp_path: Path) -> None:
    path, asked = tmp_path / "size.json", Namespace(size=None, minutes=9)
    assert quickstart.size_of(path, 36e9, asked) == choose_size(36e9, 540) != SIZES[0]
    # The machine is busier or quieter now.
    assert quickstart.size_of(path, 1e12, asked) == choose_size(36e9, 540)
    assert quickstart.size_of(path, 36e9, Namespace(size=0, minutes=9)) == SIZES[0]


def test_the_speed_is_measured_in_either_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "VOCABULARY", 1024)
    for dtype in (torch.float32, torch.bfloat16):
        assert quickstart.measured_speed(dtype, tokens=8, repeats=1) > 0


def test_progress_is_read_from_logs_and_results(tmp_path: Path) -> None:
    log = tmp_path / "kd-trained-abc" / "log.jsonl"
    phases = [
        Phase("evaluating", 30.0, measured(tmp_path / "measured", 1)),
        Phase("kd", 70.0, trained(measured(tmp_path / "measured", 2), tmp_path, "kd-*/log.jsonl", 0.0)),
    ]
    one = half(tmp_path, "text", phases=phases)
    assert one.progress()[:2] == (0.0, "evaluating")
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "a.json").write_text("{}")
    assert one.progress()[:2] == (0.3, "kd")
    log.parent.mkdir()
    entries = [json.dumps({"step": step, "max_steps": 30}) for step in (5, 10)]
    log.write_text("\n".join(entries) + '\n{"step": 1')
    share, what, _ = one.progress()
    assert (share, what) == (pytest.approx(0.3 + 0.7 * 0.9 / 3), "kd: step 10 of 30")
    (tmp_path / "measured" / "b.json").write_text("{}")
    assert one.progress()[0] == 0.99
    one.status = 0
    assert one.progress() == (1.0, "done", 0.0)


def test_time_left_follows_what_this_run_has_done(tmp_path: Path) -> None:
    done = [0.5]
    one = half(tmp_path, "text", phases=[Phase("all", 100.0, lambda: (done[0], ""))])
    one.begun = time.monotonic() - 60
    # Half of it was there before: the estimate, of what is left.
    assert one.progress()[2] == pytest.approx(50)
    done[0] = 0.75
    assert one.progress()[2] == pytest.approx(60, rel=0.01)


def test_halves_run_side_by_side_and_leave_their_words_in_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "_LINES", 0.0)
    meet = "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    left, right = str(tmp_path / "left"), str(tmp_path / "right")
    shown, written = console()
    halves = [
        half(tmp_path, "text", meet.format(left, right), "print('second')"),
        half(tmp_path, "vision", f"print('noise')\n{meet.format(right, left)}"),
    ]
    assert run_halves(halves, shown) == 0
    assert (tmp_path / "text.log").read_text() == "second\n"
    assert (tmp_path / "vision.log").read_text() == "noise\n"
    assert "noise" not in written.getvalue()
    assert "text: 0%, working, about 0 min left; vision: 0%, working" in written.getvalue()
    assert written.getvalue().endswith("text: 100%, done; vision: 100%, done\n")


def test_a_half_that_fails_shows_its_end_and_stops_the_other(tmp_path: Path) -> None:
    shown, written = console()
    program = "print('bar 1\\rbar 2')\nraise SystemExit('no such teacher')"
    halves = [
        half(tmp_path, "text", program, "print('never')"),
        half(tmp_path, "vision", "import time; time.sleep(60)"),
    ]
    assert run_halves(halves, shown) == 1
    assert "The text half has failed." in written.getvalue()
    assert "bar 2\nno such teacher\n" in written.getvalue()
    assert "bar 1" not in written.getvalue()
    assert halves[1].process is not None
    assert halves[1].process.poll() is not None


def test_a_terminal_shows_both_halves_in_one_screen(tmp_path: Path) -> None:
    written = io.StringIO()
    shown = Console(file=written, width=120, force_terminal=True, force_interactive=True, color_system=None)
    phases = [Phase("sft", 60.0, lambda: (0.5, "step 4 of 8"))]
    program = "import time\ntime.sleep(0.3)"
    halves = [half(tmp_path, name, program, phases=phases) for name in ("text", "vision and language")]
    assert run_halves(halves, shown) == 0
    lines = [line for line in written.getvalue().splitlines() if "sft: step 4 of 8, about 0 min left" in line]
    for name in ("text ", "vision and language "):
        assert any(name in line for line in lines)


def test_both_tables_end_it_and_say_what_was_smaller(tmp_path: Path) -> None:
    row = {"name": "kd", "role": "student", "recipe": "kd.yaml", "folders": ["a"], "parameters": 1_000_000}
    row |= {
        "tokens": [100],
        "metrics": {"kl": {"title": "KL to teacher (nats)", "values": [1.5], "mean": 1.5, "std": None}},
    }
    row |= {"tasks": {}, "retention": {}, "flips": {}, "gain_over_sft": {}, "cost": None, "cache": None}
    machine = {"device": "cpu", "processor": "some CPU", "threads": 1, "versions": {"torch": "2.13.0"}}
    comparison = {"schema": 1, "seeds": [0], "flags": [], "machine": machine, "rows": [row]}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    (tmp_path / "easy_vqa.log").write_text("noise\n┏━━━┓\n┃ LLaVA-KD ┃\n2000 questions\n")
    for size in (SIZES[0], SIZES[-1]):
        shown, written = console()
        quickstart.results(tmp_path, size, "float32", shown)
        words = written.getvalue()
        assert words.startswith("┏━━━┓\n┃ LLaVA-KD ┃\n2000 questions\n")
        assert "KL to teacher (nats)" in words
        assert ("A smaller text half" in words) == (size == SIZES[-1])
        assert "Products in float32." in words


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_both_halves(tmp_path: Path, number: int) -> None:
    ready = [tmp_path / name for name in ("a", "b")]
    program = "import pathlib, time\npathlib.Path({!r}).touch()\ntime.sleep(600)"
    halves = [half(tmp_path, path.name, program.format(str(path))) for path in ready]

    def interrupt() -> None:
        while not all(path.exists() for path in ready):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_halves(halves, console()[0]) == 130
    thread.join()
    for one in halves:
        assert one.process is not None
        assert one.process.poll() is not None


def test_what_does_not_end_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    stubborn = "import pathlib, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    one = half(tmp_path, "text", f"{stubborn}pathlib.Path({str(ready)!r}).touch()\ntime.sleep(600)")
    one.advance()
    while not ready.exists():
        time.sleep(0.01)
    one.interrupt()
    one.end(0.2)
    assert one.process is not None
    assert one.process.returncode == -signal.SIGKILL


def test_both_halves_name_commands_that_exist(tmp_path: Path) -> None:
    text, vision = quickstart.text_half(tmp_path, SIZES[-1], 1e11, ["--seed", "1"]), quickstart.vision_half(tmp_path)
    for command in (*text.commands, *vision.commands):
        place = command[2].replace(".", "/") + ".py" if command[1] == "-m" else command[1]
        assert (quickstart.ROOT / place).is_file()
    assert [name for name in text.commands[-1] if name.endswith("/quickstart")] == ["sft/quickstart", "kd/quickstart"]
    assert text.commands[-1][-2:] == ["--seed", "1"]
    assert sum(phase.seconds for phase in text.phases) == pytest.approx(SIZES[-1].seconds(1e11))
    assert sum(phase.seconds for phase in vision.phases) == pytest.approx(quickstart.VISION)
