"""The terms of a tower's loss: student and teacher on one grid of patches, and their summaries."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from mmkd.losses.feature_losses import cosine, mse, relation
from mmkd.losses.grid_frequencies import frequency_loss
from mmkd.models.tower_heads import TeacherHead
from mmkd.models.vision_towers import TowerView

from .tower_config import TowerKDConfig

Grid = Float[Tensor, "image height width channel"]


def on_grid(patches: Grid, height: int, width: int) -> Grid:
    """A map of patches with as many patches as another, bilinear; a coarser one is the mean of what it covers."""
    if patches.shape[1:3] == (height, width):
        return patches
    channels_first = patches.float().permute(0, 3, 1, 2)
    size = (height, width)
    return interpolate(channels_first, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def view_terms(
    student: TowerView, teacher: TowerView, head: TeacherHead, args: TowerKDConfig
) -> dict[str, Float[Tensor, "image"]]:
    """Term -> its value for each image, without weight; those of weight 0 are left out.

    `teacher` is on its scale. Both sides are compared on the teacher's grid.
    """
    wanted = {term for term, weight in args.term_weights.items() if weight}
    height, width = teacher.patches.shape[1:3]
    adapted = head(student)
    ours, theirs = on_grid(adapted.patches, height, width), teacher.patches
    terms: dict[str, Tensor] = {}
    for name, loss in (("cosine", cosine), ("mse", mse)):
        if f"patch_{name}" in wanted:
            terms[f"patch_{name}"] = _of_images(loss(ours.flatten(0, 2), theirs.flatten(0, 2)), len(ours))
        if f"summary_{name}" in wanted:
            terms[f"summary_{name}"] = loss(adapted.summary, teacher.summary)
    if "frequency" in wanted:
        terms["frequency"] = frequency_loss(ours, theirs, args.frequency_band, args.frequency_share).mean(-1)
    if "patch_relation" in wanted:
        own = on_grid(student.patches, height, width)
        sizes = [height * width] * len(own)
        terms["patch_relation"] = relation(own.flatten(0, 2), theirs.flatten(0, 2), sizes)
    return terms


@torch.no_grad()
def view_cosines(student: TowerView, teacher: TowerView, head: TeacherHead) -> dict[str, Float[Tensor, "image"]]:
    """How near the student is to a teacher on its scale, from -1 to 1, for each image."""
    adapted = head(student)
    ours = on_grid(adapted.patches, *teacher.patches.shape[1:3])
    patches = _of_images(1 - cosine(ours.flatten(0, 2), teacher.patches.flatten(0, 2)), len(ours))
    return {"patch_cosine": patches, "summary_cosine": 1 - cosine(adapted.summary, teacher.summary)}


def _of_images(items: Float[Tensor, "item"], images: int) -> Float[Tensor, "image"]:
    return items.unflatten(0, (images, -1)).mean(1)
