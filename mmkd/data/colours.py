"""Conversion of a picture to 8-bit sRGB: colour profile, PNG gamma, 16-bit channels, transparency."""

import io
import logging
from functools import cache, lru_cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from mmkd.errors import UserError

logger = logging.getLogger(__name__)

# Variants of the sRGB profile differ by a few levels in places. Pictures with such a profile are not converted.
_SAME_LEVELS = 4
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}
# The default gamma of a PNG, 1 / 2.2, and libpng's threshold for a significant difference from it.
_GAMMA, _SAME_GAMMA = 0.45455, 0.05


def has_alpha(image: Image.Image) -> bool:
    """Whether the picture has an alpha channel or a transparent colour."""
    return "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None


def in_rgba(image: Image.Image) -> Image.Image:
    """The picture in RGBA."""
    # PIL has no direct conversion from grey with premultiplied alpha to RGBA.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB on a white background, as transformers does it."""
    image = in_rgba(image)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def in_eight_bits(image: Image.Image) -> Image.Image:
    """The picture with at most 8 bits per channel; in 16-bit grey, 65,535 is white, whatever the picture's range.

    Raises UserError if it is unknown which value is white.
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
    # 257 = 65,535 / 255; 128 rounds to the nearest level.
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    grey.info = {key: entry for key, entry in image.info.items() if key != "transparency"}
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = Image.merge("LA", [grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))])
        grey.info = {key: entry for key, entry in image.info.items() if key != "transparency"}
    return grey


def _check_range(image: Image.Image, low: int, high: int) -> None:
    """Raises UserError for 32-bit integers whose white is unknown; most such files hold 16 bits, without saying so."""
    # These formats declare their depth, at most 16 bits, and PIL scales smaller depths.
    if image.format in ("PNG", "PPM", "JPEG2000"):
        return
    if low < 0 or high > 65_535 or 0 < high <= 255:
        raise UserError(
            f"its pixels are 32-bit integers, from {low} to {high}, and nothing says which value is white. Scale it "
            "to 0 to 255 and save it with 8 bits (PIL mode L), or to 0 to 65,535 with 16 (I;16)"
        )


def in_srgb(image: Image.Image) -> Image.Image:
    """The picture in sRGB; unchanged if it is in sRGB already or declares no colour space."""
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _from_lab())  # pyright: ignore[reportReturnType]
    profile = image.info.get("icc_profile")
    if profile:
        return _by_profile(image, bytes(profile))
    gamma = image.info.get("gamma")
    # A PNG with both chunks is sRGB; the gamma is for readers that do not support the sRGB chunk.
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
    """The colours in the mode that their profile describes, and the alpha channel or None."""
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
    """The transform from a profile to sRGB; None if it changes nothing, or if the profile is for another mode."""
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # Some tools leave an RGB profile in a grey picture, or the other way round. Browsers ignore it too.
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
        _warn_no_profile(str(error))
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
def _warn_no_profile(reason: str) -> None:
    logger.warning("A picture's colour profile cannot be read (%s): its colours are taken as sRGB.", reason)
