"""Which of the items that a module computes are compared, of one side of a micro-batch."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mmkd.errors import UserError
from mmkd.teachers.batch import View


@dataclass(frozen=True)
class FeatureItems:
    """Features of items, or their maps of attention, and how many items each image or sequence has in turn."""

    features: Tensor
    sizes: list[int]


def sequences_of(view: View) -> Int[Tensor, "batch position"]:
    """The number of the sequence that each position belongs to, -1 for padding. Rows laid end to end are many."""
    labels, positions = view.labels, view.inputs.get("position_ids")
    if positions is not None and positions.shape == labels.shape and view.inputs.get("attention_mask") is None:
        return (positions == 0).flatten().cumsum(0).view(labels.shape) - 1
    numbers = torch.arange(len(labels), device=labels.device)[:, None].expand(labels.shape)
    mask = view.inputs.get("attention_mask")
    return numbers if mask is None else numbers.masked_fill(mask == 0, -1)


def positions_of(view: View, tokens: str) -> Tensor:
    """Which positions of the text are items: those that predict the answer, all that are learnt from, or images.

    All positions are those of sequences in which something is learnt.
    """
    if tokens == "visual":
        return view.visual
    answer = torch.zeros_like(view.labels, dtype=torch.bool)
    answer[:, :-1] = view.supervised
    if tokens == "answer":
        return answer
    numbers = sequences_of(view)
    return torch.isin(numbers, numbers[answer]) & (numbers >= 0)


def sizes_at(view: View, positions: Tensor, tokens: str) -> list[int]:
    """How many of these positions each image or sequence in turn has."""
    if tokens == "visual":
        return view.images[:, 1].tolist()
    return sequences_of(view)[positions].unique_consecutive(return_counts=True)[1].tolist()


def text_items(feature: Tensor, view: View, tokens: str) -> FeatureItems:
    """The items of a module of the language model."""
    positions = positions_of(view, tokens)
    return FeatureItems(feature[positions], sizes_at(view, positions, tokens))


def attention_items(weights: Tensor, view: View, tokens: str) -> FeatureItems:
    """What the items attend to, of maps [batch, head, query, key]: [item, head, key]."""
    positions = positions_of(view, tokens)
    return FeatureItems(weights.transpose(1, 2)[positions], sizes_at(view, positions, tokens))


def image_items(feature: Tensor, view: View, module: str) -> FeatureItems:
    """The items of a module for images, of the images of rows that are learnt from.

    Raises UserError where the features of a batch cannot be told apart by image.
    """
    if feature.ndim == 4:
        # The map of a convolution, channels first.
        feature = feature.flatten(2).transpose(1, 2)
    width, counts = feature.shape[-1], view.image_tokens
    assert counts is not None
    flat = feature.reshape(-1, width)
    sizes = _by_image(feature, counts[:, 1], module)
    learnt = view.supervised.any(1)[counts[:, 0]]
    chosen = torch.repeat_interleave(learnt, torch.tensor(sizes, device=learnt.device))
    kept = [size for size, kept in zip(sizes, learnt.tolist(), strict=True) if kept]
    return FeatureItems(flat if len(kept) == len(sizes) else flat[chosen.to(flat.device)], kept)


def _by_image(feature: Tensor, tokens: Int[Tensor, "image"], module: str) -> list[int]:
    """How many items each image has: as many as another where each has a row, else in proportion to its tokens."""
    if feature.ndim == 3 and len(feature) == len(tokens):
        return [feature.shape[1]] * len(tokens)
    items, total = feature.shape[:-1].numel(), int(tokens.sum())
    sizes = [count * items / max(1, total) for count in tokens.tolist()]
    # Images that are cut into tiles have whole tiles.
    tile = feature.shape[1] if feature.ndim == 3 else 1
    if not all(size.is_integer() and size % tile == 0 for size in sizes):
        raise UserError(
            f"features: which of the {items} features of {module} belong to which of {len(tokens)} images cannot be "
            "told, since the model does not keep all of them. Compare a module of the language model with tokens: "
            "visual instead.",
            because="not built",
        )
    return [int(size) for size in sizes]
