"""Rewards: a function of the user's rates the student's own answers, and the student learns to say what it likes."""

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor

from mmkd.data.canonical import OURS
from mmkd.data.user_functions import user_function
from mmkd.errors import UserError
from mmkd.losses.likelihood import token_log_probs
from mmkd.preparation.row_names import STORED_IMAGES
from mmkd.teachers.batch import Batch

from .answer_text import without_answer
from .items import ItemLosses, Supervised
from .rollouts import Mixed

RATED = "rated_row"
"""Column of prepared rows of text with what a reward function is told of the row, as JSON."""

REWARD = "reward"
"""The kind of item that the policy gradient is divided by: a token of a rollout."""

_LISTS = ("prompts", "completions", "completion_ids")
_TOLD = (*_LISTS, "trainer_state")
"""What a reward function is told besides the columns of the rows."""
_TOKENS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "seq_lengths")
_SHOWN = 300
"""Characters of a prompt and of an answer that an error shows."""


def with_rated_rows(data: Any) -> Any:
    """Rows of text with the column `RATED`, which outlives their preparation; those with images stay as they are."""
    if not isinstance(data, Dataset | IterableDataset):
        return data
    row = next(iter(data), None)
    if row is None or "images" in row or "image" in row:
        return data
    if isinstance(data, IterableDataset):
        return data.map(lambda row: {RATED: json.dumps(told_of(row))})
    names = [name for name in data.column_names if name not in _TOKENS]
    rows = data.select_columns(names).map(
        lambda row: {RATED: json.dumps(told_of(row))}, remove_columns=names, desc="Reading what the reward is told"
    )
    return concatenate_datasets([data, rows], axis=1)


def told_of(row: Mapping[str, Any], pictures: Sequence[str] = ()) -> dict[str, Any]:
    """What a reward function is told of a row: its prompt where it has one, and its columns besides TRL's.

    `pictures` name further columns with images, which are not told. Raises UserError for a value that is neither text,
    number, list nor mapping of such.
    """
    untold = {*OURS, *_TOKENS, "image", STORED_IMAGES, *pictures}
    told = {name: value for name, value in row.items() if name not in untold}
    if "messages" in row:
        told["prompt"] = without_answer(row["messages"])
    elif "prompt" in row:
        told["prompt"] = row["prompt"]
    for name, value in told.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise UserError(
                f"The column {name!r} holds a {type(value).__name__}, which cannot be given to a reward function: "
                f"{error}. Map it to text or numbers, or remove it from the data."
            ) from error
    return told


