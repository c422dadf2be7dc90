"""What is measured on held-out pairs during training: the loss in batches of training's size, and recall among all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmkd.losses.contrastive_losses import unit
from mmkd.losses.retrieval import retrieval_ranks

from .pair_terms import PairFacts, PairFeatures

Sides = tuple[Tensor, Tensor]


class EvaluatedPairs:
    """Features of the pairs of an evaluation, of the student ("") and of each teacher, gathered from all ranks."""

    def __init__(self) -> None:
        self.features: dict[str, list[Sides]] = {}
        self.numbers: list[Tensor] = []
        self.rows: list[Tensor] = []

    def add(self, batch: tuple[Mapping[str, Sides], Tensor, Tensor]) -> None:
        """A batch: features by model, numbers of its captions, and where its pairs stand in the data."""
        features, numbers, rows = batch
        for name, (images, texts) in features.items():
            self.features.setdefault(name, []).append((images.cpu(), texts.cpu()))
        self.numbers.append(numbers.cpu())
        self.rows.append(rows.cpu())

    def reports(self, trainer: Any) -> dict[str, tuple[Tensor, Any]]:
        """Report -> sum and number of items: the loss and its terms, and recall at 1 of student and teachers."""
        if not self.numbers:
            return {}
        numbers, rows = torch.cat(self.numbers), torch.cat(self.rows)
        joined = {
            name: PairFeatures(*(torch.cat([batch[side] for batch in batches]) for side in (0, 1)))
            for name, batches in self.features.items()
        }
        reports = _losses(trainer, joined, numbers, rows)
        for name, features in joined.items():
            for measure, hits in _hits(features, numbers).items():
                reports[f"{measure}_{name}".replace(" ", "_").rstrip("_")] = (hits.sum(), len(hits))
        return reports


def _losses(
    trainer: Any, joined: Mapping[str, PairFeatures], numbers: Tensor, rows: Tensor
) -> dict[str, tuple[Tensor, Any]]:
    """The loss of groups of pairs as large as the batches of training; the last one may be smaller."""
    size, device = trainer.pairs_per_step, trainer.args.device
    sums: dict[str, tuple[Tensor, Any]] = {}
    with torch.no_grad():
        for chosen in torch.arange(len(numbers)).split(size):
            if len(chosen) < min(size, len(numbers)):
                # Fewer pairs are told apart more easily.
                continue
            said = {
                name: PairFeatures(own.images[chosen].to(device), own.texts[chosen].to(device))
                for name, own in joined.items()
            }
            asked = {name.removeprefix("teacher ").removeprefix("teacher"): own for name, own in said.items() if name}
            places = zip(rows[chosen].tolist(), numbers[chosen].tolist(), strict=True)
            captions = [trainer.evaluated_rows.caption_of(row, number) for row, number in places]
            facts = PairFacts(numbers[chosen].to(device), rows[chosen].to(device), captions)
            loss, reports = trainer.losses(said[""], asked, facts, everywhere=False)
            reports = {**reports, "loss": (loss * len(chosen), len(chosen))}
            for name, (total, count) in reports.items():
                before = sums.get(name, (torch.zeros(()), 0))
                sums[name] = (before[0] + total.cpu(), before[1] + count)
    return sums


def _hits(features: PairFeatures, numbers: Tensor) -> dict[str, Tensor]:
    """Whether the nearest of all captions is an image's own, and the nearest image one that a caption belongs to.

    Equal captions are one.
    """
    _, places, first = _unique(numbers)
    images, texts = unit(features.images), unit(features.texts)[first]
    of_caption = [torch.nonzero(places == number).flatten().tolist() for number in range(len(first))]
    found = retrieval_ranks(images, texts, [[int(place)] for place in places])
    back = retrieval_ranks(texts, images, of_caption)
    return {"image_to_text_recall": (found == 0).float(), "text_to_image_recall": (back == 0).float()}


def _unique(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Different numbers, the place among them of each, and where each comes first."""
    values, places = numbers.unique(return_inverse=True)
    first = torch.full((len(values),), len(numbers)).scatter_reduce(0, places, torch.arange(len(numbers)), "amin")
    return values, places, first
