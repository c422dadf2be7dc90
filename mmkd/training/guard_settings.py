"""Settings of the guards on what the student says itself: when to warn, and when to stop."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmkd.errors import UserError

from .log_lines import warnings_in


@dataclass(frozen=True)
class GuardKind:
    """A value that is watched, and what it means for it to go wrong."""

    falls: bool
    """Whether low values are the bad ones."""
    limits: tuple[float, float]
    """Between which its limits lie: above the first, up to the second (for a value that falls: from 0, below)."""
    warn: float
    """From which value on it warns by default."""
    says: Callable[[float], str]
    """What a value says of the student."""
    advice: str
    """What to do about it."""
    both_ways: bool = False
    """Whether a ratio of a half is as bad as one of two."""

    def beyond(self, value: float, limit: float | None) -> bool:
        """Whether a value has reached a limit; no limit is never reached."""
        if self.both_ways:
            value = max(value, 1 / value) if value else float("inf")
        return limit is not None and (value <= limit if self.falls else value >= limit)


KINDS: dict[str, GuardKind] = {
    "ended": GuardKind(
        True,
        (0, 1),
        0.2,
        lambda value: f"{value:.0%} of the student's answers ended by themselves",
        "Raise rollout_max_tokens or max_length, and see that the data's answers end with the tokenizer's eos_token.",
    ),
    "repeated": GuardKind(
        False,
        (0, 1),
        0.2,
        lambda value: f"{value:.0%} of the student's answers repeated themselves",
        "Lower learning_rate, on_policy_fraction or rollout_max_tokens, or start from a better student.",
    ),
    "other_script": GuardKind(
        False,
        (0, 1),
        0.1,
        lambda value: f"{value:.0%} of the student's answers were in a script that neither prompt nor data has",
        "Lower learning_rate or on_policy_fraction, and look whether the teacher answers in the prompt's language.",
    ),
    "length": GuardKind(
        False,
        (1, float("inf")),
        3.0,
        lambda value: f"the student's answers were {value:.2g} times as long as those they are compared with",
        "Read some answers (mmkd report). If they are padded or cut short, lower learning_rate or on_policy_fraction.",
        both_ways=True,
    ),
    "entropy": GuardKind(
        True,
        (0, 1),
        0.2,
        lambda value: f"the student's entropy on its own answers was {value:.0%} of what it was at first",
        "It says the same things over and over. Lower learning_rate or on_policy_fraction, or use divergence "
        "forward_kl or jsd.",
    ),
}
"""Name of a guard -> what it watches: the keys of `rollout_guards`."""

REFERENCES = ("start", "data")
_STEPS = 20
_EXAMPLE = "rollout_guards: {repeated: {warn: 0.2, stop: 0.5}}"


def warnings_of(log: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the guards said in a run, by its log: each guard with the first step in which it warned."""
    first: dict[str, str] = {}
    for entry in log:
        for name, value in warnings_in(entry).items():
            first.setdefault(name, f"step {entry['step']}: {KINDS[name].says(value)}")
    return list(first.values())


@dataclass(frozen=True)
class Limits:
    """From which values on a guard warns and stops; None: never."""

    warn: float | None
    stop: float | None = None


@dataclass(frozen=True)
class RolloutGuards:
    """All guards of a run.

    Args:
        limits: by name; a guard that is off is not there.
        steps: over how many steps values are averaged.
        against: what lengths are compared with: those of the first steps, or those of the data's answers.
    """

    limits: Mapping[str, Limits] = field(
        default_factory=lambda: {name: Limits(kind.warn) for name, kind in KINDS.items()}
    )
    steps: int = _STEPS
    against: str = "start"

    keys: ClassVar[tuple[str, ...]] = ("warn", "stop")

    @classmethod
    def of(cls, value: Mapping[str, Any] | str | None, *, ends: bool = True) -> "RolloutGuards":
        """The guards that a recipe asks for; those that it does not name keep their defaults, null turns one off.

        `ends` says that answers can end at all; where they cannot, that guard is off. A text is JSON. Raises UserError
        for what has no meaning.
        """
        named = _read(value)
        unknown = sorted(named.keys() - {*KINDS, "steps"})
        if unknown:
            raise UserError(f"rollout_guards knows {', '.join([*KINDS, 'steps'])}, and not {', '.join(unknown)}.")
        if not ends and named.get("ended") is not None:
            raise UserError(
                "rollout_guards watches whether answers end, and with rollout_prompt_tokens they continue plain text, "
                "which does not end. Remove ended from rollout_guards.",
                because="meaning",
            )
        steps = named.get("steps", _STEPS)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UserError(f"rollout_guards: steps is {steps!r}; give a whole number of 1 or more.")
        off = {name for name, own in named.items() if own is None} | (set() if ends else {"ended"})
        limits = {name: _limits(name, named.get(name, {})) for name in KINDS if name not in off}
        length = named.get("length") or {}
        against = length.get("against", "start")
        if against not in REFERENCES:
            raise UserError(f"rollout_guards: length: against is {against!r}; choose one of {', '.join(REFERENCES)}.")
        return cls(limits, steps, against)


def _read(value: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"rollout_guards is no JSON ({error}). Write a mapping, such as {_EXAMPLE}.") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"rollout_guards is {value!r}; write a mapping, such as {_EXAMPLE}.")
    return value


def _limits(name: str, own: Any) -> Limits:
    """The limits of one guard. Raises UserError for those that can never, or must always, be reached."""
    kind = KINDS[name]
    place = f"rollout_guards: {name}"
    allowed = (*RolloutGuards.keys, "against") if name == "length" else RolloutGuards.keys
    if not isinstance(own, Mapping) or not own.keys() <= {*allowed}:
        raise UserError(f"{place} is {own!r}; give {' and '.join(allowed)}, or null to turn it off.")
    low, high = kind.limits
    limits = {"warn": kind.warn, **{key: own[key] for key in RolloutGuards.keys if key in own}}
    for key, limit in limits.items():
        if limit is None:
            continue
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        # A value that falls may reach 0 and starts at 1; one that rises starts at the lower bound.
        if not (number and (low <= limit < high if kind.falls else low < limit <= high)):
            between = f"from {low:g} to below {high:g}" if kind.falls else f"above {low:g} up to {high:g}"
            raise UserError(f"{place}: {key} is {limit!r}; give a number {between}, or null for no limit.")
    warn, stop = limits["warn"], limits.get("stop")
    if "warn" not in own and stop is not None and kind.beyond(stop, warn) is False:
        # Whoever only says when to stop is not to hear of the default's warning after that.
        warn = stop
    if warn is not None and stop is not None and not kind.beyond(stop, warn):
        raise UserError(
            f"{place}: stop is {stop:g} and warn {warn:g}, so that the run would end before it warns. Swap them, or "
            "set warn: null."
        )
    return Limits(warn, stop)