class RewardFunction:
    """A function of the user's, called with the arguments of TRL's GRPO.

    Args:
        name: package.module:function, or path/to/file.py:function.

    Raises UserError where there is no such function, or it takes no answers.
    """

    def __init__(self, name: str):
        self.name, self.function = name, user_function(name, "reward")
        try:
            self.parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):
            # Of a compiled function nothing is known.
            self.parameters = {}
        kinds = [parameter.kind for parameter in self.parameters.values()]
        self.takes_all = not kinds or inspect.Parameter.VAR_KEYWORD in kinds
        if not self.takes_all and "completions" not in self.parameters:
            raise UserError(
                f"reward: {name} takes {', '.join(self.parameters) or 'nothing'}. It must take completions, and may "
                "take prompts, completion_ids, trainer_state and columns of the data, or **kwargs for all of them."
            )

    @property
    def columns(self) -> list[str]:
        """The columns that it cannot do without."""
        return [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name not in _TOLD
        ]

    def check(self, row: Mapping[str, Any], split: str = "train") -> None:
        """Raises UserError where a row lacks a column that the function asks for."""
        missing = next((name for name in self.columns if name not in row), None)
        if missing is not None:
            known = ", ".join(name for name in row if name != "prompt") or "none besides what is trained on"
            raise UserError(
                f"reward: {self.name} asks for {missing!r}, which is no column of the {split} data; it has {known}. "
                "Name one of these, or keep the column in the data recipe."
            )

    def __call__(self, told: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[Any]]) -> list[float | None]:
        """The rewards of answers to rows; None for those that are not rated.

        `answers` holds prompts, completions and completion_ids. Raises UserError with the row where it fails.
        """
        if not told:
            return []
        columns = {name: [row.get(name) for row in told] for name in dict.fromkeys(n for row in told for n in row)}
        try:
            rewards = self._called({**columns, **answers})
        except Exception as error:
            failed = f"reward: {self.name} failed with {type(error).__name__}: {error}."
            if len(told) == 1:
                prompt, answer = (repr(answers[name][0])[:_SHOWN] for name in ("prompts", "completions"))
                raise UserError(f"{failed} Prompt: {prompt}. Answer: {answer}.") from error
            # It gets all answers at a time, and its error rarely says of which.
            for place in range(len(told)):
                one = {name: [answers[name][place]] for name in _LISTS}
                self([told[place]], {**answers, **one})
            raise UserError(failed) from error
        if len(rewards) != len(told):
            raise UserError(
                f"reward: {self.name} gave {len(rewards)} rewards for {len(told)} answers. It must give one for each, "
                "or None for an answer that it does not rate."
            )
        return rewards

    def _called(self, everything: Mapping[str, Any]) -> list[float | None]:
        known = everything if self.takes_all else {n: v for n, v in everything.items() if n in self.parameters}
        rewards: Any = self.function(**known)
        if inspect.isawaitable(rewards):
            # In a thread of its own, since a notebook runs a loop in this one.
            with ThreadPoolExecutor(1) as thread:
                rewards = thread.submit(asyncio.run, _awaited(rewards)).result()
        values = [None if reward is None else float(reward) for reward in rewards]
        if any(value is not None and math.isinf(value) for value in values):
            raise ValueError("it gave an infinite reward")
        # As in TRL, where None and NaN are the same.
        return [None if value is None or math.isnan(value) else value for value in values]


async def _awaited(rewards: Any) -> Any:
    return await rewards


def reward_columns(args: Any) -> list[str]:
    """The columns of the data that the reward of a run asks for. Raises UserError where there is no such function."""
    if args.reward is None:
        return []
    return list(dict.fromkeys([*RewardFunction(args.reward).columns, *(args.reward_columns or [])]))


