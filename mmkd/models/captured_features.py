"""What modules inside a model compute during a forward pass, by their names, and which modules people mean."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from mmkd.errors import UserError

from .parts import part_of

HIDDEN_STATES = "hidden_states"
"""The shorthand for what the first block of the language model is given and every block returns."""

ATTENTIONS = "attentions"
"""The shorthand for the self-attention of every block of the language model."""

SHORTHANDS = ("tower", "projector", "deepstack", "every_nth", HIDDEN_STATES, ATTENTIONS)
"""Names of modules that every family of models has somewhere; `every_3rd` is a further form of `every_nth`."""

INPUT = ":input"
"""Ends a name that means what the module is given, not what it returns."""

# What wrappers of a module put between its name and those of its parts.
_WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
# How families call the module of a block that returns maps of attention.
_SELF_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_EVERY = re.compile(r"every_(?:nth|(\d+)(?:st|nd|rd|th)?)")
# Blocks that `every_nth` spreads over the depth of a model.
_SPREAD = 4


def named_modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their names before PEFT, FSDP, DDP or checkpointing wrapped anything."""
    modules: dict[str, nn.Module] = {}
    for name, module in _bare(model).named_modules():
        # A wrapper comes before what it wraps, which then takes its name.
        modules[".".join(word for word in name.split(".") if word not in _WRAPPERS)] = module
    return modules


def _bare(model: nn.Module) -> nn.Module:
    """The transformers model under the wrappers of DDP, DeepSpeed and PEFT."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, nn.Module)
    return base


@contextmanager
def capturing(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """In it, what the named modules return in a forward pass, by name, and nothing else; a later call replaces it.

    A name that ends in `:input` is what the module is given. A tuple is kept as it is, see `feature_of` and
    `attention_map_of`. The tensors belong to the graph of the pass, also below gradient checkpointing unless that is
    reentrant. Nothing is kept when the context ends but what the caller took. Raises UserError for unknown names.
    """
    modules, captured = named_modules_of(model), dict[str, Any]()
    for name in names:
        _check_known(name.removesuffix(INPUT), modules, model)
    handles = [_listening(modules[name.removesuffix(INPUT)], name, captured) for name in dict.fromkeys(names)]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
        captured.clear()


def _listening(module: nn.Module, name: str, captured: dict[str, Any]) -> Any:
    # Only references are taken: what a hook computed, a checkpointed block would compute again in its backward pass.
    if name.endswith(INPUT):

        def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured[name] = args if args else tuple(kwargs.values())

        return module.register_forward_pre_hook(given, with_kwargs=True)

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        captured[name] = output

    return module.register_forward_hook(returned)


def feature_of(value: Any) -> Tensor | None:
    """The feature in what was captured: the tensor itself, the last hidden state of an output, or a tuple's first."""
    if isinstance(value, Tensor):
        return value
    states = getattr(value, "last_hidden_state", None)
    if isinstance(states, Tensor):
        return states
    if isinstance(value, tuple | list):
        return next((part for part in map(feature_of, value) if part is not None), None)
    return None


def attention_map_of(value: Any) -> Tensor | None:
    """The attention weights [batch, head, query, key] in what a module of self-attention returned."""
    if not isinstance(value, tuple | list):
        return None
    maps = [part for part in value if isinstance(part, Tensor) and part.ndim == 4]
    return maps[0] if maps else None


