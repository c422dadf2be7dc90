"""Settings of on-policy distillation: how much of a batch the student answers itself, and how."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

from trl.trainer.sft_config import SFTConfig

from mmkd.errors import UserError
from mmkd.schema import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Share, check_fields
from mmkd.seams.trainer_seam import with_json_keys

from .guard_settings import RolloutGuards
from .reward_config import RewardConfig


@dataclass
class RolloutConfig(RewardConfig):
    """trl's SFTConfig with the settings of on-policy distillation."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = with_json_keys(SFTConfig, "rollout_guards")

    learns_from_rollouts: ClassVar[bool] = False
    """Whether the method can learn from what the student says itself."""

    on_policy_fraction: Share = field(
        default=0.0,
        metadata={
            "help": "Share of each batch's prompts that the student answers itself; the teacher then judges these "
            "answers (on-policy distillation). 0 (default) learns from the data's answers, 1 from the "
            "student's only. Try 0.5. Generating takes longer than training."
        },
    )
    rollouts: str = field(
        default="student",
        metadata={
            "help": "Who writes the student's answers. student (default): it alone. interleaved: the student proposes "
            "each token, and a token that is not among the teacher's interleaved_top_k most likely ones is replaced "
            "by one sampled from these (speculative knowledge distillation, 2410.11325). Try it where the student "
            "still goes wrong early.",
            "choices": ["student", "interleaved"],
        },
    )
    interleaved_top_k: PositiveInt = field(
        default=25,
        metadata={
            "help": "For rollouts: interleaved. The student's token stays if it is among so many of the teacher's "
            "most likely ones. 25 by default, as in the paper. With a large number the student writes nearly alone."
        },
    )
    rollout_max_tokens: PositiveInt = field(
        default=128,
        metadata={
            "help": "Tokens after which an answer of the student is cut off. Short answers (default 128) cost less "
            "and teach nearly as much, since a student goes wrong early. max_length limits them too."
        },
    )
    rollout_temperature: NonNegativeFloat = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature of the student's answers. 1 (default) samples from its own distribution; "
            "0 is greedy decoding."
        },
    )
    rollout_top_p: Annotated[float, Range(above=0, max=1)] = field(
        default=1.0,
        metadata={
            "help": "Sample the student's answers from the most likely tokens that have this total probability. 1 "
            "(default) samples from all."
        },
    )
    rollout_batch_size: PositiveInt = field(
        default=16,
        metadata={
            "help": "Prompts that each process answers at a time. Generating needs no gradients, so a larger "
            "number fits and is faster."
        },
    )
    rollout_prompt_tokens: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "For plain text. Use the first so many tokens of a row as the prompt that the student "
            "continues. Default: only rows with a prompt are answered."
        },
    )
    rollout_truncated: str = field(
        default="keep",
        metadata={
            "help": "What to do with answers of the student that were cut off. keep (default): learn from them, "
            "since the divergence at a token does not depend on later ones. drop: ignore them.",
            "choices": ["keep", "drop"],
        },
    )
    rollout_rows: str = field(
        default="replace",
        metadata={
            "help": "Where the student's answers go. replace (default): each takes the place of the data's answer to "
            "the prompt. add: the data's answer is learnt from in the same step, too. A batch then has up to twice "
            "as many rows.",
            "choices": ["replace", "add"],
        },
    )
    rollout_patience: NonNegativeInt = field(
        default=20,
        metadata={
            "help": "Stop the run with an error if at least 95 percent of the student's answers are empty or never "
            "end for this many steps in a row. 0 never stops it."
        },
    )
    rollout_guards: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "When to warn about the student's own answers, and when to stop the run: for each guard, warn and "
            "stop. The guards are ended (share of answers that end; warns at 0.2), repeated (share that repeat "
            "themselves; 0.2), other_script (share in a script that neither prompt nor data has; 0.1), length (times "
            "longer or shorter than at first, or with against: data than the data's answers; 3) and entropy (share "
            "of what it was at first; 0.2). steps: how many steps are averaged (20). null turns a guard off. By "
            "default no guard stops the run."
        },
    )
    rollout_server: list[str] | None = field(
        default=None,
        metadata={
            "help": "URLs of vLLM servers that generate the student's answers, started with "
            "VLLM_SERVER_DEV_MODE=1. They get the student's weights before each batch, or its adapter alone; the "
            "on-policy page says how to start them for an adapter. Default: generate in this process with "
            "transformers."
        },
    )
    rollout_server_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder through which the weights reach rollout_server; the server must see it under the same "
            "path. Fast storage such as /dev/shm pays off. Default: _rollout_weights in output_dir."
        },
    )
    rollout_ahead: Annotated[int, Range(min=0, max=1)] = field(
        default=0,
        metadata={
            "help": "1: rollout_server answers the prompts of the next batch while this one trains, so that neither "
            "waits for the other. The answers are then those of the student one step before; the logs say so as "
            "rollout_staleness. 0 (default): a batch is answered before it is learnt from."
        },
    )
    rollout_token_weights: str = field(
        default="uniform",
        metadata={
            "help": "How much each token of the student's answers counts. uniform (default): all alike. importance: "
            "tokens count less the further the answer has strayed from the teacher before them (IW-OPD). prefix: only "
            "the first rollout_prefix of each answer is learnt from, which is cheaper and may teach as much.",
            "choices": ["uniform", "importance", "prefix"],
        },
    )
    importance_gamma: NonNegativeFloat = field(
        default=0.5,
        metadata={
            "help": "For rollout_token_weights: importance. The first token of an answer counts 1 + importance_gamma "
            "times, the last about once; 0.5 as in the paper."
        },
    )
    rollout_prefix: Annotated[float, Range(above=0, max=1)] = field(
        default=0.3,
        metadata={
            "help": "For rollout_token_weights: prefix. Share of each answer of the student that is learnt from, at "
            "least one token. 0.3 did as well as all of the answer in the paper on IW-OPD."
        },
    )

    weighs_tokens: ClassVar[bool] = True
    """Whether the items of the method's loss are tokens, which may have weights of their own."""

    def __post_init__(self) -> None:
        check_fields(self, besides=SFTConfig)
        super().__post_init__()
        guards = self.guards
        if self.on_policy_fraction:
            self._check_guards(guards)
            self._check_method()
            self._check_sampling()
            self._check_lengths()
        else:
            self._check_unused()
        self._check_weights()
        sampling = (self.rollout_temperature, self.rollout_top_p, self.rollouts == "interleaved")
        self.check_reward(self.on_policy_fraction, *sampling)

    def _check_unused(self) -> None:
        """Raises UserError for a choice about the student's own answers where there are none."""
        chosen = {"rollouts": self.rollouts != "student", "rollout_rows": self.rollout_rows != "replace"}
        chosen["rollout_guards"] = self.rollout_guards is not None
        name = next((name for name, own in chosen.items() if own), None)
        if name is not None:
            raise UserError(
                f"{name} is {getattr(self, name)}, which is about the student's own answers, and with "
                f"on_policy_fraction: 0 there are none. Set on_policy_fraction, or remove {name}.",
                because="meaning",
            )

    def _check_weights(self) -> None:
        weights = self.rollout_token_weights
        if weights != "uniform" and not self.on_policy_fraction:
            raise UserError(
                f"rollout_token_weights: {weights} weighs the tokens of the student's own answers, and with "
                "on_policy_fraction: 0 there are none. Set on_policy_fraction, or remove rollout_token_weights.",
                because="meaning",
            )
        if weights != "uniform" and not self.weighs_tokens:
            raise UserError(
                f"rollout_token_weights: {weights} weighs tokens, and the loss of {type(self).__name__} is about "
                "chunks of text. Set rollout_token_weights: uniform, or use kd or taid.",
                because="not built",
            )

    @property
    def answers_everything(self) -> bool:
        """Whether nothing is learnt from the data's answers."""
        return self.on_policy_fraction == 1 and self.rollout_rows == "replace"

    @property
    def guards(self) -> RolloutGuards:
        """The guards of the student's answers, with the defaults of those that are not named."""
        return RolloutGuards.of(self.rollout_guards, ends=self.rollout_prompt_tokens is None)

    def _check_guards(self, guards: RolloutGuards) -> None:
        if self.rollout_guards is not None and 0 < self.max_steps < guards.steps:
            raise UserError(
                f"rollout_guards average over {guards.steps} steps, and the run has max_steps {self.max_steps}: they "
                "would never speak. Lower steps in rollout_guards, or remove rollout_guards.",
                because="meaning",
            )

    def _check_method(self) -> None:
        if not self.learns_from_rollouts:
            raise UserError(
                f"on_policy_fraction is {self.on_policy_fraction}, but {type(self).__name__} learns from the data's "
                "answers only. Set it to 0, or use method kd, taid, alm or llava_kd.",
                because="meaning",
            )
        if self.packing and self.packing_strategy == "wrapped":
            raise UserError(
                "packing_strategy: wrapped cuts rows wherever a pack is full, so that a prompt may stand in one pack "
                "and its answer in the next. Set packing_strategy: bfd, or on_policy_fraction: 0.",
                because="meaning",
            )
        if self.rollout_ahead and self.rollout_server is None:
            raise UserError(
                "rollout_ahead has a server answer the next batch while this one trains, and without rollout_server "
                "this process answers itself. Set rollout_server, or rollout_ahead: 0.",
                because="meaning",
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


ROLLOUT_KEYS = tuple(sorted({own.name for own in fields(RolloutConfig)} - {own.name for own in fields(SFTConfig)}))
"""The keys about the student's own answers, which a method that learns from the data's has no use for."""
