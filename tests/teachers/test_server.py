"""VLLMClient and ServerTeacher against a fake vLLM that misbehaves on request."""

import base64
import io
import re
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tenacity import wait_none

from mmkd.teachers.server import Prompt, RowError, ScoreRequest, ServerTeacher, TopK, VLLMClient, questions_of
from mmkd.teachers.vllm_wire import LogProb, difference, openai_messages, top_k
from tests.teachers.fake_vllm import FakeVLLM, fake_vllm


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("mmkd.teachers.endpoints.BACK_OFF", wait_none())
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake():
    with fake_vllm() as running:
        yield running


def question(*ids: int) -> ScoreRequest:
    return ScoreRequest(ids, np.arange(len(ids)) > 0)


def questions(count: int) -> list[ScoreRequest]:
    return [question(i % 50, (i + 3) % 50, 7) for i in range(count)]


def assert_scored(fake: FakeVLLM, asked: ScoreRequest, answer: TopK | RowError, k: int) -> None:
    assert isinstance(answer, TopK)
    expected = np.stack([fake.log_probs(int(asked.ids[int(t) - 1])) for t in np.flatnonzero(asked.supervised)])
    order = np.argsort(-expected, axis=-1)[:, :k]
    assert (answer.ids == order).all()
    assert (answer.ids.dtype, answer.log_probs.dtype) == (np.int32, np.float32)
    np.testing.assert_allclose(answer.log_probs, np.take_along_axis(expected, order, -1), rtol=1e-6)


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# Scoring


def test_scores_come_in_the_order_of_the_questions_and_few_are_held(fake):
    fake.delay = 0.005
    drawn = 0

    def draw():
        nonlocal drawn
        for asked in questions(40):
            drawn += 1
            yield asked

    with VLLMClient(f"{fake.url}/v1/", concurrency=4) as client:
        for i, answer in enumerate(client.score(draw(), 5)):
            assert_scored(fake, questions(40)[i], answer, 5)
            assert drawn <= i + 1 + 2 * 4
    assert fake.most_at_once <= 4


def test_only_supervised_tokens_are_answered_and_none_after_them_sent(fake):
    supervised = np.array([False, False, True, False, True, False, False])
    asked = ScoreRequest(np.arange(7), supervised)
    with VLLMClient(fake.url) as client:
        scored, nothing = client.score([asked, ScoreRequest([1, 2], np.zeros(2, bool))], 5)
    assert_scored(fake, asked, scored, 5)
    assert isinstance(nothing, TopK)
    assert nothing.ids.shape == nothing.log_probs.shape == (0, 5)
    assert [request["prompt"] for request in fake.requests] == [[0, 1, 2, 3, 4]]


def test_tokens_of_the_padding_are_passed_over(fake):
    fake.cap = fake.vocab_size
    with VLLMClient(fake.url) as client:
        (answer,) = client.score([question(3, 4, 5)], 6, vocab_size=20)
    assert isinstance(answer, TopK)
    for row, token in enumerate([3, 4]):
        expected = np.argsort(-fake.log_probs(token)[:20])[:6]
        assert (answer.ids[row] == expected).all()
        # Not renormalised: what the padding has stays in the tail.
        np.testing.assert_allclose(answer.log_probs[row], fake.log_probs(token)[expected], rtol=1e-6)


def test_more_padding_than_the_cap_can_pass_over_is_refused(fake):
    fake.cap = 8
    with VLLMClient(fake.url) as client, pytest.raises(ValueError, match=r"--max-logprobs \d+ or more"):
        list(client.score([question(3, 4, 5)], 8, vocab_size=20))


def test_entries_are_read_by_rank_whatever_their_order():
    entries = [
        {9: LogProb(-4.0, 7), 1: LogProb(-2.0, 2), 3: LogProb(-1.0, 1)},
        {5: LogProb(-0.5, 1), 2: LogProb(-3.0, 2)},
    ]
    ids, log_probs = top_k(entries, 2)
    assert ids.tolist() == [[3, 1], [5, 2]]
    assert log_probs.tolist() == [[-1.0, -2.0], [-0.5, -3.0]]


