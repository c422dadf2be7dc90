"""A card of the lab: what a paper claims, and the trainings that can tell whether it holds at our size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.errors import UserError
from mmkd.eval.comparison_summary import METRICS
from mmkd.yaml_files import read_yaml

Equal = Literal["steps", "time"]

_KEYS = ("title", "method", "metric", "seeds", "search", "test_data", "equal", "base", "lines", "claims")


@dataclass(frozen=True)
class Claim:
    """What a paper says of pairs of lines. It holds where every pair's interval says so."""

    claim: str
    paper: str
    """Its number, and where it stands."""
    pairs: tuple[tuple[str, str], ...]
    """(line that is better, line that it is better than)."""


@dataclass(frozen=True)
class Card:
    """The lines that are trained, all with the same seeds, steps and search, and the claims about them."""

    name: str
    title: str
    method: str
    metric: str
    """The measure on test rows, one of METRICS."""
    seeds: tuple[int, ...]
    search_seed: int
    """Of the trainings by which a learning rate is chosen; none of `seeds`."""
    rates: tuple[float, ...]
    test_data: str
    """Data recipe whose held-out rows are looked at once, with the chosen rates."""
    equal: tuple[Equal, ...]
    lines: Mapping[str, Mapping[str, Any]]
    """Name -> all keys of its recipe; those of `data` are validation rows."""
    claims: tuple[Claim, ...]

    @classmethod
    def read(cls, path: Path) -> "Card":
        """The card in a YAML file. Raises UserError for one that cannot be run."""
        keys = read_yaml(path)
        if not isinstance(keys, dict) or set(keys) != set(_KEYS):
            told = keys if isinstance(keys, dict) else {}
            odd = sorted(map(str, told.keys() ^ set(_KEYS)))
            raise UserError(f"{path}: a card has the keys {', '.join(_KEYS)}; too much or missing: {', '.join(odd)}.")
        card = cls(
            name=path.stem,
            title=keys["title"],
            method=keys["method"],
            metric=keys["metric"],
            seeds=tuple(keys["seeds"]),
            search_seed=keys["search"]["seed"],
            rates=tuple(keys["search"]["learning_rate"]),
            test_data=keys["test_data"],
            equal=tuple(keys["equal"]),
            lines={name: _without_none({**keys["base"], **own}) for name, own in keys["lines"].items()},
            claims=tuple(_claim(each) for each in keys["claims"]),
        )
        _check(card, path)
        return card


def _claim(keys: Mapping[str, Any]) -> Claim:
    return Claim(keys["claim"], keys["paper"], tuple((better, than) for better, than in keys["better"]))


def _without_none(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Null in a line takes a key of `base` away."""
    return {key: value for key, value in keys.items() if value is not None}


def _check(card: Card, path: Path) -> None:
    if card.metric not in METRICS:
        raise UserError(f"{path}: metric {card.metric!r} is none of {', '.join(METRICS)}.")
    if card.search_seed in card.seeds:
        raise UserError(
            f"{path}: search.seed {card.search_seed} is among seeds, so that the rate would be chosen by a training "
            "that counts. Set another."
        )
    for name, value in (("seeds", card.seeds), ("search.learning_rate", card.rates), ("equal", card.equal)):
        _check_distinct(value, name, path)
    if wrong := [value for value in card.equal if value not in ("steps", "time")]:
        raise UserError(f"{path}: equal takes steps and time, not {wrong[0]!r}.")
    for claim in card.claims:
        if absent := [name for pair in claim.pairs for name in pair if name not in card.lines]:
            raise UserError(f"{path}: the claim {claim.claim!r} is about {absent[0]!r}, which is no line.")
    for name, keys in card.lines.items():
        if taken := sorted(keys.keys() & {"seed", "learning_rate", "output_dir"}):
            raise UserError(f"{path}: {taken[0]} of {name!r} is the lab's to set; remove it.")


def _check_distinct(values: Sequence[Any], name: str, path: Path) -> None:
    if not values or len(set(values)) < len(values):
        raise UserError(f"{path}: {name} needs at least one value, and none twice.")
