"""On-policy distillation: which rows the student answers, and that a rollout is a batch's row like any other."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from mmkd.commands.main import main
from mmkd.generation.local_generation import up_to_stop
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.teachers.batch import Batch
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.several import pairs_of
from mmkd.training.answers import Rollout
from mmkd.training.method import METHODS
from mmkd.training.rollouts import Rollouts, check_rollouts
from scripts.make_tiny_models import make_model, save, sentences
from tests.alignment.tiny_tokenizers import CHATTERS
from tests.forked import run_ranks
from tests.helpers import LORA, Build, losses_of
from tests.teachers.fake_vllm import fake_vllm
from tests.teachers.vlm import make_image, make_vlm
from tests.trainers.on_policy_ranks import NAMES
from tests.trainers.served_student import ServedStudent
from tests.vlms import make_llava, vision_rows

GREEDY: dict[str, Any] = {"on_policy_fraction": 0.5, "rollout_max_tokens": 8, "rollout_temperature": 0.0}
WEIGHED: dict[str, Any] = {
    "divergence": "reverse_kl",
    "student_top_k": 6,
    "rollout_token_weights": "importance",
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher that reads with another tokenizer and another chat template."""
    tokenizer = CHATTERS["llama"]()
    model = make_model(layers=3, width=48, seed=4, rows=len(tokenizer))
    return save(model, tokenizer, tmp_path_factory.mktemp("foreign") / "teacher")


def steps(trainer: Any) -> list[tuple[float, float]]:
    trainer.train()
    return list(zip(losses_of(trainer), losses_of(trainer, "grad_norm"), strict=True))


def mixed(trainer: Any, batches: int = 1) -> list[Batch]:
    """The first accumulated batch as the loss sees it, before any step."""
    iterator = iter(trainer.get_train_dataloader())
    return trainer.get_batch_samples(iterator, batches, torch.device("cpu"))[0]


# The batch


def test_rollouts_are_what_the_student_says_token_by_token(build: Build, completions: Dataset) -> None:
    trainer: Any = build(KDTrainer, completions, **{**GREEDY, "on_policy_fraction": 1.0})
    (plain,) = list(trainer.get_train_dataloader())[:1]
    (batch,) = mixed(trainer)
    model = trainer.model.eval()
    for row in range(4):
        start = int((plain["labels"][row] != -100).nonzero()[0])
        ids = plain["input_ids"][row, :start].tolist()
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == ids
        assert batch["labels"][row, :length].tolist() == [-100] * start + ids[start:]
        assert (batch["labels"][row, length:] == -100).all()


@pytest.mark.parametrize("chats", [False, True])
def test_prompts_need_no_answers(build: Build, completions: Dataset, chats: bool) -> None:
    """The student answers what it would have answered with the data's answers beside."""
    rows = completions
    if chats:
        turns = [("prompt", "user"), ("completion", "assistant")]
        rows = Dataset.from_list(
            [{k: [{"role": role, "content": row[k]}] for k, role in turns} for row in completions.to_list()]
        )
    settings = {**GREEDY, "on_policy_fraction": 1.0}
    whole, alone = (mixed(build(KDTrainer, data, **settings)) for data in (rows, rows.remove_columns("completion")))
    assert torch.equal(whole[0]["input_ids"], alone[0]["input_ids"])
    assert torch.equal(whole[0]["labels"], alone[0]["labels"])
    with pytest.raises(ValueError, match="rows of the train data are prompts without answers to learn from"):
        build(KDTrainer, rows.remove_columns("completion"), **GREEDY)


def test_the_share_is_exact_and_in_other_rows_at_each_step(build: Build, completions: Dataset) -> None:
    trainer: Any = build(KDTrainer, completions, **{**GREEDY, "on_policy_fraction": 0.3})
    batches = list(trainer.get_train_dataloader())[:5]
    chosen = []
    for step in range(40):
        prompts = trainer.rollouts._prompts(batches, step)
        assert prompts == trainer.rollouts._prompts(batches, step)
        assert len(prompts) == 6
        chosen += [4 * prompt.batch + prompt.row for prompt in prompts]
    assert {*chosen} == {*range(20)}