def test_a_question_must_be_one():
    with pytest.raises(AssertionError, match="one flag per token"):
        ScoreRequest([1, 2, 3], np.ones(2, bool))
    with pytest.raises(AssertionError, match="nothing comes before"):
        ScoreRequest([1, 2], np.ones(2, bool))


# Failures


def test_busy_and_failing_servers_are_asked_again(fake):
    fake.failures = [429, 500, 503]
    with VLLMClient(fake.url, concurrency=1) as client:
        (answer,) = client.score([question(1, 2, 3)], 5)
    assert_scored(fake, question(1, 2, 3), answer, 5)
    assert len(fake.requests) == 4


def test_a_server_that_keeps_failing_ends_the_run(fake):
    fake.failures = [500] * 9
    with (
        VLLMClient(fake.url, retries=2) as client,
        pytest.raises(ValueError, match=r"HTTP 500: told to fail \(3 tries"),
    ):
        list(client.score([question(1, 2)], 5))


@pytest.mark.parametrize("status", [401, 404, 405])
def test_refusals_that_concern_the_server_are_not_repeated(fake, status):
    with VLLMClient(fake.url) as client:
        client.check()
        fake.failures = [status]
        with pytest.raises(ValueError, match=f"HTTP {status}"):
            list(client.score([question(1, 2)], 5))
    assert len(fake.requests) == 1


def test_a_refused_row_leaves_the_others_alone(fake):
    with VLLMClient(fake.url) as client:
        first, refused, long, last = client.score(
            [question(1, 2), question(1, 99), question(*range(50), *range(50), *range(28)), question(3, 4)], 5
        )
    assert_scored(fake, question(1, 2), first, 5)
    assert refused == RowError("Token id 99 is out of vocabulary")
    assert isinstance(long, RowError)
    assert re.search("128 tokens and the one .* do not fit into the server's 128", long.reason)
    assert_scored(fake, question(3, 4), last, 5)


def test_a_row_that_leaves_no_room_for_the_server_is_a_row_error(fake):
    # vLLM blames max_tokens, of which nobody chose another value.
    with VLLMClient(fake.url) as client:
        client.check()
        fake.complete = lambda body: (
            400,
            {"error": {"message": "max_tokens must be at least 1", "param": "max_tokens"}},
        )
        assert list(client.score([question(1, 2)], 5)) == [RowError("max_tokens must be at least 1")]


def test_slow_server_is_named_with_the_time_it_had(fake):
    with VLLMClient(fake.url, timeout=0.2, retries=1) as client:
        client.check()
        fake.delay = 1.0
        with pytest.raises(ValueError, match=r"no answer from http.* within 0.2 s .*2 tries"):
            list(client.score([question(1, 2)], 5))


def test_a_dead_server_is_passed_over(fake):
    with fake_vllm() as dying, VLLMClient([fake.url, dying.url], retries=2) as client:
        client.check()
        dying.failures = [500] * 100
        asked = questions(40)
        for one, answer in zip(asked, client.score(asked, 5), strict=True):
            assert_scored(fake, one, answer, 5)
        assert len(dying.requests) <= 16


def test_work_is_spread_over_the_servers(fake):
    fake.delay = 0.002
    with fake_vllm(delay=0.002) as other, VLLMClient([fake.url, other.url]) as client:
        assert all(isinstance(answer, TopK) for answer in client.score(questions(60), 5))
        assert min(len(fake.requests), len(other.requests)) >= 15


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"held_back": 2}, "gave 3 log-probs of a token where k=5"),
        ({"shift": 30.0}, "--logprobs-mode raw_logprobs"),
        ({"shift": float("nan")}, "answered something that is not vLLM's"),
        ({"page": "<html>"}, "not vLLM's.*<html>"),
    ],
)
def test_answers_that_are_none_end_the_run(fake, settings, why):
    with VLLMClient(fake.url) as client:
        client.check()
        for name, value in settings.items():
            setattr(fake, name, value)
        with pytest.raises(ValueError, match=why):
            list(client.score([question(1, 2, 3)], 5))


