"""What of a model can be pruned, and which dimensions of which parameters that concerns.

Nothing here knows an architecture: a config is doubled in one size at a time, the model of it is made without weights,
and every dimension that has doubled belongs to that size.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mmkd.errors import UserError
from mmkd.seams.transformers_seam import empty_like

from .parts import part_of

VISION = "vision_"
"""What the kinds of a vision tower begin with."""

HIDDEN, FFN, QUERIES, GROUPS, EXPERTS, EXPERT_FFN = "hidden", "ffn", "queries", "groups", "experts", "expert_ffn"
"""Kinds of units: channels of the hidden state, FFN neurons, query heads, key/value heads, experts, their neurons."""

_FIELDS = {
    "layers": ("num_hidden_layers", "depth"),
    # Qwen2-VL's tower calls the width of what it gives hidden_size.
    HIDDEN: ("embed_dim", "hidden_size"),
    FFN: ("intermediate_size", "ffn_dim", "n_inner"),
    QUERIES: ("num_attention_heads", "num_heads"),
    GROUPS: ("num_key_value_heads",),
    EXPERTS: ("num_local_experts", "num_experts", "n_routed_experts"),
    EXPERT_FFN: ("moe_intermediate_size",),
}
"""Size -> what configs call it, the first that is there."""

_FUSED = re.compile(r"(qkv|in_proj_|c_attn|query_key_value)")
_ROWS = re.compile(
    r"(q_proj|k_proj|v_proj|qkv_proj|qkv|in_proj_|c_attn|query_key_value|\.query|\.key|\.value)(\.|_|$)"
)
_COLUMNS = re.compile(r"(o_proj|out_proj|attn\.proj|attention\.dense|attn\.c_proj|attention\.output\.dense)\.weight$")
# Query, key and value of a head follow each other.
_BY_HEAD = re.compile(r"query_key_value")


@dataclass(frozen=True)
class Segment:
    """A stretch of a dimension that holds so many units of a kind, each `inner` entries long."""

    kind: str
    units: int
    inner: int

    @property
    def length(self) -> int:
        """Entries."""
        return self.units * self.inner


@dataclass(frozen=True)
class Dimension:
    """A dimension of a parameter that is made up of units."""

    name: str
    """Of the parameter."""
    number: int
    segments: tuple[Segment, ...]
    layer: int | None
    """The layer that it belongs to; None outside of the layers."""

    def by_unit(self, values: Tensor) -> Iterator[tuple[Segment, Tensor]]:
        """Values of all entries as [..., unit, entry of a unit], segment by segment."""
        stretches = values.split([segment.length for segment in self.segments], -1)
        for segment, stretch in zip(self.segments, stretches, strict=True):
            yield segment, stretch.unflatten(-1, (segment.units, segment.inner))

    def kept(self, units: Mapping[str, Int[Tensor, "unit"]]) -> Int[Tensor, "entry"]:
        """The entries of the units that are kept of each kind; of a kind that is not named, all."""
        every = torch.arange(sum(segment.length for segment in self.segments))
        kept = []
        for segment, places in self.by_unit(every):
            chosen = units.get(segment.kind)
            kept.append((places if chosen is None else places[chosen.cpu()]).flatten())
        return torch.cat(kept)


@dataclass(frozen=True)
class Part:
    """The language model, or the vision tower of a vision-language model."""

    mark: str
    """What its kinds begin with."""
    stack: str
    """The name of its list of layers."""
    depth: int

    def config(self, config: Any) -> Any:
        """Its own part of a model's config."""
        return config.vision_config if self.mark else config.get_text_config()

    def field(self, config: Any, size: str) -> str | None:
        """What its config calls a size; None for one that it does not have."""
        own = self.config(config)
        # A copy of the attribute map: GPT-2 calls the width n_embd and answers to hidden_size.
        return next((name for name in _FIELDS[size] if hasattr(own, name)), None)

    def size(self, config: Any, size: str) -> int | None:
        """How many units of a kind, or layers, its config has; None where it does not have the like."""
        name = self.field(config, size)
        value = None if name is None else getattr(self.config(config), name)
        if size == GROUPS and value is None:
            return self.size(config, QUERIES)
        if size == FFN and name == "n_inner" and value is None:
            return 4 * self.config(config).hidden_size
        return value

    def set(self, config: Any, size: str, value: int) -> None:
        """Writes a size into a model's config."""
        name = self.field(config, size)
        if name is not None:
            setattr(self.config(config), name, value)

    def head_width(self, config: Any) -> int:
        """Channels of an attention head."""
        width, heads = self.size(config, HIDDEN), self.size(config, QUERIES)
        assert width is not None
        assert heads is not None
        return getattr(self.config(config), "head_dim", None) or width // heads


