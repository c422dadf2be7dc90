"""Competitive distillation (CoMD): the student's failures decide what the teacher is asked next.

What runs the rounds is `mmkd.comd`; here are the settings, and the loss of a round.
"""

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmkd.errors import UserError
from mmkd.losses.fused import Targets
from mmkd.schema import NonNegativeFloat, NonNegativeInt, PositiveInt, Share
from mmkd.seams.trainer_seam import with_json_keys
from mmkd.training.base import DistillationTrainer
from mmkd.training.config import DistillationConfig
from mmkd.training.items import ItemLosses, Supervised

_ASSESSORS = ("judge", "exact", "rouge", "likelihood", "agreement", "none")
_AUGMENTORS = ("model", "templates", "random", "none")
_ROUNDS = ("sft", "kd", "taid")


@dataclass
class CoMDConfig(DistillationConfig):
    """Settings of method comd, besides those that every round is trained with."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = with_json_keys(DistillationConfig, "round_settings")

    ce_weight: Share = field(
        default=1.0,
        metadata={
            "help": "Always 1. To mix in the teacher's distribution, set round_method: kd and ce_weight in "
            "round_settings."
        },
    )
    rounds: NonNegativeInt = field(
        default=4,
        metadata={
            "help": "Number of rounds after round 0, in which the student learns the teacher's answers to the "
            "data's own instructions. 4 (default) as in the paper."
        },
    )
    round_method: str = field(
        default="sft",
        metadata={
            "help": "How a round learns from the teacher's answers. sft (default): from their text, as in the "
            "paper. kd, taid: from the teacher's distribution over them.",
            "choices": list(_ROUNDS),
        },
    )
    round_settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keys that a round's recipe sets beside those of this one, such as {divergence: jsd}."},
    )
    round_cache: bool = field(
        default=False,
        metadata={
            "help": "For round_method: kd and taid. Ask the teacher once for each round and train from a cache on "
            "disk."
        },
    )
    train_on: str = field(
        default="pool",
        metadata={
            "help": "The answers that a round trains on. pool (default): all so far. new: those of the last round "
            "only, as Lion does.",
            "choices": ["pool", "new"],
        },
    )
    assessor: str = field(
        default="judge",
        metadata={
            "help": "How the student's answers are judged. judge (default): a language model rates both answers "
            "from 1 to 10, in both orders. exact, rouge: by the data's own answers. likelihood: by how "
            "much likelier the teacher finds its own answer, in nats per token. agreement: by whether the "
            "student says what the teacher says. none: not at all; instructions are drawn from the whole "
            "pool.",
            "choices": list(_ASSESSORS),
        },
    )
    assessor_model: str | None = field(
        default=None, metadata={"help": "For assessor: judge. The judge: a Hub id or a folder. Default: the teacher."}
    )
    assessor_server: list[str] | None = field(
        default=None,
        metadata={"help": "For assessor: judge. URLs of chat servers (OpenAI's protocol) that run the judge."},
    )
    assessor_server_model: str | None = field(
        default=None, metadata={"help": "For assessor: judge. The judge's name on its servers."}
    )
    assessor_tries: PositiveInt = field(
        default=3,
        metadata={
            "help": "For assessor: judge. How often the judge is asked for scores before the pair is left out and "
            "counted."
        },
    )
    assess_instructions: PositiveInt | None = field(
        default=None,
        metadata={"help": "Assess at most this many instructions of the pool in each round. Default: all."},
    )
    hard_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Gap between teacher and student from which an instruction counts as hard. Default by "
            "assessor: judge 1 point (as Lion), exact 1, rouge 0.3, agreement 0.5, likelihood 0.5 nats."
        },
    )
    min_teacher_score: float | None = field(
        default=None,
        metadata={"help": "Leave out instructions that the teacher itself answers worse than this. Default: none."},
    )
    augmentor: str = field(
        default="model",
        metadata={
            "help": "How new instructions are made. model (default): a language model writes them. templates: the "
            "pool's questions are asked about its other pictures. random: any question about any picture. "
            "none: there are none, and rounds go on with the pool.",
            "choices": list(_AUGMENTORS),
        },
    )
    augmentor_model: str | None = field(
        default=None,
        metadata={"help": "For augmentor: model. Who writes: a Hub id or a folder. Default: the teacher."},
    )
    augmentor_server: list[str] | None = field(
        default=None, metadata={"help": "For augmentor: model. URLs of chat servers (OpenAI's protocol) that run it."}
    )
    augmentor_server_model: str | None = field(
        default=None, metadata={"help": "For augmentor: model. Its name on its servers."}
    )
    new_instructions: PositiveInt = field(default=512, metadata={"help": "New instructions to make in each round."})
    hard_ratio: Share = field(
        default=0.5,
        metadata={"help": "Share of the new instructions that are made from hard ones; 0.5 (default) as Lion."},
    )
    new_image: str = field(
        default="parent",
        metadata={
            "help": "The picture of a new instruction. parent (default): that of the instruction it is made from. "
            "similar: one that looks like it to the student's vision tower.",
            "choices": ["parent", "similar"],
        },
    )
    max_rouge: Share = field(
        default=0.7,
        metadata={
            "help": "ROUGE-L above which a new instruction counts as a repetition and is left out; 0.7 (default) "
            "as Lion."
        },
    )
    min_words: PositiveInt = field(
        default=4, metadata={"help": "Fewest words of a new instruction; 4 (default) as Lion."}
    )
    max_words: PositiveInt = field(default=200, metadata={"help": "Most words of a new instruction."})
    type_words: PositiveInt = field(
        default=2,
        metadata={
            "help": "First words of an instruction that name its type, in reports and for augmentor: templates."
        },
    )
    max_teacher_tokens: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Tokens that the teacher may generate in the whole run, in all its roles. When they are spent, "
            "the run trains on what it has and ends. Default: no limit."
        },
    )
    max_new_instructions: PositiveInt | None = field(
        default=None, metadata={"help": "New instructions to make in all rounds together. Default: no limit."}
    )
    answer_max_new_tokens: PositiveInt = field(
        default=512,
        metadata={
            "help": "Tokens after which an answer of teacher or student is cut off. Cut-off answers are left out "
            "of the pool."
        },
    )
    answer_temperature: NonNegativeFloat = field(
        default=0.0, metadata={"help": "Sampling temperature of answers. 0 (default) is greedy decoding."}
    )
    judge_max_new_tokens: PositiveInt = field(
        default=256, metadata={"help": "Tokens after which a judge's reply is cut off."}
    )
    augment_max_new_tokens: PositiveInt = field(
        default=256, metadata={"help": "Tokens after which a new instruction is cut off."}
    )
    judge_temperature: NonNegativeFloat = field(
        default=0.2, metadata={"help": "Sampling temperature of a judge; 0.2 (default) as Lion."}
    )
    augment_temperature: NonNegativeFloat = field(
        default=1.0, metadata={"help": "Sampling temperature of the augmentor; 1 (default) as Lion, for variety."}
    )
    generation_batch_size: PositiveInt = field(
        default=16, metadata={"help": "Prompts that a model in this process answers at a time."}
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Folder with prompts of your own: judge.txt, judge_again.txt, augment_hard.txt or "
            "augment_easy.txt."
        },
    )
    held_out_metric: str = field(
        default="exact",
        metadata={
            "help": "How answers to held-out rows are compared with the data's. exact (default): equal or not. "
            "rouge: by ROUGE-L.",
            "choices": ["exact", "rouge"],
        },
    )
    mutual: bool = field(
        default=False,
        metadata={
            "help": "Let the teacher learn too: after each assessment it is trained by LoRA on the student's "
            "answers that are better than its own. A model whose held-out score falls is rolled back. An "
            "extension of mmkd, not of the paper."
        },
    )
    mutual_steps: PositiveInt = field(
        default=50, metadata={"help": "For mutual. Updates of the teacher in each round."}
    )
    mutual_learning_rate: NonNegativeFloat = field(
        default=1e-4, metadata={"help": "For mutual. Learning rate of the teacher's LoRA."}
    )
    mutual_tolerance: NonNegativeFloat = field(
        default=0.0,
        metadata={"help": "For mutual. How far a held-out score may fall before the model is rolled back."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.round_settings, str):
            self.round_settings = json.loads(self.round_settings)
        super().__post_init__()
        if self.ce_weight != 1:
            raise UserError(
                f"ce_weight is {self.ce_weight}; a round of comd mixes by round_method: kd with round_settings: "
                "{ce_weight: ...}.",
                because="meaning",
            )
        if self.teacher_view is not None:
            raise UserError(
                "teacher_view is a prompt of the teacher's own, and comd has the teacher answer the instructions as "
                "they are. Remove it, or use method kd or taid.",
                because="not built",
            )
        if self.train_on == "new" and self.augmentor == "none":
            raise UserError(
                "train_on: new needs new instructions; choose an augmentor, or train_on: pool.", because="meaning"
            )
        if self.round_cache and self.round_method == "sft":
            raise UserError(
                "round_cache keeps the teacher's distribution, which round_method: sft does not read.",
                because="meaning",
            )
        if self.mutual and self.assessor == "none":
            raise UserError("mutual needs an assessor to know whose answer is better.", because="meaning")


class CoMDTrainer(DistillationTrainer[Targets | None]):
    """The loss of a round: cross-entropy with the teacher's answers, the one term that the paper attests.

    It trains one round on rows you give it. `mmkd-train` with method comd runs the whole loop.
    """

    method = "comd"
    config_class = CoMDConfig
    # Its teacher speaks through the data.
    needs_teacher = False
    args: CoMDConfig

    def item_losses(self, student: Supervised, signal: Targets | None) -> ItemLosses:
        """One cross-entropy per supervised token."""
        return self.fused(student, signal)