def test_null_log_probs_are_refused():
    with pytest.raises(ValueError, match="NaN or positive"):
        top_k([{1: LogProb(None, 1)}], 1)


def test_an_interrupted_run_asks_nothing_more(fake):
    fake.delay = 0.05
    with VLLMClient(fake.url, concurrency=2) as client:
        answers = client.score(questions(100), 5)
        next(answers)
        answers.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(fake.requests) <= 5


def test_closing_ends_the_thread_and_may_be_repeated(fake):
    before = threading.active_count()
    client = VLLMClient(fake.url)
    client.check()
    client.close()
    client.close()
    assert threading.active_count() <= before + 1  # the fake's own, for the connection


@pytest.mark.parametrize("urls", ["localhost:8000", "ftp://a", [], ["http://a:1", "http://a:1/v1"]])
def test_urls_that_are_none_are_refused(urls):
    with pytest.raises(ValueError, match=r"not of the form http://HOST:PORT|one or more different URLs"):
        VLLMClient(urls)


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"timeout": 0}, {"retries": -1}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="concurrency must be at least 1"):
        VLLMClient("http://a:1", **settings)


# check


def test_check_says_what_is_there(fake):
    with VLLMClient(fake.url) as client:
        facts = client.check("teacher", 5, 127)
    assert (facts.model, facts.root, facts.max_model_len) == ("teacher", "/models/teacher", 128)
    assert (facts.vllm_version, facts.urls) == ("0.32.0", (fake.url,))


def test_server_that_is_down_is_named_at_once():
    url = free_url()
    with VLLMClient(url) as client, pytest.raises(ValueError, match=f"no connection to {url} .*serve_teacher.sh"):
        client.check()


