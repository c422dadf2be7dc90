"""Colours of a picture as a person sees them: its profile, its gamma, 16 bits, what lies under transparency."""

import io
import logging
from functools import cache, lru_cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from mmkd.errors import UserError

logger = logging.getLogger(__name__)

# Two profiles of sRGB differ by a few levels in places; such pictures are left as they are, which is exact.
_SAME_LEVELS = 4
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}
# 1 / 2.2, what a PNG is taken to have that does not say; libpng's threshold for a difference that counts.
_GAMMA, _SAME_GAMMA = 0.45455, 0.05


def has_alpha(image: Image.Image) -> bool:
    """Whether some of the picture may be transparent."""
    return "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None


def in_rgba(image: Image.Image) -> Image.Image:
    """The picture in RGBA."""
    # PIL knows no way from grey with premultiplied alpha to colours.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, laid on white where it is transparent, as transformers does it."""
    image = in_rgba(image)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def in_eight_bits(image: Image.Image) -> Image.Image:
    """The picture with at most 8 bits per channel: of 16 bits of grey 65,535 is white, whatever the picture's range.

    Raises UserError where nothing says which value is white.
    """
    if image.mode == "F":
        low, high = image.getextrema()
        raise UserError(
            f"its pixels are floating-point numbers, from {low:.4g} to {high:.4g}, and nothing says which value is "
            "white. Scale it to 0 to 255 and save it with 8 bits, or to 0 to 65,535 with 16"
        )
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.int64)
    if image.mode == "I":
        _check_range(image, int(values.min()), int(values.max()))
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    grey.info = {key: one for key, one in image.info.items() if key != "transparency"}
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = Image.merge("LA", [grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))])
        grey.info = {key: one for key, one in image.info.items() if key != "transparency"}
    return grey


def _check_range(image: Image.Image, low: int, high: int) -> None:
    """Pictures of 32-bit integers hold 16 bits in most files, but nothing says so."""
    # Formats whose files say that they have up to 16 bits; PIL scales those of fewer.
    if image.format in ("PNG", "PPM", "JPEG2000"):
        return
    if low < 0 or high > 65_535 or 0 < high <= 255:
        raise UserError(
            f"its pixels are 32-bit integers, from {low} to {high}, and nothing says which value is white. Scale it "
            "to 0 to 255 and save it with 8 bits (PIL mode L), or to 0 to 65,535 with 16 (I;16)"
        )


def in_srgb(image: Image.Image) -> Image.Image:
    """The picture with its colours in sRGB: the same picture where they are already, or where it does not say."""
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _from_lab())  # pyright: ignore[reportReturnType]
    profile = image.info.get("icc_profile")
    if profile:
        return _by_profile(image, bytes(profile))
    gamma = image.info.get("gamma")
    # A file that names both means sRGB and gives the gamma to readers that know no better.
    if gamma and "srgb" not in image.info and abs(gamma / _GAMMA - 1) > _SAME_GAMMA:
        return _by_gamma(image, gamma)
    return image


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    colour, alpha = _without_alpha(image)
    transform = _transform(profile, colour.mode)
    if transform is None:
        return image
    return _with_alpha(ImageCms.applyTransform(colour, transform), alpha)


def _by_gamma(image: Image.Image, gamma: float) -> Image.Image:
    colour, alpha = _without_alpha(image)
    if colour.mode not in ("RGB", "L"):
        return image
    levels = [round(255 * (value / 255) ** (_GAMMA / gamma)) for value in range(256)]
    return _with_alpha(colour.point(levels * len(colour.getbands())), alpha)


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours in the mode that their profile speaks of, and the alpha channel if there is one."""
    if has_alpha(image):
        *bands, alpha = (image.convert("LA") if image.mode in ("LA", "La") else image.convert("RGBA")).split()
        return (Image.merge("RGB", bands) if len(bands) == 3 else bands[0]), alpha
    if image.mode == "1":
        return image.convert("L"), None
    return (image if image.mode in _SPACES else image.convert("RGB")), None


def _with_alpha(colour: Image.Image | None, alpha: Image.Image | None) -> Image.Image:
    assert colour is not None
    if alpha is None:
        return colour
    return Image.merge("RGBA", [*colour.convert("RGB").split(), alpha])


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where that would change nothing, or where the profile is not about such pixels."""
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # A profile of colours in a grey picture (or the other way round) is what other tools left behind: browsers
        # do not apply it either.
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError) as error:
        _say_no_profile(str(error))
        return None
    return None if _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    if mode not in ("RGB", "L"):
        return False
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    pixels = np.array(list(product(levels, repeat=3)), dtype=np.uint8)[None]
    colours = Image.fromarray(pixels if mode == "RGB" else levels[None])
    changed = ImageCms.applyTransform(colours, transform)
    assert changed is not None
    return bool(np.abs(np.asarray(changed).astype(int) - np.asarray(colours.convert("RGB"))).max() <= _SAME_LEVELS)


@cache
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


@cache
def _say_no_profile(reason: str) -> None:
    logger.warning("A picture's colour profile cannot be read (%s): its colours are taken as sRGB.", reason)
