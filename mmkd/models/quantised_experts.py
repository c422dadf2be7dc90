"""Experts whose weights are one tensor, computing with the values that a quantised model will have."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from mmkd.errors import UserError
from mmkd.seams.deepspeed_seam import shape_of
from mmkd.seams.torch_seam import computing_with
from mmkd.seams.transformers_seam import gated, is_fused_experts

from .quantisation_grids import Grid

_LAST = "down_proj"
"""What multiplies what is between the two products of an expert."""


class ExpertsQuantiser:
    """How the experts of a layer compute: `names` are their weights that are quantised."""

    def __init__(self, grid: Grid, activations: bool, names: tuple[str, ...], weights: bool = True):
        self.grid, self.activations, self.names, self.weights, self.on = grid, activations, names, weights, True

    def quantised(self, experts: Any) -> dict[str, Tensor]:
        """The weights that the experts multiply with, in the layout of the model."""
        if not self.weights:
            return {}
        return {name: on_grid(self.grid, getattr(experts, name), experts.is_transposed) for name in self.names}

    def read(self, name: str, hidden: Tensor) -> Tensor:
        """What a product with a weight reads."""
        reads_quantised = self.activations and name in self.names
        return self.grid.fake_quantised_tokens(hidden) if reads_quantised else hidden


class QuantisedExperts(nn.Module):
    """Experts that compute as an `ExpertsQuantiser` says; their weights stay as they are."""

    quantiser: ExpertsQuantiser

    def forward(
        self,
        hidden_states: Float[Tensor, "token hidden"],
        top_k_index: Int[Tensor, "token chosen"],
        top_k_weights: Float[Tensor, "token chosen"],
    ) -> Float[Tensor, "token hidden"]:
        """As those of transformers."""
        if not self.quantiser.on:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        values = self.quantiser.quantised(self)
        # PEFT adds LoRA to weights that are no layers by a parametrization, in whose place nothing else can be put.
        if self.quantiser.activations or is_parametrized(self):
            return by_expert(self, values, self.quantiser.read, hidden_states, top_k_index, top_k_weights)
        # What wrappers know stays where it is: only this pass multiplies with other values.
        with computing_with(self, values):
            return super().forward(hidden_states, top_k_index, top_k_weights)


def on_grid(grid: Grid, weight: Float[Tensor, "expert ..."], transposed: bool) -> Tensor:
    """The weights of all experts on a grid, each expert's with a scale of its own where tensors have one."""
    rows = weight.transpose(-1, -2) if transposed else weight
    tensor_scale = None
    if grid.format == "nvfp4":
        tensor_scale = torch.stack([grid.tensor_scale(each) for each in rows]).view(-1, 1, 1, 1)  # pyright: ignore
    values = grid.fake_quantised(rows, tensor_scale)
    return values.transpose(-1, -2) if transposed else values


def fused_experts(
    model: nn.Module, leaves_out: Callable[[str], bool], grid: Grid
) -> Iterator[tuple[str, tuple[nn.Module, tuple[str, ...]]]]:
    """The experts of each layer with the names of their weights that are quantised.

    Raises UserError for weights in one tensor that are in no layout of transformers, or that groups do not divide.
    """
    for place, module in model.named_modules():
        # Under LoRA.
        name = place.replace(".base_layer", "")
        three = [own for own, weight in module.named_parameters(recurse=False) if len(shape_of(weight)) == 3]
        chosen = [own for own in three if not leaves_out(name) and not leaves_out(f"{name}.{own}")]
        if not chosen or not ("experts" in name.split(".") or "Experts" in type(module).__name__):
            continue
        words = "experts" if "experts" in name.split(".") else name.rpartition(".")[2]
        if not is_fused_experts(module):
            raise UserError(
                f"The experts of {type(model).__name__} are one tensor ({name}.{chosen[0]}), in a layout that "
                f"student_quantization does not know. Leave them out: student_quantization_skip: [{words}, router].",
                because="not built",
            )
        for own in chosen:
            count, first, second = shape_of(getattr(module, own))
            grid.check((count, second, first) if module.is_transposed else (count, first, second), f"{name}.{own}")
        yield name, (module, tuple(chosen))


def set_quantiser(experts: Any, quantiser: ExpertsQuantiser) -> None:
    """Lets experts compute so from now on."""
    if not isinstance(experts, QuantisedExperts):
        experts.__class__ = _quantised_class(type(experts))
    experts.quantiser = quantiser


@torch.no_grad()
def quantise_experts(experts: Any) -> None:
    """Puts the weights of experts on their grid."""
    quantiser: ExpertsQuantiser = experts.quantiser
    for name, value in quantiser.quantised(experts).items():
        getattr(experts, name).data = value


@cache
def _quantised_class(cls: type[nn.Module]) -> type[nn.Module]:
    # Of the same name, by which others know its layout.
    return type(cls.__name__, (QuantisedExperts, cls), {})


def by_expert(
    experts: Any,
    values: Mapping[str, Tensor],
    read: Callable[[str, Tensor], Tensor],
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """What experts give, one after another, with these weights in the place of their own, and what products read."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    matrices = {name: values.get(name, getattr(experts, name)) for name in (first, _LAST)}

    def product(name: str, reads: Tensor, expert: int) -> Tensor:
        weight, bias = matrices[name][expert], getattr(experts, f"{name}_bias", None)
        return functional.linear(
            reads, weight.T if experts.is_transposed else weight, None if bias is None else bias[expert]
        )

    total, given = torch.zeros_like(hidden), read(first, hidden)
    # Those of another rank have the number after the last.
    for expert in index.unique().tolist():
        if expert >= len(matrices[first]):
            continue
        token, place = torch.where(index == expert)
        between = product(first, given[token], expert)
        between = gated(experts, between) if experts.has_gate else experts.act_fn(between)
        out = product(_LAST, read(_LAST, between), expert) * weights[token, place, None]
        total.index_add_(0, token, out.to(total.dtype))
    return total
