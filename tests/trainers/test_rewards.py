"""A reward beside the divergence: what its function is told, and that its gradient is the policy's."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.models.heads import LMHead
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import load_rows_of
from mmkd.teachers.batch import Batch, RolloutTokens
from mmkd.training.answers import Rollout
from mmkd.training.items import Supervised
from mmkd.training.rewards import Others, RewardFunction, policy_gradient, told_of, with_rated_rows
from tests.helpers import Build, losses_of, near
from tests.teachers.fake_vllm import fake_vllm
from tests.trainers.served_student import ServedStudent

CODE = """
import json

def length(completions, **kwargs):
    return [len(str(answer)) / 10 for answer in completions]

def matches(prompts, completions, goal, **kwargs):
    with open(goal[0], "a") as log:
        log.write(json.dumps([prompts, completions, [*kwargs]]) + chr(10))
    return [float(len(answer) % 3) for answer in completions]

def picky(completions):
    return [None if number % 2 else float("nan") for number, _ in enumerate(completions)]

def broken(completions, prompts):
    return [1 / (prompt.startswith("good")) for prompt in prompts]

def short(completions):
    return [1.0]

async def later(completions, **kwargs):
    return [len(answer) for answer in completions]

def wants(completions, solution):
    return [0.0] * len(completions)

def odd(answers):
    return answers