def test_ranks_choose_the_rows_of_one_rank(build: Build, completions: Dataset) -> None:
    trainer: Any = build(KDTrainer, completions, per_device_train_batch_size=2, **GREEDY)
    batches = list(trainer.get_train_dataloader())[:4]
    rollouts = trainer.rollouts
    whole = [one.ids for one in rollouts._prompts(batches, 7)]
    ranks = [
        Rollouts(rollouts.generator, rollouts.tokens, trainer.args, rank, 2)._prompts(batches[rank::2], 7)
        for rank in (0, 1)
    ]
    assert sorted(whole) == sorted(one.ids for side in ranks for one in side)


def test_the_last_answer_of_a_conversation_is_the_students(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, sentences(4, seed=8), strict=True)
    ]
    rows = Dataset.from_list([{"messages": turns}] * 4)
    trainer: Any = build(KDTrainer, rows, assistant_only_loss=True, **{**GREEDY, "on_policy_fraction": 1.0})
    (batch,) = mixed(trainer)
    start = int((batch["labels"][0] != -100).nonzero()[0])
    assert tokenizer.decode(batch["input_ids"][0, :start]) == tokenizer.apply_chat_template(
        turns[:3], tokenize=False, add_generation_prompt=True
    )


def test_plain_text_is_continued(build: Build, texts: Dataset) -> None:
    trainer: Any = build(KDTrainer, texts, rollout_prompt_tokens=3, **{**GREEDY, "on_policy_fraction": 1.0})
    (plain,) = list(trainer.get_train_dataloader())[:1]
    (batch,) = mixed(trainer)
    assert torch.equal(batch["input_ids"][:, :3], plain["input_ids"][:, :3])
    assert (batch["labels"][:, :3] == -100).all()
    assert torch.equal(batch["labels"][:, 3], batch["input_ids"][:, 3])


def test_max_length_cuts_rollouts(build: Build, completions: Dataset) -> None:
    settings = {**GREEDY, "on_policy_fraction": 1.0, "rollout_max_tokens": 30}
    trainer: Any = build(KDTrainer, completions, max_length=40, per_device_train_batch_size=24, **settings)
    (batch,) = mixed(trainer)
    assert batch["input_ids"].shape[1] == 40


@pytest.mark.parametrize("truncated", ["keep", "drop"])
def test_truncated_rollouts_are_kept_or_dropped(build: Build, completions: Dataset, truncated: str) -> None:
    settings = {**GREEDY, "rollout_truncated": truncated, "rollout_max_tokens": 1, "on_policy_fraction": 1.0}
    trainer = build(KDTrainer, completions, max_steps=1, per_device_train_batch_size=24, **settings)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["rollout_tokens"] == 24
    ended = 24 * entry["rollouts_ended"]
    assert entry["supervised_tokens"] == pytest.approx(24 if truncated == "keep" else ended)


# The loss


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cls", [KDTrainer, TAIDTrainer])
def test_losses_do_not_depend_on_gradient_accumulation(
    build: Build, completions: Dataset, cls: Any, temperature: float
) -> None:
    settings = {**GREEDY, "rollout_temperature": temperature, "max_steps": 3}
    whole = steps(build(cls, completions, per_device_train_batch_size=4, **settings))
    single = steps(build(cls, completions, per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings))
    assert single == [pytest.approx(pair, rel=1e-4) for pair in whole]


