"""Views of a picture: a part of it, perhaps mirrored, as numbers by which it is shown in the same way again."""

from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class PictureView:
    """A part of a picture, in shares of its width and height, resized to the whole, and mirrored or not."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    mirrored: bool = False

    @classmethod
    def drawn(cls, augmentation: str, random: np.random.Generator) -> "PictureView":
        """A view as `augmented` makes one: mirrored half of the time, of half the area or more for crop_flip."""
        if augmentation == "none":
            return cls()
        # In fp32, as caches keep them, so that a view is the same before and after.
        share, across, down, side = (float(np.float32(number)) for number in random.random(4))
        if augmentation == "flip":
            return cls(mirrored=side < 0.5)
        length = (0.5 + share / 2) ** 0.5
        left, top = across * (1 - length), down * (1 - length)
        corners = (float(np.float32(number)) for number in (left, top, left + length, top + length))
        return cls(*corners, mirrored=side < 0.5)

    @classmethod
    def of(cls, numbers: np.ndarray) -> "PictureView":
        """The view that `numbers` wrote."""
        *corners, mirrored = numbers.tolist()
        return cls(*corners, mirrored=bool(mirrored))

    @property
    def numbers(self) -> np.ndarray:
        """Five numbers in fp32."""
        return np.array(astuple(self), dtype=np.float32)

    def show(self, image: Image.Image) -> Image.Image:
        """The view of a picture."""
        if (self.left, self.top, self.right, self.bottom) != (0, 0, 1, 1):
            left, top = round(self.left * image.width), round(self.top * image.height)
            right = max(left + 1, round(self.right * image.width))
            bottom = max(top + 1, round(self.bottom * image.height))
            image = image.crop((left, top, right, bottom)).resize(image.size)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image
