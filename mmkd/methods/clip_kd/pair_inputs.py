"""What ContrastiveKDTrainer is given: rows of pairs, and encoders that can read them."""

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from mmkd.data.caption_source import captioned_split
from mmkd.data.picture_source import picture_column
from mmkd.data.text_pairs import pair_columns, text_pair_split
from mmkd.errors import UserError
from mmkd.models.dual_encoder import DualEncoder
from mmkd.preparation.pair_batches import PairRows
from mmkd.teachers.cached_encoder import CachedEncoder, CachedPairs
from mmkd.units import with_noun

from .clip_config import ContrastiveKDConfig

logger = logging.getLogger(__name__)


def cached_pairs(teachers: Mapping[str, DualEncoder], args: ContrastiveKDConfig) -> CachedPairs | None:
    """The cache whose views all models are shown; None without one. Raises UserError for another augmentation."""
    for teacher in teachers.values():
        if isinstance(teacher, CachedEncoder):
            signal = teacher.pairs.signal
            if teacher.has_images and signal["augmentation"] != args.augmentation:
                raise UserError(
                    f"The cache {teacher.name} has views of augmentation: {signal['augmentation']}, and the recipe "
                    f"says {args.augmentation}. Set augmentation to {signal['augmentation']}, or build another cache.",
                    because="meaning",
                )
            return teacher.pairs
    return None


def pair_rows(
    dataset: Dataset | PairRows | None, args: ContrastiveKDConfig, split: str, cached: CachedPairs | None = None
) -> PairRows:
    """The pairs of rows. Raises UserError where they have none."""
    augmentation = args.augmentation if split == "train" else "none"
    seed = args.seed if args.data_seed is None else args.data_seed
    if isinstance(dataset, PairRows):
        return PairRows(dataset.split, seed, augmentation, cached)
    if dataset is None:
        raise UserError("ContrastiveKDTrainer needs train_dataset: rows with a picture and captions, or two texts.")
    if picture_column(dataset) is None and pair_columns(dataset.column_names) is not None:
        pairs: Any = text_pair_split(dataset, f"{split}_dataset", split)
    else:
        pairs = captioned_split(dataset, f"{split}_dataset", split)
    for note in pairs.notes:
        logger.warning("%s", note)
    return PairRows(pairs, seed, augmentation, cached)


def check_encoders(
    student: DualEncoder, teachers: Mapping[str, DualEncoder], rows: PairRows, args: ContrastiveKDConfig
) -> None:
    """Raises UserError for encoders that cannot read the pairs, and for pairs that teach nothing."""
    check_kinds(student.name, "student", student.has_images, rows)
    for name, teacher in teachers.items():
        check_kinds(teacher.name, f"teacher {name}".strip(), teacher.has_images, rows)
    if args.freeze != "none" and not (rows.has_images and student.has_images):
        raise UserError(
            f"freeze: {args.freeze} is of encoders with a tower for images and one for texts, and these are pairs of "
            "texts. Remove it.",
            because="meaning",
        )
    check_pairs(rows, args)


def check_kinds(name: str, role: str, has_images: bool, rows: PairRows) -> None:
    """Raises UserError for an encoder of sentences, which is to read pictures."""
    if rows.has_images and not has_images:
        raise UserError(
            f"The {role} {name} is an encoder of sentences and the data has pictures. Take a dual encoder such as "
            "CLIP or SigLIP, or data with two texts per row.",
            because="meaning",
        )


def check_pairs(rows: PairRows, args: ContrastiveKDConfig) -> None:
    """Raises UserError for batches of one pair, for too few pairs, and where all have one caption."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if batch < 2:
        raise UserError(
            "A batch of one pair has nothing to compare it with. Set per_device_train_batch_size or "
            "gradient_accumulation_steps so that a step has two pairs or more; hundreds are usual.",
            because="meaning",
        )
    if len(rows) < batch:
        raise UserError(
            f"There are {with_noun(len(rows), 'pair')} to learn, and a step takes {batch:,} "
            "(per_device_train_batch_size x gradient_accumulation_steps x processes). Take smaller batches."
        )
    texts = {caption for captions in rows.split.captions for caption in captions}
    if len(texts) == 1:
        raise UserError(
            f"All pairs have one caption, {next(iter(texts))!r}, so that no text tells them apart. Give each picture "
            "its own caption.",
            because="meaning",
        )
    fewest, most = rows.caption_counts
    if most > 1:
        each = f"{most}" if fewest == most else f"{fewest} to {most}"
        logger.info("%s captions per picture: each epoch draws one of them by the seed.", each)
