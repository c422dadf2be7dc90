"""Runs a card: chooses a learning rate for every line, trains all seeds, and says which claims hold."""

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.errors import UserError
from mmkd.eval.baselines import steps_of
from mmkd.eval.compare_progress import ComparisonProgress
from mmkd.eval.comparison_summary import METRICS, gain_between
from mmkd.eval.equal_time import longer, step_factors
from mmkd.eval.results import key_of, to_json
from mmkd.eval.trainings import Trainings
from mmkd.files import write_file
from mmkd.recipe.recipe import Recipe
from mmkd.results.compared import ComparedModel
from mmkd.results.machine import machine
from mmkd.training.method import Train

from .card import Card, Claim, Equal

Verdict = Literal["holds", "does not", "cannot tell"]


def verdict_of(gains: Sequence[Mapping[str, Any]]) -> Verdict:
    """Holds where all intervals are above 0; does not where one is below; cannot tell otherwise."""
    if any(gain["high"] < 0 for gain in gains):
        return "does not"
    return "holds" if all(gain["low"] > 0 for gain in gains) else "cannot tell"


def key_of_card(card: Card) -> str:
    """Two cards with one key give the same results."""
    return key_of([to_json(vars(card))], [])[:16]


@dataclass
class Experiment:
    """A card that is being run; what is finished is kept in the folder, and the same command goes on."""

    card: Card
    folder: Path
    train: Train

    def __post_init__(self) -> None:
        self.trainings = Trainings(self.folder, None, None, False, self.train)
        for name in self.card.lines:
            self._recipe(name, self.card.rates[0], self.card.search_seed, "check").parse()

    def run(self) -> dict[str, Any]:
        """The results, as they are kept in the repository."""
        card = self.card
        searched = self._all({(name, rate): self._searched(name, rate) for name in card.lines for rate in card.rates})
        values = {
            name: {f"{rate:g}": searched[name, rate].metrics[card.metric] for rate in card.rates}
            for name in card.lines
        }
        best = max if METRICS[card.metric].higher_is_better else min
        chosen = {name: best(card.rates, key=lambda rate, own=own: own[f"{rate:g}"]) for name, own in values.items()}
        trained = {equal: self._trained(equal, chosen) for equal in card.equal}
        models = [*searched.values(), *(model for runs in trained.values() for own in runs.values() for model in own)]
        return {
            "schema": 1,
            "card": card.name,
            "key": key_of_card(card),
            "machine": machine(),
            "seeds": list(card.seeds),
            "hours": sum(model.cost["hours"] for model in models if model.cost is not None),
            "rates": {name: {"validation": values[name], "chosen": chosen[name]} for name in card.lines},
            "lines": {equal: {name: self._told(own) for name, own in runs.items()} for equal, runs in trained.items()},
            "claims": {equal: [self._judged(claim, runs) for claim in card.claims] for equal, runs in trained.items()},
        }

    # Recipes

    def _recipe(self, name: str, rate: float, seed: int, of: str, **keys: Any) -> Recipe:
        """Of a line with a rate and a seed, written to the folder."""
        written = {**self.card.lines[name], "learning_rate": rate, "seed": seed, **keys}
        place = self.folder / "recipes" / of / f"{name.replace(' ', '_')}-{rate:g}-seed{seed}.yaml"
        return Recipe.of(written, place).write(place, f"{name} of the card {self.card.name}.")

    def _searched(self, name: str, rate: float) -> Recipe:
        return self._recipe(name, rate, self.card.search_seed, "search")

    def _tested(self, name: str, rates: Mapping[str, float], seed: int) -> Recipe:
        return self._recipe(name, rates[name], seed, "test", data=self.card.test_data)

    # Trainings

    def _trained(self, equal: Equal, rates: Mapping[str, float]) -> dict[str, list[ComparedModel]]:
        """Every line with every seed."""
        lines, seeds = list(self.card.lines), self.card.seeds
        recipes = {(name, seed): self._tested(name, rates, seed) for name in lines for seed in seeds}
        if equal == "time":
            first = {name: [recipes[name, seeds[0]]] for name in lines}
            measured = self._all({name: own[0] for name, own in first.items()})
            factors = step_factors(first, lambda name, recipe: measured[name])
            place = self.folder / "recipes" / "time"
            recipes = {
                (name, seed): longer(recipe, factors[name][0], place / Path(recipe.place).name)
                for (name, seed), recipe in recipes.items()
            }
        models = self._all(recipes)
        return {name: [models[name, seed] for seed in seeds] for name in lines}

    def _all(self, recipes: Mapping[Any, Recipe]) -> dict[Any, ComparedModel]:
        """All of them, trained or known."""
        known = {key: self.trainings.known(recipe) is not None for key, recipe in recipes.items()}
        progress = ComparisonProgress(self.folder)
        progress.begin([steps_of(recipe) for recipe in recipes.values()], sum(known.values()))
        models = {}
        for key, recipe in recipes.items():
            with nullcontext() if known[key] else progress.running(Path(recipe.place).stem):
                models[key] = self.trainings.get(recipe)
            cost = models[key].cost
            progress.count(None if cost is None else cost["seconds"])
            if self.card.metric not in models[key].metrics:
                raise UserError(f"{recipe.place}: its evaluation says nothing of {self.card.metric}.")
        return models

    # What came of it

    def _told(self, runs: Sequence[ComparedModel]) -> dict[str, Any]:
        values = [run.metrics[self.card.metric] for run in runs]
        hours = [run.cost["step_hours"] for run in runs if run.cost is not None]
        return {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "values": values,
            "parameters": runs[0].parameters,
            "tokens": [run.tokens for run in runs],
            "step_hours": statistics.fmean(hours),
        }

    def _judged(self, claim: Claim, runs: Mapping[str, Sequence[ComparedModel]]) -> dict[str, Any]:
        metric, pairs = METRICS[self.card.metric], list[dict[str, Any]]()
        for better, than in claim.pairs:
            gain = gain_between(runs[better], runs[than], metric)
            if gain is None:
                raise UserError(f"{self.card.metric} is no mean over held-out items, so that it has no interval.")
            pairs.append({"better": better, "than": than, **gain})
        return {"claim": claim.claim, "paper": claim.paper, "pairs": pairs, "verdict": verdict_of(pairs)}


def run_card(card: Card, folder: Path, results: Path, train: Train) -> dict[str, Any]:
    """Runs a card and writes its results."""
    found = Experiment(card, folder, train).run()
    write_file(results, to_json(found, indent=1) + "\n")
    return found


def read_results(path: Path) -> dict[str, Any]:
    """Results that `run_card` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
