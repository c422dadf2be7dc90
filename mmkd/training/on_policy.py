"""The part of the distillation step in which the student answers prompts of its batch itself."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from mmkd.errors import UserError
from mmkd.generation.generator import Generator
from mmkd.generation.local_generation import AnswerTokens
from mmkd.models.load import tokenizer_of
from mmkd.preparation.labelling import Labelling
from mmkd.teachers.batch import Batch

from .answers import Placed
from .config import DistillationConfig
from .reports import ReportingTrainer
from .rollout_server import ServedStudent
from .rollouts import RolloutPrompt, Rollouts, check_prompts, student_generator, student_tokens


class OnPolicyTrainer(ReportingTrainer):
    """trl's SFTTrainer whose accumulated batches hold answers of the student, where `on_policy_fraction` asks so."""

    one_vocabulary: ClassVar[bool] = True
    """Whether a token must be the same to student and teacher."""

    args: DistillationConfig
    # transformers types these as unions with None, for trainers that are still without them.
    train_dataset: Any
    processing_class: Any
    labelling: Labelling
    data_collator: Any
    vocab_size: int
    rollouts: Rollouts | None = None

    def _start_rollouts(self, collate_alone: Any) -> None:
        """Called when everything else is built; `collate_alone` makes the student's side of a batch."""
        args = self.args
        check_prompts(args, self.train_dataset, self.data_collator, self.labelling.vision)
        tokenizer = tokenizer_of(self.processing_class)
        tokens = student_tokens(self.model, tokenizer, self.vocab_size, text_only=not self.one_vocabulary)
        generator = self._generator(tokens, tokenizer, collate_alone)
        self.rollouts = Rollouts(generator, tokens, args, args.process_index, args.world_size)

    def _generator(self, tokens: AnswerTokens, tokenizer: Any, collate_alone: Any) -> Generator[RolloutPrompt]:
        args = self.args
        if is_deepspeed_zero3_enabled() or (self.is_fsdp_enabled and args.rollout_server is None):
            raise UserError(
                "on_policy_fraction generates with a student whose weights are sharded (FSDP2, ZeRO-3), which would "
                "gather all of them for every token. Set rollout_server under fsdp2, which gathers them once per "
                "step; or use DDP or ZeRO-2, or on_policy_fraction: 0."
            )
        if args.rollout_server is not None:
            if self.labelling.vision or isinstance(self.model, PeftModel):
                raise UserError(
                    "A rollout_server takes whole students that read text; this one has images or an adapter. Remove "
                    "rollout_server to generate in this process."
                )
            # Its name keeps it out of what is pushed to the Hub.
            folder = Path(args.rollout_server_folder or Path(args.output_dir or ".") / "_rollout_weights")
            return ServedStudent(self.model, tokens, tokenizer, self.accelerator, args, folder)
        return student_generator(self.model, tokenizer, tokens, collate_alone, self.accelerator, args)

    def with_rollouts(self, batch: Batch, placed: Mapping[int, Placed]) -> Batch:
        """A micro-batch whose rollouts (row -> rollout) are in place, as the method's teacher reads it."""
        return batch

    def _answered(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of an optimizer step, the student's answers among them; told in the logs."""
        assert self.rollouts is not None
        batches, mixed = self.rollouts.mix(batches, self.state.global_step)
        batches = [
            replace(self.with_rollouts(batch, mixed.of(number)), rows=()) for number, batch in enumerate(batches)
        ]
        facts, device = mixed.facts, self.accelerator.device
        # Where the other reports are: they are reduced together, by NCCL perhaps, which knows no others.
        counts = torch.tensor(list(facts.values()), device=device)
        told = dict(zip(facts, counts, strict=True))
        self._record(
            {
                **{f"rollouts_{kind}": (told[kind], facts["rollouts"]) for kind in ("ended", "truncated", "empty")},
                "rollout_length": (told["tokens"], facts["rollouts"]),
                "rollout_tokens": (told["tokens"], 1),
                "rollout_seconds": (torch.tensor(mixed.seconds, device=device), 1),
            },
            "train",
        )
        totals = self._summed(counts).tolist()
        self.rollouts.judge(dict(zip(facts, totals, strict=True)))
        return batches

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the tokens of rollouts since the start, the seconds they took since the last log, and their speed."""
        sums = self._sums["train"]
        if not self._evaluating and "rollout_tokens" in sums:
            # The tokens are counted where the supervised ones are.
            tokens, seconds = (self._summed(sums[name][0]).item() for name in ("rollout_tokens", "rollout_seconds"))
            del sums["rollout_seconds"]
            logs["rollout_seconds"] = seconds / self.args.world_size
            logs["rollout_tokens_per_second"] = tokens / max(logs["rollout_seconds"], 1e-9)
        super().log(logs, start_time)
