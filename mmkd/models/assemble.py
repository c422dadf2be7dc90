"""Pruning: a student made of parts of a teacher, so that distillation starts from trained weights."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from mmkd.errors import UserError

from .prune_cut import Cut
from .prune_scores import Scores
from .prune_sizes import PruneSizes


def prune(
    teacher: PreTrainedModel,
    *,
    layers: int | Sequence[int] | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    hidden_size: int | None = None,
    num_experts: int | None = None,
    expert_intermediate_size: int | None = None,
    vision_layers: int | Sequence[int] | None = None,
    vision_intermediate_size: int | None = None,
    vision_num_attention_heads: int | None = None,
    vision_hidden_size: int | None = None,
    scores: Scores | None = None,
) -> PreTrainedModel:
    """A new model of the teacher's class with copies of the most important weights; the teacher is not changed.

    `layers` is a count, or ascending 0-based indices. A count keeps the layers with the largest scores; without scores
    of layers it is spread evenly as `round(linspace(0, depth - 1, layers))` so that the first and the last layer stay.
    `intermediate_size` is the new FFN width. `num_attention_heads` is the new number of query heads: key/value heads
    are removed with their queries, in whole GQA groups, unless `num_key_value_heads` says how many stay, and
    `head_dim` stays. `hidden_size` is the width of the model; Llama and Gemma configs require it to be a multiple of
    the number of heads, and where heads make up the width (OPT, most vision towers) they are cut with it. The sizes
    that begin with `vision_` are of a vision tower.

    Units are chosen in each layer, channels of the hidden state over all layers, by `scores`: see
    `mmkd.models.prune_calibration`. Without them weights decide (`mmkd.models.prune_scores.weight_scores`).

    Raises UserError where no size is passed or one cannot be, for a quantised teacher, and for an architecture that
    does not allow the cut.
    """
    sizes = PruneSizes(
        layers,
        intermediate_size,
        num_attention_heads,
        num_key_value_heads,
        hidden_size,
        num_experts,
        expert_intermediate_size,
        vision_layers,
        vision_intermediate_size,
        vision_num_attention_heads,
        vision_hidden_size,
    )
    return pruned(teacher, sizes, scores)[0]


@torch.no_grad()
def pruned(teacher: PreTrainedModel, sizes: PruneSizes, scores: Scores | None = None) -> tuple[PreTrainedModel, Cut]:
    """As `prune`, with what was kept."""
    if not sizes.given:
        raise UserError(
            "prune() got no size, so the student would equal the teacher: pass layers, intermediate_size or "
            "num_attention_heads."
        )
    require_prunable(teacher)
    cut = Cut.of(teacher, sizes, scores)
    return cut.made(teacher), cut


def require_prunable(teacher: PreTrainedModel) -> None:
    """Raises UserError for a teacher whose weights cannot be copied one by one, or whose layers differ in size."""
    packed = any(not parameter.is_floating_point() for parameter in teacher.parameters())
    if packed or getattr(teacher, "is_quantized", False) or getattr(teacher, "quantization_method", None):
        raise UserError(
            "The teacher is quantised, so its rows and columns are packed and cannot be copied one by one: load it "
            "unquantised to prune it; the student can be quantised afterwards.",
            because="not built",
        )
    config = teacher.config.get_text_config()
    if getattr(config, "is_heterogeneous", False) or isinstance(getattr(config, "intermediate_size", None), list):
        raise UserError(
            f"{type(config).__name__} sizes its layers one by one, so one number cannot say how wide the student is: "
            "use a teacher whose layers are all alike (not Gemma 3n or Gemma 4).",
            because="not built",
        )
