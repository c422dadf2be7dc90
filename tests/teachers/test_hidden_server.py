"""HiddenServerTeacher against a fake vLLM that gives the true hidden states of a tiny model, or misbehaves."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tenacity import wait_none

from mmkd.models.backbone import head_of
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.server import RowError, ScoreRequest, VLLMClient
from scripts.make_tiny_models import make_model
from tests.teachers.fake_vllm import ServedStates, fake_vllm


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("mmkd.teachers.endpoints.BACK_OFF", wait_none())


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(width=32, rows=60, seed=3)


@pytest.fixture
def fake(model):
    with fake_vllm(ServedStates, served=model) as running:
        yield running


def question(*ids: int) -> ScoreRequest:
    return ScoreRequest(ids, np.arange(len(ids)) > 0)


def padded() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 60, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [5], [7]])
    supervised = mask[:, 1:] & (torch.arange(8) > 1)
    return {"input_ids": ids, "attention_mask": mask.long()}, supervised


def test_states_are_those_before_the_supervised_tokens_and_nothing_after_them_is_sent(fake, model):
    asked = ScoreRequest(np.arange(7), np.array([False, False, True, False, True, False, False]))
    with VLLMClient(fake.url) as client:
        assert client.signal() == "hidden"
        states, nothing = client.states([asked, ScoreRequest([1, 2], np.zeros(2, bool))])
    with torch.no_grad():
        expected = model.model(torch.arange(7)[None]).last_hidden_state[0, [1, 3]]
    assert isinstance(states, torch.Tensor)
    assert isinstance(nothing, torch.Tensor)
    torch.testing.assert_close(states, expected)
    assert len(nothing) == 0
    assert fake.requests[-1]["input"] == [0, 1, 2, 3]


def test_a_refused_row_leaves_the_others_alone(fake):
    with VLLMClient(fake.url) as client:
        first, refused, long = client.states([question(1, 2), question(1, 99, 5), question(*[1] * 200)])
    assert isinstance(first, torch.Tensor)
    assert refused == RowError("Token id 99 is out of vocabulary")
    assert isinstance(long, RowError)
    assert "199 tokens do not fit into the server's 128" in long.reason


def test_a_server_that_generates_is_asked_for_log_probs():
    with fake_vllm() as generating, VLLMClient(generating.url) as client:
        assert client.signal() == "top_k"


def test_signal_is_that_of_a_local_teacher(fake, model):
    inputs, supervised = padded()
    served, local = HiddenServerTeacher(fake.url, head_of(model), vocab_size=50), LocalTeacher(model, 50)
    for teacher in (served, local):
        teacher.prepare(Accelerator(cpu=True))
    ours, theirs = served.ask(inputs, supervised), local.ask(inputs, supervised)
    torch.testing.assert_close(ours.hidden, theirs.hidden)
    torch.testing.assert_close(ours.head.log_probs(ours.hidden), theirs.head.log_probs(theirs.hidden))
