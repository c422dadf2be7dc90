"""A model with other rows in its embeddings and its head, each made of rows that it has."""

import copy
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from mmkd.alignment.token_rows import TokenRows
from mmkd.errors import UserError
from mmkd.seams.transformers_seam import empty_like

OLD_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
"""Settings of generation that hold ids of tokens, besides those whose name ends in _token_id."""


def embedding_rows(model: PreTrainedModel) -> Float[Tensor, "row width"]:
    """The input embeddings. Raises UserError for a model that is quantised, or sizes other weights by its tokens."""
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        raise UserError(
            "The model is quantised, so its rows cannot be averaged: load it unquantised.", because="not built"
        )
    embeddings: Any = model.get_input_embeddings()
    config = model.config.get_text_config()
    sizes = {len(embeddings.weight), getattr(config, "vocab_size_per_layer_input", None)}
    for name, table in model.named_modules():
        own = isinstance(table, nn.Embedding) and table.weight is not embeddings.weight
        if own and table.num_embeddings in sizes:
            raise UserError(
                f"{name} of {type(model).__name__} has one row per token, like embeddings and head, but "
                "the rows of new tokens are unknown there. Use a model without such a table.",
                because="not built",
            )
    return embeddings.weight


def with_token_rows(
    model: PreTrainedModel, config: PreTrainedConfig, rows: TokenRows, count: int, seed: int = 0
) -> Any:
    """A new model of `config` with `count` rows; all other weights are the model's, whose type and device it has."""
    weights = _weights(model, rows, count, seed)
    # Only weights stay empty; buffers that no checkpoint holds are computed in the type that from_pretrained gives
    # them.
    with init_empty_weights(include_buffers=False):
        student: Any = empty_like(type(model), config, model.dtype)
    if getattr(model, "pooler", student) is None:
        student.pooler = None
    # assign keeps the type of every tensor, and unties the embeddings.
    student.load_state_dict(weights, assign=True)
    student.tie_weights()
    if model.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.to(model.device).train(model.training)


def _weights(model: PreTrainedModel, rows: TokenRows, count: int, seed: int) -> dict[str, Tensor]:
    """The state of the new model, which shares no memory with the old one."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tables = [embeddings.weight, getattr(head, "weight", None), getattr(head, "bias", None)]
    names = {id(table) for table in tables if table is not None}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    state: dict[str, Tensor] = model.state_dict()
    for name, tensor in state.items():
        table = id(parameters.get(name))
        if table in names and table not in made:
            made[table] = _new_rows(tensor, rows, count, torch.Generator().manual_seed(seed))
        weights[name] = made.get(table, tensor).clone()
    return weights


@torch.no_grad()
def _new_rows(
    old: Float[Tensor, "row *width"], rows: TokenRows, count: int, generator: torch.Generator
) -> Float[Tensor, "new *width"]:
    """Means of old rows in fp32 or better; without old rows, draws from a normal per channel over all old rows."""
    wide = old.cpu().reshape(len(old), -1)
    wide = wide.to(torch.promote_types(old.dtype, torch.float32))
    starts = np.cumsum(rows.lengths) - rows.lengths
    new = wide.new_zeros(count, wide.shape[1])
    new[: len(rows)] = functional.embedding_bag(
        torch.from_numpy(rows.pieces), wide, torch.from_numpy(starts), mode="mean"
    )
    # Rows that only pad the old vocabulary were never trained.
    trained = wide[torch.from_numpy(rows.old)]
    without_old = torch.from_numpy(rows.lengths == 0)
    noise = torch.randn(int(without_old.sum()), wide.shape[1], generator=generator, dtype=wide.dtype)
    new[len(rows) :] = trained.mean(0)
    new[: len(rows)][without_old] = trained.mean(0) + trained.std(0) * noise
    return new.reshape(count, *old.shape[1:]).to(old.dtype).to(old.device)