def modules_of(model: nn.Module, name: str) -> list[str]:
    """The names for `capturing` that a shorthand or a module's name means, from the model's input to its output.

    `tower` is what the connector of a vision-language model is given, `projector` what it returns, `deepstack` what
    the mergers of inner layers return (Qwen3-VL), `every_nth` four blocks of the language model at equal distances,
    the last among them, and `every_3rd` every third block. `hidden_states` are its embeddings and all blocks,
    `attentions` the self-attention of all blocks. A module is named as `named_modules` does, or by the end
    of its name where no other module ends so; with `:input` it means what the module is given.

    Raises UserError for a name that no module has, with those that are near, and for a part that the model lacks.
    """
    modules = named_modules_of(model)
    if every := _EVERY.fullmatch(name):
        return _spread(blocks_of(model), every.group(1))
    if name == HIDDEN_STATES:
        blocks = blocks_of(model)
        return [blocks[0] + INPUT, *blocks]
    if name == ATTENTIONS:
        return [_self_attention(model, modules, block) for block in blocks_of(model)]
    if name in ("tower", "projector"):
        return [_connector(model, modules, name) + (INPUT if name == "tower" else "")]
    if name == "deepstack":
        mergers = inner_connectors(modules)
        if not mergers:
            raise _lacks(model, name, "mergers of inner layers, as Qwen3-VL has")
        return mergers
    suffix = INPUT if name.endswith(INPUT) else ""
    plain = name.removesuffix(INPUT)
    if plain not in modules:
        ends = [module for module in modules if module.endswith(f".{plain}")]
        if len(ends) > 1:
            raise UserError(
                f"{name!r} is the end of several names of modules of {type(_bare(model)).__name__}: "
                f"{', '.join(ends[:4])}. Write one of them in full."
            )
        _check_known(plain if not ends else ends[0], modules, model)
        plain = ends[0]
    return [plain + suffix]


def inner_connectors(names: Iterable[str]) -> list[str]:
    """Those of a model's modules that merge what inner layers of the vision tower see (deepstack)."""
    return [name for name in names if re.search(r"deepstack_merger\w*\.\d+$", name)]


def blocks_of(model: nn.Module) -> list[str]:
    """The blocks of the language model (of any model without one: of the model), from first to last.

    Raises UserError for a model without a list of blocks.
    """
    modules = named_modules_of(model)
    lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)}
    text = {name: module for name, module in lists.items() if part_of(name) == "language_model"} or lists
    # Lists in a block, of experts say, stand below its own.
    outer = {name: module for name, module in text.items() if not any(name.startswith(f"{other}.") for other in text)}
    if not outer:
        raise _lacks(model, "every_nth", "a list of blocks")
    longest = max(outer, key=lambda name: len(outer[name]))
    return [f"{longest}.{number}" for number in range(len(outer[longest]))]


def _self_attention(model: nn.Module, modules: dict[str, nn.Module], block: str) -> str:
    """The self-attention of a block. Raises UserError for a block without."""
    for name in _SELF_ATTENTION:
        if f"{block}.{name}" in modules:
            return f"{block}.{name}"
    raise _lacks(model, ATTENTIONS, f"a module {' or '.join(_SELF_ATTENTION)} in each block ({block})")


def _spread(blocks: list[str], every: str | None) -> list[str]:
    """Every so-many-th block, by default four at equal distances; the last block is always among them."""
    count = len(blocks)
    if every is None:
        ends = [round(count * (number + 1) / _SPREAD) - 1 for number in range(_SPREAD)]
        return [blocks[end] for end in dict.fromkeys(ends) if end >= 0]
    if not 1 <= int(every) <= count:
        raise UserError(f"every_{every} asks for one in {every} blocks, and there are {count}: choose 1 to {count}.")
    return blocks[::-1][:: int(every)][::-1]


def _connector(model: nn.Module, modules: dict[str, nn.Module], shorthand: str) -> str:
    """The outermost module between vision tower and language model."""
    for name in modules:
        # Deepstack's mergers are connectors of inner layers.
        if name and part_of(name) == "connector" and not name.split(".")[-1].startswith("deepstack"):
            return name
    raise _lacks(model, shorthand, "a module between a vision tower and a language model")


def _lacks(model: nn.Module, shorthand: str, what: str) -> UserError:
    return UserError(
        f"{shorthand} asks for {what}, and {type(_bare(model)).__name__} has none. Name a module instead.",
        because="meaning",
    )


def _check_known(name: str, modules: dict[str, nn.Module], model: nn.Module) -> None:
    if name in modules and name:
        return
    near = difflib.get_close_matches(name, [module for module in modules if module], n=4, cutoff=0.4)
    ends = [module for module in modules if name and module.endswith(name.split(".")[-1])][:4]
    names = list(dict.fromkeys([*near, *ends]))[:6] or [module for module in modules if module][:6]
    raise UserError(
        f"{type(_bare(model)).__name__} has no module {name!r}. Near names: {', '.join(names)}. "
        f"Shorthands are {', '.join(SHORTHANDS)}."
    )
