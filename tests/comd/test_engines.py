"""Engines: batches say what single questions say, servers are asked over HTTP, and what is wrong is said."""

import base64
import io
import socket
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmkd.generation.generator import Sampling
from mmkd.methods.comd.assess import AnswerPair, LikelihoodAssessor, question_of
from mmkd.methods.comd.comd_engines import ChatServer, LocalEngine
from mmkd.methods.comd.reply_record import Question, Record, Reply
from mmkd.models.load import load_model, load_processing_class
from mmkd.teachers import endpoints
from scripts.make_tiny_models import sentences
from tests.comd.chat_server import chat_server
from tests.comd.stand_ins import instruction, nothing
from tests.teachers.conftest import Served
from tests.vlms import make_llava, picture

SAMPLING = Sampling(6)


def local(folder: Path, batch_size: int = 8) -> LocalEngine:
    load = lambda: (load_model(str(folder)), load_processing_class(str(folder)))  # noqa: E731
    return LocalEngine("The teacher", {"weights": folder.name}, load, batch_size)


def replies(engine: Any, questions: list[Question], sampling: Sampling = SAMPLING) -> list[Reply]:
    found = {place: reply for batch in engine.replies(questions, sampling) for place, reply in batch}
    return [replace(found[place], seconds=0.0) for place in range(len(questions))]


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("comd") / "llava", seed=1)


def test_batches_of_text_answer_as_single_questions_do(tiny: dict[str, Path]) -> None:
    questions = [question_of(instruction(text)) for text in sentences(7, seed=9)]
    together = replies(local(tiny["teacher"]), questions)
    assert together == replies(local(tiny["teacher"], batch_size=1), questions)
    assert len({one.text for one in together}) > 1


def test_batches_with_pictures_answer_as_single_questions_do(llava: Path, tmp_path: Path) -> None:
    questions = []
    for number, text in enumerate(sentences(6, seed=9)):
        picture(number).save(tmp_path / f"{number}.png")
        images = [str(tmp_path / f"{number}.png")] if number % 3 else []
        questions.append(question_of(instruction(text, images=images)))
    together = replies(local(llava), questions)
    assert together == replies(local(llava, batch_size=1), questions)
    # The pictures are seen.
    blind = [question_of(instruction(text)) for text in sentences(6, seed=9)]
    assert together != replies(local(llava), blind)


def test_the_likelihood_of_an_answer_is_that_of_its_tokens(tiny: dict[str, Path]) -> None:
    engine = local(tiny["teacher"])
    texts = list(zip(sentences(5, seed=9), sentences(5, seed=8), strict=True))
    found = replies(engine, [question_of(instruction(asked), answer=answer) for asked, answer in texts])
    model: Any = load_model(str(tiny["teacher"]))
    tokenizer: Any = load_processing_class(str(tiny["teacher"]))
    for (asked, answer), reply in zip(texts, found, strict=True):
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        count = len(tokenizer(answer + "<|end|>")["input_ids"])
        log_probs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        expected = log_probs.gather(-1, ids[0, 1:, None])[-count:].sum().item()
        assert reply.tokens == count
        assert reply.log_prob == pytest.approx(expected, rel=1e-4)


