"""Every pair of choices that a training is put together from trains as with a local teacher, or is refused.

The cells are data (scripts/combination_axes.py), from which the page of the docs is made too.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scripts.combination_axes import (
    AXES,
    REFUSALS,
    Cell,
    Refusal,
    covering,
    further_cells,
    is_exact,
    pairs,
    pairs_of,
    refusals_of,
)
from scripts.combination_page import combination_page
from tests.combinations.cell_recipes import CellRecipes, cell_recipes
from tests.combinations.cell_runs import on_two_ranks, outcome

QUICK = 6
"""How many cells of one rank are trained in CI; those that come first have most pairs."""
PROVOKED = [refusal for refusal in REFUSALS if refusal.message is not None]
ALONE = [cell for cell in covering() if cell.ranks == "1 rank"]
TRAINED = (*covering(), *further_cells())
# Under torchrun a cell takes a second, and a launch ten; all launches together are too long for CI.
SLOW = pytest.mark.slow, pytest.mark.timeout(900)

Trained = Callable[[Cell], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CellRecipes]:
    with cell_recipes(tmp_path_factory.mktemp("combinations")) as recipes:
        yield recipes


@pytest.fixture(scope="session")
def trained(recipes: CellRecipes) -> Trained:
    """What each rank says became of a cell. All cells of several ranks are trained by one launch."""
    outcomes: dict[Cell, list[dict[str, Any]]] = {}

    def train(cell: Cell) -> list[dict[str, Any]]:
        if cell not in outcomes and cell.ranks == "1 rank":
            outcomes[cell] = [outcome(recipes.recipe(cell))]
        elif cell not in outcomes:
            everyone = {*TRAINED, *(refusal.example for refusal in PROVOKED)}
            alike = {str(other): other for other in everyone if other.ranks == cell.ranks}
            paths = {name: recipes.recipe(alike[name]) for name in sorted(alike)}
            seen = on_two_ranks(paths, cell.ranks, recipes.folder / cell.ranks)
            outcomes.update({other: seen[name] for name, other in alike.items()})
        return outcomes[cell]

    return train


def parameter(cell: Cell) -> Any:
    quick = cell in ALONE[:QUICK]
    return pytest.param(cell, id=str(cell), marks=() if quick else SLOW)


def tolerance(cell: Cell) -> float:
    """What rounding may change, as a share."""
    if cell.student == "QLoRA":
        # trl trains such adapters in bf16.
        return 0.02
    # A cache rounds log-probs to 7e-5 nats and more.
    inexact = cell.teacher in ("top-k cache", "several, mixed")
    return 2e-3 if inexact else 1e-4


@pytest.mark.parametrize("cell", [parameter(cell) for cell in TRAINED])
def test_a_cell_trains_as_with_a_local_teacher_on_one_rank(cell: Cell, trained: Trained) -> None:
    if cell.ranks == "ZeRO-3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not among mmkd's dependencies")
    (expected,) = trained(cell.reference)
    assert "steps" in expected, expected
    assert len(expected["steps"]) == 2
    for rank in trained(cell):
        assert "steps" in rank, rank.get("error") or rank
        if not is_exact(cell):
            assert all(math.isfinite(value) and value > 0 for step in rank["steps"] for value in step)
            continue
        assert rank["steps"] == [pytest.approx(step, rel=tolerance(cell), abs=1e-6) for step in expected["steps"]]
        assert rank["eval"] == pytest.approx(expected["eval"], rel=tolerance(cell))


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(refusal, id=refusal.reason, marks=() if refusal.example.ranks == "1 rank" else SLOW)
        for refusal in PROVOKED
    ],
)
def test_a_refusal_says_why(refusal: Refusal, trained: Trained) -> None:
    for rank in trained(refusal.example):
        assert rank.get("because") == refusal.because, rank
        assert re.search(refusal.message or "", rank["refused"])


def test_every_pair_is_trained_or_refused() -> None:
    together = {pair for cell in covering() for pair in pairs_of(cell)}
    for pair, refused in pairs().items():
        assert (pair in together) != bool(refused), pair
    assert not any(refusals_of(cell) for cell in covering())


def test_every_refusal_has_an_example_of_its_own() -> None:
    """No refusal is hidden by another one, so that the table of refusals has nothing that could be left out."""
    for refusal in REFUSALS:
        assert refusals_of(refusal.example) == [refusal]


def test_the_page_has_every_choice_and_every_refusal() -> None:
    page = combination_page()
    for value in (value for values in AXES.values() for value in values):
        assert re.search(rf"^\| \*\*{re.escape(value)}\*\* \||^\|.* {re.escape(value)} \|", page, re.MULTILINE)
    for number, refusal in enumerate(REFUSALS, start=1):
        row = rf"^\| {number} \|.*\| {refusal.because} \| {re.escape(refusal.reason)} \|$"
        assert re.search(row, page, re.MULTILINE)
