"""Settings of method trans_encoder."""

from dataclasses import dataclass, field

from mmkd.errors import UserError
from mmkd.schema import PositiveFloat, PositiveInt, Share
from mmkd.training.whole_model_config import WholeModelConfig


@dataclass
class TransEncoderConfig(WholeModelConfig):
    """Settings of method trans_encoder. learning_rate, num_train_epochs and the like are those of the bi-encoder."""

    cycles: PositiveInt = field(
        default=3,
        metadata={"help": "How often the cross-encoder learns from the bi-encoder and teaches it. 3 as in the paper."},
    )
    cross_encoder: str | None = field(
        default=None,
        metadata={
            "help": "The model that cross-encoders begin with: a Hub id or a folder, such as the language model that "
            "the student was made of. Default: the student itself, with a new head."
        },
    )
    mutual_student: str | None = field(
        default=None,
        metadata={
            "help": "A second bi-encoder of another base model. Both are trained in turn, and each learns from the "
            "mean of what both say (mutual distillation). Default: the student learns from itself alone."
        },
    )
    mutual_cross_encoder: str | None = field(
        default=None,
        metadata={"help": "For mutual_student. What its cross-encoders begin with. Default: mutual_student itself."},
    )
    begin_with: str = field(
        default="start",
        metadata={
            "help": "What each training begins with. start (default): the models of the recipe, as in the paper, so "
            "that cycles hand on scores alone. previous: the weights of the encoder that was trained before.",
            "choices": ["start", "previous"],
        },
    )
    symmetric: bool = field(
        default=True,
        metadata={
            "help": "Show each pair in both orders to the cross-encoder. Set to false for pairs whose order matters, "
            "such as question and answer. Default: true."
        },
    )
    max_length: PositiveInt = field(
        default=32,
        metadata={
            "help": "Tokens of a sentence in training; longer ones are cut. 32 as in the paper. The saved model reads "
            "as many as before."
        },
    )
    cross_max_length: PositiveInt = field(
        default=64, metadata={"help": "Tokens of a pair that the cross-encoder reads. 64 as in the paper."}
    )
    cross_batch_size: PositiveInt = field(
        default=32, metadata={"help": "Pairs per step of the cross-encoder. 32 as in the paper."}
    )
    cross_learning_rate: PositiveFloat = field(
        default=2e-5, metadata={"help": "Learning rate of the cross-encoder. 2e-5 as in the paper."}
    )
    cross_epochs: PositiveFloat = field(
        default=1.0, metadata={"help": "Epochs of each training of the cross-encoder. 1 as in the paper."}
    )
    cross_warmup: Share = field(
        default=0.1, metadata={"help": "Share of the cross-encoder's steps in which its learning rate rises."}
    )
    score_batch_size: PositiveInt = field(
        default=64, metadata={"help": "Pairs that are scored at a time for the next training."}
    )
    dev_data: str | None = field(
        default=None,
        metadata={
            "help": "Pairs with a column score, to choose the best cycle by Spearman's correlation. Default: the last "
            "cycle is the result, which needs no labels."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mutual_cross_encoder is not None and self.mutual_student is None:
            raise UserError(
                "mutual_cross_encoder is the start of a second student's cross-encoders, and there is none. Set "
                "mutual_student, or remove it.",
                because="meaning",
            )
        if self.world_size > 1:
            raise UserError(
                f"trans_encoder trains in one process, and there are {self.world_size}. Remove accelerate_config.",
                because="not built",
            )