def test_the_likelihood_of_an_answer_about_a_picture(llava: Path, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    questions = [question_of(instruction(text, images=[str(tmp_path / "0.png")]), "a cat") for text in sentences(3)]
    together = replies(local(llava), questions)
    single = replies(local(llava, batch_size=1), questions)
    assert [one.log_prob for one in together] == pytest.approx([one.log_prob for one in single], rel=1e-4)


def test_a_student_that_is_the_teacher_has_no_likelihood_gap(tiny: dict[str, Path], tmp_path: Path) -> None:
    record = Record(tmp_path / "record.jsonl")
    pairs = [AnswerPair(instruction(text), "the cat sat", "") for text in sentences(4, seed=9)]
    teacher, same = local(tiny["teacher"]), local(tiny["teacher"])
    scores = LikelihoodAssessor(record, teacher, same).assess(pairs, "phase", nothing).scores
    assert [one.gap for one in scores] == [0.0] * 4
    other = LikelihoodAssessor(record, teacher, local(tiny["student"])).assess(pairs, "phase", nothing).scores
    assert all(one.gap != 0 for one in other)


def test_sampling_follows_its_seed(tiny: dict[str, Path]) -> None:
    questions = [question_of(instruction(text)) for text in sentences(4, seed=9)]
    said = [replies(local(tiny["teacher"]), questions, Sampling(6, 1.0, seed=seed)) for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]
    state = torch.random.get_rng_state()
    replies(local(tiny["teacher"]), questions, Sampling(6, 1.0))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_a_local_model_cannot_answer(tiny: dict[str, Path], tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    seen = question_of(instruction("what is it?", images=[str(tmp_path / "0.png")]))
    with pytest.raises(ValueError, match="The teacher reads text only"):
        replies(local(tiny["teacher"]), [seen])
    with pytest.raises(ValueError, match="room for 256"):
        replies(local(tiny["teacher"]), [question_of(instruction("what?"))], Sampling(300))


def server(urls: list[str], model: str | None = None, retries: int = 0) -> ChatServer:
    return ChatServer(urls, model, "teacher", concurrency=4, timeout=5, retries=retries)


def test_a_server_is_sent_messages_pictures_and_sampling(tmp_path: Path) -> None:
    picture(3).save(tmp_path / "3.png")
    asked = question_of(instruction("what is it?", images=[str(tmp_path / "3.png")]))
    with chat_server(models=("vlm",)) as fake:
        (reply,) = replies(server([fake.url]), [asked], Sampling(7, 0.5, seed=3))
        again = replies(server([fake.url + "/v1"]), [replace(asked, sample=2)], Sampling(7, 0.5, seed=3))
    assert (reply.tokens, reply.finish_reason, len(again)) == (2, "stop", 1)
    body = fake.requests[0]
    settings = {"model": "vlm", "max_tokens": 7, "temperature": 0.5}
    assert {key: body[key] for key in settings} == settings
    # Or all questions would be answered with the same random numbers.
    assert fake.requests[1]["seed"] != body["seed"]
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "what is it?"}
    png = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
    assert png.tobytes() == picture(3).tobytes()


def test_answers_of_a_server_keep_the_order_of_the_questions() -> None:
    questions = [question_of(instruction(text)) for text in sentences(30, seed=9)]
    with chat_server(reply=lambda body: body["messages"][0]["content"].upper()) as fake:
        found = replies(server([fake.url], "teacher"), questions)
    assert [one.text for one in found] == [question.messages[0]["content"].upper() for question in questions]


def test_a_failed_question_loses_none_of_the_answers_under_way() -> None:
    questions = [question_of(instruction(text)) for text in sentences(4, seed=9)]
    gone = questions[0].messages[0]["content"]

    def reply(body: dict[str, Any]) -> str:
        if body["messages"][0]["content"] == gone:
            raise ConnectionError
        return "yes"

    with chat_server(reply=reply) as fake:
        batches = server([fake.url], "teacher").replies(questions, Sampling(8))
        assert [place for ((place, _),) in islice(batches, 3)] == [1, 2, 3]
        with pytest.raises(ValueError, match="does not answer"):
            next(batches)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"status": 401, "fail_after": 0}, "VLLM_API_KEY"),
        ({"status": 500, "fail_after": 0}, "does not answer"),
        ({"models": ("a", "b")}, "serves 'a', 'b': name the model"),
    ],
)
def test_servers_that_cannot_be_asked(settings: dict[str, Any], message: str) -> None:
    with chat_server(**settings) as fake, pytest.raises(ValueError, match=message):
        replies(server([fake.url]), [question_of(instruction("what is it?"))])


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(endpoints, "BACK_OFF", 0)
    with pytest.raises(ValueError, match="no connection"):
        replies(server([f"http://127.0.0.1:{port}"], "teacher"), [question_of(instruction("what is it?"))])


def test_a_question_that_is_refused_costs_that_question_alone() -> None:
    with chat_server(fail_after=0, status=400) as fake:
        (reply,) = replies(server([fake.url], "teacher"), [question_of(instruction("what is it?"))])
    assert reply.finish_reason == "refused: told to fail"


@pytest.mark.slow
def test_a_real_vllm_says_what_the_model_says_here(served_teacher: Served) -> None:
    questions = [question_of(instruction(text)) for text in sentences(6, seed=9)]
    ours = replies(local(served_teacher.folder), questions)
    theirs = replies(ChatServer([served_teacher.url], None, None, 4, 60), questions)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.tokens, mine.finish_reason) == (other.tokens, other.finish_reason)
        # vLLM keeps back bytes that are not yet a character.
        assert mine.text.rstrip("\ufffd").strip() == other.text.rstrip("\ufffd").strip()
