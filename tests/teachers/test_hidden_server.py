"""HiddenServerTeacher against a fake vLLM that gives the true hidden states of a tiny model, or misbehaves."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from tenacity import wait_none
from transformers import AutoModelForCausalLM

from mmkd.models.backbone import head_of
from mmkd.models.heads import LMHead
from mmkd.recipe.run_teacher import wire_dtype
from mmkd.teachers.head_checks import FinalNorm, check_states
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.served_head import final_norm_of_checkpoint, head_of_checkpoint
from mmkd.teachers.server import RowError, ScoreRequest, ServerTeacher, VLLMClient
from scripts.make_tiny_models import make_model
from tests.families import FAMILIES, made, model_of
from tests.loopback import Binary
from tests.teachers.fake_vllm import ServedStates, fake_vllm

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": None}
SMALL |= {"intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2}
HEADS = [
    ("Llama", {"tie_word_embeddings": False}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Gemma2", {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 5.0}),
    ("Granite", {"logits_scaling": 4.0}),
    ("Cohere", {"logit_scale": 0.5}),
    ("Phi", {}),
]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("mmkd.teachers.endpoints.BACK_OFF", wait_none())


@pytest.fixture(scope="module")
def model() -> Any:
    return of_its_own(seed=3)


def of_its_own(seed: int) -> Any:
    """A random model whose last norm is as particular as a trained one's."""
    model = make_model(width=32, rows=60, seed=seed)
    model.model.norm.weight.data = 0.5 + torch.rand(32, generator=torch.Generator().manual_seed(seed))
    return model


def teacher_of(fake: ServedStates, model: Any, **settings: Any) -> HiddenServerTeacher:
    """A teacher as a recipe makes it: with the last norm of the model that its head is of."""
    return HiddenServerTeacher(fake.url, head_of(model), norm=FinalNorm.of(model.model.norm, 32), **settings)


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


# What is refused


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"cut": 3}, "bytes, in which 32 states of 32 numbers from byte 0 on are not whole"),
        ({"metadata": {"embed_dtype": "float16"}}, "answered in float16 where float32 was asked for"),
        ({"metadata": {"shape": [32]}}, "one row for each of .* tokens was asked for.*token_embed"),
        ({"metadata": {"shape": [30, 32]}}, "one row for each of"),
        ({"metadata": {"index": None}}, "answered something that is not vLLM's"),
        ({"computes": lambda ids: torch.full((len(ids), 32), torch.nan)}, "NaN or infinite.*--dtype bfloat16"),
        ({"computes": lambda ids: torch.zeros(len(ids), 16)}, "states of 16 numbers, but the teacher's head .* 32"),
        ({"page": "<html>"}, "not vLLM's"),
        ({"failures": [401]}, "Give the server's key"),
    ],
)
def test_answers_that_are_none_are_refused(fake, model, settings, why):
    teacher = teacher_of(fake, model)
    for name, value in settings.items():
        setattr(fake, name, value)
    with pytest.raises(ValueError, match=why):
        teacher.prepare(Accelerator(cpu=True))


def test_answer_without_its_header_is_refused(fake, model):
    fake.packed = lambda tables, name: Binary(b"0000", {})
    with VLLMClient(fake.url) as client, pytest.raises(ValueError, match="without the header `metadata`"):
        list(client.states([question(1, 2)]))


def test_the_wrong_runner_is_told_how_to_become_the_right_one(model):
    with fake_vllm(root="org/name") as generating:
        teacher = HiddenServerTeacher(generating.url, head_of(model))
        with pytest.raises(ValueError, match=r"(?s)no hidden states.*vllm serve org/name .*--runner pooling"):
            teacher.prepare(Accelerator(cpu=True))
    with (
        fake_vllm(ServedStates, served=model, root="org/name") as pooling,
        pytest.raises(ValueError, match=r"(?s)gives no log-probs.*vllm serve org/name .*--max-logprobs 8"),
    ):
        ServerTeacher(pooling.url, 8).prepare(Accelerator(cpu=True))


def test_a_server_that_pools_whole_texts_is_told_how_to_give_tokens(fake):
    told = {"message": "Try switching the model's pooling_task via --pooler-config.task token_embed", "param": "task"}
    fake.complete = lambda body: (400, {"error": told})
    with VLLMClient(fake.url) as client, pytest.raises(ValueError, match="neither log-probs nor hidden states of"):
        client.signal()


def test_servers_of_different_runners_are_no_one_teacher(fake):
    with (
        fake_vllm() as generating,
        VLLMClient([fake.url, generating.url]) as client,
        pytest.raises(ValueError, match="different signals"),
    ):
        client.signal()


def test_a_head_of_another_model_is_known_by_the_last_norm(fake):
    with pytest.raises(ValueError, match=r"runs another model than the teacher.*root mean square"):
        teacher_of(fake, of_its_own(seed=4)).prepare(Accelerator(cpu=True))