@pytest.mark.parametrize("cls", [KDTrainer, LLaVAKDTrainer])
def test_cross_entropy_is_of_the_datas_answers(build: Build, completions: Dataset, tmp_path: Path, cls: Any) -> None:
    """And a mean over their tokens, while the divergence is one over all."""
    settings: dict[str, Any] = {"rollout_max_tokens": 8, "on_policy_fraction": 0.5, "max_steps": 1}
    if cls is KDTrainer:
        shares, trainer = {"ce": 0.3, "kl": 0.7}, build(cls, completions, ce_weight=0.3, **settings)
    else:
        folders = {"model": tmp_path / "student", "teacher": tmp_path / "teacher"}
        models = {name: str(make_llava(folder, seed=len(name))) for name, folder in folders.items()}
        weights = {"alpha": 0.5, "beta": 0.0, "gamma": 0.0, "assistant_only_loss": True}
        rows = vision_rows([1, 2, 0, 3])
        shares, trainer = {"ce": 1.0, "kl": 0.5}, build(cls, rows, trainer=models, **weights, **settings)
    (batch,) = mixed(trainer)
    ((student, teacher),) = pairs_of(trainer.teacher, batch).values()
    with torch.no_grad():
        ours, theirs = (
            model.eval()(**view.inputs).logits[:, :-1][view.supervised].log_softmax(-1)
            for model, view in ((trainer.model, student), (trainer.teacher.model, teacher))
        )
    data = ~student.own[student.supervised]
    assert 0 < data.sum() < len(data)
    ce = -ours.gather(1, student.labels[:, 1:][student.supervised][:, None])[data].mean()
    expected = shares["ce"] * ce + shares["kl"] * (theirs.exp() * (theirs - ours)).sum(-1).mean()
    trainer.train()
    assert losses_of(trainer) == [pytest.approx(float(expected), rel=1e-4)]
    assert losses_of(trainer, "ce") == [pytest.approx(float(ce), rel=1e-4)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "zero3"])
