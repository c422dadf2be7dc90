"""What a recipe says of pruning: what is left of a model, and what decides."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from mmkd.errors import UserError
from mmkd.models.prune_sizes import PruneSizes
from mmkd.schema import NonNegativeInt, PositiveFloat, PositiveInt

_COUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmbt]?)", re.IGNORECASE)
_TIMES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

SIZES = {
    "student_layers": "layers",
    "student_intermediate_size": "intermediate_size",
    "student_num_attention_heads": "num_attention_heads",
    "student_num_key_value_heads": "num_key_value_heads",
    "student_hidden_size": "hidden_size",
    "student_num_experts": "num_experts",
    "student_expert_intermediate_size": "expert_intermediate_size",
    "student_vision_num_hidden_layers": "vision_layers",
    "student_vision_intermediate_size": "vision_intermediate_size",
    "student_vision_num_attention_heads": "vision_num_attention_heads",
    "student_vision_hidden_size": "vision_hidden_size",
}
"""Key of a recipe -> the size that is left, as `PruneSizes` calls it."""

TARGETS = ("target_params", "target_latency")

PRUNE_KEYS = (*SIZES, *TARGETS, "prune_importance", "prune_layer_importance", "prune_calibration_rows")
"""The keys that say how student_init: prune makes a student."""


@dataclass(kw_only=True)
class PruneArguments:
    """For student_init: prune. What is kept of `student`, or of the teacher if `student` is not set."""

    student_layers: list[NonNegativeInt] | None = field(
        default=None,
        metadata={
            "help": "For student_init: prune. The layers to keep: one number for so many layers, chosen by "
            "prune_layer_importance, or a list of layers counted from 0."
        },
    )
    student_intermediate_size: PositiveInt | None = field(
        default=None, metadata={"help": "For student_init: prune. The width of the FFN to keep. Default: all of it."}
    )
    student_num_attention_heads: PositiveInt | None = field(
        default=None,
        metadata={"help": "For student_init: prune. Query heads to keep; key-value heads follow. Default: all."},
    )
    student_num_key_value_heads: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "For student_init: prune. Key-value heads to keep. Their query heads stay with them, or as many "
            "of these as student_num_attention_heads says. Default: all."
        },
    )
    student_hidden_size: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "For student_init: prune. The width of the hidden state to keep, which also cuts embeddings, head "
            "and the connector of a vision-language model. Default: all of it."
        },
    )
    student_num_experts: PositiveInt | None = field(
        default=None,
        metadata={"help": "For student_init: prune. Experts of each layer to keep of a mixture. Default: all."},
    )
    student_expert_intermediate_size: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "For student_init: prune. The width of experts to keep, in models whose config has a "
            "moe_intermediate_size. In others, such as Mixtral, set student_intermediate_size. Default: all of it."
        },
    )
    student_vision_num_hidden_layers: list[NonNegativeInt] | None = field(
        default=None,
        metadata={
            "help": "For student_init: prune of a vision-language model. The layers of its vision tower to keep: a "
            "number, or a list of layers counted from 0. Default: all."
        },
    )
    student_vision_intermediate_size: PositiveInt | None = field(
        default=None,
        metadata={"help": "For student_init: prune. The width of the vision tower's FFN to keep. Default: all of it."},
    )
    student_vision_num_attention_heads: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "For student_init: prune. Heads of the vision tower to keep. They make up its width, so that "
            "student_vision_hidden_size follows. Default: all."
        },
    )
    student_vision_hidden_size: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "For student_init: prune. The width of the vision tower to keep, a multiple of the channels of a "
            "head. Default: all of it."
        },
    )
    prune_importance: str = field(
        default="weights",
        metadata={
            "help": "For student_init: prune. What decides which neurons, heads, channels and experts stay. weights "
            "(default): the magnitude of their weights, without data. activations: how large they are on "
            "prune_calibration_rows, as in Minitron. gradients: how much the loss on these rows would change "
            "without them, to first order.",
            "choices": ["weights", "activations", "gradients"],
        },
    )
    prune_layer_importance: str = field(
        default="even",
        metadata={
            "help": "For student_init: prune. Which layers stay where student_layers is a number. even (default): "
            "evenly spread ones. block_influence: those that change the hidden state most on prune_calibration_rows. "
            "loss: those without which the loss on these rows rises most.",
            "choices": ["even", "block_influence", "loss"],
        },
    )
    prune_calibration_rows: PositiveInt = field(
        default=64,
        metadata={
            "help": "For student_init: prune. Training rows on which importance is measured, spread evenly over the "
            "data and prepared as for training. Default: 64."
        },
    )
    target_params: str | None = field(
        default=None,
        metadata={
            "help": "For student_init: prune. Parameters that the student may have, such as 0.5B or 90M. Layers, "
            "widths and heads that are not set are searched, and those that keep the most importance are taken."
        },
    )
    target_latency: PositiveFloat | None = field(
        default=None,
        metadata={
            "help": "For student_init: prune. Milliseconds that the student may take for a generated token, measured "
            "on this machine. The largest candidate that is fast enough is taken."
        },
    )

    @property
    def sizes(self) -> PruneSizes:
        """The sizes that are set."""
        return PruneSizes(**{name: _one_or_many(getattr(self, key)) for key, name in SIZES.items()})

    @property
    def searches(self) -> bool:
        """Whether sizes are found and not all given."""
        return self.target_params is not None or self.target_latency is not None

    @property
    def ranks_layers(self) -> bool:
        """Whether layers are chosen by data."""
        counts = [self.sizes.layers, self.sizes.vision_layers]
        return self.prune_layer_importance != "even" and (
            self.searches or any(isinstance(count, int) for count in counts)
        )

    @property
    def parameters_wanted(self) -> int | None:
        """The number that target_params says. Raises UserError for what is no number."""
        if self.target_params is None:
            return None
        match = _COUNT.fullmatch(self.target_params.strip())
        if match is None:
            raise UserError(
                f"target_params is {self.target_params!r}; write a number such as 500M, 0.5B or 500000000."
            )
        return round(float(match[1]) * _TIMES[match[2].lower()])


UNPRUNED = {each.name: each.default for each in fields(PruneArguments)}
"""The keys of pruning with the values that they have where a recipe does not set them."""


def check_pruning(arguments: Any) -> None:
    """Raises UserError where keys of pruning stand beside another student_init, or nothing says what is left."""
    given = [key for key in (*SIZES, *TARGETS) if getattr(arguments, key) is not None]
    said = [key for key, default in UNPRUNED.items() if getattr(arguments, key) != default]
    if (arguments.student_init != "prune" and said) or (arguments.student_init == "prune" and not given):
        raise UserError(
            "student_init: prune and the sizes to keep (student_layers, student_intermediate_size, "
            "student_num_attention_heads, student_hidden_size, ..., or target_params) go together: set both or "
            "neither." + (f" {said[0]} is set." if arguments.student_init != "prune" else ""),
            because="meaning",
        )
    arguments.parameters_wanted  # noqa: B018  (it checks)
    if arguments.target_params is not None and arguments.target_latency is not None:
        raise UserError(
            "target_params and target_latency both say how small the student is to be: set one of them.",
            because="meaning",
        )


def _one_or_many(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
