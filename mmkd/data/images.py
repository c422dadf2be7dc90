"""Reading of pictures in any form: the only place where a picture becomes the pixels that models get."""

import base64
import binascii
import io
import logging
import os
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from huggingface_hub.constants import ENDPOINT
from PIL import Image as PILImage
from PIL import ImageOps
from PIL.ExifTags import Base as ExifTag

from mmkd.errors import UserError
from mmkd.seams.datasets_seam import xopen

from .colours import has_alpha, in_eight_bits, in_rgba, in_srgb, on_white
from .image_urls import download, is_url
from .png_checksums import check_png

logger = logging.getLogger(__name__)

# The errors of PIL's readers for broken files; they have no common base class below Exception.
UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    PILImage.DecompressionBombError,
)

STORED = "mmkd_stored"
"""The key of an image's `info` under which the picture is kept in its original mode, if that was not RGB."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
"""Endings of the names of picture files."""

# The number of characters of base64, and of paths and URLs, that errors show.
_SHOWN, _LONG = 40, 300
_LONGEST_PATH = 4096
# The first characters of the base64 of a picture file: PNG, JPEG, GIF, WebP, BMP, TIFF, AVIF and JPEG 2000, JPEG 2000,
# PNM.
_BASE64_STARTS = ("iVBOR", "/9j/", "_9j_", "R0lG", "UklG", "Qk", "SUkq", "TU0A", "AAAA", "/0//", "UD")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{24,}={0,2}\s*")
# Of paths in the notation of datasets and fsspec, such as zip://a.png::b.zip: files here, at the Hub, in a bucket that
# the user has keys of, and within archives of these.
_PROTOCOLS = ("file", "hf", "zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4", "s3", "gs", "gcs", "az", "abfs")
# In these formats, frames after the first are previews or other sizes of the same picture.
_ONE_PICTURE = ("MPO", "ICO", "ICNS", "CUR")


class UnreadableImage(UserError):
    """A picture cannot be read; the message is the reason."""


@dataclass(frozen=True)
class UnusableRow:
    """The reason why a row cannot be read."""

    reason: str


def read_image(value: Any, *, folder: str | Path | None = None, allow_urls: bool = False) -> PILImage.Image:
    """The picture in RGB with 8 bits per channel, as an image viewer shows it.

    `value` is a PIL image, the bytes of a file, a path (relative paths start at `folder`), base64, a data URL, an
    http(s) URL if `allow_urls`, a dict with one of them (`bytes`, `path`, `url`), or an array of uint8 [height, width,
    channels]. The EXIF orientation is applied, transparent areas become white, colours are converted from the
    picture's profile (or PNG gamma) to sRGB, 16-bit grey becomes 8-bit (65,535 is white), and the first frame of an
    animation is read. Raises UnreadableImage for everything else.
    """
    try:
        image = _opened(value, folder, allow_urls)
        return _as_seen(image, ours=image is not value)
    except UnreadableImage:
        raise
    except UserError as error:
        raise UnreadableImage(f"{describe(value)}: {error}") from error
    except PILImage.DecompressionBombError as error:
        raise UnreadableImage(
            f"{describe(value)}: {error} Shrink the picture, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except UNDECODABLE as error:
        # PIL names the buffer by its address, which differs between runs and would make equal errors unequal.
        reason = re.sub(r"<[^>]* object at 0x[0-9a-f]+>", "the picture's bytes", str(error))
        raise UnreadableImage(f"{type(error).__name__}: {reason} ({describe(value)})") from error


def read_row(row: Mapping[str, Any], columns: Iterable[str] = ("images",)) -> dict[str, Any] | UnusableRow:
    """The row with the pictures of its columns `columns` read, or the reason why one of them cannot be read."""
    read = dict(row)
    for column in columns:
        if column not in row:
            continue
        read[column] = []
        for number, value in enumerate(row[column] if row[column] is not None else []):
            try:
                read[column].append(read_image(value))
            except UnreadableImage as error:
                return UnusableRow(f"{column}[{number}]: {error}")
    return read


def describe(value: Any) -> str:
    """A short description of a value that stands for a picture, for messages."""
    if isinstance(value, Mapping):
        keys = ("bytes", "path", "url", "data", "base64")
        values = {key: value[key] for key in keys if value.get(key) is not None}
        if not values:
            return f"a dict without bytes or path, its keys are {sorted(map(str, value))}"
        kind = describe(next(iter(values.values())))
        return f"{kind} named {_cut(str(values['path']), _LONG)}" if {"bytes", "path"} <= set(values) else kind
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value):,} bytes"
    if isinstance(value, (str, Path)):
        text = str(value)
        if text.startswith("data:"):
            return f"data URL {_cut(text)}"
        if is_url(text):
            return f"URL {_cut(text, _LONG)}"
        return f"base64 {_cut(text)}" if _is_base64(text) else f"path {_cut(text, _LONG)}"
    if isinstance(value, PILImage.Image):
        return f"a PIL image of {value.width} x {value.height} in mode {value.mode}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    return "nothing (None)" if value is None else f"a value of type {type(value).__name__}"


def _cut(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _opened(value: Any, folder: str | Path | None, allow_urls: bool) -> PILImage.Image:
    """The decoded picture in the mode of its file."""
    if isinstance(value, PILImage.Image):
        value.load()
        return value
    if isinstance(value, np.ndarray):
        return image_of_array(value)
    if isinstance(value, Mapping):
        value = file_of(value)
    if isinstance(value, (str, Path)):
        value = _content(str(value), folder, allow_urls)
    if not isinstance(value, (bytes, bytearray, memoryview, Path)):
        raise UnreadableImage(
            f"{describe(value)} where a picture is needed. Give a path, the bytes of a picture file, base64, a data "
            "URL, a PIL image, or a dict with bytes or path; a row without pictures has an empty list"
        )
    # PIL keeps a file open until its image is garbage collected; thousands of rows would run out of file handles.
    with (
        value.open("rb") if isinstance(value, Path) else io.BytesIO(value) as file,
        PILImage.open(file) as image,
    ):
        # To count the frames PIL seeks to another one, so that this has to come before loading.
        if getattr(image, "is_animated", False) and image.format not in _ONE_PICTURE:
            _warn_first_frame(str(image.format))
        image.load()
        if image.format == "PNG":
            check_png(file)
    return image


def file_of(value: Mapping[str, Any]) -> bytes | str | Path:
    """The picture in a dict: the bytes of a file, or a path or URL. Raises UnreadableImage for a dict without one."""
    for key in ("bytes", "path", "url", "base64", "data"):
        file = value.get(key)
        if isinstance(file, (bytes, bytearray, memoryview)):
            return bytes(file)
        if isinstance(file, (str, Path)) and str(file):
            return file
    raise UnreadableImage(
        f"{describe(value)}. A picture as a dict has its file in `bytes` or where it lies in `path` or `url`"
    )


def image_of_array(array: np.ndarray) -> PILImage.Image:
    """The picture of an array of uint8. Raises UnreadableImage for other arrays."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UnreadableImage(
            f"{describe(array)}: an array is a picture if it is of uint8 from 0 to 255, [height, width] or [height, "
            "width, 1, 3 or 4 channels]. Convert it first: nothing says which value of another type is white"
        )
    return PILImage.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _content(text: str, folder: str | Path | None, allow_urls: bool) -> bytes | Path:
    """The bytes of the picture that a string encodes or refers to, or the path of its file."""
    if not text:
        raise UnreadableImage("an empty string where a picture is needed; a row without pictures has an empty list")
    if is_url(text):
        if not allow_urls:
            raise UnreadableImage(
                f"URL {_cut(text, _LONG)} is not downloaded by default. Set `image_urls: true` in the data recipe (in "
                "Python: call mmkd.data.image_columns.download_images on the rows), and every picture is downloaded "
                "once. If it is set, this download failed; a warning at the start says why"
            )
        return download(text)
    if "://" in text and not text.startswith(("data:", "file:")) and len(text) < _LONGEST_PATH:
        _check_protocols(text)
        with xopen(text, "rb") as file:
            return file.read()
    content = content_of_text(text, folder)
    if isinstance(content, Path) and not os.path.isfile(content):
        raise UnreadableImage(f"FileNotFoundError: there is no file {_cut(str(content), _LONG)}")
    return content


