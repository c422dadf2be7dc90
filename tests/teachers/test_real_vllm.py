"""VLLMClient and ServerTeacher against real vLLM servers on loopback: the same numbers as transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.served_head import final_norm_of_checkpoint, head_of_checkpoint
from mmkd.teachers.server import Prompt, RowError, ScoreRequest, ServerTeacher, TopK, VLLMClient
from scripts.make_tiny_models import sentences
from tests.teachers.conftest import Served, serve
from tests.teachers.vlm import make_image

# Nats. In fp32 both sides agree to 2e-5.
TOLERANCE = 1e-3
# Nats, where an image is resized: vLLM does so with torchvision, and transformers here with Pillow.
RESIZED = 2e-2
ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / ".cache" / "mmkd" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def model(served_teacher: Served) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(served_teacher.folder)


@pytest.fixture(scope="module")
def rows(served_teacher: Served) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(served_teacher.folder)
    return [tokenizer(text)["input_ids"] for text in sentences(12, seed=5)]


def assert_same(answer: TopK | RowError, log_probs: torch.Tensor, k: int, tolerance: float = TOLERANCE) -> None:
    """`answer` is the top k of the log-probs of transformers, one row per supervised token."""
    assert isinstance(answer, TopK), answer
    values, ids = log_probs.topk(k)
    np.testing.assert_allclose(answer.log_probs, values.numpy(), atol=tolerance)
    # Ids may swap where two tokens are nearly as likely; their own log-probs must agree all the same.
    own = log_probs.gather(-1, torch.from_numpy(answer.ids).long())
    np.testing.assert_allclose(answer.log_probs, own.numpy(), atol=tolerance)
    assert all(len(set(row)) == k for row in answer.ids.tolist())
    assert (answer.ids == ids.numpy()).mean() > 1 - 20 * tolerance


@torch.no_grad()
def reference(model: Any, ids: list[int], **inputs: Any) -> torch.Tensor:
    """Log-probs of every token from the second on."""
    return model(input_ids=torch.tensor([ids]), **inputs).logits[0, :-1].float().log_softmax(-1)


def test_check_of_a_real_server(served_teacher):
    tokenizer = AutoTokenizer.from_pretrained(served_teacher.folder)
    with VLLMClient(served_teacher.url) as client:
        facts = client.check(str(served_teacher.folder), 256, 255, tokenizer)
        assert (facts.root, facts.max_model_len) == (str(served_teacher.folder), 256)
        assert facts.vllm_version.count(".") >= 2
        with pytest.raises(ValueError, match=r"--max-logprobs 257"):
            client.check(k=257)
        with pytest.raises(ValueError, match="--max-model-len 257"):
            client.check(max_length=256)
        with pytest.raises(ValueError, match="The teacher is 'Qwen/Qwen3-8B'"):
            client.check("Qwen/Qwen3-8B")
        tokenizer.add_tokens(["<other>"], special_tokens=True)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<other>"]})
        with pytest.raises(ValueError, match="tokenises unlike"):
            client.check(tokenizer=tokenizer)


@pytest.mark.parametrize("k", [1, 64, 256])
def test_log_probs_are_those_of_transformers(served_teacher, model, rows, k):
    with VLLMClient(served_teacher.url) as client:
        answers = list(client.score([ScoreRequest(ids, np.arange(len(ids)) > 0) for ids in rows], k))
    for ids, answer in zip(rows, answers, strict=True):
        assert_same(answer, reference(model, ids), k, 1e-4)


def test_padding_rows_of_the_vocabulary_are_passed_over(served_teacher, model, rows):
    known = 200
    with VLLMClient(served_teacher.url) as client:
        (answer,) = client.score([ScoreRequest(rows[0], np.arange(len(rows[0])) > 0)], 64, vocab_size=known)
    assert_same(answer, reference(model, rows[0])[:, :known], 64, 1e-4)


def test_longest_text_fits_and_one_more_token_is_a_row_error(served_teacher, model):
    ids = np.random.default_rng(0).integers(5, 300, 256)
    last = np.arange(256) == 254
    with VLLMClient(served_teacher.url) as client:
        fits, not_known, long = client.score(
            [
                ScoreRequest(ids[:255], last[:255]),
                ScoreRequest([5, 100_000, 6], np.array([False, False, True])),
                ScoreRequest(ids, np.arange(256) == 255),
            ],
            8,
        )
    assert_same(fits, reference(model, ids[:255].tolist())[-1:], 8, 1e-4)
    assert isinstance(not_known, RowError)
    assert "100000" in not_known.reason
    assert isinstance(long, RowError)
    assert "--max-model-len" in long.reason


def test_a_row_that_the_server_itself_finds_too_long_is_a_row_error(served_teacher):
    with VLLMClient(served_teacher.url) as client:
        facts = client.check()
        # As a proxy in front of servers of different length would have it.
        client._facts = type(facts)(facts.urls, facts.model, facts.root, 10_000, facts.vllm_version)
        for length in (256, 257, 400):
            (answer,) = client.score([ScoreRequest([7] * length, np.arange(length) == length - 1)], 8)
            assert isinstance(answer, RowError)


@pytest.mark.parametrize("packed", [False, True])
def test_live_teacher_gives_the_top_of_the_local_teachers_distribution(served_teacher, model, rows, packed):
    few = rows[:4]
    if packed:
        inputs = {
            "input_ids": torch.tensor([[i for ids in few for i in ids]]),
            "position_ids": torch.tensor([[i for ids in few for i in range(len(ids))]]),
        }
        supervised = inputs["position_ids"][:, 1:] > 0
    else:
        width = max(map(len, few))
        inputs = {
            "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in few]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in few]),
        }
        supervised = inputs["attention_mask"][:, 1:] > 0
    tokenizer = AutoTokenizer.from_pretrained(served_teacher.folder)
    served = ServerTeacher(served_teacher.url, 32, teacher=str(served_teacher.folder), tokenizer=tokenizer)
    local = LocalTeacher(model)
    accelerator = Accelerator(cpu=True)
    served.prepare(accelerator)
    local.prepare(accelerator)
    signal = served.ask(inputs, supervised)
    dense = local.ask(inputs, supervised)
    log_probs = dense.head.log_probs(dense.hidden)
    values, _ = log_probs.topk(32)
    torch.testing.assert_close(signal.log_probs, values, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_probs.gather(-1, signal.ids), values, atol=1e-4, rtol=0)
    tail = torch.log1p(-values.double().exp().sum(-1)).float()
    torch.testing.assert_close(signal.tail_log_probs, tail, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_hidden_states_are_those_of_transformers(served_teacher, model, rows, tmp_path):
    """scripts/serve_teacher.sh --signal hidden: its states, its refusals, and what the checks make of it."""
    folder, accelerator = str(served_teacher.folder), Accelerator(cpu=True)
    with serve(served_teacher.folder, tmp_path / "server.log", "--signal", "hidden") as served:
        with VLLMClient(served.url) as client, VLLMClient(served_teacher.url) as generating:
            assert (client.signal(), generating.signal()) == ("hidden", "top_k")
            with pytest.raises(ValueError, match=r"(?s)gives no log-probs.*vllm serve"):
                client.check(k=8)
            with pytest.raises(ValueError, match=r"(?s)gives no hidden states.*--runner pooling"):
                generating.check(states=torch.float32)
            asked = [ScoreRequest(ids, np.arange(len(ids)) > 0) for ids in rows]
            refused = ScoreRequest([5, 100_000, 6], np.arange(3) > 0)
            *answers, bad = client.states([*asked, refused])
            assert isinstance(bad, RowError)
            halves = list(client.states(asked, torch.bfloat16))
        for ids, states, half in zip(rows, answers, halves, strict=True):
            with torch.no_grad():
                expected = model.model(torch.tensor([ids])).last_hidden_state[0, :-1]
            assert isinstance(states, torch.Tensor)
            torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(half, states.to(torch.bfloat16))
        settings = {"norm": final_norm_of_checkpoint(folder), "teacher": folder, "max_length": 256}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        teacher = HiddenServerTeacher(served.url, head_of_checkpoint(folder), tokenizer=tokenizer, **settings)
        local = LocalTeacher(model)
        ids = torch.tensor([rows[0]])
        with teacher.client:
            for side in (teacher, local):
                side.prepare(accelerator)
            ours, theirs = (side.ask({"input_ids": ids}, ids[:, 1:] >= 0) for side in (teacher, local))
    log_probs, expected = (signal.head.log_probs(signal.hidden) for signal in (ours, theirs))
    assert (expected.exp() * (expected - log_probs)).sum(-1).max() < 1e-6


def test_greedy_answers_are_those_of_transformers(served_teacher, model, rows):
    with VLLMClient(served_teacher.url) as client:
        answers = list(client.generate(rows, {"max_tokens": 12, "temperature": 0}))
    tokenizer = AutoTokenizer.from_pretrained(served_teacher.folder)
    for ids, found in zip(rows, answers, strict=True):
        assert not isinstance(found, RowError)
        (answer,) = found
        whole = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        assert answer.ids == whole[0, len(ids) :].tolist()
        # vLLM leaves out a character that the last token only begins.
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)[: len(answer.text)]
        assert answer.text.strip("\ufffd")
        assert answer.finish_reason == ("stop" if answer.ids[-1] == tokenizer.eos_token_id else "length")


def test_samples_differ_and_a_seed_repeats_them(served_teacher, rows):
    sampling = {"max_tokens": 8, "temperature": 1.0, "seed": 7}
    with VLLMClient(served_teacher.url) as client:
        (first,), (again,) = (list(client.generate(rows[:1], sampling, n=4)) for _ in range(2))
    assert not isinstance(first, RowError)
    assert len({tuple(answer.ids) for answer in first}) > 1
    assert first == again


# Images

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat sat"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "on a mat"}]},
]


def row_of(processor: Any, seed: int, conversation: list[dict[str, Any]] = CHAT, **template: Any) -> tuple[Any, Any]:
    """The student's inputs of a conversation about one random image, and that image."""
    image = make_image(seed, width=64, height=(32, 48, 64)[seed % 3])
    text = processor.apply_chat_template(conversation, **template)
    return processor(text=[text], images=[[image]], return_tensors="pt"), image


