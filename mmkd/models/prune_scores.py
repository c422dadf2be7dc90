"""How much each unit of a model matters: scores of neurons, heads, channels, experts and layers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from .prune_axes import EXPERT_FFN, EXPERTS, FFN, GROUPS, HIDDEN, QUERIES, VISION, Axes, Dimension

Place = tuple[str, int | None]
"""A kind of units, and the layer that they belong to; channels of the hidden state belong to none."""


@dataclass(frozen=True)
class Scores:
    """Scores of units, by their place, larger for what matters more, and of the layers of each part."""

    units: Mapping[Place, Float[Tensor, "*expert unit"]]
    """Of neurons within experts, a row for each expert."""
    layers: Mapping[str, Float[Tensor, "layer"]] = field(default_factory=dict)
    """By the mark of the part."""
    adds: bool = False
    """Whether a group of heads matters as much as the sum of its heads, and not as the root of their squares."""

    def groups(self, place: Place, groups: int) -> Float[Tensor, "group"]:
        """The scores of key/value heads: of all their queries together."""
        heads = self.units[place].unflatten(0, (groups, -1))
        return heads.sum(1) if self.adds else heads.square().sum(1).sqrt()

    def on_cpu(self) -> "Scores":
        """The same, where other processes can read them."""
        units = {place: scores.cpu() for place, scores in self.units.items()}
        return Scores(units, {mark: scores.cpu() for mark, scores in self.layers.items()}, self.adds)

    def over(self, other: "Scores") -> "Scores":
        """These scores, and for places that they lack the other's."""
        return Scores({**other.units, **self.units}, {**other.layers, **self.layers}, self.adds)


@torch.no_grad()
def weight_scores(model: PreTrainedModel, axes: Axes) -> Scores:
    """Scores by the magnitude of weights alone, without data.

    A neuron scores ||gate row|| * ||up row|| * ||down column||, a head ||its columns of W_o|| * ||the rows of W_v that
    it reads||, an expert ||its first weights|| * ||its last weights||, and a channel of the hidden state the norm of
    all weights that read or write it. Norms are in fp32.
    """
    weights = model.state_dict()
    products: dict[Place, Tensor] = {}
    squares: dict[Place, Tensor] = {}
    for dimension in axes.dimensions:
        tensor = weights[dimension.name]
        for kind, norms in _norms(tensor, dimension):
            plain = kind.removeprefix(VISION)
            place = place_of(kind, dimension)
            if plain == HIDDEN:
                squares[place] = squares.get(place, torch.zeros(())) + norms.square().cpu()
            elif plain in (FFN, EXPERTS, EXPERT_FFN) or _decides(dimension, kind):
                product = products.get(place)
                products[place] = norms if product is None else product * norms
    units = {place: value for place, value in products.items() if place[0].removeprefix(VISION) != GROUPS}
    for (kind, layer), norms in products.items():
        heads = kind.replace(GROUPS, QUERIES), layer
        if kind.removeprefix(VISION) == GROUPS and heads in units:
            units[heads] = units[heads] * norms.repeat_interleave(len(units[heads]) // len(norms))
    return Scores({**units, **{place: value.sqrt() for place, value in squares.items()}})


def _decides(dimension: Dimension, kind: str) -> bool:
    """Whether the norm of heads in a weight counts: their values, and what reads them."""
    if dimension.number == 1 or "c_proj" in dimension.name:
        return True
    name = dimension.name
    fused = len(dimension.segments) > 1 or any(word in name for word in ("query_key_value", "c_attn"))
    return fused or "v_proj" in name or ".value." in name


def _norms(tensor: Tensor, dimension: Dimension) -> Iterable[tuple[str, Float[Tensor, "*expert unit"]]]:
    """The norm of each unit's entries of a matrix, segment by segment; biases and norms are no matrices."""
    if tensor.ndim < 2:
        return
    of_heads = dimension.segments[0].kind.removeprefix(VISION) in (QUERIES, GROUPS)
    squares = list(dimension.by_unit(reduced(tensor.float().square(), dimension)))
    # Of queries, keys and values in one weight, the last are the values.
    for segment, entries in squares[-1:] if of_heads else squares:
        yield segment.kind, entries.sum(-1).sqrt()


def reduced(values: Tensor, dimension: Dimension) -> Float[Tensor, "*expert entry"]:
    """The sum of a parameter's values over all but one dimension; of neurons within experts also all but experts."""
    keeps = {dimension.number}
    if values.ndim == 3 and dimension.number != 0 and dimension.segments[0].kind in (FFN, EXPERT_FFN):
        keeps.add(0)
    others = [number for number in range(values.ndim) if number not in keeps]
    return values.sum(others) if others else values


def place_of(kind: str, dimension: Dimension) -> Place:
    """The place of units of a kind in a dimension: channels of the hidden state are the same in all layers."""
    return kind, None if kind.removeprefix(VISION) == HIDDEN else dimension.layer


def unit_sums(values: Mapping[str, Tensor], axes: Axes) -> dict[Place, Tensor]:
    """The sum of the values of every unit's parameters; values of key/value heads are spread over their queries."""
    sums: dict[Place, Tensor] = {}
    for dimension in axes.dimensions:
        if dimension.name not in values:
            continue
        for segment, entries in dimension.by_unit(reduced(values[dimension.name].float(), dimension)):
            units = entries.sum(-1)
            place = place_of(segment.kind, dimension)
            sums[place] = units if place not in sums else sums[place] + units
    return _spread(sums)


def _spread(sums: dict[Place, Tensor]) -> dict[Place, Tensor]:
    units = {place: value for place, value in sums.items() if place[0].removeprefix(VISION) != GROUPS}
    for (kind, layer), value in sums.items():
        heads = kind.replace(GROUPS, QUERIES), layer
        if kind.removeprefix(VISION) == GROUPS and heads in units:
            share = len(units[heads]) // len(value)
            units[heads] = units[heads] + value.repeat_interleave(share) / share
    return units


def modules_reading(model: nn.Module, axes: Axes, kinds: Iterable[str]) -> dict[str, tuple[str, int | None, int]]:
    """The linear modules whose input is made of units of a kind: their names, with kind, layer and entries a unit."""
    wanted, reading = set(kinds), dict[str, tuple[str, int | None, int]]()
    modules = dict(model.named_modules())
    for dimension in axes.dimensions:
        owner, _, own = dimension.name.rpartition(".")
        module, segments = modules[owner], dimension.segments
        if own != "weight" or len(segments) != 1 or segments[0].kind not in wanted:
            continue
        transposed = type(module).__name__ == "Conv1D"
        if (isinstance(module, nn.Linear) and dimension.number == 1) or (transposed and dimension.number == 0):
            reading[owner] = segments[0].kind, dimension.layer, segments[0].inner
    return reading
