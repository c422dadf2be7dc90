"""Settings of what a classifier may learn besides labels and one teacher's logits by KL."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.errors import UserError
from mmkd.losses.class_objectives import KD_LOSSES
from mmkd.losses.gated_teachers import BALANCES
from mmkd.losses.open_vocabulary import FEATURE_DISTANCES, TEMPERATURE
from mmkd.schema import NonNegativeFloat, PositiveFloat, PositiveInt
from mmkd.training.whole_model_config import WholeModelConfig

TERMS = ("text_ce", "vl_align", "image_contrast", "caption", "feature_mse")
"""Terms that compare the student's embedding with those of a CLIP-like teacher."""


@dataclass
class ClassTermsConfig(WholeModelConfig):
    """Settings of the loss on the teacher, of embeddings, aspects, and several teachers."""

    kd_loss: str = field(
        default="kl",
        metadata={
            "help": "How the distillation head learns the teacher's logits. kl (default): KL divergence. ofa: OFA-KD, "
            "which stresses the label's class by ofa_epsilon. pld: the teacher's order of the classes, the label "
            "first (PLD).",
            "choices": list(KD_LOSSES),
        },
    )
    ofa_epsilon: PositiveFloat = field(
        default=1.0,
        metadata={
            "help": "For kd_loss: ofa. Above 1, the label's class weighs more. 1 (default) as the authors on CIFAR; "
            "they take 1.5 on ImageNet."
        },
    )
    stage_heads: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Also teach so many inner stages of the backbone, each through a head of its own into the "
            "teacher's classes (OFA-KD: 4). The heads are thrown away after training. Default: none."
        },
    )
    stage_weight: PositiveFloat = field(
        default=1.0, metadata={"help": "Weight of each stage beside the distillation head. 1 (default) as in OFA-KD."}
    )
    text_ce_weight: NonNegativeFloat = field(
        default=0.0,
        metadata={
            "help": "Weight of the loss on labels of the prediction by texts: the cosine of the student's embedding "
            "with the teacher's text features of the classes. Default: 0."
        },
    )
    vl_align_weight: NonNegativeFloat = field(
        default=0.0,
        metadata={
            "help": "Weight of the divergence between student and teacher in how an image compares with the texts of "
            "the classes. Default: 0."
        },
    )
    vl_align_top_k: PositiveInt = field(
        default=256,
        metadata={"help": "For vl_align_weight. How many of the teacher's first classes count. 256 as the authors."},
    )
    vl_align_filter: bool = field(
        default=False,
        metadata={"help": "For vl_align_weight. Only labelled images that the teacher classifies rightly count."},
    )
    image_contrast_weight: NonNegativeFloat = field(
        default=0.0,
        metadata={
            "help": "Weight of finding an image's teacher features among those of the batch, and back. Default: 0."
        },
    )
    image_contrast_both_ways: bool = field(
        default=True,
        metadata={
            "help": "For image_contrast_weight. true (default): also find the image of teacher features. false: only "
            "the teacher features of an image."
        },
    )
    caption_weight: NonNegativeFloat = field(
        default=0.0,
        metadata={
            "help": "Weight of finding an image's caption among those of the batch. The data recipe names the column "
            "(`caption`). Default: 0."
        },
    )
    feature_mse_weight: NonNegativeFloat = field(
        default=0.0,
        metadata={"help": "Weight of the squared distance to the teacher's image features. Default: 0."},
    )
    feature_mse_form: str = field(
        default="normalized",
        metadata={
            "help": "For feature_mse_weight. normalized (default): of features of length 1. log: of the features as "
            "they are, as log(1 + distance / 10).",
            "choices": list(FEATURE_DISTANCES),
        },
    )
    text_temperature: PositiveFloat = field(
        default=TEMPERATURE,
        metadata={"help": "What cosines with texts and images are divided by. 0.07 (default) as the authors."},
    )
    unseen_classes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Classes that training never sees. After it, their rows are classified through texts, and the "
            "mean accuracy per class is reported for seen and unseen classes."
        },
    )
    aspects: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Yes-or-no questions about an image, as a list or a text file with one a line. The student learns "
            "a vision-language model's answers to them through outputs that are thrown away (MaKD)."
        },
    )
    aspects_count: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "For aspects that name a file which is not there. `mmkd cache build RECIPE --job aspects` has "
            "aspects_server write so many questions about the classes into it, for you to read and change."
        },
    )
    aspects_weight: PositiveFloat = field(
        default=4.0, metadata={"help": "For aspects. Weight of the answers in the loss. 4 (default) as in the paper."}
    )
    aspects_model: str | None = field(
        default=None,
        metadata={"help": "For aspects. The vision-language model that answers: a Hub id or a folder."},
    )
    aspects_server: str | None = field(
        default=None,
        metadata={
            "help": "For aspects. URL of a chat server (vLLM, SGLang) that answers, with log-probs of first tokens."
        },
    )
    aspects_server_model: str | None = field(
        default=None, metadata={"help": "For aspects_server. The model to ask, where the server offers several."}
    )
    aspects_cache: str | None = field(
        default=None,
        metadata={
            "help": "For aspects. Folder of the answers; `mmkd cache build RECIPE --job aspects` writes it. Default: "
            "aspects in output_dir."
        },
    )
    mixing: str = field(
        default="weights",
        metadata={
            "help": "How several `teachers` teach. weights (default): all of them, by their `weight`. learned: a gate "
            "that reads the student's logits chooses gate_top_k of them for each row (MST-Distill). blended: the "
            "student learns the mean of their logits by the gate's probabilities.",
            "choices": ["weights", "learned", "blended"],
        },
    )
    gate_top_k: PositiveInt = field(
        default=1, metadata={"help": "For mixing: learned. Teachers of a row. 1 (default) as in the paper."}
    )
    gate_balance: str = field(
        default="kl",
        metadata={
            "help": "For mixing: learned. What keeps the gate from using one teacher only: kl (default, to an even "
            "use), cv (the spread of use), or none.",
            "choices": list(BALANCES),
        },
    )
    gate_balance_weight: PositiveFloat = field(
        default=1.0, metadata={"help": "For mixing: learned. Weight of gate_balance. 1 (default) as in the paper."}
    )

    @property
    def term_weights(self) -> dict[str, float]:
        """The weights of the terms of embeddings that are in the loss."""
        weights = {name: getattr(self, f"{name}_weight") for name in TERMS}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def questions(self) -> tuple[str, ...]:
        """The questions of `aspects`. Raises UserError for a file that cannot be read, and for none or one twice."""
        return questions_of(self.aspects)

    @property
    def lacks_questions(self) -> bool:
        """Whether the questions are still to be written by aspects_server."""
        return self.aspects_count is not None and not Path(str(self.aspects)).is_file()

    def check_terms(self, rows_of_a_step: int) -> None:
        """Raises UserError for settings that contradict each other."""
        if (self.stage_heads is not None or self.aspects is not None) and self.torch_compile:
            raise UserError(
                "stage_heads and aspects have outputs in training only, and torch_compile makes one program of the "
                "model. Set torch_compile: false.",
                because="upstream",
            )
        in_batch = [name for name in ("image_contrast", "caption") if name in self.term_weights]
        if in_batch and rows_of_a_step < 2:
            raise UserError(
                f"{in_batch[0]}_weight compares the images of a step, and a step has one. Raise "
                "per_device_train_batch_size, unlabeled_batch_size or gradient_accumulation_steps.",
                because="meaning",
            )
        if self.unseen_classes is not None and not self.term_weights:
            raise UserError(
                "unseen_classes are recognised through texts, for which the student learns an embedding: set "
                f"{', '.join(f'{name}_weight' for name in TERMS[:2])} or another of its terms.",
                because="meaning",
            )
        if self.mixing == "blended" and self.kd_loss == "pld":
            raise UserError(
                "kd_loss: pld takes the order of a teacher's classes, through which a gate of mixing: blended cannot "
                "learn. Set mixing: learned or weights.",
                because="meaning",
            )
        self._check_aspects()

    @property
    def gated(self) -> bool:
        """Whether a gate mixes several teachers."""
        return self.mixing != "weights"

    def _check_aspects(self) -> None:
        named = [name for name in ("aspects_model", "aspects_server") if getattr(self, name) is not None]
        if len(named) == 2:
            raise UserError("aspects_model and aspects_server both say who answers: keep one.", because="meaning")
        if named and self.aspects is None:
            raise UserError(f"{named[0]} answers `aspects`, which are not set.", because="meaning")
        if self.aspects_count is not None and (not isinstance(self.aspects, str) or self.aspects_server is None):
            raise UserError(
                "aspects_count has aspects_server write questions into the file that aspects names: set both.",
                because="meaning",
            )
        if not self.lacks_questions:
            _ = self.questions


def questions_of(aspects: Any) -> tuple[str, ...]:
    """The questions that `aspects` holds or names a file of; none for None. Raises UserError as `questions`."""
    if aspects is None:
        return ()
    if isinstance(aspects, str):
        path = Path(aspects)
        if not path.is_file():
            raise UserError(f"aspects names the file {aspects}, which is not there. Write one question a line.")
        aspects = path.read_text(encoding="utf-8").splitlines()
    questions = [question.strip() for question in aspects if question.strip()]
    if not questions:
        raise UserError("aspects holds no question; write yes-or-no questions such as 'Does it have sleeves?'.")
    twice = next((question for question in questions if questions.count(question) > 1), None)
    if twice is not None:
        raise UserError(f"aspects asks {twice!r} twice; the second answer would teach nothing.", because="meaning")
    return tuple(questions)
