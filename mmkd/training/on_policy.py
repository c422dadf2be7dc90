"""Who answers the prompts of batches for a student: itself in this process, or servers that get its weights."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmkd.models.sharded_weights import is_sharded
from mmkd.preparation.collation import Collator
from mmkd.seams.deepspeed_seam import weights_of
from mmkd.units import readable_size

from .interleaved_rollouts import interleaved
from .rollout_probes import probes_of
from .rollout_server import ServedStudent
from .rollouts import Rollouts, check_prompts, student_generator, student_tokens

logger = logging.getLogger(__name__)


def rollouts_of(trainer: Any) -> Rollouts:
    """The rollouts of a trainer's student, generated in this process or on servers.

    Raises UserError where it cannot generate, or the data has no prompts.
    """
    args, side, accelerator = trainer.args, trainer.student_side, trainer.accelerator
    vision = side.labelling.vision
    check_prompts(args, side.train, trainer.data_collator, vision, trainer.padding_free)
    tokens = student_tokens(side.model, side.tokenizer, trainer.vocab_size, text_only=not trainer.one_vocabulary)
    ranks = args.process_index, args.world_size
    # Rows that were collated before have their images read.
    again = None if trainer.padding_free else replace(trainer.data_collator, reader=None)
    rows: dict[str, Any] = {"lay": side.views.collator if trainer.padding_free else None, "collate": again}
    if args.rollout_server is None:
        if is_sharded(accelerator) and accelerator.is_main_process:
            size = sum(weights_of(part) * part.element_size() for part in side.model.parameters())
            logger.warning(
                f"To generate, the student's {readable_size(size)} of weights are gathered on every device once per "
                "step, in the type they are computed in. Set rollout_server if there is no memory for them."
            )
        # The student's views alone: a prompt is not asked about.
        collate = None if trainer.padding_free else Collator(side.views)
        generator = student_generator(side.model, side.tokenizer, tokens, collate, accelerator, args)
        if args.rollouts == "interleaved":
            generator = interleaved(trainer, generator, tokens, collate)
        return Rollouts(generator, tokens, args, *ranks, **rows)
    # Its name keeps it out of what is pushed to the Hub.
    folder = Path(args.rollout_server_folder or Path(args.output_dir or ".") / "_rollout_weights")
    probes = probes_of(side.tokenizer, side.processing_class, side.train, vision)
    settings = (side.model, tokens, side.tokenizer, accelerator, args, folder, probes)
    served = ServedStudent(*settings, trainer.weights_to_save)
    generator = interleaved(trainer, served, tokens, None) if args.rollouts == "interleaved" else served
    return Rollouts(generator, tokens, args, *ranks, hand_over=served.hand_over, **rows)