"""
SETTINGS: dict[str, Any] = {"on_policy_fraction": 0.5, "rollout_max_tokens": 8, "reward_weight": 0.5}


@pytest.fixture
def code(tmp_path: Path) -> str:
    path = tmp_path / "rewards.py"
    path.write_text(CODE)
    return str(path)


def answering(rows: Any) -> dict[str, list[Any]]:
    texts = [f"answer {row}" for row in range(rows)]
    return {"prompts": [f"question {row}" for row in range(rows)], "completions": texts, "completion_ids": texts}


# The function


def test_functions_as_trl_calls_them(code: str) -> None:
    told = [{"goal": "x"}, {"goal": "y"}, {}]
    assert RewardFunction(f"{code}:length")(told, answering(3)) == [0.8, 0.8, 0.8]
    assert RewardFunction(f"{code}:later")(told, answering(3)) == [8, 8, 8]

    async def in_a_notebook() -> list[float | None]:
        return RewardFunction(f"{code}:later")(told, answering(3))

    assert asyncio.run(in_a_notebook()) == [8, 8, 8]
    assert RewardFunction(f"{code}:picky")(told, answering(3)) == [None, None, None]
    assert RewardFunction(f"{code}:wants").columns == ["solution"]
    assert RewardFunction(f"{code}:length")([], answering(0)) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "ZeroDivisionError.*Prompt: 'bad'. Answer: 'answer 1'"),
        ("short", "gave 1 rewards for 2 answers"),
        ("odd", "must take completions"),
        ("nothing", "no function 'nothing'"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(code: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardFunction(f"{code}:{name}")([{}, {}], {**answering(2), "prompts": ["good", "bad"]})


def test_a_missing_column_and_one_that_cannot_be_told_are_named(code: str) -> None:
    with pytest.raises(ValueError, match=r"asks for 'solution'.*it has goal"):
        RewardFunction(f"{code}:wants").check({"prompt": "a", "goal": 1})
    with pytest.raises(ValueError, match="'when' holds a bytes"):
        told_of({"prompt": "a", "when": b"x"})


def test_rows_keep_what_a_function_is_told() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = with_rated_rows(Dataset.from_list([{"messages": messages, "level": 3, "options": ["x", "y"]}]))
    assert json.loads(rows[0]["rated_row"]) == {"prompt": messages[:1], "level": 3, "options": ["x", "y"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "a:b", "on_policy_fraction": 0.0}, "on_policy_fraction: 0 there are none"),
        ({"reward": "a:b", "reward_weight": None}, "no reward_weight"),
        ({}, "there is no reward"),
        ({"reward": "a:b", "rollout_temperature": 0.7}, "come from another one"),
        ({"reward": "a:b", "rollouts": "interleaved"}, "the teacher chooses among its tokens"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KDConfig(output_dir=str(tmp_path), bf16=False, report_to="none", **{**SETTINGS, **settings})


# The gradient


def test_advantages_leave_the_answer_itself_out() -> None:
    others = Others([("a", 1.0), ("a", 3.0), ("b", 5.0), ("b", None)])
    assert others.advantage("a", 1.0) == -2.0
    # The only answer to its prompt is measured against all others.
    assert others.advantage("b", 5.0) == 3.0
    assert Others([("a", 2.0)]).advantage("a", 2.0) == 2.0


def policy(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, rollout: RolloutTokens, clip: float) -> Any:
    return policy_gradient(Supervised(hidden, LMHead(head), labels, rollout=rollout), 1.0, clip, 4, False)


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """Over all answers, weighted by their probabilities, it is the derivative of the expected reward."""
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    reward = torch.randn(6)
    expected = ((hidden @ head.T).softmax(-1)[0] * reward).sum()
    exact = torch.autograd.grad(expected, (hidden, head))
    every = torch.arange(6)
    rollout = RolloutTokens(torch.ones(6, dtype=torch.bool), None, reward)
    repeated = hidden.expand(6, 4)
    probabilities = (hidden @ head.T).softmax(-1)[0].detach()
    rollout = RolloutTokens(rollout.own, None, reward * probabilities)
    loss = policy(repeated, head, every, rollout, 0.2).totals["reward"]
    ours = torch.autograd.grad(loss, (hidden, head))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(-a, b)


def test_tokens_that_moved_far_are_clipped_as_in_ppo() -> None:
    torch.manual_seed(0)
    hidden, head, labels = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4])
    own, advantages = torch.tensor([True] * 4 + [False]), torch.tensor([1.0, 1.0, -1.0, -1.0, 9.0])
    log_probs = (hidden @ head.T).log_softmax(-1)[range(5), labels]
    then = (log_probs + torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0])).detach()
    losses = policy(hidden, head, labels, RolloutTokens(own, then, advantages), 0.2)
    ratio = (log_probs - then).exp()
    expected = -(ratio[0] + 1.2 - 0.8 - ratio[3])
    torch.testing.assert_close(losses.totals["reward"], expected)
    assert [int(value) for value in losses.reports["reward_clipped"]] == [2, 4]


# Training


def first(trainer: Any) -> Batch:
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))[0][0]


@pytest.mark.parametrize("kind", ["padded", "padding_free", "packing", "view", "alm", "taid", "served"])
def test_every_token_of_a_rollout_has_its_advantage(
    build: Build,
    completions: Dataset,
    foreign: Path,
    tokenizer: PreTrainedTokenizerFast,
    code: str,
    tmp_path: Path,
    kind: str,
) -> None:
    settings: dict[str, Any] = {**SETTINGS, "on_policy_fraction": 1.0, "reward": f"{code}:matches", "max_steps": 2}
    settings |= {"padding_free": {"padding_free": True, "max_length": None}, "packing": {"packing": True}}.get(
        kind, {}
    )
    settings |= {"max_length": 64} if kind == "packing" else {}
    if kind == "view":
        settings |= {"packing": True, "max_length": 64, "teacher_view": {"template": "Think. {prompt}"}}
    settings |= {"chunks": "all", "tau": 5.0} if kind == "alm" else {}
    models = {"teacher": str(foreign)} if kind == "alm" else {}
    log = tmp_path / "log"
    rows = completions.add_column("goal", [str(log)] * 24)
    cls: Any = {"alm": ALMTrainer, "taid": TAIDTrainer}.get(kind, KDTrainer)
    with fake_vllm(ServedStudent, max_model_len=256, tokenizer=tokenizer) as fake:
        settings |= {"rollout_server": [fake.url]} if kind == "served" else {}
        trainer: Any = build(cls, rows, trainer=models, **settings)
        batch = first(trainer)
        prompts, answers, names = json.loads(log.read_text().splitlines()[0])
        assert {*prompts} <= {*rows["prompt"]}
        assert "completion_ids" in names
        rollout = batch.student.rollout
        assert rollout is not None
        assert rollout.advantages is not None
        rewards = [float(len(answer) % 3) for answer in answers]
        others = Others(list(zip(prompts, rewards, strict=True)))
        expected = {round(others.advantage(*pair), 4) for pair in zip(prompts, rewards, strict=True)}
        assert {round(value, 4) for value in rollout.advantages[rollout.own].tolist()} == expected
        assert not rollout.advantages[~rollout.own].any()
        assert int(trainer._counts["reward"]) == int((rollout.own[:, 1:] & batch.student.supervised).sum())
        trainer.train()
    assert len(losses_of(trainer, "reward")) == 2
    assert losses_of(trainer, "rollouts_unrated") == [0, 0]


def test_a_reward_changes_what_is_learnt_and_weight_0_only_logs_it(
    build: Build, completions: Dataset, code: str
) -> None:
    """And a reward that every answer gets teaches nothing."""
    settings: dict[str, Any] = {**SETTINGS, "reward": f"{code}:length", "max_steps": 3}
    runs = {}
    for weight in (None, 0.0, 0.5):
        changed = {**settings, "reward_weight": weight}
        if weight is None:
            del changed["reward"], changed["reward_weight"]
        trainer: Any = build(KDTrainer, completions, **changed)
        trainer.train()
        runs[weight] = losses_of(trainer, "grad_norm")
        assert bool(losses_of(trainer, "reward")) == (weight is not None)
    assert runs[0.0] == runs[None]
    assert runs[0.5] != runs[None]


def test_accumulation_does_not_change_the_reward(build: Build, completions: Dataset, code: str) -> None:
    settings: dict[str, Any] = {**SETTINGS, "reward": f"{code}:length", "max_steps": 2, "on_policy_fraction": 1.0}
    runs = []
    for size, steps in ((4, 1), (1, 4)):
        trainer: Any = build(
            KDTrainer,
            completions,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **settings,
        )
        trainer.rollouts._answered = lambda asked, seed: [Rollout(prompt.ids[-6:], False) for prompt in asked]
        trainer.train()
        runs.append([*losses_of(trainer), *losses_of(trainer, "grad_norm"), *losses_of(trainer, "reward_std")])
    assert runs[0] == near(runs[1])


def test_the_columns_that_a_function_reads_come_through_a_recipe(tmp_path: Path, tiny: dict[str, Path]) -> None:
    (tmp_path / "rewards.py").write_text("def wants(completions, solution, **kwargs):\n    return [0.0]\n")
    rows = [{"prompt": f"q {row}", "completion": f"a {row}", "solution": row, "note": "n"} for row in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = {
        "method": "kd",
        "teacher": str(tiny["teacher"]),
        "student": str(tiny["student"]),
        "data": str(tmp_path / "rows.jsonl"),
        "reward": f"{tmp_path}/rewards.py:wants",
        **SETTINGS,
    }
    for columns, kept in ((None, {"solution"}), (["note"], {"solution", "note"})):
        data = load_rows_of(Recipe.of({**keys, "reward_columns": columns}, tmp_path / "run.yaml").parse())
        assert {*data["train"].column_names} - {"prompt", "completion"} == kept
