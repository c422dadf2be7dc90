"""Settings of a reward for the student's own answers."""

from dataclasses import dataclass, field

from trl.trainer.sft_config import SFTConfig

from mmkd.errors import UserError
from mmkd.field_docs import DocumentedFields
from mmkd.schema import NonNegativeFloat, PositiveFloat


@dataclass
class RewardConfig(DocumentedFields, SFTConfig):
    """trl's SFTConfig with the settings of a reward."""

    reward: str | None = field(
        default=None,
        metadata={
            "help": "A function of yours that rates the student's own answers, besides the teacher: "
            "package.module:function, or path/to/file.py:function. It is called as TRL's GRPO calls a reward "
            "function, with prompts, completions, completion_ids and the columns of the data, and returns a number "
            "for each answer, or None for an answer that it does not rate. Its code runs as your own."
        },
    )
    reward_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the data that the reward function reads from **kwargs. Those that its parameters name "
            "are read anyway; in Python it is told every column."
        },
    )
    reward_weight: NonNegativeFloat | None = field(
        default=None,
        metadata={
            "help": "Weight of the policy gradient of the reward beside the divergence, which keeps its own. Required "
            "with reward. Try 0.1 to 1 for rewards between 0 and 1. 0 only logs the reward."
        },
    )
    reward_clip: PositiveFloat = field(
        default=0.2,
        metadata={
            "help": "For reward with rollout_server. A token whose probability has moved by more than this share "
            "since it was sampled, in the direction that the reward asks for, is not moved further, as in PPO. 0.2 is "
            "usual. Answers of this process are those of the student as it is, where nothing is clipped."
        },
    )

    @property
    def learns_from_reward(self) -> bool:
        """Whether the loss has a term of the reward."""
        return bool(self.reward and self.reward_weight)

    def check_reward(self, share: float, temperature: float, top_p: float, interleaved: bool) -> None:
        """Raises UserError for a reward without answers of the student's (`share` of them) or without its weight.

        Its gradient is that of the distribution that answers are sampled from, which must be the student's own.
        """
        if self.reward is None:
            if self.reward_columns:
                raise UserError(
                    "reward_columns names what a reward function reads, but there is no reward. Set reward: "
                    "package.module:function, or remove reward_columns.",
                    because="meaning",
                )
            if self.reward_weight is not None:
                raise UserError(
                    f"reward_weight is {self.reward_weight}, but there is no reward. Set reward: "
                    "package.module:function, or remove reward_weight.",
                    because="meaning",
                )
            return
        if self.reward_weight is None:
            raise UserError(
                "reward has no reward_weight. Set it: 0.1 to 1 for rewards between 0 and 1, or 0 to log the reward "
                "without learning from it."
            )
        if not share:
            raise UserError(
                "A reward rates the student's own answers, and with on_policy_fraction: 0 there are none. Set "
                "on_policy_fraction, or remove reward.",
                because="meaning",
            )
        if self.reward_weight and (temperature, top_p) != (1, 1):
            raise UserError(
                "The policy gradient of a reward is that of the student's own distribution, and with "
                f"rollout_temperature {temperature} and rollout_top_p {top_p} its answers come from another one. Set "
                "both to 1, or reward_weight: 0 to log the reward only.",
                because="meaning",
            )
        if self.reward_weight and interleaved:
            raise UserError(
                "The policy gradient of a reward is that of the student's own distribution, and with rollouts: "
                "interleaved the teacher chooses among its tokens. Set rollouts: student, or reward_weight: 0 to log "
                "the reward only.",
                because="meaning",
            )