def test_folders_are_compared_as_folders(fake, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    fake.root = str(tmp_path / "model")
    with VLLMClient(fake.url) as client:
        client.check(str(tmp_path / "link"))
        with pytest.raises(ValueError, match=r"(?s)but http.* serves 'teacher' \(loaded from"):
            client.check(str(tmp_path))


def test_name_on_the_hub_is_known_in_its_cache(fake):
    fake.root = "/cache/models--org--name/snapshots/0a"
    with VLLMClient(fake.url) as client:
        client.check("org/name")
        with pytest.raises(ValueError, match="The teacher is 'org/other'"):
            client.check("org/other")


@pytest.mark.parametrize(
    ("settings", "arguments", "why"),
    [
        ({}, {"teacher": "Qwen/Qwen3-8B"}, "The teacher is 'Qwen/Qwen3-8B', but http.* serves 'teacher'"),
        ({}, {"k": 33}, "top 33 log-probs .* 32. Start it with --max-logprobs 33"),
        ({"held_back": 1}, {"k": 8}, "gave 7 log-probs of a token where k=8"),
        ({}, {"max_length": 128}, "room for 128 tokens, .* up to 128 takes 129. Start it with --max-model-len 129"),
        ({"page": "<html>"}, {}, "not vLLM's"),
        ({"key": "secret"}, {}, "HTTP 401: Unauthorized. Give the server's key"),
    ],
)
def test_check_refuses(fake, settings, arguments, why):
    for name, value in settings.items():
        setattr(fake, name, value)
    with VLLMClient(fake.url) as client, pytest.raises(ValueError, match=why):
        client.check(**arguments)


def test_key_comes_from_the_environment(fake, monkeypatch):
    fake.key = "secret"
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with VLLMClient(fake.url) as client:
        client.check(k=5)


def test_model_may_be_chosen_and_must_be_there(fake):
    with (
        VLLMClient(fake.url, model="other") as client,
        pytest.raises(ValueError, match="'teacher', 'adapter', not 'other'"),
    ):
        client.check()


def test_all_urls_must_serve_one_model(fake):
    with (
        fake_vllm(root="/models/another") as other,
        VLLMClient([fake.url, other.url]) as client,
        pytest.raises(ValueError, match=r"but http.* serves 'teacher' \(loaded from '/models/another'\)"),
    ):
        client.check()


def test_shortest_server_sets_the_length(fake):
    with fake_vllm(max_model_len=64) as other, VLLMClient([fake.url, other.url]) as client:
        assert client.check().max_model_len == 64
        with pytest.raises(ValueError, match=f"{other.url} has room for 64"):
            client.check(max_length=100)


def test_tokenizers_are_compared(fake, tokenizer):
    fake.tokens = [1, 2, 3]
    with VLLMClient(fake.url) as client:
        with pytest.raises(ValueError, match=r"tokenises unlike .* 3 tokens instead of"):
            client.check(tokenizer=tokenizer)
        with pytest.raises(ValueError, match="more than the teacher's 300 tokens"):
            client.check(k=301, tokenizer=tokenizer)


# Generation


def test_sampling_is_stated_in_full_and_answers_are_ordered(fake):
    with VLLMClient(fake.url) as client:
        (answers,) = client.generate([[1, 2, 3]], {"max_tokens": 4, "temperature": 0.7}, n=3)
    assert not isinstance(answers, RowError)
    assert [answer.ids for answer in answers] == [[3]] * 3
    (request,) = fake.requests
    assert (request["prompt"], request["n"], request["temperature"], request["top_p"]) == ([1, 2, 3], 3, 0.7, 1.0)


@pytest.mark.parametrize(
    ("sampling", "n", "why"),
    [
        ({"temperature": 1}, 1, "is incomplete. Give max_tokens"),
        ({"max_tokens": 4, "temprature": 1}, 1, "holds temprature, which vLLM would ignore"),
        ({"max_tokens": 4, "temperature": 0}, 2, "the same answer"),
    ],
)
def test_sampling_that_cannot_be_is_refused(fake, sampling, n, why):
    with VLLMClient(fake.url) as client, pytest.raises(ValueError, match=why):
        client.generate([[1, 2]], sampling, n)


def test_sampling_that_the_server_refuses_is_no_row_error(fake):
    with VLLMClient(fake.url) as client:
        client.check()
        fake.complete = lambda body: (400, {"error": {"message": "top_p must be in (0, 1]", "param": "top_p"}})
        with pytest.raises(ValueError, match="refuses the sampling parameters: top_p must"):
            list(client.generate([[1, 2]], {"max_tokens": 4, "top_p": 0}))


# Images


def messages(places: int = 1) -> list[dict[str, Any]]:
    parts = [{"type": "image"}] * places + [{"type": "text", "text": "the cat"}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": "a mat"}]


def test_images_fill_their_places_and_strings_stay():
    user, assistant = openai_messages(messages(), [Image.new("RGBA", (4, 4), (255, 0, 0, 0))])
    assert assistant == {"role": "assistant", "content": "a mat"}
    image, text = user["content"]
    assert text == {"type": "text", "text": "the cat"}
    prefix, data = image["image_url"]["url"].split(",")
    assert prefix == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    # What a model in this process sees: transparent pixels lie on white.
    assert (sent.mode, sent.getpixel((0, 0))) == ("RGB", (255, 255, 255))


def test_images_that_cannot_be_sent_are_row_errors(fake):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    broken = Image.open(io.BytesIO(file.getvalue()[:500]))
    whole = Image.new("RGB", (4, 4))
    video = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}]}]
    prompts = [Prompt([1], messages(), [broken]), Prompt([1], messages(2), [whole]), Prompt([1], video, [whole])]
    with VLLMClient(fake.url) as client:
        reasons = [
            answer.reason for answer in client.generate(prompts, {"max_tokens": 2}) if isinstance(answer, RowError)
        ]
    assert len(reasons) == 3
    assert "cannot be sent" in reasons[0]
    assert "2 places for images, but the row has 1 images" in reasons[1]
    assert "type 'video'" in reasons[2]


def test_difference_shows_the_first_token_that_differs():
    words = difference([1, 2, 3, 3, 4], [1, 2, 3, 3, 3, 4], image_token_id=3)
    assert words == "6 tokens instead of 5, and from position 4 on [3, 4] instead of [4]; 3 image tokens instead of 2"
    assert "on nothing instead of [3]" in difference([1, 2, 3], [1, 2])


# The live teacher


