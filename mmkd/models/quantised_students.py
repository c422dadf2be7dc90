"""Students that compute with the values that a quantised model will have, in training and afterwards."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from mmkd.errors import UserError
from mmkd.results.trained_as import trained_as
from mmkd.seams.deepspeed_seam import shape_of, weights_of
from mmkd.seams.peft_seam import (
    LoraLinear,
    adapts_a_parameter,
    copies_of,
    drops_out,
    is_adapted,
    is_copied,
    is_lora,
    merged_weight,
    merges_otherwise,
)
from mmkd.seams.transformers_seam import is_fused_experts

from .backbone import base_of
from .load import load_model
from .parts import PARTS, part_of
from .quantisation_grids import Grid
from .quantised_experts import ExpertsQuantiser, QuantisedExperts, fused_experts, quantise_experts, set_quantiser

KEY = "student_quantization"
"""Of config.json: as what a student was trained."""

LEFT_OUT = ("vision_tower", "connector", "router")
"""What is not quantised where nothing is said, besides the head, embeddings and norms."""

_ROUTERS = {"gate", "router", "shared_expert_gate"}
# Layers that runtimes join to one, whose scale of the tensor is then one.
_JOINED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"})


@dataclass(frozen=True)
class StudentQuantisation:
    """As what a student is quantised.

    Args:
        format: one of `quantisation_grids.FORMATS`.
        group: weights that share a scale, for int4.
        activations: whether what a layer reads is quantised, too: of int8, fp8 and nvfp4.
        skip: what is left out: parts of a vision-language model, `router`, words of a module's name, or patterns of
            the whole name. The head, embeddings and norms are never quantised.
    """

    format: str
    group: int | None = None
    activations: bool = False
    skip: tuple[str, ...] = LEFT_OUT

    @classmethod
    def of(
        cls, format: str, group: int | None = None, activations: bool | None = None, skip: Sequence[str] | None = None
    ) -> Self:
        """As a recipe says it. Raises UserError for what no runtime computes."""
        grid = Grid.of(format, group)
        if activations and not grid.quantises_activations:
            raise UserError(
                f"student_quantization_activations: {format} is a format of weights alone. Remove the key, or choose "
                "int8, fp8 or nvfp4.",
                because="meaning",
            )
        chosen = grid.quantises_activations if activations is None else activations
        return cls(format, grid.group, chosen, LEFT_OUT if skip is None else tuple(skip))

    @classmethod
    def read(cls, recorded: Mapping[str, Any]) -> Self:
        """What `as_dict` wrote."""
        return cls(recorded["format"], recorded["group"], recorded["activations"], tuple(recorded["skip"]))

    def as_dict(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {**asdict(self), "skip": list(self.skip)}

    @property
    def grid(self) -> Grid:
        """The values that a weight can take."""
        return Grid.of(self.format, self.group if self.format == "int4" else None)

    def described(self) -> str:
        """The format, for a reader."""
        grid = self.grid
        scales = f"groups of {grid.group}" if grid.group else "a scale per row"
        what = "weights and activations" if self.activations else "weights"
        return f"{self.format} {what} ({scales})"

    def leaves_out(self, name: str) -> bool:
        """Whether a module of this name is left out."""
        words = name.split(".")
        for pattern in self.skip:
            if pattern in PARTS and part_of(name) == pattern:
                return True
            if pattern == "router" and words[-1] in _ROUTERS:
                return True
            if pattern in words or f".{pattern}." in f".{name}." or fnmatchcase(name, pattern):
                return True
        return False


class LayerQuantiser:
    """How one layer computes: with its weight on the grid, and perhaps what it reads."""

    def __init__(self, grid: Grid, activations: bool, weights: bool = True):
        self.grid, self.activations, self.weights, self.on = grid, activations, weights, True
        self.joined: tuple[torch.nn.Module, ...] = ()
        """With itself, the layers that a runtime joins with it."""

    def weight(self, layer: torch.nn.Module) -> Tensor:
        """The weight that the layer multiplies with."""
        weight = whole_weight(layer)
        return self.grid.fake_quantised(weight, self.tensor_scale()) if self.weights else weight

    @torch.no_grad()
    def tensor_scale(self) -> Tensor | None:
        """That of the joined layers together."""
        if self.grid.format != "nvfp4" or not self.joined:
            return None
        return self.grid.tensor_scale(*map(whole_weight, self.joined))

    def linear(self, layer: torch.nn.Module, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer gives for what it reads."""
        if self.activations:
            hidden = self.grid.fake_quantised_tokens(hidden)
        return functional.linear(hidden, self.weight(layer), bias)


