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
        default=1.0, metadata={"help": "Always 1: mix by round_method: kd and round_settings: {ce_weight: ...}."}
    )
    rounds: NonNegativeInt = field(
        default=4,
        metadata={
            "help": "Competitive distillations after round 0, in which the student learns the teacher's answers to "
            "the data's own instructions. 4 (default) as in the paper."
        },
    )
    round_method: str = field(
        default="sft",
        metadata={
            "help": "How a round trains on the teacher's answers: sft (default; sequence-level KD, the loss that its "
            "paper attests), or kd and taid with the teacher's distribution over its own answers.",
            "choices": list(_ROUNDS),
        },
    )
    round_settings: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keys of the recipe of a round alone, such as {divergence: jsd}."}
    )
    round_cache: bool = field(
        default=False,
        metadata={"help": "round_method kd and taid: ask the teacher once per round and train from a cache on disk."},
    )
    train_on: str = field(
        default="pool",
        metadata={
            "help": "pool: all of it (default). new: what the last round brought, as Lion.",
            "choices": ["pool", "new"],
        },
    )
    assessor: str = field(
        default="judge",
        metadata={
            "help": "judge: a language model rates both answers from 1 to 10, in both orders. exact, rouge: against "
            "the data's own answers. likelihood: nats per token by which the teacher finds its answer likelier than "
            "the student does. agreement: whether the student says what the teacher says. none: nobody, and parents "
            "are drawn from the whole pool.",
            "choices": list(_ASSESSORS),
        },
    )
    assessor_model: str | None = field(
        default=None, metadata={"help": "The judge: a Hub id or a folder. Default: the teacher."}
    )
    assessor_server: list[str] | None = field(
        default=None, metadata={"help": "Base URLs of chat servers (OpenAI's protocol) with the judge."}
    )
    assessor_server_model: str | None = field(default=None, metadata={"help": "The judge's name on its servers."})
    assessor_tries: PositiveInt = field(
        default=3, metadata={"help": "How often a judge is asked for scores before the pair is dropped and counted."}
    )
    assess_instructions: PositiveInt | None = field(
        default=None, metadata={"help": "Assess at most so many instructions of the pool per round. Default: all."}
    )
    hard_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Gap between teacher and student from which an instruction is hard. Default by assessor: judge 1 "
            "point (Lion's), exact 1, rouge 0.3, agreement 0.5, likelihood 0.5 nats."
        },
    )
    min_teacher_score: float | None = field(
        default=None,
        metadata={"help": "Leave out what the teacher itself answers worse than this. Default: nothing is left out."},
    )
    augmentor: str = field(
        default="model",
        metadata={
            "help": "model: a language model writes new instructions. templates: the pool's questions about other "
            "pictures of the pool. random: any question about any picture. none: no new instructions, the rounds go "
            "on with the pool as it is.",
            "choices": list(_AUGMENTORS),
        },
    )
    augmentor_model: str | None = field(
        default=None, metadata={"help": "Who writes: a Hub id or a folder. Default: the teacher."}
    )
    augmentor_server: list[str] | None = field(
        default=None, metadata={"help": "Base URLs of chat servers (OpenAI's protocol) with who writes."}
    )
    augmentor_server_model: str | None = field(default=None, metadata={"help": "Its name on its servers."})
    new_instructions: PositiveInt = field(default=512, metadata={"help": "New instructions wanted per round."})
    hard_ratio: Share = field(
        default=0.5,
        metadata={"help": "Share of the new instructions that are made of hard ones; 0.5 (default) as Lion."},
    )
    new_image: str = field(
        default="parent",
        metadata={
            "help": "The picture of a new instruction: its parent's (default), or one that looks like it to the "
            "student's vision tower (similar).",
            "choices": ["parent", "similar"],
        },
    )
    max_rouge: Share = field(
        default=0.7, metadata={"help": "ROUGE-L above which a new instruction repeats an old one; 0.7 as Lion."}
    )
    min_words: PositiveInt = field(
        default=4, metadata={"help": "Words that a new instruction has at least; 4 as Lion."}
    )
    max_words: PositiveInt = field(default=200, metadata={"help": "Words that a new instruction has at most."})
    type_words: PositiveInt = field(
        default=2, metadata={"help": "First words of an instruction that name its type, in reports and templates."}
    )
    max_teacher_tokens: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Tokens the teacher may generate in the whole run, in all its roles. Checked before every batch; "
            "when they are spent the loop trains on what it has and ends."
        },
    )
    max_new_instructions: PositiveInt | None = field(
        default=None, metadata={"help": "New instructions of the whole run, of all rounds together."}
    )
    answer_max_new_tokens: PositiveInt = field(
        default=512, metadata={"help": "Longest answer of teacher and student; longer ones are left out of the pool."}
    )
    answer_temperature: NonNegativeFloat = field(
        default=0.0, metadata={"help": "Sampling temperature of answers; 0 (default) is greedy decoding."}
    )
    judge_max_new_tokens: PositiveInt = field(default=256, metadata={"help": "Longest reply of a judge."})
    augment_max_new_tokens: PositiveInt = field(default=256, metadata={"help": "Longest new instruction."})
    judge_temperature: NonNegativeFloat = field(
        default=0.2, metadata={"help": "Sampling temperature of a judge; 0.2 as Lion."}
    )
    augment_temperature: NonNegativeFloat = field(
        default=1.0, metadata={"help": "Sampling temperature of the augmentor; 1 as Lion, for variety."}
    )
    generation_batch_size: PositiveInt = field(
        default=16, metadata={"help": "Questions that a model in this process reads at a time."}
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Folder with your own judge.txt, judge_again.txt, augment_hard.txt or augment_easy.txt."},
    )
    held_out_metric: str = field(
        default="exact",
        metadata={
            "help": "How held-out answers are compared with the data's: exact or rouge.",
            "choices": ["exact", "rouge"],
        },
    )
    mutual: bool = field(
        default=False,
        metadata={
            "help": "Extension of ours, not in the paper: after each assessment the teacher learns, by LoRA, the "
            "student's answers where those are better. A teacher or student whose held-out score falls is rolled back."
        },
    )
    mutual_steps: PositiveInt = field(default=50, metadata={"help": "mutual: updates of the teacher per round."})
    mutual_learning_rate: NonNegativeFloat = field(
        default=1e-4, metadata={"help": "mutual: learning rate of the teacher's LoRA."}
    )
    mutual_tolerance: NonNegativeFloat = field(
        default=0.0, metadata={"help": "mutual: how far a held-out score may fall before it is rolled back."}
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