def test_losses_do_not_depend_on_ranks(
    build: Build,
    completions: Dataset,
    tiny: dict[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    how: str,
) -> None:
    """Nor on how they share the student, which generates itself or has a server get its weights or its adapter."""
    if how == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not among mmkd's dependencies")
    interleaved = {"rollouts": "interleaved", "interleaved_top_k": 100}
    serving = {"max_model_len": 256, "tokenizer": tokenizer, "folder": str(tiny["student"])}
    with fake_vllm(ServedStudent, **serving) as fake:
        served = {"how": how, "server": fake.url}
        jobs: dict[str, Any] = {
            "here": {"how": how},
            "adapter here": {"how": how, "lora": True},
            # Before the server gets other weights than those under the adapter.
            "adapter served": {**served, "lora": True},
            "served": served,
            "still ahead": {**served, "rollout_ahead": 1, "learning_rate": 0.0},
            "weighed here": {"how": how, **WEIGHED},
        }
        # A teacher that ZeRO-3 shards cannot judge single tokens.
        if how != "zero3":
            jobs["interleaved"] = {"how": how, **interleaved}
        seen = on_ranks(jobs, tiny["teacher"].parent, tmp_path)
        assert fake.loads == 4 * 3
    torch.manual_seed(0)
    models = {"model": str(tiny["student"]), "peft_config": LoraConfig(**LORA)}
    alone = {
        "adapter": build(KDTrainer, completions, trainer=models, **GREEDY),
        "interleaved": build(KDTrainer, completions, **interleaved, **GREEDY),
        "still": build(KDTrainer, completions, learning_rate=0.0, **GREEDY),
        "weighed": build(KDTrainer, completions, **GREEDY, **WEIGHED),
        "": build(KDTrainer, completions, **GREEDY),
    }
    expected = {}
    for kind, trainer in alone.items():
        trainer.train()
        expected[kind] = list(zip(*(losses_of(trainer, report) for report in NAMES), strict=True))
    for name, ranks in seen.items():
        steps = next(steps for kind, steps in expected.items() if kind in name)
        for rank in ranks:
            assert rank == [pytest.approx(step, rel=1e-4) for step in steps], name


def on_ranks(jobs: dict[str, Any], models: Path, folder: Path) -> dict[str, list[Any]]:
    """What each of two ranks saw of the jobs of on_policy_ranks.py."""
    arguments = ["-m", "tests.trainers.on_policy_ranks", str(models), str(folder), json.dumps(jobs)]
    run_ranks(2, arguments, {"DS_ACCELERATOR": "cpu"}, timeout=800)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return {name: [rank[name] for rank in ranks] for name in jobs}


def test_who_cannot_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher_cache holds the teacher's words"):
        check_rollouts(CachedTeacher.__new__(CachedTeacher))


@pytest.mark.parametrize("cls", [KDTrainer, TAIDTrainer, ALMTrainer])
def test_a_student_that_is_the_teacher_has_no_loss(
    build: Build, completions: Dataset, tiny: dict[str, Path], cls: Any
) -> None:
    settings = {"on_policy_fraction": 1.0, "rollout_max_tokens": 8, "max_steps": 1}
    trainer: Any = build(cls, completions, trainer={"model": str(tiny["teacher"])}, **settings)
    if cls is ALMTrainer:
        # Random weights say tokens that no tokenizer makes of their text.
        ids = trainer.processing_class(" one dog saw red birds")["input_ids"]
        trainer.rollouts._answered = lambda asked, seed: [Rollout([*ids, 1], True)] * len(asked)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(0, abs=1e-6)
    assert losses_of(trainer, "rollout_tokens")[0] > 4


def test_resume_gives_the_losses_of_an_uninterrupted_run(build: Build, completions: Dataset, tmp_path: Path) -> None:
    settings = {**GREEDY, "rollout_temperature": 1.0, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = build(KDTrainer, completions, **settings)
    whole.train()
    resumed = build(KDTrainer, completions, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name in ("loss", "grad_norm", "rollout_length", "rollout_tokens"):
        assert losses_of(resumed, name)[-3:] == losses_of(whole, name)[-3:], name


def test_generating_leaves_the_student_as_it_was(build: Build, completions: Dataset) -> None:
    trainer: Any = build(KDTrainer, completions, activation_checkpointing=True, **GREEDY)
    own, caches = trainer.model.generation_config, []
    original = trainer.model.model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        caches.append((kwargs.get("use_cache"), trainer.model.training, torch.is_grad_enabled()))
        return original(*args, **kwargs)

    dense, head = [], trainer.model.lm_head
    hook = head.register_forward_hook(lambda _, inputs, __: dense.append(inputs[0].is_contiguous()))
    trainer.model.model.forward = spy
    trainer.model.train()
    mixed(trainer)
    hook.remove()
    assert {*caches} == {(True, False, False)}
    assert dense
    # On a CPU, torch would copy the head's weight for each row of a slice of states.
    assert all(dense)
    assert not head._forward_pre_hooks
    assert trainer.model.training
    assert trainer.model.generation_config is own
    assert len(steps(trainer)) == 4


def test_evaluation_has_no_rollouts(build: Build, completions: Dataset) -> None:
    on, off = (build(KDTrainer, completions, on_policy_fraction=share, rollout_max_tokens=8) for share in (1.0, 0.0))
    found, expected = (trainer.evaluate(completions) for trainer in (on, off))
    assert found["eval_loss"] == expected["eval_loss"]
    assert not [name for name in found if "rollout" in name]


# Images


def test_images_stay_with_their_prompts(build: Build, tmp_path: Path) -> None:
    models = {"model": str(make_llava(tmp_path / "student")), "teacher": str(make_llava(tmp_path / "teacher", seed=3))}
    rows = vision_rows([1, 2, 0, 3] * 3)
    settings = {"assistant_only_loss": True, "max_length": 128, **GREEDY}
    whole: Any = build(KDTrainer, rows, trainer=models, per_device_train_batch_size=4, **settings)
    (plain,), (batch,) = list(whole.get_train_dataloader())[:1], mixed(whole)
    image = whole.processing_class.image_token_id
    assert torch.equal((plain["input_ids"] == image).sum(1), (batch["input_ids"] == image).sum(1))
    assert torch.equal(plain["pixel_values"], batch["pixel_values"])
    assert torch.equal(batch.student.visual, batch["input_ids"] == image)
    assert (batch["labels"] != plain["labels"][:, : batch["labels"].shape[1]]).any()
    expected = steps(whole)
    single = build(
        KDTrainer, rows, trainer=models, per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )
    assert steps(single) == [pytest.approx(pair, rel=1e-4) for pair in expected]


# Other tokenizers


@pytest.mark.parametrize("kind", ["completions", "chats", "texts"])
def test_a_foreign_teacher_reads_the_text_of_rollouts(
    build: Build, foreign: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    data: Dataset = request.getfixturevalue(kind)
    if kind == "chats":
        talks = [row["messages"] for row in data.to_list()]
        data = Dataset.from_list([{"prompt": turns[:1], "completion": turns[1:]} for turns in talks])
    settings: dict[str, Any] = {**GREEDY, "on_policy_fraction": 1.0, "chunks": "all", "tau": 5.0, "max_length": 200}
    settings |= {"rollout_prompt_tokens": 3} if kind == "texts" else {}
    trainer: Any = build(ALMTrainer, data, trainer={"teacher": str(foreign)}, **settings)
    silent = trainer.rollouts.tokens.stops
    # Bytes that are no text, which a trained student hardly ever says, would be read as something else.
    allowed = set(trainer.processing_class("the cat sat on a mat and saw one dog")["input_ids"])
    trainer.rollouts.tokens.silenced.extend({*range(300)} - allowed - {*silent})
    (batch,) = mixed(trainer)
    supervised = batch.student.supervised
    signal = trainer.ask(batch)
    spoken = ~torch.isin(batch["labels"][:, 1:][supervised], torch.tensor(silent))
    assert (signal.alignment.student_chunk >= 0)[spoken].float().mean() > 0.9
    assert len(signal.log_probs) > 8


def test_a_foreign_vision_teacher_reads_them_too(build: Build, tmp_path: Path) -> None:
    other = copy.deepcopy(CHATTERS["llama"]())
    other.pad_token = other.eos_token
    models = {"model": str(make_vlm(tmp_path / "student")), "teacher": str(make_vlm(tmp_path / "teacher", other))}
    pairs = zip(sentences(8, seed=1), sentences(8, seed=2), strict=True)
    rows = [
        {
            "images": [make_image(number) for number in range(row % 3)],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for row, (question, answer) in enumerate(pairs)
    ]
    data = Dataset.from_list(rows, features=Features({**Dataset.from_list(rows).features, "images": List(Image())}))
    settings = {**GREEDY, "on_policy_fraction": 1.0, "max_length": None, "chunks": "all", "tau": 5.0, "max_steps": 1}
    trainer: Any = build(ALMTrainer, data, trainer=models, **settings)
    spoken = trainer.processing_class.tokenizer(" one dog saw red birds")["input_ids"]
    trainer.rollouts._answered = lambda asked, seed: [Rollout(spoken, False)] * len(asked)
    trainer.train()
    assert losses_of(trainer, "aligned") == [1.0]
    assert losses_of(trainer, "supervised_tokens") == [4 * len(spoken)]


def test_alm_losses_do_not_depend_on_gradient_accumulation(build: Build, completions: Dataset, foreign: Path) -> None:
    settings = {**GREEDY, "chunks": "merge", "tau": 5.0, "max_steps": 3, "trainer": {"teacher": str(foreign)}}
    whole = steps(build(ALMTrainer, completions, per_device_train_batch_size=4, **settings))
    single = steps(
        build(ALMTrainer, completions, per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    )
    assert single == [pytest.approx(pair, rel=1e-4) for pair in whole]


# What goes wrong


def test_rollouts_that_never_end_stop_the_run(build: Build, completions: Dataset) -> None:
    trainer = build(KDTrainer, completions, **{**GREEDY, "rollout_max_tokens": 1, "rollout_patience": 2})
    with pytest.raises(ValueError, match=r"In 2 steps on end .* do not end within rollout_max_tokens.*Raise"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_empty_rollouts_stop_the_run_and_a_good_step_starts_over(build: Build, completions: Dataset) -> None:
    trainer: Any = build(KDTrainer, completions, **{**GREEDY, "rollout_patience": 2})
    silent, good = {"rollouts": 40, "empty": 39, "truncated": 0}, {"rollouts": 40, "empty": 37, "truncated": 0}
    for totals in (silent, good, silent):
        trainer.rollouts.judge(totals)
    with pytest.raises(ValueError, match="say nothing"):
        trainer.rollouts.judge(silent)


def test_what_a_rollout_is() -> None:
    assert Rollout(*up_to_stop([5, 6, 1, 0, 0], [1])) == Rollout([5, 6, 1], True)
    assert Rollout(*up_to_stop([1, 5], [1])).empty
    assert not Rollout(*up_to_stop([5, 6], [1])).ended
    assert Rollout(*up_to_stop([], [1])).empty


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"on_policy_fraction": 1.5}, "give a number from 0 to 1"),
        ({"on_policy_fraction": 1.0, "ce_weight": 0.1}, "ce_weight"),
        ({"on_policy_fraction": 0.5, "rollout_temperature": -1.0}, "rollout_temperature"),
        ({"on_policy_fraction": 0.5, "rollout_top_p": 0.0}, "rollout_top_p"),
        ({"on_policy_fraction": 0.5, "rollout_batch_size": 0}, "rollout_batch_size"),
        ({"on_policy_fraction": 0.5, "rollout_truncated": "cut"}, "choose one of keep, drop"),
        ({"on_policy_fraction": 0.5, "rollout_max_tokens": 64, "max_length": 64}, "has no room"),
        ({"on_policy_fraction": 0.5, "rollout_prompt_tokens": 8, "rollout_truncated": "drop"}, "does not end"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        KDConfig(output_dir=str(tmp_path), bf16=False, report_to="none", **settings)


@pytest.mark.parametrize("method", ["sft", "comd"])
def test_other_methods_refuse_rollouts(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learns from the data's answers only"):
        METHODS[method].config(output_dir=str(tmp_path), bf16=False, report_to="none", on_policy_fraction=0.5)


def test_data_without_prompts_are_refused(build: Build, texts: Dataset) -> None:
    with pytest.raises(ValueError, match=r"None of the first 24 rows has a prompt.*rollout_prompt_tokens"):
        build(KDTrainer, texts, **GREEDY)


def test_rows_of_a_stream_are_answered(build: Build, completions: Dataset) -> None:
    """As those of the same data in the same order, a seed repeats them."""
    settings = {**GREEDY, "rollout_temperature": 1.0, "max_steps": 3}
    in_order = steps(build(KDTrainer, completions, train_sampling_strategy="sequential", **settings))
    stream = completions.to_iterable_dataset()
    streamed = [steps(build(KDTrainer, stream, **settings)) for _ in range(2)]
    assert streamed[0] == streamed[1] == in_order


# The command line


def test_a_recipe_trains_on_rollouts(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, completions: Dataset
) -> None:
    monkeypatch.chdir(tmp_path)
    completions.to_json("train.jsonl")
    data = {"name": "tiny", "source": "json", "data_files": {"train": "train.jsonl"}, "splits": {"train": "train"}}
    data |= {
        "description": "Sentences.",
        "license": "mit",
        "columns": {"prompt": "prompt", "completion": "completion"},
    }
    Path("data.yaml").write_text(yaml.safe_dump(data))
    recipe = {
        "method": "kd",
        "teacher": str(tiny["teacher"]),
        "student": str(tiny["student"]),
        "data": "data.yaml",
        "output_dir": "run",
        "max_steps": 2,
        "max_length": 64,
        "logging_steps": 1,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        **GREEDY,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "recipe.yaml"]) == 0
    history = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
    assert history[1]["rollout_tokens"] > history[0]["rollout_tokens"] > 0
