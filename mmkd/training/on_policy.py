"""Who generates the answers of a student that answers prompts of its batches itself."""

from pathlib import Path
from typing import Any

from peft import PeftModel

from mmkd.errors import UserError
from mmkd.generation.generator import Generator
from mmkd.generation.local_generation import AnswerTokens
from mmkd.preparation.collation import Collator
from mmkd.seams.deepspeed_seam import is_zero3

from .rollout_server import ServedStudent
from .rollouts import RolloutPrompt, check_prompts, student_generator, student_tokens


def generator_of(trainer: Any) -> tuple[Generator[RolloutPrompt], AnswerTokens]:
    """What generates for the student of a trainer, in this process or on a server, and where its answers end.

    Raises UserError where it cannot generate, or the data has no prompts.
    """
    args, side = trainer.args, trainer.student_side
    vision = side.labelling.vision
    check_prompts(args, side.train, trainer.data_collator, vision)
    tokens = student_tokens(side.model, side.tokenizer, trainer.vocab_size, text_only=not trainer.one_vocabulary)
    if is_zero3() or (trainer.is_fsdp_enabled and args.rollout_server is None):
        raise UserError(
            "on_policy_fraction generates with a student whose weights are sharded (FSDP2, ZeRO-3), which would "
            "gather all of them for every token. Set rollout_server under fsdp2, which gathers them once per "
            "step; or use DDP or ZeRO-2, or on_policy_fraction: 0.",
            because="not built",
        )
    if args.rollout_server is None:
        # The student's views alone: a prompt is not asked about.
        collate = Collator(side.views)
        return student_generator(side.model, side.tokenizer, tokens, collate, trainer.accelerator, args), tokens
    if vision or isinstance(side.model, PeftModel):
        raise UserError(
            "A rollout_server takes whole students that read text; this one has images or an adapter. Remove "
            "rollout_server to generate in this process.",
            because="not built",
        )
    # Its name keeps it out of what is pushed to the Hub.
    folder = Path(args.rollout_server_folder or Path(args.output_dir or ".") / "_rollout_weights")
    return ServedStudent(side.model, tokens, side.tokenizer, trainer.accelerator, args, folder), tokens