def _check_protocols(text: str) -> None:
    """Raises UnreadableImage for a chain of protocols that asks a server which `image_urls` has not allowed."""
    for part in text.split("::"):
        protocol, mark, _ = part.partition("://")
        if mark and protocol not in _PROTOCOLS and not part.startswith(f"{ENDPOINT}/"):
            raise UnreadableImage(
                f"{_cut(text, _LONG)}: pictures are not read through {protocol}://. Known are "
                f"{', '.join(_PROTOCOLS)}, and http(s) URLs of single pictures with `image_urls: true`"
            )


def content_of_text(text: str, folder: str | Path | None = None) -> bytes | Path:
    """The bytes that a data URL or base64 encodes, or otherwise the text as a path, which need not exist.

    Relative paths start at `folder`. Raises UnreadableImage for broken base64.
    """
    if text.startswith("data:"):
        header, comma, content = text.partition(",")
        if not comma or not header.startswith("data:image/"):
            raise UnreadableImage(f"{_cut(text)} is no picture's data URL, which begins with data:image/TYPE;base64,")
        if not header.endswith(";base64"):
            return unquote_to_bytes(content)
        return decoded_base64(unquote(content))
    if text.startswith("file:"):
        return Path(url2pathname(urlsplit(text).path))
    if len(text) < _LONGEST_PATH:
        path = Path(folder, text) if folder is not None else Path(text)
        # All characters of base64 may occur in a path, so that a file of this name takes precedence.
        if not _is_base64(text) or os.path.isfile(path):
            return path
    elif not _is_base64(text):
        raise UnreadableImage(f"{_cut(text)} is too long for a path, and not the base64 of a picture")
    return decoded_base64(text)


