"""The parts of a vision-language model, and which of them are trained."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from mmkd.errors import UserError

PARTS = ("vision_tower", "connector", "language_model")
"""The names that `trainable` accepts."""

# By the names that model families give to their modules: transformers has no attribute that says which part is which.
_CONNECTOR = {
    "multi_modal_projector",
    "connector",
    "merger",
    "mm_projector",
    "image_newline",
    "embed_vision",
    "perceiver_resampler",
    "qformer",
    "query_tokens",
    "language_projection",
    "aligner",
}
_VISION = {"vision_tower", "vision_model", "vision_encoder", "visual", "vision_embed_tokens"}


def part_of(parameter: str) -> str:
    """The part, one of `PARTS`, to which a parameter belongs by its name in the model."""
    words = set(parameter.split("."))
    # The connector first: the merger of Qwen-VL is a module within its vision tower.
    if words & _CONNECTOR or any(word.startswith("deepstack_merger") for word in words):
        return "connector"
    return "vision_tower" if words & _VISION else "language_model"


def train_only(model: PreTrainedModel, parts: Sequence[str]) -> None:
    """Freezes all parameters outside of the named parts.

    Raises UserError for unknown parts and for parts that the model does not have.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UserError(
            f"trainable is {list(parts)}; name one or more of {', '.join(PARTS)}, or remove the key to train all."
        )
    part_by_name = {name: part_of(name) for name, _ in model.named_parameters()}
    missing = [part for part in parts if part not in part_by_name.values()]
    if missing:
        raise UserError(
            f"trainable names {', '.join(missing)}, but {type(model).__name__} has no such part: it has "
            f"{', '.join(sorted(set(part_by_name.values())))}.",
            because="meaning",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and part_by_name[name] in parts)
