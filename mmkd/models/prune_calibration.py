"""Scores that need data: what units do on calibration rows, and what the model loses without them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from mmkd.errors import UserError

from .prune_axes import EXPERT_FFN, EXPERTS, FFN, HIDDEN, QUERIES, VISION, Axes, Part
from .prune_scores import Place, Scores, modules_reading, place_of, unit_sums

Batches = Sequence[Mapping[str, Any]]
"""Inputs of a model; `labels` are -100 where nothing is learnt, `attention_mask` is 0 on padding."""

_READ = (FFN, QUERIES)


def activation_scores(model: PreTrainedModel, axes: Axes, batches: Batches) -> Scores:
    """Scores by what units do (Minitron, 2407.14679, as in NVIDIA's Model Optimizer).

    Of every channel the mean of |activation| over the tokens of a row, then the L2 norm over rows. A neuron's
    activation is what the last projection of the FFN reads. A head's score is the L2 norm over the channels that the
    output projection reads of it. A channel of the hidden state is scored by the outputs of the layers' norms, summed
    over them. An expert scores the mean L2 norm of what it adds to a token that is sent to it.
    """
    counts = _Activations(model, axes)
    with counts.watching(), torch.no_grad():
        for batch in batches:
            counts.mask = _tokens(batch)
            model(**_inputs(batch, model), use_cache=False)
    return Scores(counts.scores())


def gradient_scores(model: PreTrainedModel, axes: Axes, batches: Batches) -> Scores:
    """Scores by the change of the loss to first order: the sum of |weight * gradient| over the weights of a unit.

    The gradient is that of the mean loss of a batch; scores are means over batches. A key/value head's weights count
    for its queries in equal parts.
    """
    names = {dimension.name for dimension in axes.dimensions}
    # Tied weights have one gradient.
    parameters = {name: each for name, each in model.named_parameters() if name in names}
    trained = {name: each.requires_grad for name, each in model.named_parameters()}
    sums: dict[Place, Tensor] = {}
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for batch in batches:
            loss, count = _loss(model, batch)
            if not count:
                continue
            gradients = torch.autograd.grad(loss / count, list(parameters.values()), allow_unused=True)
            products = {
                name: (weight.detach().float() * gradient.float()).abs()
                for (name, weight), gradient in zip(parameters.items(), gradients, strict=True)
                if gradient is not None
            }
            for place, value in unit_sums(products, axes).items():
                sums[place] = sums.get(place, torch.zeros_like(value)) + value / len(batches)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
    return Scores(sums, adds=True)


@torch.no_grad()
def block_influence(model: PreTrainedModel, part: Part, batches: Batches) -> Float[Tensor, "layer"]:
    """1 - the cosine of each layer's input and output, mean over tokens (ShortGPT, 2403.03853; Minitron)."""
    sums, tokens = torch.zeros(part.depth, dtype=torch.float64), [0] * part.depth
    mask: Tensor | None = None

    def watch(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = _hidden(args, kwargs), output[0] if isinstance(output, tuple) else output
            cosines = cosine_similarity(before.float(), after.float(), dim=-1)
            kept = _matching(mask, cosines)
            sums[number] += (1 - cosines[kept]).double().sum().cpu()
            tokens[number] += int(kept.sum())

        return hook

    layers = _layers(model, part)
    handles = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for batch in batches:
            mask = None if part.mark else _tokens(batch)
            model(**_inputs(batch, model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return (sums / torch.tensor(tokens).clamp(min=1)).float()


@torch.no_grad()
def losses_without(model: PreTrainedModel, part: Part, batches: Batches) -> Float[Tensor, "layer"]:
    """The loss on the batches (nats per token) without each layer in turn, less the loss with all of them."""
    whole, losses = mean_loss(model, batches), []
    for layer in _layers(model, part):
        with _skipped(layer):
            losses.append(mean_loss(model, batches) - whole)
    return torch.tensor(losses)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Batches) -> float:
    """Nats per supervised token of all batches together."""
    total, tokens = 0.0, 0
    for batch in batches:
        loss, count = _loss(model, batch)
        total, tokens = total + float(loss), tokens + count
    return total / max(tokens, 1)


def perplexity(model: PreTrainedModel, batches: Batches) -> float:
    """exp of `mean_loss`; infinite where that is beyond what a number holds."""
    loss = mean_loss(model, batches)
    return math.exp(loss) if loss < 700 else math.inf


def _loss(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """The summed loss of the supervised tokens, and how many they are."""
    labels = batch["labels"][:, 1:].to(model.device)
    logits = model(**_inputs(batch, model), use_cache=False).logits[:, :-1]
    kept = labels != -100
    return cross_entropy(logits[kept].float(), labels[kept], reduction="sum"), int(kept.sum())


def _inputs(batch: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    return {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }


def _tokens(batch: Mapping[str, Any]) -> Bool[Tensor, "row token"]:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _layers(model: PreTrainedModel, part: Part) -> nn.ModuleList:
    layers = model.get_submodule(part.stack)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def _skipped(layer: nn.Module) -> Iterator[None]:
    """Within it, a layer gives what it is given."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = _hidden(args, kwargs)
        return (before, *output[1:]) if isinstance(output, tuple) else before

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _matching(mask: Tensor | None, values: Tensor) -> Bool[Tensor, "..."]:
    """The mask of a batch where it fits a module's tokens; all of them in a vision tower."""
    if mask is None or mask.shape != values.shape:
        return torch.ones_like(values, dtype=torch.bool)
    return mask.to(values.device)


class _Activations:
    """Sums of what modules read and write, row by row."""

    def __init__(self, model: PreTrainedModel, axes: Axes):
        self.model, self.axes = model, axes
        self.mask: Tensor | None = None
        self.squares: dict[tuple[Place, str], Tensor] = {}
        """Of each module, the squares of the mean activations of rows, summed."""
        self.inner: dict[Place, int] = {}
        self.experts: dict[Place, list[Tensor]] = {}
        """Sum of norms and number of tokens of each expert."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, what the model does is counted."""
        modules, handles = dict(self.model.named_modules()), []
        kinds = {f"{part.mark}{kind}" for part in self.axes.parts for kind in _READ}
        for name, (kind, layer, inner) in modules_reading(self.model, self.axes, kinds).items():
            place = kind, layer
            self.inner[place] = inner
            handles.append(modules[name].register_forward_pre_hook(self._reads(place, name)))
        for dimension in self.axes.dimensions:
            owner = dimension.name.rpartition(".")[0]
            kind, module = dimension.segments[0].kind, modules[owner]
            plain, place = kind.removeprefix(VISION), place_of(kind, dimension)
            norm = "Norm" in type(module).__name__ and dimension.name.endswith(".weight")
            if plain == HIDDEN and norm and dimension.layer is not None:
                self.inner[place] = 1
                handles.append(module.register_forward_hook(self._writes(place, owner)))
            if plain in (EXPERTS, FFN, EXPERT_FFN) and dimension.name.endswith("down_proj") and dimension.number != 1:
                add = self._expert_outputs if plain == EXPERTS else self._expert_neurons
                handles.append(module.register_forward_pre_hook(add(place)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def scores(self) -> dict[Place, Tensor]:
        """Of all places that were seen."""
        scores: dict[Place, Tensor] = {}
        for (place, _), squares in self.squares.items():
            norms = squares.sqrt()
            scores[place] = scores[place] + norms if place in scores else norms
        for place, inner in self.inner.items():
            if inner > 1 and place in scores:
                scores[place] = scores[place].unflatten(0, (-1, inner)).square().sum(1).sqrt()
        for place, (sums, tokens) in self.experts.items():
            scores[place] = sums / tokens.clamp(min=1).unflatten(0, (-1, *[1] * (sums.ndim - 1)))
        return scores

    def _reads(self, place: Place, name: str) -> Callable[..., None]:
        return lambda module, args: self._add(place, name, args[0])

    def _writes(self, place: Place, name: str) -> Callable[..., None]:
        return lambda module, args, output: self._add(place, name, output)

    def _add(self, place: Place, name: str, values: Tensor) -> None:
        values = values.detach().float().abs()
        # A tower's patches of all images may stand in one row.
        rows = values if values.ndim == 3 else values[None]
        mask = _matching(None if place[0].startswith(VISION) else self.mask, rows[..., 0]).float()[..., None]
        means = (rows * mask).sum(1) / mask.sum(1).clamp(min=1)
        squares = means.square().sum(0).cpu()
        key = place, name
        self.squares[key] = self.squares.get(key, torch.zeros_like(squares)) + squares

    def _expert_outputs(self, place: Place) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            hidden, chosen, weights = _routed(args, module)
            experts = module.down_proj.shape[0]
            sums, tokens = self.experts.setdefault(place, [torch.zeros(experts), torch.zeros(experts)])
            for expert in range(experts):
                here = (chosen == expert) & self._tokens_of(chosen)
                rows = here.any(-1).nonzero().flatten()
                if len(rows):
                    # The module itself, of the tokens that are sent there and with the other experts' weights at 0.
                    only = torch.where(here[rows], weights[rows], 0).to(weights.dtype)
                    output = module.forward(hidden[rows], chosen[rows], only)
                    sums[expert] += output.float().norm(dim=-1).sum().cpu()
                    tokens[expert] += len(rows)

        return hook

    def _expert_neurons(self, place: Place) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            hidden, chosen, _ = _routed(args, module)
            gates = getattr(module, "gate_up_proj", None)
            if gates is None or not hasattr(module, "act_fn") or gates.shape[-1] != hidden.shape[-1]:
                raise UserError(
                    f"What neurons do within {type(module).__name__} cannot be seen from outside. Set "
                    "prune_importance: weights or gradients to make its experts narrower.",
                    because="not built",
                )
            experts, neurons = module.down_proj.shape[0], module.down_proj.shape[-1]
            sums, tokens = self.experts.setdefault(place, [torch.zeros(experts, neurons), torch.zeros(experts)])
            for expert in range(experts):
                rows = ((chosen == expert) & self._tokens_of(chosen)).any(-1)
                gate, up = nn.functional.linear(hidden[rows], gates[expert]).chunk(2, dim=-1)
                sums[expert] += (module.act_fn(gate) * up).float().abs().sum(0).cpu()
                tokens[expert] += int(rows.sum())

        return hook

    def _tokens_of(self, chosen: Tensor) -> Bool[Tensor, "token 1"]:
        """The tokens that are no padding, of the rows of a batch end to end."""
        if self.mask is None or self.mask.numel() != len(chosen):
            return torch.ones(len(chosen), 1, dtype=torch.bool, device=chosen.device)
        return self.mask.flatten()[:, None].to(chosen.device)


def _routed(args: tuple[Any, ...], module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that a module of experts is given, their experts, and the weights of these."""
    if len(args) != 3:
        raise UserError(
            f"{type(module).__name__} is not given which tokens go to which expert. Set prune_importance: weights or "
            "gradients to prune its experts.",
            because="not built",
        )
    hidden, chosen, weights = args
    return hidden.reshape(-1, hidden.shape[-1]), chosen, weights
