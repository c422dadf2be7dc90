"""The visual output of one vision-language model in the place of another's (Switch-KD, 2604.14629).

The visual output is what the vision tower hands to the connector. It is taken and put where the connector is called,
so that any two families fit whose connectors take the same numbers; mergers of inner layers (deepstack) are connectors
too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmkd.errors import UserError

from .captured_features import INPUT, inner_connectors, modules_of, named_modules_of
from .parts import part_of

VisualOutputs = list[list[Tensor]]
"""What each connector is given in a forward pass, call by call; from the outermost connector to those within."""


def connectors_of(model: nn.Module) -> list[nn.Module]:
    """The modules between vision tower and language model. Raises UserError for a model without one."""
    modules = named_modules_of(model)
    names = [name.removesuffix(INPUT) for name in modules_of(model, "tower")]
    return [modules[name] for name in [*names, *inner_connectors(modules)]]


def trains_its_tower(model: nn.Module) -> bool:
    """Whether a parameter of the vision tower, or of an adapter in it, is trained."""
    return any(part_of(name) == "vision_tower" for name, p in model.named_parameters() if p.requires_grad)


@contextmanager
def visual_outputs_of(model: nn.Module) -> Iterator[VisualOutputs]:
    """In it, the visual outputs of the model's next forward pass, as parts of its graph."""
    connectors = connectors_of(model)
    outputs: VisualOutputs = [[] for _ in connectors]

    def recorder(calls: list[Tensor]) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(_first(args, kwargs))

        return record

    handles = [
        module.register_forward_pre_hook(recorder(calls), with_kwargs=True)
        for module, calls in zip(connectors, outputs, strict=True)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def switched_to(model: nn.Module, outputs: VisualOutputs) -> Iterator[None]:
    """In it, the model's connectors are given these visual outputs in place of those of its own tower.

    They are converted to the type of its own, and keep their gradient. Raises UserError in the forward pass where they
    have another shape.
    """
    connectors = connectors_of(model)
    if len(connectors) != len(outputs):
        raise UserError(
            f"The student's tower hands on {len(outputs)} visual outputs, and the teacher's takes {len(connectors)}. "
            "switch needs two models of one kind: remove it, or use another student.",
            because="meaning",
        )

    def exchanger(calls: Iterator[Tensor]) -> Any:
        def exchange(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            own, other = _first(args, kwargs), next(calls, None)
            if other is None or other.shape != own.shape:
                raise UserError(_misfit(own, other), because="meaning")
            other = other.to(own.device, own.dtype)
            if args:
                return (other, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): other}

        return exchange

    handles = [
        module.register_forward_pre_hook(exchanger(iter(calls)), with_kwargs=True)
        for module, calls in zip(connectors, outputs, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor), "a connector is given a tensor first"
    return value


def _misfit(own: Tensor, other: Tensor | None) -> str:
    if other is None:
        what = f"It would get nothing, and takes numbers of the shape {list(own.shape)}"
    elif other.shape[-1] != own.shape[-1]:
        what = f"The towers have different widths ({other.shape[-1]} and {own.shape[-1]})"
    else:
        what = (
            f"The shapes differ ({list(other.shape)} and {list(own.shape)}): the two sides cut a picture into "
            "different numbers of patches, or see different numbers of pictures"
        )
    return (
        f"switch gives the teacher's connector the student's visual output. {what}. Give the student a vision tower "
        "and an image processor like the teacher's (student_vision_tower), or remove switch."
    )
