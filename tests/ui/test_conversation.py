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
from mmkd.generation.local_generation import LocalGenerator
from mmkd.generation.row_answers import row_generator
from mmkd.models.load import load_model, load_processing_class
from mmkd.publish import run_sides
from mmkd.ui.conversation import LoadedModels, sides_named
from tests.teachers.fake_vllm import ServedModel, fake_vllm
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


def test_code_of_a_model_runs_only_if_the_caller_trusts_it(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["keys"]["trust_remote_code"] = True
    (run / "run.json").write_text(json.dumps(record))
    assert not any(side.model.trust_remote_code for side in sides_named(str(run)).values())
    assert all(side.model.trust_remote_code for side in sides_named(str(run), trust_remote_code=True).values())


def test_memory_holds_one_model_where_it_is_short(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, sides = LoadedModels(), sides_named(str(run))
    for side in sides.values():
        assert list(models.reply(side, ASKED, [], Sampling(2)))
    assert len(models.loaded) == 2
    assert models.unload() == 2
    # Half of this holds either model, and not both.
    monkeypatch.setattr(run_sides, "device_memory", lambda: ("a small device", 80_000 * 4 * 2))
    for side in sides.values():
        assert list(models.reply(side, ASKED, [], Sampling(2)))
    assert len(models.loaded) == 1


def test_chat_prints_both_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(run), "--prompt", "the cat", "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("student: ")
    assert "\nteacher: " in out
    assert main(["chat", str(run), "--prompt", "the cat", "--side", "teacher", "--max_new_tokens", "4"]) == 0
    assert "teacher: " not in capsys.readouterr().out
    # An empty prompt is one, too.
    assert main(["chat", str(run), "--prompt", "", "--system", "the cat", "--max_new_tokens", "4"]) == 0


def taught_by(run: Path, **keys: Any) -> Path:
    """The run, with these keys of its teacher."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "keys": {**record["keys"], **keys}}))
    return run


@pytest.mark.parametrize("named", [True, False])
def test_a_served_teacher_answers(
    run: Path, tiny: dict[str, Path], named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny["teacher"])
    with fake_vllm(ServedModel, root=folder, tokenizer=load_processing_class(folder)) as fake:
        taught_by(run, teacher=folder if named else None, teacher_server=[fake.url])
        assert main(["chat", str(run), "--prompt", "the cat", "--max_new_tokens", "4"]) == 0
    answer = capsys.readouterr().out.partition("\nteacher: ")[2]
    assert answer.startswith("served: ")
    assert "the cat" in answer
    (asked,) = fake.requests
    assert (asked["max_tokens"], asked["temperature"]) == (4, 0.0)


def test_a_served_teacher_that_is_down_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taught_by(run, teacher=None, teacher_server=["http://127.0.0.1:9"])
    assert main(["chat", str(run), "--prompt", "the cat", "--side", "teacher"]) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err


def test_a_teacher_that_is_only_cached_is_said_to_be_silent(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taught_by(run, teacher=None, teacher_cache="cache/words")
    assert main(["chat", str(run), "--prompt", "the cat", "--max_new_tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert "The teacher cannot answer: the run read it from the cache cache/words" in captured.err
    assert "teacher:" not in captured.out


def test_a_quantised_teacher_is_loaded_as_in_training(run: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole = sides_named(str(run))["teacher"]
    side = sides_named(str(taught_by(run, teacher_load_in_4bit=True)))["teacher"]
    assert side.size == whole.size / 8
    generator = side.generator()
    assert isinstance(generator, LocalGenerator)
    assert generator.model.config.quantization_config.load_in_4bit


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
