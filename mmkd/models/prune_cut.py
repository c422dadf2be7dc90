"""A cut: which layers and units of a model are kept, and the smaller model of them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mmkd.errors import UserError

from .prune_axes import (
    EXPERT_FFN,
    EXPERTS,
    FFN,
    GROUPS,
    HIDDEN,
    QUERIES,
    VISION,
    Axes,
    Dimension,
    Part,
    empty_model,
    follow_width,
    layer_of,
    settled_config,
)
from .prune_scores import Place, Scores, place_of, weight_scores
from .prune_sizes import PruneSizes, kept_layers

_LENGTHS = {HIDDEN: "hidden_size", FFN: "intermediate_size", EXPERTS: "num_experts"}
_LENGTHS |= {EXPERT_FFN: "expert_intermediate_size"}


@dataclass(frozen=True)
class Cut:
    """What is kept of a model."""

    axes: Axes
    sizes: PruneSizes
    """With what they imply."""
    layers: Mapping[str, list[int]]
    """By the mark of the part."""
    units: Mapping[Place, Int[Tensor, "*expert kept"]]
    """Kept units by their place in the teacher, ascending; of neurons within experts a row for each expert."""
    scores: Scores
    """Of all units, by which they were chosen."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, sizes: PruneSizes, scores: Scores | None = None) -> "Cut":
        """What has the largest scores; where there are none, by the magnitude of weights, and layers evenly.

        Raises UserError for sizes that cannot be.
        """
        axes = Axes.of(model, sizes.kinds)
        for part in axes.parts:
            sizes = sizes.checked(axes.config, part, part.mark in axes.whole_heads)
        without_data = model.device.type == "meta"
        own = Scores({}) if without_data else weight_scores(model, axes)
        scores = own if scores is None else scores.over(own)
        layers = {
            part.mark: _layers(sizes.vision_layers if part.mark else sizes.layers, part, axes.config, scores)
            for part in axes.parts
        }
        places = {place_of(segment.kind, each) for each in axes.dimensions for segment in each.segments}
        units: dict[Place, Tensor] = {}
        for kind, layer in sorted(places, key=_order):
            plain, mark = kind.removeprefix(VISION), VISION if kind.startswith(VISION) else ""
            if layer is not None and layer not in layers[mark]:
                continue
            part, place = axes.part(mark), (kind, layer)
            if plain == QUERIES:
                units |= _heads(place, sizes, part, axes.config, None if without_data else scores)
            elif plain in _LENGTHS and (count := getattr(sizes, mark + _LENGTHS[plain])) is not None:
                total = part.size(axes.config, plain)
                assert total is not None
                units[place] = torch.arange(count) if without_data else largest(scores.units[place], count)
        return cls(axes, sizes, layers, units, scores)

    def on_cpu(self) -> "Cut":
        """The same, where other processes can read it."""
        units = {place: kept.cpu() for place, kept in self.units.items()}
        return Cut(self.axes, self.sizes, self.layers, units, self.scores.on_cpu())

    def config(self) -> PreTrainedConfig:
        """The smaller model's."""
        config: Any = copy.deepcopy(self.axes.config)
        for part in self.axes.parts:
            _keep_layers_in_config(config, part, self.layers[part.mark])
            for plain, name in (*_LENGTHS.items(), (QUERIES, "num_attention_heads"), (GROUPS, "num_key_value_heads")):
                value = getattr(self.sizes, part.mark + name, None)
                before = part.size(self.axes.config, plain)
                if value is None or before is None:
                    continue
                part.set(config, plain, value)
                if plain == HIDDEN:
                    follow_width(config, part, before, value)
        return config

    @torch.no_grad()
    def made(self, model: PreTrainedModel) -> PreTrainedModel:
        """The smaller model, with copies of the kept weights; `model` is not changed.

        Raises UserError for an architecture that does not allow the cut.
        """
        config: Any = self.config()
        try:
            config.get_text_config().validate_architecture()
        except ValueError as error:
            raise UserError(f"{type(config).__name__} cannot have these sizes: {error}") from error
        # A model is built from the new config, so that layers are numbered anew (layer_idx of the KV cache) and masks
        # fit.
        student, whole = empty_model(model, config), empty_model(model, settled_config(model.config, self.axes.parts))
        for part in self.axes.parts:
            before, after = whole.get_submodule(part.stack), student.get_submodule(part.stack)
            _require_same_behaviour(before, after, self.layers[part.mark])
        weights = self._weights(model)
        if model.device.type != "meta":
            self._keep_scale(model, student, weights)
        _load(student, weights)
        student.generation_config = copy.deepcopy(model.generation_config)
        return student.to(model.device).train(model.training)  # pyright: ignore[reportArgumentType]

    def _weights(self, model: PreTrainedModel) -> dict[str, Tensor]:
        dimensions: dict[str, list[Dimension]] = {}
        for dimension in self.axes.dimensions:
            dimensions.setdefault(dimension.name, []).append(dimension)
        weights = {}
        for name, tensor in model.state_dict().items():
            new = self._new_name(name)
            if new is None:
                continue
            cut = tensor
            # Neurons of experts first, while all experts are there.
            for dimension in sorted(dimensions.get(name, []), key=lambda each: each.number, reverse=True):
                cut = self._taken(cut, dimension)
            weights[new] = tensor.clone() if cut is tensor else cut
        return weights

    def _taken(self, tensor: Tensor, dimension: Dimension) -> Tensor:
        places = {segment.kind: place_of(segment.kind, dimension) for segment in dimension.segments}
        units = {kind: self.units[place] for kind, place in places.items() if place in self.units}
        if not units:
            return tensor
        kind, first = next(iter(units.items()))
        if first.ndim == 1:
            return tensor.index_select(dimension.number, dimension.kept(units).to(tensor.device))
        rows = [
            part.index_select(dimension.number - 1, dimension.kept({kind: own}).to(tensor.device))
            for part, own in zip(tensor, first, strict=True)
        ]
        return torch.stack(rows)

    def _new_name(self, name: str) -> str | None:
        """What a weight is called in the smaller model; None for one of a layer that is left out."""
        for part in self.axes.parts:
            layer = layer_of(name, part)
            if layer is not None:
                kept = self.layers[part.mark]
                if layer not in kept:
                    return None
                rest = name.removeprefix(f"{part.stack}.").split(".", 1)[1]
                return f"{part.stack}.{kept.index(layer)}.{rest}"
        return name

    def _keep_scale(self, model: PreTrainedModel, student: PreTrainedModel, weights: dict[str, Tensor]) -> None:
        """Has a narrower model compute what the whole one would with the other channels at 0.

        The mean square over fewer channels is larger, and Gemma multiplies its embeddings by the root of the width.
        LayerNorm subtracts a mean over the kept channels, for which no weight makes up.
        """
        modules = dict(model.named_modules())
        for dimension in self.axes.dimensions:
            module, kind = modules[dimension.name.rpartition(".")[0]], dimension.segments[0].kind
            new = self._new_name(dimension.name)
            if kind.removeprefix(VISION) != HIDDEN or "RMSNorm" not in type(module).__name__ or new is None:
                continue
            kept = len(self.units[kind, None])
            shift = _norm_shift(module)
            ratio = (dimension.segments[0].units / kept) ** 0.5
            weights[new] = _scaled(weights[new], ratio, shift)
        before, after = model.get_input_embeddings(), student.get_input_embeddings()
        ratio = getattr(before, "scalar_embed_scale", 1.0) / getattr(after, "scalar_embed_scale", 1.0)
        if ratio == 1:
            return
        tied = model.config.get_text_config().tie_word_embeddings
        for name, module in modules.items():
            if module is before or (tied and module is model.get_output_embeddings()):
                weights[f"{name}.weight"] = _scaled(weights[f"{name}.weight"], ratio, 0)
        if tied:
            # The head is the same weight, and reads what the last norm gives.
            name = self.axes.part("").stack.rpartition(".")[0] + ".norm"
            weights[f"{name}.weight"] = _scaled(weights[f"{name}.weight"], 1 / ratio, _norm_shift(modules[name]))


