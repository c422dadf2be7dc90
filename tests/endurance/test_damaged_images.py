"""Picture files with random damage, and files that are traps: read as a picture that a model can take, or refused."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmkd.data.images import UnreadableImage, read_image
from tests.endurance.damage import Tally

COUNT = [pytest.param(600, id="short"), pytest.param(5000, id="long", marks=pytest.mark.slow)]


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 18)) -> Image.Image:
    """A picture with something in it."""
    numbers = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    numbers[:, : size[0] // 2] //= 4
    return Image.fromarray(numbers).convert(mode)


def encoded(kind: str, mode: str = "RGB", **settings: Any) -> bytes:
    """A file of a format."""
    file = io.BytesIO()
    picture(mode).save(file, kind, **settings)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def several(kind: str) -> bytes:
    return encoded(kind, save_all=True, append_images=[picture(size=(24, 18)).rotate(180)])


FILES = {
    "png": encoded("PNG"),
    "png with alpha": encoded("PNG", "RGBA"),
    "png of a palette": encoded("PNG", "P"),
    "png of 16 bits": encoded("PNG", "I;16"),
    "png of one bit": encoded("PNG", "1"),
    "jpeg": encoded("JPEG"),
    "jpeg, progressive": encoded("JPEG", progressive=True),
    "jpeg in CMYK": encoded("JPEG", "CMYK"),
    "jpeg in grey": encoded("JPEG", "L"),
    "jpeg, rotated": rotated(),
    "webp": encoded("WEBP", lossless=True),
    "webp, animated": several("WEBP"),
    "gif, animated": several("GIF"),
    "png, animated": several("PNG"),
    "tiff": encoded("TIFF", compression="tiff_lzw"),
    "tiff of pages": several("TIFF"),
    "bmp": encoded("BMP"),
    "avif": encoded("AVIF"),
    "jpeg 2000": encoded("JPEG2000"),
}


def damaged(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A file with random damage, and its kind."""
    kind, place = (
        chance.choice(("bit", "byte", "bytes", "zeros", "insert", "cut", "empty", "head")),
        chance.randrange(len(content)),
    )
    rest = content[place + 1 :]
    match kind:
        case "bit":
            return kind, content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + rest
        case "byte":
            return kind, content[:place] + chance.randbytes(1) + rest
        case "bytes":
            return kind, content[:place] + chance.randbytes(chance.randrange(1, 60)) + rest[60:]
        case "zeros":
            return kind, content[:place] + bytes(min(200, len(rest))) + rest[200:]
        case "insert":
            return kind, content[:place] + chance.randbytes(chance.randrange(1, 9)) + content[place:]
        case "head":
            return kind, content[:place] + bytes(len(content) - place)
        case "cut":
            return kind, content[:place]
    return kind, b""


def is_picture(image: Any) -> bool:
    """Whether a model can take it, all its pixels loaded."""
    pixels = image.width * image.height
    return image.mode == "RGB" and pixels > 0 and len(image.tobytes()) == 3 * pixels


def near(expected: Image.Image) -> Callable[[Any], bool]:
    """Whether a picture looks like the undamaged one: what is missing at the end of some formats is no pixel."""
    wanted = np.asarray(expected).astype(int)

    def same(image: Any) -> bool:
        return is_picture(image) and image.size == expected.size and np.abs(np.asarray(image) - wanted).max() <= 1

    return same


@pytest.mark.parametrize("count", COUNT)
def test_a_damaged_picture_is_refused_or_a_picture(count: int) -> None:
    tally, names = Tally(f"damaged pictures, seeds 0 to {count - 1}"), list(FILES)
    whole = {name: read_image(content) for name, content in FILES.items()}
    for seed in range(count):
        chance, name = random.Random(seed), names[seed % len(names)]
        kind, content = damaged(FILES[name], chance)
        # Of flipped bits most formats know nothing: the pixels of such a file are what it says. PNG has checksums.
        strict = kind in ("cut", "empty") or (name.startswith("png") and name != "png, animated")
        same = near(whole[name]) if strict else is_picture
        tally.try_(seed, f"{kind} of {name}", lambda content=content: read_image(content), same)
    tally.end()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that claims a size and has hardly a pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + lines + chunk(b"IEND", b"")


TRAPS = {
    "png of 2 billion pixels": png_of(50_000, 50_000),
    "png as wide as can be": png_of(2**31 - 1, 1),
    "png as high as can be": png_of(1, 2**31 - 1),
    "png without pixels": png_of(0, 7),
    "png with text that grows": png_of(2, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))),
    "png with a profile that grows": png_of(2, 2, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))),
    "gif of a large screen": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(3) + b",",
    "bmp of a negative size": encoded("BMP")[:18] + struct.pack("<ii", -5, 2**31 - 1) + encoded("BMP")[26:],
    "a page": b"<html><body>404</body></html>",
    "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "a postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/tmp/x) (w) file\nshowpage\n",
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "an archive": b"PK\x03\x04" + bytes(60),
    "text": "kein Bild, nur Wörter".encode() * 40,
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_refused(name: str) -> None:
    with pytest.raises(UnreadableImage, match=r".+"):
        read_image(TRAPS[name])


def test_a_picture_by_another_name_is_read_by_what_it_is(tmp_path: Any) -> None:
    for name, content in FILES.items():
        path = tmp_path / "picture.txt"
        path.write_bytes(content)
        assert read_image(path).tobytes() == read_image(content).tobytes(), name
