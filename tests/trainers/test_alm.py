"""ALM: the loss is that of chunks of text, however they are tokenised, batched or packed."""

import copy
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from mmkd.alignment.pieces import TokenPieces, boundary_mask
from mmkd.alignment.spans import Aligner
from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.losses.chunks import binarised
from mmkd.methods.alm import DIVERGENCES, ALMConfig, ALMTrainer
from mmkd.models.load import load_processing_class
from mmkd.preparation.pairs import BatchAligner, read
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.served_head import head_of_checkpoint
from mmkd.teachers.server import ServerTeacher
from scripts.make_tiny_models import make_model, sentences
from tests.alignment.tiny_tokenizers import CHATTERS, wordpiece
from tests.helpers import Build, losses_of
from tests.teachers.fake_vllm import ServedLogProbs, ServedStates, fake_vllm
from tests.teachers.vlm import make_image, make_vlm


@pytest.fixture
def alm(build: Build, foreign: Path) -> Any:
    """`alm(data, key=value, ...)`: a trainer of the tiny student and the foreign teacher."""

    def make(data: Dataset, trainer: dict[str, Any] | None = None, **settings: Any) -> Any:
        settings = {"chunks": "all", "tau": 5.0, **settings}
        return build(ALMTrainer, data, trainer={"teacher": str(foreign), **(trainer or {})}, **settings)

    return make


def steps(trainer: Any) -> list[tuple[float, float]]:
    trainer.train()
    return list(zip(losses_of(trainer), losses_of(trainer, "grad_norm"), strict=True))


# The loss is what it says


def token_log_probs(model: Any, ids: list[int]) -> np.ndarray:
    """log p of tokens 1, 2, ... given those before."""
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(ids)[1:, None])[:, 0].double().numpy()


def chunks_by_the_book(ours: list[bytes], theirs: list[bytes]) -> list[tuple[slice, slice]]:
    """Spans of tokens with the same bytes, as short as can be."""
    ends = [np.cumsum([len(piece) for piece in side]).tolist() for side in (ours, theirs)]
    common = sorted({*ends[0]} & {*ends[1]})
    found, start = [], (0, 0)
    for end in common:
        stop = tuple(side.index(end) + 1 for side in ends)
        found.append((slice(start[0], stop[0]), slice(start[1], stop[1])))
        start = stop
    return found


def test_loss_is_the_mean_divergence_of_the_models_own_chunk_likelihoods(alm: Any) -> None:
    row = {"prompt": "the cat sat on a mat and", "completion": " saw one dog run near a house"}
    trainer = alm(Dataset.from_list([row] * 4), max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    pieces = trainer._paired[""].aligner
    student, teacher = pieces.student, pieces.teacher
    prompt = len(trainer.processing_class(row["prompt"])["input_ids"])
    ids = batch["input_ids"][0].tolist()[: int(batch["attention_mask"][0].sum())]
    view = batch.readings[""].view
    theirs = view["input_ids"][0].tolist()[: int(view["attention_mask"][0].sum())]
    first = int(view.supervised[0].int().argmax()) + 1
    # The end of the text is a marker on both sides and a chunk of its own.
    spans = chunks_by_the_book([student[i] for i in ids[prompt:-1]], [teacher[i] for i in theirs[first:-1]])
    log_probs = token_log_probs(trainer.model, ids)[prompt - 1 :], token_log_probs(trainer.teacher.model, theirs)
    log_probs = log_probs[0], log_probs[1][first - 1 :]
    a, b = (
        torch.tensor([*(x[s].sum() for s in spans_of), x[-1]])
        for x, spans_of in zip(log_probs, zip(*spans, strict=True), strict=True)
    )
    expected = 5 * binarised(a, b, temperature=5.0).mean()
    assert len(spans) < len(ids) - prompt
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected.item(), rel=1e-4)
    assert losses_of(trainer, "chunk_gap")[0] == pytest.approx((a - b).abs().mean().item(), rel=1e-4)
    assert losses_of(trainer, "aligned") == [1.0]


