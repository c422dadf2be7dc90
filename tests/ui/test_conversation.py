"""`mmkd chat`, and the models it keeps: streamed answers, sides of a run, pictures, and one model at a time."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.eval.answer_statistics import greedy_answers
from mmkd.generation.generator import Sampling
from mmkd.generation.row_answers import row_generator
from mmkd.models.load import load_model, load_processing_class
from mmkd.publish import run_sides
from mmkd.ui.conversation import LoadedModels, sides_named
from tests.ui.stand_ins import make_run
from tests.vlms import make_llava

ASKED = [{"role": "user", "content": "the cat sat on"}]


@pytest.fixture
def run(tiny: dict[str, Path], tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", tiny["student"], str(tiny["teacher"]))


def test_a_streamed_answer_is_the_answer(tiny: dict[str, Path]) -> None:
    model, tokenizer = load_model(str(tiny["student"])), load_processing_class(str(tiny["student"]))
    pieces = list(row_generator(model, tokenizer).stream((ASKED, None), Sampling(24)))
    (whole,) = greedy_answers(model, tokenizer, [ASKED], 24)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1


def test_closing_a_stream_ends_the_generation(tiny: dict[str, Path]) -> None:
    model, tokenizer = load_model(str(tiny["student"])), load_processing_class(str(tiny["student"]))
    generator = row_generator(model, tokenizer)
    generator.tokens.stops.clear()
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    stream = generator.stream((ASKED, None), Sampling(200))
    assert isinstance(stream, Iterator)
    next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(steps) < 200
    assert torch.is_grad_enabled()


def test_an_error_while_generating_reaches_the_reader(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(str(tiny["student"])), load_processing_class(str(tiny["student"]))

    def fails(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(row_generator(model, tokenizer).stream((ASKED, None), Sampling(4)))


def test_a_run_has_a_student_and_its_teachers(run: Path, tiny: dict[str, Path]) -> None:
    sides = sides_named(str(run))
    assert {name: side.model.path for name, side in sides.items()} == {
        "student": str(run),
        "teacher": str(tiny["teacher"]),
    }
    assert list(sides_named(str(tiny["teacher"]))) == ["model"]
    record = json.loads((run / "run.json").read_text())
    record["keys"] = {**record["keys"], "teacher": None, "teachers": {"big": {"teacher": str(tiny["teacher"])}}}
    (run / "run.json").write_text(json.dumps(record))
    assert list(sides_named(str(run))) == ["student", "teacher big"]


def test_memory_holds_one_model_where_it_is_short(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, sides = LoadedModels(), sides_named(str(run))
    for side in sides.values():
        assert list(models.reply(side, ASKED, [], Sampling(2)))
    assert len(models.generators) == 2
    assert models.unload() == 2
    # Half of this holds either model, and not both.
    monkeypatch.setattr(run_sides, "device_memory", lambda: ("a small device", 80_000 * 4 * 2))
    for side in sides.values():
        assert list(models.reply(side, ASKED, [], Sampling(2)))
    assert len(models.generators) == 1


def test_chat_prints_both_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(run), "--prompt", "the cat", "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("student: ")
    assert "\nteacher: " in out
    assert main(["chat", str(run), "--prompt", "the cat", "--side", "teacher", "--max_new_tokens", "4"]) == 0
    assert "teacher: " not in capsys.readouterr().out


def test_chat_reads_questions_line_by_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def reply(self: Any, side: Any, messages: Any, images: Any, sampling: Any) -> Iterator[str]:
        seen.append([message["content"] for message in messages])
        yield "yes"

    monkeypatch.setattr(LoadedModels, "reply", reply)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/clear\nthree\n/quit\nfour\n"))
    assert main(["chat", str(run), "--side", "student", "--system", "be brief"]) == 0
    assert seen == [["be brief", "one"], ["be brief", "one", "yes", "two"], ["be brief", "three"]]
    assert capsys.readouterr().out == "yes\n" * 3


def test_what_chat_cannot_do_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for words, says in (
        (["--image", str(tmp_path / "red.png")], "reads text only"),
        (["--image", str(tmp_path / "broken.png")], "--image cannot be read"),
    ):
        assert main(["chat", str(run), "--prompt", "what?", *words]) == 2
        assert says in capsys.readouterr().err
    assert main(["chat", str(tmp_path / "nowhere"), "--prompt", "what?"]) == 2
    assert "There is no folder" in capsys.readouterr().err
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "keys": {"method": "sft"}}))
    assert main(["chat", str(run), "--prompt", "what?", "--side", "teacher"]) == 2
    assert "There is no teacher here" in capsys.readouterr().err
    (run / "run.json").write_text(json.dumps({**record, "method": "dho"}))
    with pytest.raises(UserError, match="predicts classes"):
        sides_named(str(run))


def test_a_vision_language_model_sees_the_picture(tmp_path: Path) -> None:
    sides, models = sides_named(str(make_llava(tmp_path / "llava"))), LoadedModels()
    side = sides["model"]
    assert side.model.vision
    answers = [
        "".join(models.reply(side, ASKED, [Image.new("RGB", (16, 16), colour)], Sampling(8)))
        for colour in ("black", "white")
    ]
    assert answers[0] != answers[1]