def text_part(model: PreTrainedModel) -> Part:
    """The language model. Raises UserError where its layers are not one list."""
    depth = model.config.get_text_config().num_hidden_layers
    decoder: Any = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    stacks = list(_stacks(decoder, depth))
    if len(stacks) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(stacks)} lists of {depth} decoder layers, so which to prune is unclear: "
            "use a model whose decoder layers are one ModuleList.",
            because="not built",
        )
    return Part("", f"{prefix}.{stacks[0]}" if prefix else stacks[0], depth)


def vision_part(model: PreTrainedModel) -> Part:
    """The vision tower of a vision-language model. Raises UserError for a model that has none, or none of layers."""
    config: Any = getattr(model.config, "vision_config", None)
    if config is None:
        raise UserError(
            f"{type(model).__name__} has no vision tower that student_vision_ keys could cut. Remove them.",
            because="meaning",
        )
    depth = next((value for name in _FIELDS["layers"] if (value := getattr(config, name, None)) is not None), None)
    stacks = [name for name in _stacks(model, depth) if part_of(f"{name}.") == "vision_tower"]
    if depth is None or len(stacks) != 1:
        raise UserError(
            f"The vision tower of {type(model).__name__} does not keep its layers in one list, so that it cannot be "
            "pruned. Remove the student_vision_ sizes.",
            because="not built",
        )
    return Part(VISION, stacks[0], depth)


def _stacks(model: nn.Module, depth: int | None) -> Iterator[str]:
    for name, module in model.named_modules():
        # A list within a numbered module belongs to one layer (for example its experts), whatever its length.
        if isinstance(module, nn.ModuleList) and len(module) == depth and not any(map(str.isdigit, name.split("."))):
            yield name


def layer_of(name: str, part: Part) -> int | None:
    """The layer of a part to which a parameter or module belongs."""
    rest = name.removeprefix(f"{part.stack}.")
    return int(rest.split(".", 1)[0]) if rest != name else None


def settled_config(config: PreTrainedConfig, parts: Iterable[Part]) -> PreTrainedConfig:
    """A copy of a config that says what it else implies of other sizes: the width of heads, GPT-2's FFN."""
    config = copy.deepcopy(config)
    for part in parts:
        own = part.config(config)
        if part.size(config, QUERIES) is not None and not part.mark:
            own.head_dim = part.head_width(config)
        if part.field(config, FFN) == "n_inner":
            own.n_inner = part.size(config, FFN)
    return config


