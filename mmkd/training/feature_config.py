"""The key `features` of methods that can compare what modules inside student and teacher compute."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmkd.errors import UserError
from mmkd.seams.trainer_seam import with_json_keys

from .config import DistillationConfig
from .feature_terms import FeatureTerm, terms_of


@dataclass
class FeatureConfig(DistillationConfig):
    """What methods read that take `features`."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = with_json_keys(DistillationConfig, "features")

    features: list[dict[str, Any] | str] | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Also compare what modules inside student and teacher compute. A shorthand (tower, projector, "
            "deepstack, every_nth, every_3rd, last_hidden, hidden_states, attentions), the name of a module, a "
            "mapping, or a list of these. A mapping: {student: MODULE, teacher: MODULE, kind: cosine | mse | relation "
            "| attention | attention_mse, weight: 1, projector: linear | none, tokens: answer | all | visual, "
            "visual_tokens: same | pool | hungarian, name: TEXT}. Each term adds its weight times the mean distance "
            "to the loss and is logged as feature_NAME. The teacher must be a model in this process; last_hidden also "
            "takes hidden states of a server or a cache."
        },
    )

    @property
    def feature_terms(self) -> tuple[FeatureTerm, ...]:
        """The terms of `features`."""
        return terms_of(self.features)

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss, by the term's name in the logs."""
        return {**super().term_weights, **self.feature_weights}

    @property
    def feature_weights(self) -> dict[str, float]:
        """The weights of the terms of `features`; a shorthand for several modules is one of them."""
        return {f"feature_{term.label}": term.weight for term in self.feature_terms}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.feature_terms:
            return
        if self.torch_compile:
            raise UserError(
                "features listens to modules while they run, and torch_compile merges modules into one. Set "
                "torch_compile: false, or remove features.",
                because="upstream",
            )
        checkpointing = self.activation_checkpointing_kwargs or {}
        assert isinstance(checkpointing, dict)
        if self.activation_checkpointing and checkpointing.get("use_reentrant"):
            raise UserError(
                "features needs gradients in the middle of the student, which reentrant checkpointing cuts off. Set "
                "use_reentrant: false in activation_checkpointing_kwargs.",
                because="upstream",
            )