def test_images_are_scored_as_transformers_does(served_vlm):
    processor = Idefics3Processor.from_pretrained(served_vlm.folder)
    vlm = Idefics3ForConditionalGeneration.from_pretrained(served_vlm.folder)
    asked, expected = [], []
    for seed in range(6):
        inputs, image = row_of(processor, seed)
        ids = inputs["input_ids"][0].tolist()
        asked.append(ScoreRequest(ids, np.arange(len(ids)) >= len(ids) - 5, CHAT, [image]))
        with torch.no_grad():
            expected.append(vlm(**inputs).logits[0, -6:-1].log_softmax(-1))
    with VLLMClient(served_vlm.url) as client:
        client.check(str(served_vlm.folder), 32, 100, processor.tokenizer)
        for answer, log_probs in zip(client.score(asked, 32), expected, strict=True):
            assert_same(answer, log_probs, 32, RESIZED)
    # The image matters, or the test above would say little.
    assert (expected[0] - expected[3]).abs().max() > 100 * TOLERANCE


def test_image_tokens_that_do_not_line_up_are_a_row_error(served_vlm):
    processor = Idefics3Processor.from_pretrained(served_vlm.folder)
    inputs, image = row_of(processor, 0)
    ids = inputs["input_ids"][0].tolist()
    at = ids.index(processor.image_token_id)
    fewer = ids[:at] + ids[at + 1 :]
    with VLLMClient(served_vlm.url, image_token_id=processor.image_token_id) as client:
        wrong, right = client.score(
            [
                ScoreRequest(fewer, np.arange(len(fewer)) == len(fewer) - 1, CHAT, [image]),
                ScoreRequest(ids, np.arange(len(ids)) == len(ids) - 1, CHAT, [image]),
            ],
            8,
        )
    assert isinstance(right, TopK)
    assert isinstance(wrong, RowError)
    count = ids.count(processor.image_token_id)
    assert f"{len(ids)} tokens instead of {len(fewer)}" in wrong.reason
    assert f"{count} image tokens instead of {count - 1}" in wrong.reason