def test_a_certain_head_of_another_model_is_known_by_what_it_says():
    generator = torch.Generator().manual_seed(0)
    weight, ids = torch.randn(500, 64, generator=generator), torch.randperm(500, generator=generator)[:40]
    # States of a model that is sure of the next token, and mostly right.
    states = weight[ids.roll(-1)] * 0.3 + 0.5 * torch.randn(40, 64, generator=generator)
    check_states(LMHead(weight), None, ids.tolist(), states, "URL")
    other = LMHead(torch.randn(500, 64, generator=generator))
    with pytest.raises(ValueError, match=r"URL runs another model .* nats on average, where a guess among 500"):
        check_states(other, None, ids.tolist(), states, "URL")
    # A random model finds the token itself likeliest, and the next one less likely than a guess would.
    check_states(LMHead(weight), None, ids.tolist(), weight[ids], "URL")


def test_servers_with_different_weights_are_no_one_teacher(fake, model):
    with fake_vllm(ServedStates, served=of_its_own(seed=5)) as other:
        teacher = HiddenServerTeacher([fake.url, other.url], head_of(model))
        with pytest.raises(ValueError, match=r"give different hidden states .*different weights"):
            teacher.prepare(Accelerator(cpu=True))


def test_a_server_with_other_weights_in_mid_run_is_noticed(fake, model):
    inputs, supervised = padded()
    teacher = teacher_of(fake, model, recheck=2)
    teacher.prepare(Accelerator(cpu=True))
    for _ in range(3):
        teacher.ask(inputs, supervised)
    fake.served = of_its_own(seed=6)
    with pytest.raises(ValueError, match=r"other hidden states than when the run began .*other weights by now"):
        teacher.ask(inputs, supervised)


def test_a_server_that_was_away_is_looked_at_when_it_is_back(fake, model):
    inputs, supervised = padded()
    teacher = teacher_of(fake, model)
    teacher.prepare(Accelerator(cpu=True))
    fake.failures = [503]
    teacher.ask(inputs, supervised)
    fake.failures, fake.served = [503], of_its_own(seed=6)
    with pytest.raises(ValueError, match="other weights by now"):
        teacher.ask(inputs, supervised)


def test_the_other_server_goes_on_for_one_that_is_away_and_is_looked_at_when_back(fake, model, monkeypatch):
    inputs, supervised = padded()
    with fake_vllm(ServedStates, served=model) as other:
        teacher = HiddenServerTeacher([fake.url, other.url], head_of(model), recheck=1)
        teacher.prepare(Accelerator(cpu=True))
        expected = teacher.ask(inputs, supervised).hidden
        other.failures = [503] * 1000
        for _ in range(3):
            torch.testing.assert_close(teacher.ask(inputs, supervised).hidden, expected)
        other.failures, other.served = [], of_its_own(seed=6)
        monkeypatch.setattr(teacher.client, "rests", lambda url: False)
        with pytest.raises(ValueError, match="other weights by now"):
            teacher.ask(inputs, supervised)


def test_settings_that_cannot_be_are_refused(fake, model):
    with pytest.raises(ValueError, match=r"dtype is torch.float64 and recheck 100"):
        teacher_of(fake, model, dtype=torch.float64)


@pytest.mark.parametrize(
    ("named", "head", "wire", "warns"),
    [
        ("auto", torch.bfloat16, torch.bfloat16, False),
        ("bfloat16", torch.float32, torch.bfloat16, False),
        ("float32", torch.bfloat16, torch.float32, True),
    ],
)
def test_states_that_the_head_would_round_are_warned_of(caplog, named, head, wire, warns):
    run: Any = SimpleNamespace(arguments=SimpleNamespace(teacher_server_dtype=named))
    assert wire_dtype(run, LMHead(torch.zeros(2, 2, dtype=head))) == wire
    assert ("teacher_dtype: float32" in caplog.text) == warns


# The head of a checkpoint


@pytest.mark.parametrize(("kind", "settings"), HEADS)
def test_head_is_that_of_the_loaded_model(tmp_path, kind, settings):
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SMALL, **settings))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    head, expected = head_of_checkpoint(str(tmp_path)), head_of(model)
    assert (head.scale, head.softcap, head.vocab_size) == (expected.scale, expected.softcap, expected.vocab_size)
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(head.log_probs(hidden), expected.log_probs(hidden))
    norm = final_norm_of_checkpoint(str(tmp_path))
    # As it was made, a norm's scale is 1 everywhere and tells nothing.
    assert norm is None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_head_of_a_vision_language_model(tmp_path, family):
    model = model_of(made(family)[0], seed=1)
    model.save_pretrained(tmp_path)
    assert torch.equal(head_of_checkpoint(str(tmp_path)).weight, head_of(model).weight)