def empty_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class of another config, whose parameters have shapes only."""
    # Buffers that no checkpoint holds (rotary frequencies, Gemma's embedding scale) are computed, in the type that
    # from_pretrained would give them.
    with init_empty_weights(include_buffers=False):
        return empty_like(type(model), copy.deepcopy(config), model.dtype)


@dataclass(frozen=True)
class Axes:
    """The dimensions of a model's parameters that hold units of the kinds that were asked for."""

    parts: tuple[Part, ...]
    config: PreTrainedConfig
    """Of the model, with all sizes said."""
    dimensions: tuple[Dimension, ...]
    whole_heads: frozenset[str]
    """Marks of the parts whose width is heads times their channels: width and heads are cut together."""

    @classmethod
    def of(cls, model: PreTrainedModel, kinds: Iterable[str]) -> "Axes":
        """The axes of a model; `kinds` are HIDDEN, FFN, QUERIES, EXPERTS, EXPERT_FFN, or those of a vision tower.

        Raises UserError for a kind that the model does not have, or whose dimensions are not understood.
        """
        kinds = list(kinds)
        parts = [text_part(model)]
        if any(kind.startswith(VISION) for kind in kinds):
            parts.append(vision_part(model))
        config = settled_config(model.config, parts)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        dimensions: dict[tuple[str, int], Dimension] = {}
        together: set[str] = set()
        # The width first: where heads make it up, they are cut with it.
        for kind in sorted(kinds, key=lambda each: each.removeprefix(VISION) != HIDDEN):
            part = parts[1] if kind.startswith(VISION) else parts[0]
            if kind.removeprefix(VISION) == QUERIES and part.mark in together:
                continue
            probe = _Probe(model, part, config, shapes, kind.removeprefix(VISION))
            found = list(probe.dimensions())
            if probe.whole_heads:
                together.add(part.mark)
            for dimension in found:
                key = dimension.name, dimension.number
                if key in dimensions and dimensions[key].segments != dimension.segments:
                    raise UserError(
                        f"{dimension.name} of {type(model).__name__} grows with several sizes at once in a way that "
                        "is not known here. Prune layers only, or use another teacher.",
                        because="not built",
                    )
                dimensions[key] = dimension
        return cls(tuple(parts), config, tuple(dimensions.values()), frozenset(together))

    def part(self, mark: str) -> Part:
        """The part whose kinds begin so."""
        return next(part for part in self.parts if part.mark == mark)