class QuantisedLinear(torch.nn.Linear):
    """A linear layer that computes as a `LayerQuantiser` says; its weight stays as it is."""

    quantiser: LayerQuantiser

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if not self.quantiser.on:
            return super().forward(input)
        return self.quantiser.linear(self, input, self.bias)


class QuantisedLora(LoraLinear):
    """A layer with LoRA that computes as it will when the adapter is merged and the sum quantised."""

    quantiser: LayerQuantiser

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's layer, without dropout."""
        if not self.quantiser.on:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        return self.quantiser.linear(self, x, base.bias)


def whole_weight(layer: Any) -> Tensor:
    """The weight of a layer before it is quantised, with its adapter."""
    return merged_weight(layer) if isinstance(layer, LoraLinear) else layer.weight


def quantise_forward(model: PreTrainedModel | PeftModel, quantisation: StudentQuantisation) -> list[str]:
    """Lets a student compute with quantised values from now on, while its weights stay; returns the layers' names.

    Parameters keep their names and places, so that optimizers, wrappers and checkpoints see the student as it was.
    Raises UserError for a student that cannot be quantised so.
    """
    layers, experts = quantised_layers(model, quantisation), quantised_experts(model, quantisation)
    _set(layers, quantisation, weights=True)
    _set_experts(experts, quantisation, weights=True)
    return [*(name for name, _ in layers), *experts]


def replaces_dropout(model: torch.nn.Module) -> bool:
    """Whether an adapter has dropout, which a merged weight has no place for."""
    return any(isinstance(layer, QuantisedLora) and drops_out(layer) for layer in model.modules())


@torch.no_grad()
def quantise_weights(model: PreTrainedModel, quantisation: StudentQuantisation) -> None:
    """Puts the weights of a finished student on their grid, and quantises what its layers read, where that is due."""
    layers, experts = quantised_layers(model, quantisation), quantised_experts(model, quantisation)
    _set(layers, quantisation, weights=True)
    _set_experts(experts, quantisation, weights=True)
    values = [(layer, layer.quantiser.weight(layer)) for _, layer in layers]
    for layer, value in values:
        layer.weight.data = value
    for own, _ in experts.values():
        quantise_experts(own)
    _set(layers, quantisation, weights=False)
    _set_experts(experts, quantisation, weights=False)


@contextmanager
def quantisation_off(model: torch.nn.Module) -> Iterator[None]:
    """In it the model computes with its weights as they are."""
    kinds = QuantisedLinear | QuantisedLora | QuantisedExperts
    quantisers: list[Any] = [part.quantiser for part in model.modules() if isinstance(part, kinds)]
    before = [quantiser.on for quantiser in quantisers]
    for quantiser in quantisers:
        quantiser.on = False
    try:
        yield
    finally:
        for quantiser, on in zip(quantisers, before, strict=True):
            quantiser.on = on


def quantised_layers(model: PreTrainedModel | PeftModel, quantisation: StudentQuantisation) -> list[tuple[str, Any]]:
    """The layers of a student that are quantised, with their names in the model without an adapter.

    Raises UserError where there are none, for layers that groups do not divide, and for weights that are quantised
    already.
    """
    base, grid = base_of(model), quantisation.grid
    if getattr(base.config, "quantization_config", None) is not None:
        raise UserError(
            f"student_quantization: {quantisation.format} quantises weights while they are trained, and those of "
            f"{base.config.name_or_path or 'the student'} are quantised already. Name the student in full precision, "
            "and remove load_in_4bit and load_in_8bit.",
            because="meaning",
        )
    head = base.get_output_embeddings()
    heads = set() if head is None else set(head.modules())
    layers: list[tuple[str, Any]] = []
    for name, module in _linear_layers(base):
        if module in heads or quantisation.leaves_out(name):
            continue
        _check_layer(name, module)
        grid.check(shape_of(whole_weight(module)), name)
        layers.append((name, module))
    if not layers and not quantised_experts(model, quantisation):
        raise UserError(
            f"student_quantization: {quantisation.format} finds no layer to quantise in {type(base).__name__}: it "
            f"has no nn.Linear besides its head and what student_quantization_skip leaves out "
            f"({', '.join(quantisation.skip) or 'nothing'}).",
            because="not built",
        )
    return layers


def quantised_experts(
    model: PreTrainedModel | PeftModel, quantisation: StudentQuantisation
) -> dict[str, tuple[torch.nn.Module, tuple[str, ...]]]:
    """The experts in one tensor that are quantised, by name, with the names of their weights.

    Raises UserError for those of an unknown layout.
    """
    return dict(fused_experts(base_of(model), quantisation.leaves_out, quantisation.grid))