class Rewards:
    """Rates the rollouts of a step, and says of each by how much it is better than the others.

    Args:
        function: rates answers.
        tokenizer: the student's.
        gathered: gives the objects of all ranks, in their order.
        pictures: columns with images that teachers see in the place of the student's.
    """

    def __init__(
        self,
        function: RewardFunction,
        tokenizer: Any,
        gathered: Callable[[list[Any]], list[Any]],
        pictures: Sequence[str] = (),
    ):
        self.function, self.tokenizer, self.gathered, self.pictures = function, tokenizer, gathered, pictures

    def check(self, row: Mapping[str, Any]) -> None:
        """Raises UserError where a prepared row lacks a column that the function asks for."""
        self.function.check(self._told(row))

    def of(self, mixed: Mixed, state: Any) -> list[float | None]:
        """The reward of each rollout of this rank; None for those that are not rated."""
        # Plain text, which has no prompt of its own, is continued from its first tokens on.
        told = [
            {"prompt": self.tokenizer.decode(prompt.ids, skip_special_tokens=True), **self._told(prompt.example)}
            for prompt in mixed.prompts
        ]
        texts = [str(self.tokenizer.decode(rollout.ids, skip_special_tokens=True)) for rollout in mixed.rollouts]
        prompts = [row["prompt"] for row in told]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        ids = [rollout.ids for rollout in mixed.rollouts]
        columns = [{name: value for name, value in row.items() if name != "prompt"} for row in told]
        answers = {"prompts": prompts, "completions": completions, "completion_ids": ids, "trainer_state": state}
        return self.function(columns, answers)

    def advantages(
        self, mixed: Mixed, rewards: Sequence[float | None]
    ) -> tuple[list[float], dict[str, tuple[Tensor, Tensor | float]]]:
        """The advantage of each rollout of this rank among those of all ranks, and what the logs say of rewards."""
        own = [(tuple(prompt.ids), reward) for prompt, reward in zip(mixed.prompts, rewards, strict=True)]
        ranks = self.gathered([own])
        everyone = [entry for rank in ranks for entry in rank]
        rated = [reward for _, reward in everyone if reward is not None]
        reports: dict[str, tuple[Tensor, Tensor | float]] = {
            "rollouts_unrated": (torch.tensor(rewards.count(None)), len(rewards))
        }
        scored = [reward for reward in rewards if reward is not None]
        reports["reward"] = (torch.tensor(float(sum(scored))), len(scored))
        # In float32 for a device that has no other.
        spread = torch.tensor(rated, dtype=torch.float64).std(correction=0).float() if rated else torch.zeros(())
        reports["reward_std"] = (spread, 1.0 if rated else 0.0)
        others = Others(everyone)
        return [0.0 if reward is None else others.advantage(prompt, reward) for prompt, reward in own], reports

    def _told(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the function is told of a prepared row."""
        if RATED not in row:
            return told_of(row, self.pictures)
        return json.loads(row[RATED][0] if "seq_lengths" in row else row[RATED])


class Others:
    """The rewards of a step, as (prompt, reward), against which each of them is measured."""

    def __init__(self, rated: Sequence[tuple[Hashable, float | None]]):
        self._sums: dict[Hashable, tuple[float, int]] = {}
        self._all = 0.0, 0
        for prompt, reward in rated:
            if reward is not None:
                total, count = self._sums.get(prompt, (0.0, 0))
                self._sums[prompt] = total + reward, count + 1
                self._all = self._all[0] + reward, self._all[1] + 1

    def advantage(self, prompt: Hashable, reward: float) -> float:
        """How far a reward is above the mean of the other answers to the prompt; without such, of all other answers.

        It leaves the answer itself out, so that the gradient is unbiased (RLOO, 2402.14740).
        """
        total, count = self._sums[prompt]
        if count == 1:
            total, count = self._all
        return reward - (total - reward) / (count - 1) if count > 1 else reward


def with_advantages(batch: Batch, mixed: Mixed, number: int, advantages: Sequence[float]) -> Batch:
    """The micro-batch of this number, whose rollouts have their advantages among those of `mixed`."""
    tokens = batch.student.rollout
    if tokens is None:
        return batch
    placed = [
        (prompt.row, advantage, rollout)
        for prompt, advantage, rollout in zip(mixed.prompts, advantages, mixed.rollouts, strict=True)
        if prompt.batch == number
    ]
    # Tokens stand in the order of their rows, whether these lie end to end or not.
    values = [
        advantage
        for _, advantage, rollout in sorted(placed, key=itemgetter(0))
        for replaced in rollout.replaced or [False] * len(rollout.ids)
        if not replaced
    ]
    whole = torch.zeros_like(tokens.own, dtype=torch.float)
    whole = whole.masked_scatter(tokens.own, whole.new_tensor(values))
    return replace(batch, student=replace(batch.student, rollout=replace(tokens, advantages=whole)))


def policy_gradient(student: Supervised, weight: float, clip: float, chunk_size: int, precise: bool) -> ItemLosses:
    """PPO's clipped loss of the student's own tokens, whose gradient is that of their advantages.

    A token that this very student sampled has the ratio 1: its gradient is the advantage times that of its log-prob.
    """
    rollout = student.rollout
    if rollout is None or rollout.advantages is None or not rollout.own.any():
        return ItemLosses()
    own = rollout.own
    advantages, labels = rollout.advantages[own], student.labels[own]
    log_probs, _ = token_log_probs(student.hidden[own], student.head, labels, chunk_size=chunk_size, precise=precise)
    sampled = log_probs.detach() if rollout.log_probs is None else rollout.log_probs[own]
    ratio = (log_probs - sampled).exp()
    moved = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    reports: dict[str, Any] = {}
    if rollout.log_probs is not None:
        clipped = (moved < ratio * advantages).sum()
        reports["reward_clipped"] = (clipped, len(labels))
    return ItemLosses({REWARD: -weight * moved.sum()}, reports)