class _Probe:
    """A model of a config in which one size is doubled, beside the model itself."""

    def __init__(
        self,
        model: PreTrainedModel,
        part: Part,
        config: PreTrainedConfig,
        shapes: Mapping[str, tuple[int, ...]],
        size: str,
    ):
        self.model, self.part, self.base, self.shapes, self.size = model, part, config, shapes, size
        self.whole_heads = False
        self.modules = dict(model.named_modules())

    def dimensions(self) -> Iterator[Dimension]:
        count = self.part.size(self.base, self.size)
        if count is None or isinstance(count, list):
            raise self._refusal("its config has no such size")
        grown = list(self._grown())
        if self.size == HIDDEN and any(self._heads_rows(name, number) for name, number in grown):
            self.whole_heads = True
            grown = list(self._grown())
        if not grown:
            why = "its layers have no such weights"
            if self.size == QUERIES:
                why = "a head is hidden_size / heads wide there, so that heads go with the width: set hidden_size"
            raise self._refusal(why)
        mark = self.part.mark
        for name, number in grown:
            if self.size == QUERIES and "Norm" in type(self.modules[name.rpartition(".")[0]]).__name__:
                # It averages over all heads, so that what is kept of it would be something else.
                continue
            segments = self._segments(name, number, self.shapes[name][number], count)
            named = tuple(Segment(mark + part.kind, part.units, part.inner) for part in segments)
            yield Dimension(name, number, named, layer_of(name, self.part))

    def _grown(self) -> Iterator[tuple[str, int]]:
        """The dimensions that double with the size."""
        config = copy.deepcopy(self.base)
        sizes = [self.size]
        if self.size == QUERIES or self.whole_heads:
            sizes += [GROUPS] if self.size == QUERIES else [QUERIES, GROUPS]
        before = {size: self.part.size(self.base, size) for size in sizes}
        for size, value in before.items():
            if value is not None:
                self.part.set(config, size, 2 * value)
        if self.size == HIDDEN:
            width = before[HIDDEN]
            assert width is not None
            follow_width(config, self.part, width, 2 * width)
        probe = empty_model(self.model, config)
        for name, tensor in probe.state_dict().items():
            old = self.shapes.get(name)
            if old is None or len(old) != tensor.ndim:
                raise self._refusal(f"{name} is there only in a model of another size")
            for number, (ours, theirs) in enumerate(zip(old, tensor.shape, strict=True)):
                if theirs not in (ours, 2 * ours):
                    raise self._refusal(f"{name} grows from {ours} to {theirs} where the size doubles")
                if theirs != ours:
                    yield name, number

    def _heads_rows(self, name: str, number: int) -> bool:
        """Whether it is the output of a projection to the heads, where the width of heads is said."""
        return not self.whole_heads and self._side(name, number) == "heads"

    def _side(self, name: str, number: int) -> str:
        """Which side of an attention projection a dimension is: heads, or hidden as everything else."""
        transposed = type(self.modules.get(name.rpartition(".")[0])).__name__ == "Conv1D"
        output = number == (1 if transposed and len(self.shapes[name]) == 2 else 0)
        if _COLUMNS.search(name):
            return "hidden" if output else "heads"
        return "heads" if output and _ROWS.search(name) else "hidden"

    def _segments(self, name: str, number: int, length: int, count: int) -> list[Segment]:
        heads = self.size == QUERIES or (self.whole_heads and self._side(name, number) == "heads")
        if not heads:
            owner = type(self.modules.get(name.rpartition(".")[0])).__name__
            if length % count:
                raise self._refusal(f"{name} has {length} entries for {count}")
            blocks = length // count
            # GPT-OSS has gate and up of a neuron side by side, all others all gates before all ups.
            if self.size in (FFN, EXPERT_FFN) and owner == "GptOssExperts":
                return [Segment(self.size, count, blocks)]
            return [Segment(self.size, count, 1)] * blocks
        queries = self.part.size(self.base, QUERIES)
        groups = self.part.size(self.base, GROUPS)
        assert queries is not None
        assert groups is not None
        width = self.part.head_width(self.base)
        if _FUSED.search(name) and length == (queries + 2 * groups) * width:
            if _BY_HEAD.search(name) and queries == groups:
                return [Segment(QUERIES, queries, 3 * width)]
            kinds = ((QUERIES, queries), (GROUPS, groups), (GROUPS, groups))
            return [Segment(kind, units, width) for kind, units in kinds]
        own = re.search(r"(k_proj|v_proj|\.key|\.value)(\.|$)", name) is not None
        kind, units = (GROUPS, groups) if own else (QUERIES, queries)
        if length % units:
            raise self._refusal(f"{name} has {length} entries for {units} heads")
        return [Segment(kind, units, length // units)]

    def _refusal(self, why: str) -> UserError:
        names = {
            HIDDEN: "hidden_size",
            FFN: "intermediate_size",
            QUERIES: "num_attention_heads",
            EXPERTS: "num_experts",
            EXPERT_FFN: "expert_intermediate_size",
        }
        where = "the vision tower of " if self.part.mark else ""
        return UserError(
            f"The {names[self.size]} of {where}{type(self.model).__name__} cannot be pruned: {why}. Prune other "
            "sizes, or use a teacher built like Llama, Qwen, Mistral or Gemma.",
            because="not built",
        )


def follow_width(config: Any, part: Part, before: int, after: int) -> None:
    """Writes a new width of a part to where else a config says it."""
    own = part.config(config)
    if getattr(own, "word_embed_proj_dim", None) == before:
        own.word_embed_proj_dim = after
    vision = getattr(config, "vision_config", None)
    if part.mark or vision is None:
        return
    # The width of what a tower hands to the language model.
    name = "hidden_size" if hasattr(vision, "embed_dim") else "out_hidden_size"
    if getattr(vision, name, None) == before:
        setattr(vision, name, after)