def test_a_training_evaluates_by_its_schedule(alm: Any, texts: Dataset) -> None:
    held_out = texts.select(range(5))
    trainer = alm(texts, {"eval_dataset": held_out}, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert len(found := losses_of(trainer, "eval_chunk_gap")) == 2
    assert trainer.evaluate(held_out)["eval_chunk_gap"] == pytest.approx(found[-1], rel=1e-6)


def test_the_best_student_has_its_projection(alm: Any, texts: Dataset) -> None:
    held_out = texts.select(range(5))
    every: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # Not the last one: the loss falls.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = alm(texts, {"eval_dataset": held_out}, max_steps=3, hidden_weight=0.5, **every, **best)
    trainer.train()
    found = losses_of(trainer, "eval_loss")
    assert found[0] == max(found)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found[0], rel=1e-5)


def test_bits_per_byte_are_those_of_the_text(alm: Any, texts: Dataset) -> None:
    trainer = alm(texts, max_steps=1)
    before = trainer.evaluate(texts)
    nats = size = 0.0
    for text in texts["text"]:
        ids = trainer.processing_class(text + trainer.processing_class.eos_token)["input_ids"]
        nats -= token_log_probs(trainer.model, ids).sum()
        # Nothing predicts the first token.
        size += len(text.encode()) - len(trainer.processing_class.decode(ids[:1]).encode())
    assert before["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_a_student_that_is_the_teacher_has_no_loss(build: Build, texts: Dataset, tiny: dict[str, Path]) -> None:
    for policy in ("all", "space", "unbiased", "merge"):
        trainer = build(ALMTrainer, texts, trainer={"model": str(tiny["teacher"])}, max_steps=1, chunks=policy)
        trainer.train()
        assert losses_of(trainer)[0] == pytest.approx(0, abs=1e-6)
        assert losses_of(trainer, "chunk_gap")[0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_every_divergence_brings_the_student_nearer(alm: Any, texts: Dataset, divergence: str) -> None:
    trainer = alm(texts, divergence=divergence, max_steps=20)
    before = trainer.evaluate(texts)["eval_chunk_gap"]
    trainer.train()
    assert trainer.evaluate(texts)["eval_chunk_gap"] < before


@pytest.mark.parametrize("objective", ["uld", "mined"])
def test_the_baselines_train_too(alm: Any, texts: Dataset, objective: str) -> None:
    trainer = alm(texts, objective=objective, max_steps=20)
    before = trainer.evaluate(texts)["eval_divergence"]
    trainer.train()
    assert trainer.evaluate(texts)["eval_divergence"] < before


def test_policies_compare_other_chunks(alm: Any, texts: Dataset) -> None:
    counts = {}
    for policy in ("all", "space", "unbiased", "merge"):
        trainer = alm(texts, chunks=policy, gamma=0.3)
        batch = next(iter(trainer.get_train_dataloader()))
        counts[policy] = int(trainer.count_items(trainer.ask_ahead(batch, alone=True))["chunk"])
    assert counts["space"] < counts["all"]
    assert counts["unbiased"] <= counts["merge"] < counts["all"]


def test_boundary_probabilities_are_the_teachers_own(alm: Any) -> None:
    trainer = alm(Dataset.from_dict({"text": ["the cat sat on a mat"] * 4}), chunks="merge")
    batch = next(iter(trainer.get_train_dataloader()))
    signal, view = trainer.ask(batch), batch.readings[""].view
    with torch.no_grad():
        logits = trainer.teacher.model(**view.inputs).logits
    mask = torch.from_numpy(boundary_mask(TokenPieces.of(CHATTERS["gemma"]())))
    space = logits.log_softmax(-1)[..., mask].logsumexp(-1)[:, :-1][view.supervised]
    following = signal.alignment.teacher_next
    # Ends of texts need no boundary; the others are followed by white space.
    assert (following < 0).any()
    assert (following >= 0).any()
    expected = torch.where(following < 0, 0, space[following.clamp(min=0)])
    torch.testing.assert_close(signal.boundary_log_probs, expected)


# Nothing depends on how a batch is cut


@pytest.mark.parametrize("policy", ["all", "merge"])
def test_losses_do_not_depend_on_gradient_accumulation(alm: Any, completions: Dataset, policy: str) -> None:
    settings = {"chunks": policy, "ce_weight": 0.3, "tau": 100.0}
    whole = steps(alm(completions, per_device_train_batch_size=4, **settings))
    halves = steps(alm(completions, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings))
    assert halves == [pytest.approx(pair, rel=1e-4) for pair in whole]


@pytest.mark.parametrize("policy", ["all", "merge"])
def test_no_hidden_states_of_two_micro_batches_are_kept_at_a_time(alm: Any, texts: Dataset, policy: str) -> None:
    settings = {"chunks": policy, "hidden_weight": 0.5, "gradient_accumulation_steps": 4}
    trainer: Any = alm(texts, max_steps=2, per_device_train_batch_size=1, **settings)
    ask, answers, kept = trainer.teacher.ask, [], []

    def asked(*args: Any) -> Any:
        signal = ask(*args)
        answers.append(weakref.ref(signal.hidden))
        kept.append(sum(answer() is not None for answer in answers))
        return signal

    trainer.teacher.ask = asked
    trainer.train()
    assert len(kept) >= 8
    assert max(kept) == 1


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_losses_do_not_depend_on_ranks(alm: Any, completions: Dataset, ranks: Any, how: str) -> None:
    # As long as on the ranks: the tokenizer is trained anew, and the teacher may need more than 64 tokens.
    settings = {"chunks": ALMConfig.chunks, "tau": ALMConfig.tau, "max_length": 128}
    alone = alm(completions, per_device_train_batch_size=4, **settings)
    expected = steps(alone)
    evaluated = alone.evaluate(eval_dataset=completions.select(range(5)))
    found = ranks[f"alm {how}"]
    for rank in found:
        assert rank["steps"] == [pytest.approx(pair, rel=1e-4) for pair in expected]
        assert rank["evaluated"]["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-4)
    if how == "ddp":
        assert found[0]["weights"] == found[1]["weights"]


@pytest.mark.parametrize(
    "layout", [{"teacher_max_length": 23}, {"packing": True}, {"assistant_only_loss": True, "max_length": 200}]
)
def test_a_stream_trains_as_the_same_rows_do_when_they_are_loaded(
    alm: Any, completions: Dataset, chats: Dataset, layout: dict[str, Any]
) -> None:
    rows = chats if "assistant_only_loss" in layout else completions
    settings: dict[str, Any] = {"per_device_train_batch_size": 3, "max_length": 128, "chunks": "merge", **layout}
    # Loaded rows would come in another order.
    settings |= {"train_sampling_strategy": "sequential", "ce_weight": 0.3}
    loaded = alm(rows, **settings)
    streamed = alm(rows.to_iterable_dataset(num_shards=2), {"eval_dataset": rows.to_iterable_dataset()}, **settings)
    if "teacher_max_length" in layout:
        # Rows whose answers the teacher's side cuts off.
        assert 0 < len(loaded.train_dataset) < len(rows)
    assert steps(streamed) == [pytest.approx(pair, rel=1e-5) for pair in steps(loaded)]
    assert streamed.evaluate()["eval_loss"] == pytest.approx(loaded.evaluate(rows)["eval_loss"], rel=1e-5)


def test_a_shuffled_stream_goes_on_where_it_was_interrupted(alm: Any, texts: Dataset, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": 2}
    settings |= {"shuffle_dataset": True, "per_device_train_batch_size": 3}
    stream = texts.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=5)
    whole = alm(stream, **settings)
    whole.train()
    assert whole.train_dataset.num_shards == 2
    resumed = alm(stream, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses_of(resumed)[-2:] == losses_of(whole)[-2:]


def test_a_stream_that_a_side_cannot_use(alm: Any) -> None:
    rows = Dataset.from_dict({"prompt": ["the cat sat"] * 4, "completion": [" on a mat"] * 4})
    with pytest.raises(ValueError, match="No row of the stream has a supervised token for the teacher"):
        alm(rows.to_iterable_dataset(), teacher_max_length=2)


@pytest.mark.parametrize("layout", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_packing_and_padding_free_change_no_chunk(alm: Any, completions: Dataset, layout: dict[str, Any]) -> None:
    settings = {"per_device_train_batch_size": 24, "max_steps": 1, "max_length": 128}
    plain, flat = alm(completions, **settings), alm(completions, **{**settings, **layout})
    assert steps(flat) == [pytest.approx(pair, rel=1e-4) for pair in steps(plain)]
    results = [trainer.evaluate(completions) for trainer in (plain, flat)]
    for name in ("eval_loss", "eval_chunk_gap", "eval_ce", "eval_bits_per_byte"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4)


def test_resume_gives_the_losses_of_an_uninterrupted_run(alm: Any, texts: Dataset, tmp_path: Path) -> None:
    settings = {"hidden_weight": 0.5, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "chunks": "merge"}
    whole = alm(texts, **settings)
    whole.train()
    resumed = alm(texts, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses_of(resumed)[-3:] == losses_of(whole)[-3:]


def test_lora_students(alm: Any, texts: Dataset) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = alm(texts, trainer={"peft_config": adapter}, max_steps=20, ce_weight=0.5, combine="gradmag")
    before = trainer.evaluate(texts)["eval_ce"]
    trainer.train()
    assert trainer.evaluate(texts)["eval_ce"] < before


# Terms


def test_loss_is_the_mix_of_its_terms(alm: Any, texts: Dataset) -> None:
    trainer = alm(texts, ce_weight=0.3, max_steps=2)
    trainer.train()
    terms = zip(losses_of(trainer, "divergence"), losses_of(trainer, "ce"), strict=True)
    assert losses_of(trainer) == pytest.approx([0.7 * alm + 0.3 * ce for alm, ce in terms], rel=1e-4)


def test_gradmag_gives_both_terms_the_same_gradient_in_the_last_layer(alm: Any, texts: Dataset) -> None:
    trainer = alm(texts, ce_weight=0.5, combine="gradmag", max_steps=1)
    seen: list[list[float]] = []
    combined = trainer._combined

    def spy(terms: dict[str, torch.Tensor], shares: dict[str, float]) -> Any:
        totals = combined(terms, shares)
        parameters = list(trainer.model.model.layers[-1].parameters())
        norms = []
        for name, total in totals.items():
            gradients = torch.autograd.grad(total / trainer._counts[name], parameters, retain_graph=True)
            norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        seen.append(norms)
        return totals

    trainer._combined = spy
    trainer.train()
    assert seen[0][0] == pytest.approx(seen[0][1], rel=1e-4)


def test_the_projection_is_learned_and_not_shipped(alm: Any, texts: Dataset, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = alm(texts, hidden_weight=1.0, max_steps=3)
    before = trainer.model.alm_projection.weight.clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.alm_projection.weight)
    trainer.save_model(str(tmp_path / "saved"))
    # vLLM reads all of them.
    assert [path.name for path in (tmp_path / "saved").glob("*.safetensors")] == ["model.safetensors"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    info = loaded[1]
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]


# Chat templates


def test_templates_of_both_sides_differ_and_answers_align(alm: Any, chats: Dataset) -> None:
    trainer = alm(chats, max_steps=1, max_length=200)
    batch = next(iter(trainer.get_train_dataloader()))
    alignment = trainer.ask(batch).alignment
    labels = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    compared = labels[alignment.student_chunk >= 0].tolist()
    text = trainer.processing_class.decode(compared)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        spoken = trainer.processing_class.decode(ids[mask.bool()]).split("<|assistant|>")[1]
        assert spoken in text


def test_answers_align_although_prompts_do_not() -> None:
    """Headers in plain text differ, and everything after a difference would be lost with them."""
    tokenizer, other = CHATTERS["chatml"](), CHATTERS["gemma"]()
    align = BatchAligner(Aligner.of(other, tokenizer))
    talks = [["Human: one dog\nBot:", " red birds", "\nHuman: two\nBot:", " an old cat"], ["", "a", "plain text"]]
    spoken = [["[INST]one dog[/INST]", " red birds", "[INST]two[/INST]", " an old cat"], ["", "a", "plain text"]]

    def side(rows: list[list[str]], by: Any) -> Any:
        sequences = []
        for row in rows:
            parts = [np.array(by(part, add_special_tokens=False)["input_ids"], dtype=np.int64) for part in row]
            labels = [ids if number % 2 else np.full(len(ids), -100) for number, ids in enumerate(parts)]
            sequences.append((np.concatenate(parts), np.concatenate(labels)))
        return read(sequences)

    student, teacher = side(talks, tokenizer), side(spoken, other)
    found = align.chunks(student, teacher)
    said = [b"".join(align.aligner.student[i] for i in student.ids[slice(*span)]) for span in found.student]
    assert b"".join(said[: int((found.row == 0).sum())]) == b" red birds an old cat"
    assert sorted({*found.row.tolist()}) == [0]
    assert found.counts.student_unaligned.tolist() == [0, 0]
    assert found.counts.chunks.tolist() == [len(said), 0]


def test_rows_in_which_nothing_aligns_cost_nothing(alm: Any) -> None:
    row = {"teacher_input_ids": [3, 4], "teacher_labels": [-100, 4], "input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    trainer = alm(Dataset.from_list([row] * 4), max_steps=1, per_device_train_batch_size=4)
    trainer.train()
    assert losses_of(trainer) == [0.0]
    assert losses_of(trainer, "aligned") == [0.0]


# Images


def test_vision_models_with_different_tokenizers(build: Build, tmp_path: Path) -> None:
    other = copy.deepcopy(CHATTERS["llama"]())
    other.pad_token = other.eos_token
    student, teacher = make_vlm(tmp_path / "student"), make_vlm(tmp_path / "teacher", other)
    pairs = zip(sentences(8, seed=1), sentences(8, seed=2), strict=True)
    rows = [
        {
            "images": [make_image(number) for number in range(row % 3)],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for row, (question, answer) in enumerate(pairs)
    ]
    features = Features({**Dataset.from_list(rows).features, "images": List(Image())})
    arguments = {"model": str(student), "teacher": str(teacher)}
    settings: dict[str, Any] = {"max_length": None, "chunks": "merge", "tau": 5.0}
    trainer: Any = build(ALMTrainer, Dataset.from_list(rows, features=features), trainer=arguments, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    supervised = batch.student.supervised
    alignment = trainer.ask(batch).alignment
    assert (alignment.student_chunk >= 0).all()
    assert (batch["input_ids"] == trainer.processing_class.image_token_id).any()
    assert trainer.processing_class.image_token_id not in batch["labels"][:, 1:][supervised]
    trainer.train()
    assert losses_of(trainer, "divergence")[-1] < losses_of(trainer, "divergence")[0]


# Teachers behind a server


def served_by(kind: Any, folder: Path) -> Any:
    """A loopback server of the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_processing_class(str(folder), "teacher")
    return fake_vllm(kind, served=model, tokenizer=tokenizer, root=str(folder), max_model_len=256)


@pytest.mark.parametrize("settings", [{"chunks": "all"}, {"chunks": "space", "packing": True}])
def test_a_server_of_log_probs_teaches_as_the_model_in_this_process(
    alm: Any, completions: Dataset, foreign: Path, settings: dict[str, Any]
) -> None:
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": 128, **settings}
    local = alm(completions, **settings)
    with served_by(ServedLogProbs, foreign) as fake:
        teacher = ServerTeacher(fake.url, teacher=str(foreign))
        served = alm(completions, {"teacher": teacher}, **settings)
        assert steps(served) == [pytest.approx(pair, rel=1e-4) for pair in steps(local)]
        assert {request["prompt_logprobs"] for request in fake.requests} == {1}
        assert teacher.tokenizer is None
        assert served.evaluate(completions)["eval_loss"] == pytest.approx(
            local.evaluate(completions)["eval_loss"], rel=1e-4
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"chunks": "merge", "gamma": 0.3, "ce_weight": 0.3, "hidden_weight": 0.5},
        {"chunks": "unbiased", "gamma": 0.3},
        {"objective": "uld"},
        {"objective": "mined"},
    ],
)
def test_a_server_of_hidden_states_teaches_as_the_model_in_this_process(
    alm: Any, completions: Dataset, foreign: Path, settings: dict[str, Any]
) -> None:
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": 128, **settings}
    local = alm(completions, **settings)
    with served_by(ServedStates, foreign) as fake:
        teacher = HiddenServerTeacher(fake.url, head_of_checkpoint(str(foreign)), teacher=str(foreign))
        served = alm(completions, {"teacher": teacher}, **settings)
        assert steps(served) == [pytest.approx(pair, rel=1e-4) for pair in steps(local)]


@pytest.mark.parametrize("kind", [ServedLogProbs, ServedStates])
def test_rollouts_are_judged_by_a_server(alm: Any, completions: Dataset, foreign: Path, kind: Any) -> None:
    settings = {"on_policy_fraction": 1.0, "max_steps": 2, "max_length": 64, "rollout_max_tokens": 6}
    local = alm(completions, **settings)
    with served_by(kind, foreign) as fake:
        if kind is ServedStates:
            teacher: Any = HiddenServerTeacher(fake.url, head_of_checkpoint(str(foreign)), teacher=str(foreign))
        else:
            teacher = ServerTeacher(fake.url, teacher=str(foreign))
        served = alm(completions, {"teacher": teacher}, **settings)
        assert steps(served) == [pytest.approx(pair, rel=1e-4) for pair in steps(local)]


def test_what_a_server_that_generates_cannot_tell(alm: Any, texts: Dataset, foreign: Path) -> None:
    teacher = ServerTeacher("http://127.0.0.1:1", teacher=str(foreign))
    for settings in ({"chunks": "merge"}, {"objective": "uld"}, {"hidden_weight": 0.5}):
        with pytest.raises(UserError, match="teacher_server_signal: hidden") as caught:
            alm(texts, {"teacher": teacher}, **settings)
        assert caught.value.because == "upstream"
    with pytest.raises(UserError, match="does not tell its tokenizer"):
        alm(texts, {"teacher": ServerTeacher("http://127.0.0.1:1")})


# The command line, with the teacher in memory and on disk


@pytest.fixture
def recipe(tiny: dict[str, Path], foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for split, seed in (("train", 0), ("eval", 1)):
        rows = [json.dumps({"text": text}) for text in sentences(24, seed=seed)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    data = {"name": "words", "license": "CC0-1.0", "source": "json", "columns": {"text": "text"}}
    files = {"train": "train.jsonl", "eval": "eval.jsonl"}
    data |= {"data_files": files, "splits": {"train": "train", "eval": "eval"}}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(data))
    keys: dict[str, Any] = {"method": "alm", "student": str(tiny["student"]), "teacher": str(foreign), "tau": 5.0}
    keys |= {"data": "words.yaml", "output_dir": "run", "max_steps": 4, "learning_rate": 1e-2, "bf16": False}
    keys |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "chunks": "space", "max_length": 64}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "recipe.yaml"


def logged(folder: str) -> list[float]:
    history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_training_from_log_probs_on_disk_is_training_with_the_teacher(recipe: Path) -> None:
    assert main(["train", str(recipe)]) == 0
    assert main(["doctor", str(recipe)]) == 0
    cache = ["--teacher_cache", "cache", "--cache_signal", "log_probs"]
    assert main(["cache", "build", str(recipe), *cache]) == 0
    assert main(["train", str(recipe), *cache, "--output_dir", "cached"]) == 0
    assert logged("cached") == pytest.approx(logged("run"), rel=2e-3)


@pytest.mark.parametrize("policy", ["merge", "unbiased"])
def test_ends_of_words_are_cached_where_the_recipe_weighs_by_them(
    recipe: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Larger steps would magnify what 16 bits round.
    chunks = ["--chunks", policy, "--gamma", "0.3", "--learning_rate", "1e-4"]
    assert main(["train", str(recipe), *chunks]) == 0
    cache = ["--teacher_cache", "cache", "--cache_signal", "log_probs"]
    assert main(["cache", "build", str(recipe), *cache, *chunks]) == 0
    assert main(["train", str(recipe), *cache, *chunks, "--output_dir", "cached"]) == 0
    assert logged("cached") == pytest.approx(logged("run"), rel=1e-2)
    assert main(["doctor", str(recipe), *cache, *chunks]) == 0
    capsys.readouterr()
    assert main(["cache", "build", str(recipe), *cache]) == 2
    assert "set chunks as it was when this cache was begun" in capsys.readouterr().err
    assert main(["train", str(recipe), *cache, "--chunks", "space", "--output_dir", "spaces"]) == 0


@pytest.mark.parametrize("kind", [ServedLogProbs, ServedStates])
def test_a_recipe_with_a_server(recipe: Path, foreign: Path, capsys: pytest.CaptureFixture[str], kind: Any) -> None:
    chunks = ["--chunks", "space" if kind is ServedLogProbs else "merge"]
    assert main(["train", str(recipe), *chunks]) == 0
    with served_by(kind, foreign) as fake:
        served = [*chunks, "--teacher_server", fake.url]
        assert main(["train", str(recipe), *served, "--output_dir", "served"]) == 0
        assert logged("served") == pytest.approx(logged("run"), rel=1e-4)
        assert main(["doctor", str(recipe), *served]) == 0
        keys = {key: value for key, value in yaml.safe_load(recipe.read_text()).items() if key != "teacher"}
        recipe.write_text(yaml.safe_dump(keys))
        capsys.readouterr()
        assert main(["train", str(recipe), *served, "--output_dir", "other"]) == 2
        assert "Set `teacher` to its Hub id or folder" in capsys.readouterr().err


def test_a_cache_of_hidden_states_serves_every_setting(recipe: Path) -> None:
    settings = ["--chunks", "merge", "--gamma", "0.3", "--hidden_weight", "0.5", "--learning_rate", "1e-4"]
    assert main(["train", str(recipe), *settings]) == 0
    cache = ["--teacher_cache", "cache", "--cache_signal", "hidden"]
    assert main(["cache", "build", str(recipe), *cache, *settings]) == 0
    assert main(["train", str(recipe), *cache, *settings, "--output_dir", "cached"]) == 0
    assert logged("cached") == pytest.approx(logged("run"), rel=1e-2)


def test_a_cache_that_does_not_fit(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["--teacher_cache", "cache", "--cache_signal", "log_probs"]
    assert main(["cache", "build", str(recipe), *cache]) == 0
    for flags, reason in (
        (["--chunks", "merge"], "Build it again with this recipe"),
        (["--objective", "uld"], "uld and mined need the teacher's hidden states"),
        (["--teacher_max_length", "9"], "max_length"),
    ):
        capsys.readouterr()
        assert main(["train", str(recipe), *cache, "--output_dir", "other", *flags]) == 2
        assert reason in capsys.readouterr().err
    keys = yaml.safe_load(recipe.read_text())
    keys = {key: value for key, value in keys.items() if key not in ("chunks", "tau", "teacher")}
    recipe.write_text(yaml.safe_dump({**keys, "method": "kd"}))
    assert main(["train", str(recipe), "--teacher_cache", "cache", "--output_dir", "other"]) == 2
    assert "answers with LabelSignal, method kd needs" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tau": 0.0}, "tau is 0.0"),
        ({"gamma": 1.0}, "gamma is 1.0"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"divergence": "jsd"}, "divergence is 'jsd'"),
        ({"chunks": "words"}, "chunks is 'words'"),
        ({"renyi_alpha": 0.0}, "renyi_alpha is 0.0"),
        ({"hidden_weight": -1.0}, "hidden_weight is -1.0"),
        ({"ce_weight": 1.0}, "ce_weight is 1"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy wrapped"),
        ({"teacher_max_length": 1}, "teacher_max_length is 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        ALMConfig(output_dir=str(tmp_path), bf16=False, **settings)


def test_data_that_cannot_be_read_twice(alm: Any) -> None:
    with pytest.raises(ValueError, match="tokenised for the student already"):
        alm(Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4))


def test_a_teacher_of_small_letters_without_spaces_teaches(build: Build, texts: Dataset) -> None:
    processing_class = wordpiece()
    processing_class.eos_token = processing_class.pad_token = "[SEP]"
    models = {"teacher": make_model(rows=len(processing_class)), "teacher_processing_class": processing_class}
    trainer = build(ALMTrainer, texts, trainer=models, max_steps=1)
    ((loss, grad_norm),) = steps(trainer)
    assert loss > 0
    assert grad_norm > 0
    assert trainer.state.log_history[0]["aligned"] > 0.9