def _order(place: Place) -> tuple[str, int]:
    """By kind, and then by layer."""
    return place[0], -1 if place[1] is None else place[1]


def _scaled(weight: Tensor, ratio: float, shift: float) -> Tensor:
    return ((weight.double() + shift) * ratio - shift).to(weight.dtype)


def _norm_shift(norm: nn.Module) -> float:
    """What a norm adds to its weight: 1 in Gemma, 0 elsewhere."""
    probe: Any = copy.deepcopy(norm)
    nn.init.zeros_(probe.weight)
    return round(float(probe(torch.ones_like(probe.weight)).float().mean()))


def largest(importance: Tensor, count: int) -> Int[Tensor, "*expert kept"]:
    """The units with the largest scores, ascending."""
    # The order of ties in topk is undefined; a stable sort makes the result deterministic.
    return importance.argsort(descending=True, stable=True)[..., :count].sort().values


def _heads(
    place: Place, sizes: PruneSizes, part: Part, config: Any, scores: Scores | None
) -> dict[Place, Int[Tensor, "kept"]]:
    """The kept query heads of a layer, and the key/value heads that they read."""
    heads, groups = part.size(config, QUERIES), part.size(config, GROUPS)
    kept_heads = getattr(sizes, f"{part.mark}num_attention_heads")
    kept_groups: Any = kept_heads if part.mark else sizes.num_key_value_heads
    assert heads is not None
    assert groups is not None
    queries, kept_queries = heads // groups, kept_heads // kept_groups
    if scores is None:
        chosen, inside = torch.arange(kept_groups), torch.arange(kept_queries).expand(kept_groups, -1)
    else:
        chosen = largest(scores.groups(place, groups), kept_groups)
        inside = largest(scores.units[place].unflatten(0, (groups, -1))[chosen], kept_queries)
    members = (chosen[:, None] * queries + inside).flatten()
    return {place: members, (place[0].replace(QUERIES, GROUPS), place[1]): chosen}