def test_greedy_answers_about_images_are_those_of_transformers(served_vlm):
    processor = Idefics3Processor.from_pretrained(served_vlm.folder)
    vlm: Any = Idefics3ForConditionalGeneration.from_pretrained(served_vlm.folder)
    inputs, image = row_of(processor, 1, CHAT[:1], add_generation_prompt=True)
    ids = inputs["input_ids"][0].tolist()
    with VLLMClient(served_vlm.url) as client:
        (answers,) = client.generate([Prompt(ids, CHAT[:1], [image])], {"max_tokens": 8, "temperature": 0})
    expected = vlm.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not isinstance(answers, RowError)
    assert answers[0].ids == expected[0, len(ids) :].tolist()


def test_a_llava_student_is_scored_and_answers_as_in_transformers(served_llava):
    """Pictures of the tower's own size: the two sides resize with different libraries."""
    processor: Any = AutoProcessor.from_pretrained(served_llava.folder)
    student: Any = LlavaForConditionalGeneration.from_pretrained(served_llava.folder)
    asked, expected = [], []
    for images in ([make_image(seed, 8, 8) for seed in seeds] for seeds in ([0], [1, 2], [3], [])):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "the cat sat"}]
        said = [{"role": "user", "content": content}, CHAT[1]]
        inputs = processor(text=processor.apply_chat_template(said), images=images or None, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        asked.append(ScoreRequest(ids, np.arange(len(ids)) >= len(ids) - 5, said, images))
        with torch.no_grad():
            expected.append(student(**inputs).logits[0, -6:-1].log_softmax(-1))
    prompt = processor.apply_chat_template(CHAT[:1], add_generation_prompt=True)
    inputs = processor(text=prompt, images=[make_image(0, 8, 8)], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    with VLLMClient(served_llava.url) as client:
        client.check(str(served_llava.folder), 32, 100, processor.tokenizer)
        for answer, log_probs in zip(client.score(asked, 32), expected, strict=True):
            assert_same(answer, log_probs, 32)
        (answers,) = client.generate(
            [Prompt(ids, CHAT[:1], [make_image(0, 8, 8)])], {"max_tokens": 8, "temperature": 0}
        )
    assert (expected[0] - expected[2]).abs().max() > 100 * TOLERANCE
    assert not isinstance(answers, RowError)
    whole = student.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert answers[0].ids == whole[0, len(ids) :].tolist()


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs SmolLM2-135M: python scripts/get_teacher.py")
def test_real_model_has_the_log_probs_of_transformers(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    text = (ROOT / "LICENSE").read_text()
    ids = [tokenizer(text[start : start + 1000])["input_ids"] for start in (0, 3000, 6000)]
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    with (
        serve(SMOLLM2, tmp_path / "server.log", "--max-model-len", "512") as served,
        VLLMClient(served.url) as client,
    ):
        client.check(str(SMOLLM2), 64, 511, tokenizer)
        answers = list(client.score([ScoreRequest(row, np.arange(len(row)) > 0) for row in ids], 64))
    for row, answer in zip(ids, answers, strict=True):
        assert_same(answer, reference(model, row), 64)
