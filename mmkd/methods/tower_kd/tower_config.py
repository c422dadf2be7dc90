"""Settings of method tower_kd."""

from dataclasses import dataclass, field
from typing import Annotated

from mmkd.data.class_rows import AUGMENTATIONS
from mmkd.errors import UserError
from mmkd.losses.grid_frequencies import BANDS
from mmkd.losses.standardisation import SCALINGS
from mmkd.schema import NonNegativeFloat, PositiveInt, Range
from mmkd.training.whole_model_config import WholeModelConfig

PATCH_TERMS = ("patch_cosine", "patch_mse", "frequency", "patch_relation")
SUMMARY_TERMS = ("summary_cosine", "summary_mse")
TERMS = (*PATCH_TERMS, *SUMMARY_TERMS)
"""The terms of the loss; the weight of each is the key TERM_weight."""


@dataclass
class TowerKDConfig(WholeModelConfig):
    """Settings of method tower_kd."""

    patch_cosine_weight: NonNegativeFloat = field(
        default=0.9,
        metadata={
            "help": "Weight of 1 - cosine between the patches of student and teacher. 0.9 (default) as in RADIO."
        },
    )
    patch_mse_weight: NonNegativeFloat = field(
        default=0.1,
        metadata={
            "help": "Weight of the mean squared difference between patches. With 0.1 (default) and 0.9 for the cosine "
            "the student learns the length of features too."
        },
    )
    summary_cosine_weight: NonNegativeFloat = field(
        default=1.0,
        metadata={
            "help": "Weight of 1 - cosine between summaries: the class token or the pooled output of a tower, or the "
            "mean of its patches where it has neither."
        },
    )
    summary_mse_weight: NonNegativeFloat = field(
        default=0.0, metadata={"help": "Weight of the mean squared difference between summaries. Default: 0."}
    )
    patch_relation_weight: NonNegativeFloat = field(
        default=0.0,
        metadata={
            "help": "Weight of the relation term: how the patches of an image relate to each other, student against "
            "teacher. It reads the student's own features and no adaptor. Default: 0."
        },
    )
    frequency_weight: NonNegativeFloat = field(
        default=0.0,
        metadata={
            "help": "Weight of ScaleKD's frequency term: the cosine between patches after a part of the spatial "
            "frequencies was taken out, see frequency_band. Default: 0."
        },
    )
    frequency_band: str = field(
        default="all_but_mean",
        metadata={
            "help": "For frequency_weight. all_but_mean (default): without what all patches of an image share, as in "
            "ScaleKD. low: the lowest frequencies only, see frequency_share.",
            "choices": list(BANDS),
        },
    )
    frequency_share: Annotated[float, Range(above=0, max=1)] = field(
        default=0.5, metadata={"help": "For frequency_band: low. The share of the frequencies of each side to keep."}
    )
    adaptor: str = field(
        default="mlp",
        metadata={
            "help": "The head from the student's features into a teacher's. mlp (default): two layers, as in RADIO. "
            "linear: one. Heads are trained with the student and not saved into it.",
            "choices": ["mlp", "linear"],
        },
    )
    adaptor_width: PositiveInt | None = field(
        default=None,
        metadata={"help": "For adaptor: mlp. Its hidden width. Default: the wider of student and teacher."},
    )
    normalize_features: str = field(
        default="phi_s",
        metadata={
            "help": "How the features of each teacher are standardised, so that no teacher is louder than another. "
            "phi_s (default): rotated to equal variances and divided by one number, as in RADIO. channel: each "
            "channel to mean 0 and variance 1. none: as they are.",
            "choices": list(SCALINGS),
        },
    )
    normalize_images: PositiveInt = field(
        default=2048,
        metadata={"help": "For normalize_features. Pictures of the training data to measure mean and variance with."},
    )
    teacher_layer: int | None = field(
        default=None,
        metadata={
            "help": "The hidden layer of the teachers whose patches are learnt, such as -2. Default: their output."
        },
    )
    augmentation: str = field(
        default="flip",
        metadata={
            "help": "How a picture is varied before student and teachers see it; all see the same view. none, flip "
            "(default), or crop_flip.",
            "choices": list(AUGMENTATIONS),
        },
    )

    def __post_init__(self) -> None:
        if self.ddp_find_unused_parameters is None:
            # Layers after the one that is read get no gradient, nor does a pooler without a term.
            self.ddp_find_unused_parameters = True
        super().__post_init__()
        if not any(self.term_weights.values()):
            raise UserError(
                f"All terms have weight 0, so that nothing is learnt: give one of {', '.join(self.weight_keys)} a "
                "weight.",
                because="meaning",
            )
        if self.adaptor == "linear" and self.adaptor_width is not None:
            raise UserError("adaptor_width is of adaptor: mlp; a linear head has none. Remove it.", because="meaning")
        if self.label_smoothing_factor:
            raise UserError(
                "label_smoothing_factor is about labels, and there are none. Remove it.", because="meaning"
            )

    @property
    def weight_keys(self) -> list[str]:
        """The keys of the weights of all terms."""
        return [f"{term}_weight" for term in TERMS]

    @property
    def term_weights(self) -> dict[str, float]:
        """Term -> its weight."""
        return {term: getattr(self, f"{term}_weight") for term in TERMS}