def _layers(layers: Any, part: Part, config: Any, scores: Scores) -> list[int]:
    """The kept layers of a part: those named, those that matter most, or evenly spread ones."""
    kept = kept_layers(layers, part.depth)
    ranked = scores.layers.get(part.mark)
    # Layers that the tower gives to the language model by their numbers.
    needed = list(getattr(part.config(config), "deepstack_visual_indexes", None) or []) if part.mark else []
    if not isinstance(layers, int) or (ranked is None and not needed):
        missing = [number for number in needed if number not in kept]
        if missing:
            raise UserError(
                f"vision_layers leaves out {missing}, whose outputs the language model reads. Keep layers {needed}.",
                because="meaning",
            )
        return kept
    if len(needed) > layers:
        raise UserError(
            f"vision_layers={layers}, but the language model reads the outputs of layers {needed}: keep more.",
            because="meaning",
        )
    if ranked is None:
        spare = [number for number in kept if number not in needed]
        others = kept_layers(min(layers - len(needed), len(spare)) or 1, len(spare))[: layers - len(needed)]
        return sorted({*needed, *(spare[number] for number in others)})
    importance = ranked.clone().float()
    importance[needed] = torch.inf
    return largest(importance, layers).tolist()


def _keep_layers_in_config(config: Any, part: Part, kept: list[int]) -> None:
    own = part.config(config)
    for name, value in vars(own).items():
        # Lists per layer (layer_types). eos_token_id and architectures are lists too, of this length only by accident.
        indexes = name.endswith(("token_id", "architectures", "_indexes"))
        if isinstance(value, list) and len(value) == part.depth and not indexes:
            setattr(own, name, [value[index] for index in kept])
    part.set(config, "layers", len(kept))
    if not part.mark:
        return
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        if (numbers := getattr(own, name, None)) is not None:
            setattr(own, name, [kept.index(number) for number in numbers if number in kept])
    read = getattr(config, "vision_feature_layer", None)
    if read is not None and len(kept) < part.depth:
        many = isinstance(read, list)
        numbers = [_read_layer(number, kept) for number in (read if many else [read])]
        config.vision_feature_layer = numbers if many else numbers[0]


def _read_layer(number: int, kept: list[int]) -> int:
    """A layer by its number among all hidden states, the embeddings being 0; from the end it stays what it is."""
    return number if number < 0 else sum(layer < number for layer in kept)


def _require_same_behaviour(before: Any, after: Any, kept: list[int]) -> None:
    for position, index in enumerate(kept):
        news = dict(after[position].named_modules())
        for name, module in before[index].named_modules():
            # Integers are not compared: layer_idx and the widths change on purpose.
            settings = {key: value for key, value in vars(module).items() if isinstance(value, (bool, float, str))}
            new = news.get(name)
            if type(new) is not type(module) or any(vars(new).get(key) != value for key, value in settings.items()):
                raise UserError(
                    f"Layer {index} of the teacher would compute something else as layer {position} of the student: "
                    f"its {type(module).__name__} is set up by the layer's number or the number of heads. Leave that "
                    "as it is, or use another teacher.",
                    because="not built",
                )


def _load(student: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in student.state_dict().items()}
    odd = sorted({name for name, _ in expected.items() ^ {name: t.shape for name, t in weights.items()}.items()})
    if odd:
        raise UserError(
            f"{odd[0]} (and {len(odd) - 1} more) does not fit the pruned {type(student).__name__}: its shape depends "
            "on another size in this architecture. Prune layers only, or use another teacher.",
            because="not built",
        )
    # assign keeps the type of every tensor, which the config may contradict, but unties the embeddings.
    student.load_state_dict(weights, assign=True)
    student.tie_weights()