def share_of(model: PreTrainedModel | PeftModel, quantisation: StudentQuantisation) -> str:
    """How much of a student is quantised, for a reader."""
    layers, experts = quantised_layers(model, quantisation), quantised_experts(model, quantisation)
    quantised = sum(weights_of(whole_weight(layer)) for _, layer in layers)
    quantised += sum(weights_of(getattr(own, name)) for own, names in experts.values() for name in names)
    every = base_of(model).num_parameters()
    apart = f" and the experts of {len(experts)} layers" if experts else ""
    return f"{len(layers)} linear layers{apart} with {quantised:,} of {every:,} parameters"


def _set_experts(
    experts: Mapping[str, tuple[torch.nn.Module, tuple[str, ...]]], quantisation: StudentQuantisation, weights: bool
) -> None:
    for own, names in experts.values():
        set_quantiser(own, ExpertsQuantiser(quantisation.grid, quantisation.activations, names, weights))


def _set(layers: Sequence[tuple[str, Any]], quantisation: StudentQuantisation, weights: bool) -> None:
    named = dict(layers)
    for name, layer in layers:
        own: Any = layer
        own.__class__ = QuantisedLora if isinstance(layer, LoraLinear) else QuantisedLinear
        own.quantiser = LayerQuantiser(quantisation.grid, quantisation.activations, weights)
        own.quantiser.joined = joined_layers(name, named)


def joined_layers(name: str, layers: Mapping[str, Any]) -> tuple[Any, ...]:
    """The layers that a runtime joins to one with that of this name, itself among them."""
    parent, _, own = name.rpartition(".")
    beside = next((group for group in _JOINED if own in group), {own})
    joined = (layers.get(f"{parent}.{other}") for other in sorted(beside))
    return tuple(other for other in joined if other is not None)


def _linear_layers(module: torch.nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    """The linear layers of a module, those with an adapter as one; PEFT's copies have the name of the original."""
    if adapts_a_parameter(module) and is_fused_experts(cast(Any, module).get_base_layer()):
        # No linear layers: they are quantised with what the adapter adds to them.
        return
    if is_adapted(module) or type(module) in (torch.nn.Linear, QuantisedLinear):
        yield name, module
    elif is_copied(module):
        for copy in copies_of(module):
            yield from _linear_layers(copy, name)
    else:
        for own, child in module.named_children():
            yield from _linear_layers(child, f"{name}.{own}" if name else own)


def _check_layer(name: str, module: Any) -> None:
    if not is_adapted(module) or isinstance(module, QuantisedLora):
        return
    if not is_lora(module):
        raise UserError(
            f"student_quantization quantises the weight that is left when an adapter is merged, and the adapter of "
            f"{name} ({type(module).__name__}) is no plain LoRA. Use LoRA, or leave the layer out with "
            "student_quantization_skip.",
            because="not built",
        )
    if (key := merges_otherwise(module)) is not None:
        raise UserError(
            f"student_quantization quantises weight plus adapter, and {key} changes more than that. Remove {key}.",
            because="not built",
        )


# What a student was trained as


def record_in_config(model: PreTrainedModel | PeftModel, quantisation: StudentQuantisation | None) -> None:
    """Says in the config of a student, and so in its config.json, as what it is trained."""
    config = base_of(model).config
    if quantisation is not None and not isinstance(model, PeftModel):
        setattr(config, KEY, quantisation.as_dict())
    elif hasattr(config, KEY):
        delattr(config, KEY)


def recorded_in_config(config: Any) -> StudentQuantisation | None:
    """As what the student of a config was trained; None: as it is, or its weights are quantised already."""
    recorded = getattr(config, KEY, None)
    if recorded is None or getattr(config, "quantization_config", None) is not None:
        return None
    return StudentQuantisation.read(recorded)


def recorded_beside(adapter: str | Path) -> StudentQuantisation | None:
    """As what the model with the adapter in a folder was trained; None: as it is."""
    recorded = trained_as(adapter)
    return StudentQuantisation.read(recorded) if "format" in recorded else None


def load_as_trained(name: str, role: str = "model", **kwargs: Any) -> PreTrainedModel:
    """As `load_model`, with the values that the model was trained with where it was trained quantised, which is said.

    One that is quantised when it is loaded is left as that.
    """
    model = load_model(name, role, **kwargs)
    quantisation = recorded_in_config(model.config)
    if quantisation is not None:
        say_as_trained(name, quantisation.described())
        quantise_weights(model, quantisation)
    return model


def say_as_trained(name: str, what: str) -> None:
    """Says once as what a model computes that was trained quantised."""
    if (name, what) not in _SAID:
        _SAID.add((name, what))
        print(f"{name} computes as it was trained: {what}.", file=sys.stderr)


_SAID: set[tuple[str, str]] = set()