def batch() -> tuple[dict[str, Any], torch.Tensor]:
    """Two rows, one padded on the left, one on the right."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    supervised = torch.tensor([[False, False, False, True], [True, True, False, False]])
    return {"input_ids": ids, "attention_mask": mask}, supervised


def packed() -> tuple[dict[str, Any], torch.Tensor]:
    """The same sequences in one row."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    supervised = torch.tensor([[False, True, False, True, True]])
    return {"input_ids": ids, "position_ids": positions}, supervised


@pytest.mark.parametrize("form", [batch, packed])
def test_sequences_of_a_batch_are_told_apart(form):
    first, second = questions_of(*form())
    assert (list(first.ids), first.supervised.tolist()) == ([5, 6, 7], [False, False, True])
    assert (list(second.ids), second.supervised.tolist()) == ([8, 9, 10], [False, True, True])


def test_a_token_that_crosses_sequences_is_never_supervised():
    inputs, supervised = packed()
    with pytest.raises(AssertionError, match="nothing comes before"):
        questions_of(inputs, torch.ones_like(supervised))


@pytest.mark.parametrize("form", [batch, packed])
def test_live_teacher_answers_in_row_major_order(fake, form):
    teacher = ServerTeacher(fake.url, k=6, teacher="teacher", max_length=100)
    teacher.prepare(None)  # pyright: ignore[reportArgumentType]
    signal = teacher.ask(*form())
    expected = torch.tensor(np.stack([fake.log_probs(token) for token in (6, 8, 9)]))
    values, ids = expected.topk(6)
    assert torch.equal(signal.ids, ids)
    torch.testing.assert_close(signal.log_probs, values.float())
    torch.testing.assert_close(signal.tail_log_probs, torch.log1p(-values.exp().sum(-1)).float())


def test_prompts_are_sampled_apart_and_again_alike(fake):
    with VLLMClient(fake.url, model="teacher") as client:
        for _ in range(2):
            list(client.generate([[1, 2], [3, 4], [1, 2]], {"max_tokens": 4, "seed": 7}, n=2))
        list(client.generate([[1, 2]], {"max_tokens": 4}))
    *seeded, unseeded = (body.get("seed") for body in fake.requests)
    assert sorted(seeded[:3]) == sorted(seeded[3:])
    # A server gives the second answer to a prompt the seed that follows that of the first.
    assert len({seed + answer for seed in seeded[:3] for answer in range(2)}) == 6
    assert unseeded is None


def test_batch_without_a_supervised_token_asks_nothing(fake):
    inputs, supervised = batch()
    signal = ServerTeacher(fake.url, k=6).ask(inputs, torch.zeros_like(supervised))
    assert signal.ids.shape == signal.log_probs.shape == (0, 6)
    assert signal.tail_log_probs.shape == (0,)
    assert fake.requests == []


def test_live_teacher_refuses_pixels_and_rows_that_the_server_refuses(fake):
    inputs, supervised = batch()
    teacher = ServerTeacher(fake.url, k=6)
    with pytest.raises(ValueError, match=r"cannot be asked from pixel_values.*mmkd cache build"):
        teacher.ask({**inputs, "pixel_values": torch.zeros(1)}, supervised)
    with pytest.raises(ValueError, match="refused a sequence of the batch: Token id 106"):
        teacher.ask({**inputs, "input_ids": inputs["input_ids"] + 99}, supervised)
    with pytest.raises(ValueError, match="k=7 must be at least 1 and at most the 6"):
        ServerTeacher(fake.url, k=7, vocab_size=6)


def test_every_retry_is_told(fake, caplog):
    """Server, reason and wait: a run whose servers keep failing would look merely slow."""
    fake.failures = [503, 429]
    with VLLMClient(fake.url) as client:
        (answer,) = client.score(questions(1), 5)
    assert_scored(fake, questions(1)[0], answer, 5)
    assert [record.getMessage() for record in caplog.records if record.name == "mmkd.teachers.endpoints"] == [
        f"{fake.url} answered HTTP 503: told to fail; try 2 of 7 in 0.0 s.",
        f"{fake.url} answered HTTP 429: told to fail; try 3 of 7 in 0.0 s.",
    ]
