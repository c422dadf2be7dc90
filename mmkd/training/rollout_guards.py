"""Guards on what the student says itself: values averaged over steps, of which some warn and some end the run."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmkd.errors import UserError

from .guard_settings import KINDS, RolloutGuards
from .rollout_signs import in_other_script, repeats_itself
from .rollouts import Mixed

Sums = Mapping[str, float]
"""Name of a value -> its sum over one optimizer step and all ranks."""

_ENTROPY = ("entropy", "entropy_tokens")
SUMS = ("rollouts", "ended", "repeated", "other_script", "tokens", "answer_tokens", "entropy", "entropy_tokens")
"""What a step adds up: rollouts and of which kind they are, their tokens, those of the data's answers, and nats."""


def sums_of(mixed: Mixed, tokenizer: Any, longest: int) -> dict[str, int]:
    """What the rollouts of this rank add up to. `longest` is the number of tokens at which they are cut."""
    pairs = list(zip(mixed.prompts, mixed.rollouts, strict=True))
    spoken = [rollout.ids[: len(rollout.ids) - rollout.ended] for _, rollout in pairs]
    # Decoding no sequences at all gives one empty text.
    texts = tokenizer.batch_decode([*spoken, *(prompt.ids + prompt.answer for prompt, _ in pairs)]) if pairs else []
    others = zip(texts[: len(pairs)], texts[len(pairs) :], strict=True)
    return {
        "rollouts": len(pairs),
        "ended": sum(rollout.ended for _, rollout in pairs),
        "repeated": sum(map(repeats_itself, spoken)),
        "other_script": sum(in_other_script(text, known) for text, known in others),
        "tokens": sum(len(rollout.ids) for _, rollout in pairs),
        "answer_tokens": sum(min(len(prompt.answer), longest) for prompt, _ in pairs),
    }


@dataclass
class Warned:
    """A guard that warned."""

    name: str
    value: float
    message: str


@dataclass
class RolloutWatch:
    """The state of the guards of a run: every rank has the same."""

    guards: RolloutGuards
    recent: deque[dict[str, float]] = field(init=False)
    first: list[dict[str, float]] = field(init=False, default_factory=list[dict[str, float]])
    """The first steps, which later ones are compared with."""
    entropies: deque[dict[str, float]] = field(init=False)
    """Recent steps in which entropies were measured, which may be fewer than all."""
    first_entropies: list[dict[str, float]] = field(init=False, default_factory=list[dict[str, float]])
    warned: dict[str, int] = field(init=False, default_factory=dict[str, int])
    """Guards that are past the value at which they warn, and since which step."""

    def __post_init__(self) -> None:
        self._start()

    def _start(self, recent: Iterable[dict[str, float]] = (), entropies: Iterable[dict[str, float]] = ()) -> None:
        self.recent = deque(recent, maxlen=self.guards.steps)
        self.entropies = deque(entropies, maxlen=self.guards.steps)

    def look(self, sums: Sums, step: int, measured_every: int = 1) -> list[Warned]:
        """Which guards begin to warn by what a step of all ranks adds up to; those that still do are silent.

        Entropies are measured once in so many steps.
        """
        own = {name: float(sums[name]) for name in SUMS}
        if own["entropy_tokens"]:
            self._measured(own, max(1, self.guards.steps // measured_every))
        if not own["rollouts"]:
            return []
        self.recent.append(own)
        if len(self.first) < self.guards.steps:
            self.first.append(own)
        begun = []
        for name, value in self.values().items():
            if not KINDS[name].beyond(value, self.guards.limits[name].warn):
                self.warned.pop(name, None)
            elif name not in self.warned:
                self.warned[name] = step
                begun.append(Warned(name, value, f"{self._told(name, value, step)}. {KINDS[name].advice}"))
        return begun

    def _measured(self, sums: dict[str, float], window: int) -> None:
        self.entropies = deque(islice((*self.entropies, sums), max(0, len(self.entropies) + 1 - window), None))
        if len(self.first_entropies) < window:
            self.first_entropies.append(sums)

    def values(self) -> dict[str, float]:
        """The values of the guards over the last steps, shares or ratios; none before there are so many steps."""
        if len(self.recent) < self.guards.steps:
            return {}
        lengths = (self.recent, "answer_tokens") if self.guards.against == "data" else (self.first, "tokens")
        values = {
            "ended": _mean(self.recent, "ended"),
            "repeated": _mean(self.recent, "repeated"),
            "other_script": _mean(self.recent, "other_script"),
            "length": _ratio(_mean(self.recent, "tokens"), _mean(*lengths)),
            "entropy": _ratio(*(_mean(own, *_ENTROPY) for own in (self.entropies, self.first_entropies))),
        }
        return {name: value for name, value in values.items() if name in self.guards.limits and value is not None}

    def stop(self, step: int, checkpoints: Mapping[int, str]) -> None:
        """Raises UserError where a guard has reached the value that ends the run. `checkpoints` are those by step."""
        for name, value in self.values().items():
            limit = self.guards.limits[name].stop
            if not KINDS[name].beyond(value, limit):
                continue
            since = self.warned.get(name, step)
            good = [folder for saved, folder in sorted(checkpoints.items()) if saved < since]
            way = (
                f"Go on from {good[-1]}, the last checkpoint before it warned in step {since} (as student, or with "
                "--resume_from_checkpoint)."
                if good
                else "No checkpoint was saved before it warned: start again."
            )
            raise UserError(
                f"{self._told(name, value, step)}, and rollout_guards stops the run at {name} {limit:g}. {way} "
                f"{KINDS[name].advice}"
            )

    def _told(self, name: str, value: float, step: int) -> str:
        steps, compared = self.guards.steps, ""
        if name == "length":
            compared = (
                ", the data's answers" if self.guards.against == "data" else f", those of the first {steps} steps"
            )
        return f"Step {step}: {KINDS[name].says(value)}{compared} (mean of {steps} steps)"

    def state(self) -> dict[str, Any]:
        """What a checkpoint is to hold, as JSON can say it."""
        return {
            "recent": list(self.recent),
            "first": self.first,
            "entropies": list(self.entropies),
            "first_entropies": self.first_entropies,
            "warned": self.warned,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from the state of a checkpoint."""
        self._start(state["recent"], state["entropies"])
        self.first, self.first_entropies = list(state["first"]), list(state["first_entropies"])
        self.warned = dict(state["warned"])


def checkpoints_in(folder: str | None) -> dict[int, str]:
    """The checkpoints of a run's folder by their step."""
    saved = Path(folder or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): path for path in saved}
    return {int(step): str(path) for step, path in steps.items() if step.isdigit()}


def _mean(steps: Iterable[Sums], total: str, count: str = "rollouts") -> float | None:
    """Sum over number of all steps; None where nothing was counted."""
    pairs = [(sums[total], sums[count]) for sums in steps]
    number = sum(own for _, own in pairs)
    return sum(own for own, _ in pairs) / number if number else None


def _ratio(value: float | None, whole: float | None) -> float | None:
    return None if value is None or not whole else value / whole
