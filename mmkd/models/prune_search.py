"""The sizes of a student that may have so many parameters, or take so long: found by what importance they keep."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.errors import UserError

from .prune_axes import EXPERT_FFN, EXPERTS, FFN, GROUPS, HIDDEN, QUERIES, Axes, Part, layer_of, text_part
from .prune_cut import largest
from .prune_scores import Scores
from .prune_sizes import PruneSizes, kept_layers

_STEPS = 8
"""Widths that are tried between the least and the whole."""

_LEAST = 0.5
"""The share of layers, width and heads below which nothing is searched; the FFN is searched down to a quarter."""

_NAMES = {HIDDEN: "hidden_size", FFN: "intermediate_size", QUERIES: "num_attention_heads"}
_NAMES |= {GROUPS: "num_key_value_heads", EXPERTS: "num_experts", EXPERT_FFN: "expert_intermediate_size"}

_MULTIPLE = 32
_PROMPT, _TOKENS = 32, 16
_HALVINGS = 5


@dataclass(frozen=True)
class Candidate:
    """Sizes, with what they keep."""

    sizes: PruneSizes
    parameters: int
    kept: float
    """Importance that is kept: the product of the shares of layers, channels, neurons and heads."""

    @property
    def described(self) -> dict[str, Any]:
        """For a report."""
        return {**self.sizes.given, "parameters": self.parameters, "importance_kept": round(self.kept, 6)}


def searched_kinds(model: PreTrainedModel) -> tuple[str, str, str]:
    """Kinds of units of a model whose number is searched besides that of layers."""
    experts = text_part(model).field(model.config, EXPERT_FFN) is not None
    return HIDDEN, EXPERT_FFN if experts else FFN, QUERIES


class SizeSearch:
    """The candidates of a model: all numbers of layers, and widths in steps that its architecture allows.

    `sizes` that are said are not searched. Without `scores` every unit matters alike.
    """

    def __init__(self, model: PreTrainedModel, sizes: PruneSizes, scores: Scores | None):
        self.kinds = searched_kinds(model)
        self.axes = Axes.of(model, dict.fromkeys((*self.kinds, *sizes.kinds)))
        self.part, self.config = self.axes.part(""), self.axes.config
        for part in self.axes.parts:
            # Those of the language model are searched, and checked with what is found.
            sizes = sizes.checked(self.config, part, part.mark in self.axes.whole_heads) if part.mark else sizes
        self.sizes = sizes
        self.model, self.scores = model, scores
        _, self.ffn, _ = self.kinds
        self.ffn_size = "expert_intermediate_size" if self.ffn == EXPERT_FFN else "intermediate_size"
        tied = {name for name, tensor in model.state_dict().items()} - {name for name, _ in model.named_parameters()}
        self.shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
        self._dimensions = {(each.name, each.number): each for each in self.axes.dimensions}
        self._shares: dict[tuple[str, int], float] = {}

    def parameters(self, sizes: PruneSizes) -> int:
        """Of the model that is left, counted without making it."""
        units, total = self._counts(sizes), 0
        kept = [(part, self._layers(sizes, part)) for part in self.axes.parts]
        for name, shape in self.shapes.items():
            if any((layer := layer_of(name, part)) is not None and layer not in layers for part, layers in kept):
                continue
            count = 1
            for number, length in enumerate(shape):
                dimension = self._dimensions.get((name, number))
                if dimension is not None:
                    length = sum(units.get(each.kind, each.units) * each.inner for each in dimension.segments)
                count *= length
            total += count
        return total

    def candidates(self, parameters: int, layers: Sequence[int] | None = None) -> list[Candidate]:
        """What fits the number of parameters, best first: for each depth, width and heads the widest FFN that does.

        Raises UserError where nothing does.
        """
        choices = [
            candidate
            for shape in self._shapes(layers)
            if (candidate := self._with_widest_ffn(shape, parameters)) is not None
        ]
        if not choices:
            least = min(self.parameters(self._with_ffn(shape, self._ffns()[0])) for shape in self._shapes())
            raise UserError(
                f"target_params is {parameters:,}, and the least that is searched has {least:,}. Name a larger "
                "number, set sizes by hand, or start from a smaller model."
            )
        return sorted(choices, key=lambda each: (-each.kept, -each.parameters))

    def fast_enough(self, milliseconds: float, measure: Callable[[PruneSizes], float]) -> list[Candidate]:
        """The largest candidates of several depths that generate a token in so many milliseconds, best first.

        `measure` gives the milliseconds of a candidate. Raises UserError where even the smallest takes longer.
        """
        depths = self._depths()
        whole, fit = self.parameters(PruneSizes(layers=self.part.depth)), []
        for depth in dict.fromkeys(depths[round(i * (len(depths) - 1) / 3)] for i in range(4)):
            shapes = list(self._shapes([depth]))
            low = min(self.parameters(self._with_ffn(shape, self._ffns()[0])) for shape in shapes)
            high, best = whole, None
            for _ in range(_HALVINGS):
                middle = (low + high) // 2
                candidate = self.candidates(middle, [depth])[0]
                if measure(candidate.sizes) <= milliseconds:
                    low, best = middle, candidate
                else:
                    high = middle
            if best is not None:
                fit.append(best)
        if not fit:
            raise UserError(
                f"target_latency is {milliseconds:g} ms, and the smallest candidates take longer for a token on this "
                "machine. Name a longer time, or start from a smaller model."
            )
        return sorted(fit, key=lambda each: -each.kept)

    def _shapes(self, layers: Sequence[int] | None = None) -> Iterator[PruneSizes]:
        """All depths, widths and heads."""
        depths = self._depths() if layers is None else layers
        for depth, shape in itertools.product(depths, self._of_heads() if self._whole_heads else self._of_both()):
            yield replace(shape, layers=depth if self.sizes.layers is None else self.sizes.layers)

    @property
    def _grouped(self) -> int:
        """What widths are best a multiple of: transformers computes experts in groups, whose kernels want 16 bytes."""
        return 1 if self.part.field(self.config, EXPERTS) is None else 8

    @property
    def _whole_heads(self) -> bool:
        return "" in self.axes.whole_heads

    def _of_heads(self) -> Iterator[PruneSizes]:
        """Widths that are made of heads."""
        config, part, sizes = self.config, self.part, self.sizes
        if any(each is not None for each in (sizes.hidden_size, sizes.num_attention_heads, sizes.num_key_value_heads)):
            yield sizes.checked(config, part, whole_heads=True)
            return
        hidden, heads, groups = (part.size(config, kind) or 1 for kind in (HIDDEN, QUERIES, GROUPS))
        for width in _steps(hidden, part.head_width(config) * (heads // groups)):
            yield replace(sizes, hidden_size=width).checked(config, part, whole_heads=True)

    def _of_both(self) -> Iterator[PruneSizes]:
        """Widths, with numbers of heads that go with them."""
        config, part = self.config, self.part
        hidden, heads, groups = (part.size(config, kind) or 1 for kind in (HIDDEN, QUERIES, GROUPS))
        # Llama and Gemma want a width that is a multiple of the heads.
        said = self.sizes.hidden_size is not None
        widths = [self.sizes.hidden_size] if said else _steps(hidden, math.lcm(heads, 2, self._grouped))
        kept = self.sizes.num_key_value_heads
        kept_groups = [kept] if kept is not None else range(math.ceil(_LEAST * groups), groups + 1)
        if self.sizes.num_attention_heads is not None:
            kept_groups = [self.sizes.num_key_value_heads or self.sizes.num_attention_heads * groups // heads]
        for width, count in itertools.product(widths, kept_groups):
            queries = self.sizes.num_attention_heads or count * (heads // groups)
            if width is not None and width % queries == 0:
                yield replace(
                    self.sizes,
                    hidden_size=width,
                    num_attention_heads=queries,
                    num_key_value_heads=count,
                )

    def _depths(self) -> list[int]:
        if self.sizes.layers is not None:
            return [len(self._layers(self.sizes))]
        return list(range(math.ceil(_LEAST * self.part.depth), self.part.depth + 1))

    def _ffns(self) -> list[int]:
        said = getattr(self.sizes, self.ffn_size)
        if said is not None:
            return [said]
        whole = self.part.size(self.config, self.ffn) or 1
        multiple = _MULTIPLE if whole >= 8 * _MULTIPLE else self._grouped
        return sorted({*range(multiple * math.ceil(whole / 4 / multiple), whole, multiple), whole})

    def _with_widest_ffn(self, shape: PruneSizes, parameters: int) -> Candidate | None:
        widths = self._ffns()
        counts = [self.parameters(self._with_ffn(shape, width)) for width in (widths[0], widths[-1])]
        if counts[0] > parameters:
            return None
        # The count grows evenly with the width.
        slope = (counts[1] - counts[0]) / max(widths[-1] - widths[0], 1)
        room = widths[-1] if not slope else widths[0] + (parameters - counts[0]) / slope
        sizes = self._with_ffn(shape, max(width for width in widths if width <= room + 1e-6))
        return Candidate(sizes, self.parameters(sizes), self._kept(sizes))

    def _with_ffn(self, shape: PruneSizes, width: int) -> PruneSizes:
        return replace(shape, **{self.ffn_size: width})

    def _kept(self, sizes: PruneSizes) -> float:
        layers = len(self._layers(sizes))
        shares = [self._share("layers", layers)]
        for kind, count in self._counts(sizes).items():
            if kind in self.kinds:
                shares.append(self._share(kind, count))
        return math.prod(shares)

    def _share(self, kind: str, count: int) -> float:
        """The mean share of importance that so many of the most important units have."""
        key = kind, count
        if key not in self._shares:
            self._shares[key] = self._measured_share(kind, count)
        return self._shares[key]

    def _measured_share(self, kind: str, count: int) -> float:
        total = self.part.depth if kind == "layers" else self.part.size(self.config, kind) or 1
        if kind == "layers":
            ranked = None if self.scores is None else self.scores.layers.get("")
            # Differences of losses may be negative where a layer does harm.
            return count / total if ranked is None else _share_of(ranked.float().clamp(min=0), count)
        places = [] if self.scores is None else [place for place in self.scores.units if place[0] == kind]
        if self.scores is None or not places:
            return count / total
        return sum(_share_of(self.scores.units[place], count) for place in places) / len(places)

    def _counts(self, sizes: PruneSizes) -> dict[str, int]:
        """How many units are left of each kind that is cut."""
        counts: dict[str, int] = {}
        for part in self.axes.parts:
            named = {kind: getattr(sizes, part.mark + name, None) for kind, name in _NAMES.items()}
            queries, groups = (part.size(self.config, kind) or 1 for kind in (QUERIES, GROUPS))
            if (left := named[QUERIES]) is not None and named[GROUPS] is None:
                named[GROUPS] = left * groups // queries
            counts |= {part.mark + kind: value for kind, value in named.items() if value is not None}
        return counts

    def _layers(self, sizes: PruneSizes, part: Part | None = None) -> list[int]:
        part = self.part if part is None else part
        layers = sizes.vision_layers if part.mark else sizes.layers
        ranked = None if self.scores is None else self.scores.layers.get(part.mark)
        if isinstance(layers, int) and ranked is not None:
            return largest(ranked, layers).tolist()
        return kept_layers(layers, part.depth)


def _share_of(scores: Tensor, count: int) -> float:
    ordered = scores.float().sort(dim=-1, descending=True).values
    return float((ordered[..., :count].sum() / ordered.sum().clamp(min=1e-30)).item())


def _steps(whole: int, multiple: int) -> list[int]:
    """Multiples between the least share and the whole, the whole among them."""
    values = {whole}
    for step in range(_STEPS):
        share = _LEAST + (1 - _LEAST) * step / _STEPS
        values.add(max(multiple, round(share * whole / multiple) * multiple))
    return sorted(value for value in values if value <= whole)


@torch.no_grad()
def milliseconds_per_token(model: PreTrainedModel) -> float:
    """What generating one token takes behind a short prompt, one text at a time; the median of several."""
    ids = torch.full((1, _PROMPT), 1, device=model.device)
    output, times = model(input_ids=ids, use_cache=True), []
    for _ in range(_TOKENS):
        start = time.perf_counter()
        output = model(input_ids=ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
        # Waits for the device.
        float(output.logits[0, -1, 0])
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]
