"""Pictures as student and teacher towers see them: one square view, in the size and colours of each tower."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from mmkd.data.class_rows import augmented
from mmkd.data.picture_source import PictureSplit
from mmkd.errors import UserError

PIXELS, TEACHER_PIXELS = "pixel_values", "teacher_pixel_values"
"""Fields of a batch: the student's pixels, and those of each teacher by name."""


class PictureRows(TorchDataset[Image.Image]):
    """Pictures cut to their middle square, or a random part of it."""

    def __init__(self, split: PictureSplit, augmentation: str = "none"):
        self.split, self.augmentation = split, augmentation

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> Image.Image:
        return augmented(middle_square(self.split[number]), self.augmentation)


def middle_square(picture: Image.Image) -> Image.Image:
    """The largest square in the middle of a picture: all towers see it whole, whatever their processors cut."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture if picture.width == picture.height else picture.crop((left, top, left + side, top + side))


@dataclass(frozen=True)
class Pixels:
    """What makes a tower's pixels of square pictures."""

    processor: Any
    side: int
    """Of the images that the tower is made for."""
    role: str

    def __call__(self, pictures: list[Image.Image]) -> Float[Tensor, "image color height width"]:
        """The pictures whole, in the tower's size: no borders are cut off, which would shift patches.

        Raises UserError for a processor that makes no images of one size.
        """
        asked: dict[str, Any] = {"size": {"height": self.side, "width": self.side}, "do_resize": True}
        # Each is of some processors only; the others would warn of it.
        for name in ("do_center_crop", "do_image_splitting", "crop_to_patches", "do_pan_and_scan", "do_pad"):
            if getattr(self.processor, name, None):
                asked[name] = False
        if "Timm" in type(self.processor).__name__:
            asked = {}
        pixels = self.processor(images=pictures, return_tensors="pt", **asked)["pixel_values"]
        if pixels.ndim == 5 and pixels.shape[1] == 1:
            pixels = pixels[:, 0]
        elif pixels.ndim == 5 and pixels.shape[0] == 1:
            pixels = pixels[0]
        if pixels.ndim != 4 or len(pixels) != len(pictures):
            raise UserError(
                f"The image processor of the {self.role} makes {list(pixels.shape)} of {len(pictures)} pictures, and "
                "not one image of each. Name a vision tower with a processor for whole images.",
                because="not built",
            )
        return pixels

    def same_as(self, other: "Pixels") -> bool:
        """Whether both make the same pixels."""
        return self.side == other.side and self.processor.to_dict() == other.processor.to_dict()


class PictureCollator:
    """Batches of pictures in the pixels of the student and of its teachers; those of equal processors are shared."""

    def __init__(self, student: Pixels, teachers: Mapping[str, Pixels]):
        self.student, self.teachers = student, dict(teachers)

    def __call__(self, pictures: list[Image.Image]) -> dict[str, Any]:
        made: list[tuple[Pixels, Tensor]] = [(self.student, self.student(pictures))]
        for pixels in self.teachers.values():
            if not any(known.same_as(pixels) for known, _ in made):
                made.append((pixels, pixels(pictures)))
        shown = {
            name: next(tensor for known, tensor in made if known.same_as(pixels))
            for name, pixels in self.teachers.items()
        }
        return {PIXELS: made[0][1], TEACHER_PIXELS: shown}
