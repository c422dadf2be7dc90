"""Settings of method clip_kd."""

from dataclasses import dataclass, field
from typing import ClassVar

from mmkd.data.class_rows import AUGMENTATIONS
from mmkd.errors import UserError
from mmkd.losses.contrastive_losses import SAME_CAPTION
from mmkd.schema import NonNegativeFloat, PositiveFloat
from mmkd.training.whole_model_config import WholeModelConfig

from .embedding_config import EmbeddingCacheConfig
from .inherit_config import InheritConfig
from .ranking_config import RankingConfig


@dataclass
class ContrastiveKDConfig(InheritConfig, EmbeddingCacheConfig, RankingConfig, WholeModelConfig):
    """Settings of method clip_kd."""

    taught: ClassVar[dict[str, float]] = {"logit_kl": 1.0, "affinity": 0.0, "feature_mse": 2000.0, "icl": 1.0}
    """The terms that need a teacher, with the weight that each has where a recipe does not say."""

    clip_weight: NonNegativeFloat = field(
        default=1.0,
        metadata={
            "help": "Weight of the contrastive loss of the pairs themselves: CLIP's, or SigLIP's sigmoid loss for a "
            "student of that family. Default: 1. With no teacher it is the whole loss."
        },
    )
    logit_kl_weight: NonNegativeFloat | None = field(
        default=None,
        metadata={
            "help": "Weight of the KL divergence from the teacher's to the student's distribution over the batch: "
            "which text belongs to an image, and which image to a text. Default: 1 with a teacher."
        },
    )
    affinity_weight: NonNegativeFloat | None = field(
        default=None,
        metadata={
            "help": "Weight of TinyCLIP's affinity mimicking: cross-entropy of the student's similarities under the "
            "teacher's, both multiplied by affinity_scale. TinyCLIP has 1 here and 0 for all others. Default: 0."
        },
    )
    feature_mse_weight: NonNegativeFloat | None = field(
        default=None,
        metadata={
            "help": "Weight of the mean squared difference between the features of student and teacher, each of "
            "length 1. Where the widths differ, the student's pass through a linear layer that is not saved. "
            "Default: 2000 with a teacher, as CLIP-KD has it."
        },
    )
    icl_weight: NonNegativeFloat | None = field(
        default=None,
        metadata={
            "help": "Weight of CLIP-KD's interactive contrastive learning: the student's images find the teacher's "
            "texts, and its texts the teacher's images. Default: 1 with a teacher."
        },
    )
    temperature: PositiveFloat = field(
        default=1.0,
        metadata={"help": "Divides the logits of student and teacher in logit_kl; the term is multiplied by T^2."},
    )
    affinity_scale: PositiveFloat = field(
        default=50.0,
        metadata={
            "help": "What similarities of student and teacher are multiplied by in affinity. 50 (default) as in "
            "TinyCLIP's recipes."
        },
    )
    logit_scale: PositiveFloat | None = field(
        default=None,
        metadata={
            "help": "What the student's similarities are multiplied by at the start. Default: the model's own; 20 "
            "for encoders of sentences."
        },
    )
    train_logit_scale: bool = field(
        default=True,
        metadata={"help": "Train logit_scale, and the bias of SigLIP. Encoders of sentences have none to train."},
    )
    max_logit_scale: PositiveFloat = field(
        default=100.0, metadata={"help": "The largest logit_scale that training may reach. 100 (default) as in CLIP."}
    )
    same_caption: str = field(
        default="negative",
        metadata={
            "help": "What two pairs of a batch with the same caption are to each other in clip and icl. negative "
            "(default): wrong answers, as published. positive: right answers. ignore: neither. The log says how many "
            "there are (same_captions). With SigLIP's loss negative contradicts itself. With CLIP's loss positive "
            "trains as negative does, since equal captions have equal features.",
            "choices": list(SAME_CAPTION),
        },
    )
    freeze: str = field(
        default="none",
        metadata={
            "help": "A tower of the student that is not trained: image, text, or none (default).",
            "choices": ["none", "image", "text"],
        },
    )
    augmentation: str = field(
        default="none",
        metadata={
            "help": "How a picture is varied before student and teachers see it; all see the same view. none "
            "(default), flip or crop_flip. A flip contradicts captions that say left and right.",
            "choices": list(AUGMENTATIONS),
        },
    )
    save_open_clip: bool = field(
        default=False,
        metadata={
            "help": "Write the student for the open_clip package too, into the folder open_clip of output_dir. For "
            "students of CLIP's architecture."
        },
    )

    zero_shot_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Data recipes of classes, on whose test splits `mmkd compare` measures zero-shot accuracy, such "
            "as classification/food101. Default: none."
        },
    )

    def __post_init__(self) -> None:
        if self.ddp_find_unused_parameters is None:
            # Poolers, and the tower that a pair of texts does not use, get no gradient.
            self.ddp_find_unused_parameters = True
        super().__post_init__()
        self.check_ranking()
        self.check_inherit()
        if not any(self.weights_with(True).values()) and not self.scored_weight:
            keys = ", ".join(f"{term}_weight" for term in ("clip", *self.taught))
            raise UserError(
                f"All terms have weight 0, so that nothing is learnt: give one of {keys} a weight.", because="meaning"
            )
        if self.label_smoothing_factor:
            raise UserError(
                "label_smoothing_factor is about labels, and there are none. Remove it.", because="meaning"
            )

    def weights_with(self, teacher: bool) -> dict[str, float]:
        """Term -> its weight. Raises UserError for one that needs a teacher where there is none."""
        weights = {"clip": self.clip_weight}
        for term, usual in self.taught.items():
            own: float | None = getattr(self, f"{term}_weight")
            if own and not teacher:
                raise UserError(
                    f"{term}_weight is {own:g}, and there is no teacher to learn from. Name a teacher, or remove it.",
                    because="meaning",
                )
            weights[term] = (usual if teacher else 0.0) if own is None else own
        weights |= self.ranking_weights(teacher)
        if not teacher and not self.clip_weight and not self.scored_weight:
            raise UserError(
                "clip_weight is 0 and there is no teacher, so that nothing is learnt. Give clip_weight a value, or "
                "name a teacher.",
                because="meaning",
            )
        return weights
