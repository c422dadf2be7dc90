"""Check that a model keeps packed sequences separate, which packing and padding-free batches require."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.errors import UserError
from mmkd.seams.transformers_seam import attention_of

from .backbone import attention_now, base_of

# Tolerances relative to the largest hidden value: far above rounding, far below the effect of another sequence.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF = 0.05
_SHORT, _LONG = 6, 9


def check_packing(
    model: PreTrainedModel | PeftModel,
    role: str,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    special: Collection[int],
    run: Callable[..., Any] | None = None,
) -> None:
    """Raises UserError where the hidden states of a sequence change with the one before it in a batch.

    `collate` lays rows end to end as training does, `special` are ids to leave out of the probe, `run` is the model
    within its wrapper. `allow_consumers` must have been called. A model is not checked while its weights are sharded,
    or while it waits on the CPU for a GPU and is set to FlashAttention.
    """
    base = base_of(model)
    if any(hasattr(parameter, "ds_id") or parameter.is_meta for parameter in base.parameters()):
        return
    if base.device.type == "cpu" and not attention_now(base) <= {"eager", "sdpa"}:
        return
    embeddings: Any = base.get_input_embeddings()
    rows = embeddings.num_embeddings
    ids = [index for index in range(min(rows, 512)) if index not in special] or [0]
    ids = (ids * (3 * _LONG))[: 2 * _LONG + _SHORT]
    second, first, other = ids[:_SHORT], ids[_SHORT : _SHORT + _LONG], ids[_SHORT + _LONG :]
    training = model.training
    model.eval()
    try:
        alone, behind, behind_other = (
            _last_states(model, collate(_examples(parts)), run or model, sum(map(len, parts)))
            for parts in ([second], [first, second], [other, second])
        )
    finally:
        model.train(training)
    # Two sequences before the same one, and none: masks that leak and positions that go on both show in one of them.
    allowed = _ROUNDING.get(behind.dtype, _HALF) * behind.abs().max()
    if max((behind - behind_other).abs().max(), (behind - alone).abs().max()) <= allowed:
        return
    raise UserError(
        f"The {role} ({type(base).__name__}, attention {attention_of(base.config)}) lets sequences that are "
        "packed together see each other: its prediction for a row changes with the row before it in the pack. "
        "Set packing: false and padding_free: false, or, where the model has it, attn_implementation: "
        "flash_attention_2.",
        because="upstream",
    )


def _examples(rows: list[list[int]]) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": ids} for ids in rows]


@torch.no_grad()
def _last_states(
    model: PreTrainedModel | PeftModel, batch: dict[str, Any], run: Callable[..., Any], tokens: int
) -> Tensor:
    """The hidden states of the last sequence in a batch of `tokens` tokens, after which padding may follow."""
    device = base_of(model).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    del inputs["labels"]
    # FlashAttention accepts only half precision, which training in mixed precision provides.
    mixed = device.type == "cuda" and base_of(model).dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        hidden = run(**inputs, consumer=lambda hidden, head: hidden)
    return hidden[0, tokens - _SHORT : tokens]
