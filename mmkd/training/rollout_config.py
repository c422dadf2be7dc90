"""Settings of on-policy distillation: how much of a batch the student answers itself, and how."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from trl.trainer.sft_config import SFTConfig

from mmkd.errors import UserError
from mmkd.field_docs import DocumentedFields
from mmkd.schema import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Share, check_fields


@dataclass
class RolloutConfig(DocumentedFields, SFTConfig):
    """trl's SFTConfig with the settings of on-policy distillation."""

    learns_from_rollouts: ClassVar[bool] = False
    """Whether the method can learn from what the student says itself."""

    on_policy_fraction: Share = field(
        default=0.0,
        metadata={
            "help": "Share of each batch's prompts that the student answers itself before the teacher judges the "
            "answer (kd, taid and alm): 0 (default) learns from the data's answers alone, 1 from the student's. Try "
            "0.5; generating takes longer than training."
        },
    )
    rollout_max_tokens: PositiveInt = field(
        default=128,
        metadata={
            "help": "The student's tokens after which a rollout is cut. Short ones (default 128) cost less and teach "
            "nearly as much: a student goes wrong early. max_length cuts too."
        },
    )
    rollout_temperature: NonNegativeFloat = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature of rollouts: 1 (default) is the student's own distribution, 0 greedy."
        },
    )
    rollout_top_p: Annotated[float, Range(above=0, max=1)] = field(
        default=1.0, metadata={"help": "Nucleus of rollouts: 1 (default) samples from the whole distribution."}
    )
    rollout_batch_size: PositiveInt = field(
        default=16,
        metadata={"help": "Prompts that one rank answers at a time. They need no gradients: larger is faster."},
    )
    rollout_prompt_tokens: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Take the first so many tokens of a row without a prompt (plain text) as its prompt. Such "
            "rollouts are not expected to end. Default: only rows with a prompt are answered."
        },
    )
    rollout_truncated: str = field(
        default="keep",
        metadata={
            "help": "What happens to rollouts that did not end: keep (default; a divergence at a token depends on "
            "nothing after it, so that a cut answer is as right as a whole one), or drop, which learns nothing from "
            "them.",
            "choices": ["keep", "drop"],
        },
    )
    rollout_patience: NonNegativeInt = field(
        default=20,
        metadata={
            "help": "End the run with an error when, in so many steps on end, at least 95 of 100 rollouts are empty "
            "or never end. 0 goes on whatever they are."
        },
    )
    rollout_server: list[str] | None = field(
        default=None,
        metadata={
            "help": "Base URLs of vLLM servers that carry the student and answer in its place, each started with "
            "VLLM_SERVER_DEV_MODE=1; they get the student's weights before each batch. Default: transformers' "
            "generate in this process."
        },
    )
    rollout_server_folder: str | None = field(
        default=None,
        metadata={
            "help": "Where the weights are handed to rollout_server, which must see the same path; fast storage such "
            "as /dev/shm pays. Default: _rollout_weights in output_dir."
        },
    )

    def __post_init__(self) -> None:
        check_fields(self, besides=SFTConfig)
        super().__post_init__()
        if self.on_policy_fraction:
            self._check_method()
            self._check_sampling()
            self._check_lengths()

    def _check_method(self) -> None:
        if not self.learns_from_rollouts:
            raise UserError(
                f"on_policy_fraction is {self.on_policy_fraction}, but {type(self).__name__} learns from the data's "
                "answers only. Set it to 0, or use method kd, taid or alm.",
                because="not built",
            )
        if self.packing or self.padding_free:
            raise UserError(
                "packing and padding_free lay rows end to end before the student has answered them. Set both to "
                "false, or on_policy_fraction: 0.",
                because="not built",
            )

    def _check_sampling(self) -> None:
        if self.rollout_truncated == "drop" and self.rollout_prompt_tokens is not None:
            raise UserError(
                "rollout_prompt_tokens continues plain text, which does not end, and rollout_truncated: drop would "
                "learn nothing from it. Set rollout_truncated: keep.",
                because="meaning",
            )

    def _check_lengths(self) -> None:
        prompt = self.rollout_prompt_tokens
        if self.max_length is not None and (prompt or 1) + self.rollout_max_tokens > self.max_length:
            raise UserError(
                f"max_length {self.max_length} has no room for a prompt of {prompt or 1} tokens and the "
                f"{self.rollout_max_tokens} of rollout_max_tokens. Raise the one or lower the other.",
                because="meaning",
            )
