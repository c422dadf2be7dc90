"""A run's student cut out of a larger model: what is measured on calibration rows, what is searched, what is kept."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mmkd.files import write_file
from mmkd.models.assemble import pruned, require_prunable
from mmkd.models.prune_axes import Axes, text_part, vision_part
from mmkd.models.prune_calibration import (
    Batches,
    activation_scores,
    block_influence,
    gradient_scores,
    losses_without,
    mean_loss,
)
from mmkd.models.prune_cut import Cut
from mmkd.models.prune_scores import Scores, weight_scores
from mmkd.models.prune_search import Candidate, SizeSearch, milliseconds_per_token, searched_kinds
from mmkd.models.prune_sizes import PruneSizes
from mmkd.seams.trl_seam import preparing_alone

from .calibration_rows import calibration_batches
from .main_process import from_main_process
from .prune_arguments import PRUNE_KEYS, UNPRUNED
from .recipe import Run

logger = logging.getLogger(__name__)

FOUND = "found_sizes.json"
"""In the folder of a run: the sizes that a search has found, which the run goes on with."""

_TRIED = 4
"""Candidates of a search whose loss on calibration rows is measured."""


@dataclass(frozen=True)
class Pruning:
    """A student that was cut out of a model, and why so."""

    student: PreTrainedModel
    cut: Cut
    scores: Scores | None
    """None where weights and evenly spread layers decided alone."""
    candidates: list[dict[str, Any]]
    """Of a search, the sizes that were compared, the chosen ones first."""


def prune_for(run: Run, source: PreTrainedModel, processing_class: Callable[[], Any]) -> Pruning:
    """The student of a run with student_init: prune; `source` is left as it is.

    One process decides for all what stays, so that all have the same student. `processing_class` makes the tokenizer
    or processor that prepares calibration rows. Raises UserError for sizes that cannot be.
    """
    require_prunable(source)

    def decide() -> _Decision:
        return _decided(run, source, processing_class)

    # The base of an adapter is made by one process alone, for which no other waits here.
    decision = decide() if run.student.use_peft else from_main_process(run.training, decide)
    student = decision.cut.made(source).train(source.training)
    return Pruning(student, decision.cut, decision.scores, decision.candidates)


@dataclass(frozen=True)
class _Decision:
    """What of a model stays, on the CPU: processes send it to each other."""

    cut: Cut
    scores: Scores | None
    candidates: list[dict[str, Any]]


def _decided(run: Run, source: PreTrainedModel, processing_class: Callable[[], Any]) -> _Decision:
    arguments, home = run.arguments, source.device
    sizes, mode = arguments.sizes, source.training
    batches: Batches = []
    if needs_data(run):
        with preparing_alone():
            batches = calibration_batches(run, processing_class(), arguments.prune_calibration_rows)
        logger.info("Pruning: importance is measured on %d batches of training rows.", len(batches))
    # Measured where the run computes, without dropout.
    source.to(run.training.device).eval()  # pyright: ignore[reportArgumentType]
    try:
        scores = _scores(run, source, sizes, batches)
        candidates: list[dict[str, Any]] = []
        if arguments.searches:
            sizes, candidates = _searched(run, source, sizes, scores, batches)
        cut = Cut.of(source, sizes, scores).on_cpu()
    finally:
        source.to(home).train(mode)  # pyright: ignore[reportArgumentType]
    return _Decision(cut, None if scores is None else scores.on_cpu(), candidates)


def needs_data(run: Run) -> bool:
    """Whether calibration rows decide anything."""
    arguments = run.arguments
    return arguments.prune_importance != "weights" or arguments.ranks_layers or arguments.target_params is not None


def _scores(run: Run, source: PreTrainedModel, sizes: PruneSizes, batches: Batches) -> Scores | None:
    arguments = run.arguments
    kinds = [*dict.fromkeys((*(searched_kinds(source) if arguments.searches else ()), *sizes.kinds))]
    scores = Scores({})
    if arguments.prune_importance != "weights" and kinds:
        measure = activation_scores if arguments.prune_importance == "activations" else gradient_scores
        scores = measure(source, Axes.of(source, kinds), batches)
    elif arguments.searches:
        scores = weight_scores(source, Axes.of(source, kinds))
    if arguments.ranks_layers:
        rank = block_influence if arguments.prune_layer_importance == "block_influence" else losses_without
        parts = [text_part(source)] if arguments.searches or isinstance(sizes.layers, int) else []
        parts += [vision_part(source)] if isinstance(sizes.vision_layers, int) else []
        scores = replace(scores, layers={part.mark: rank(source, part, batches) for part in parts})
    return scores if scores.units or scores.layers else None


def _searched(
    run: Run, source: PreTrainedModel, sizes: PruneSizes, scores: Scores | None, batches: Batches
) -> tuple[PruneSizes, list[dict[str, Any]]]:
    """The sizes that a search finds, and those that a run which goes on has found before."""
    record, wanted = Path(run.training.output_dir or ".") / FOUND, _searched_for(run)
    if not _is_of(record, wanted):
        found = _candidates(run, source, sizes, scores, batches)
        content = {"keys": wanted, "sizes": found[0][0].given, "candidates": [each for _, each in found]}
        write_file(record, json.dumps(content, indent=1))
    content = json.loads(record.read_text(encoding="utf-8"))
    return PruneSizes(**content["sizes"]), content["candidates"]


def _searched_for(run: Run) -> dict[str, Any]:
    """The keys that the sizes of a search follow from; a run that goes on with other rows keeps its sizes."""
    arguments = run.arguments
    named = arguments.student is not None
    return {
        "source": arguments.student if named else arguments.teacher,
        "revision": run.student.model_revision if named else arguments.teacher_revision,
        **{name: value for name in PRUNE_KEYS if (value := getattr(arguments, name)) != UNPRUNED[name]},
    }


def _is_of(record: Path, wanted: dict[str, Any]) -> bool:
    return record.is_file() and json.loads(record.read_text(encoding="utf-8"))["keys"] == wanted


def _candidates(
    run: Run, source: PreTrainedModel, sizes: PruneSizes, scores: Scores | None, batches: Batches
) -> list[tuple[PruneSizes, dict[str, Any]]]:
    """What fits, best first: by what is kept, and of a number of parameters the first few by their loss."""
    search = SizeSearch(source, sizes, scores)
    wanted = run.arguments.parameters_wanted
    if wanted is None:
        assert run.arguments.target_latency is not None
        times: dict[PruneSizes, float] = {}

        def measure(candidate: PruneSizes) -> float:
            times[candidate] = milliseconds_per_token(pruned(source, candidate, scores)[0])
            return times[candidate]

        fast = search.fast_enough(run.arguments.target_latency, measure)
        return [(each.sizes, {**each.described, "ms_per_token": round(times[each.sizes], 3)}) for each in fast]
    first = _different(search.candidates(wanted))
    losses = [mean_loss(pruned(source, each.sizes, scores)[0].eval(), batches) for each in first]
    ranked = sorted(zip(losses, first, strict=True), key=lambda pair: pair[0])
    return [(each.sizes, {**each.described, "loss": round(loss, 4)}) for loss, each in ranked]


def _different(candidates: list[Candidate]) -> list[Candidate]:
    """The best candidate of each of a few depths: neighbours in width are much alike."""
    best: dict[Any, Candidate] = {}
    for candidate in candidates:
        best.setdefault(candidate.sizes.layers, candidate)
    several = list(best.values())
    return (several if len(several) >= _TRIED else [*several, *candidates])[:_TRIED]


def empty_pruned(run: Run, model: PreTrainedModel) -> PreTrainedModel:
    """A student without weights, as it will be in size; which units it keeps is not known without weights.

    A search takes every unit to matter alike here, so that its sizes may be others than those of training, for about
    the same number of parameters; of a latency, which is measured, the whole model stands for the student.
    """
    arguments = run.arguments
    sizes = arguments.sizes
    require_prunable(model)
    record = Path(run.training.output_dir or ".") / FOUND
    if arguments.searches and _is_of(record, _searched_for(run)):
        sizes = PruneSizes(**json.loads(record.read_text(encoding="utf-8"))["sizes"])
    elif arguments.target_params is not None:
        wanted = arguments.parameters_wanted
        assert wanted is not None
        sizes = SizeSearch(model, sizes, None).candidates(wanted)[0].sizes
    elif arguments.target_latency is not None and not sizes.given:
        return model
    return pruned(model, sizes)[0]