def _is_base64(text: str) -> bool:
    return text.startswith(_BASE64_STARTS) and _BASE64.fullmatch(text) is not None


def decoded_base64(text: str) -> bytes:
    """The bytes of base64 in either alphabet, with or without its padding. Raises UnreadableImage for other text."""
    compact = re.sub(r"\s", "", text).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise UnreadableImage(f"{_cut(text)} is not base64: {error}") from error


@cache
def _warn_first_frame(kind: str) -> None:
    logger.warning("A picture of the data is an animation or has several pages (%s): its first one is read.", kind)


def _as_seen(image: PILImage.Image, ours: bool) -> PILImage.Image:
    """A decoded picture in RGB. `ours` may be changed, others are left as they are."""
    if image.getexif().get(ExifTag.Orientation) is not None:
        image, ours = ImageOps.exif_transpose(image), True
    if image.mode == "RGB" and not image.info.keys() - {STORED}:
        return image
    eight = in_eight_bits(image)
    coloured = in_srgb(eight)
    if has_alpha(coloured):
        seen = on_white(coloured)
    else:
        seen = coloured if coloured.mode == "RGB" else coloured.convert("RGB")
    if seen is image and not ours:
        seen = seen.copy()
    # Profile, orientation and transparency in `info` no longer apply to the converted pixels.
    seen.info = {}
    if image.mode != "RGB" and coloured is image and not _is_transparent(image):
        seen.info[STORED] = image
    return seen


def _is_transparent(image: PILImage.Image) -> bool:
    return has_alpha(image) and in_rgba(image).getchannel("A").getextrema()[0] != 255
