"""Pictures in every form and of every kind: the pixels that all readers get, or why there are none."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from mmkd.cache.sequence_keys import image_hash
from mmkd.data.images import UnreadableImage, read_image

RED, WHITE, BLACK = (200, 30, 30), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(width: int, height: int, depth: int, colours: int, lines: bytes, **chunks: bytes) -> bytes:
    """A PNG by hand: PIL writes neither gamma nor transparent 16-bit grey."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    more = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def profile(space: bytes, *tags: tuple[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 by hand: PIL makes only sRGB, and others may not be shipped."""
    pcs = b"Lab " if space == b"CMYK" else b"XYZ "
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    description = b"desc" + bytes(4) + struct.pack(">I", 5) + b"mine\0" + bytes(78)
    white = b"XYZ " + bytes(4) + _fixed(0.9642, 1.0, 0.8249)
    everything = [(b"desc", description), (b"wtpt", white), (b"cprt", b"text" + bytes(4) + b"none\0"), *tags]
    table, content = struct.pack(">I", len(everything)), b""
    start = 128 + 4 + 12 * len(everything)
    for name, tag in everything:
        table += name + struct.pack(">II", start + len(content), len(tag))
        content += tag + bytes(-len(tag) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(content), b"lcms", 0x02400000, kind, space, pcs, bytes(12), b"acsp"
    )
    return head + bytes(28) + _fixed(0.9642, 1.0, 0.8249) + bytes(48) + table + content


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def matrix_profile(red: Any, green: Any, blue: Any, gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), (red, green, blue), strict=True)
    return profile(
        b"RGB ",
        *((name, b"XYZ " + bytes(4) + _fixed(*column)) for name, column in columns),
        *((name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")),
    )


ADOBE_RGB = matrix_profile((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.2)
DISPLAY_P3 = matrix_profile((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407), 2.2)


def cmyk_profile() -> bytes:
    """Ink whose black is as grey as paper: nobody who leaves it out gets the right colour."""
    curves = bytes(range(256))
    # 16 corners of CMYK in Lab of 8 bits: without black white, with black a middle grey.
    corners = b"".join(bytes([255 if not number % 2 else 128, 128, 128]) for number in range(16))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return profile(b"CMYK", (b"A2B0", table + curves * 4 + corners + curves * 3))


def solid(mode: str, colour: Any, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def half_clear(mode: str) -> Image.Image:
    """A red or grey square whose left half is transparent black."""
    colour = {"RGBA": (*RED, 255), "LA": (90, 255), "PA": (1, 255)}[mode]
    image = solid(mode, (0,) * len(colour))
    if mode == "PA":
        image.putpalette([*BLACK, 90, 90, 90])
    image.paste(colour, (4, 0, 8, 8))
    return image


def oriented(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def palette(transparency: Any = None, colours: int = 2) -> bytes:
    image = solid("P", 0)
    image.putpalette([*RED, 90, 90, 90])
    image.paste(1, (4, 0, 8, 8))
    return encoded(image, **({} if transparency is None else {"transparency": transparency}))


def animation(kind: str) -> bytes:
    return encoded(solid("RGB", RED), kind, save_all=True, append_images=[solid("RGB", WHITE)], duration=100)


def left_red() -> Image.Image:
    """Red above, white below."""
    image = solid("RGB", WHITE)
    image.paste(RED, (0, 0, 8, 4))
    return image


def sixteen(values: list[int], kind: str = "PNG", mode: str = "I;16") -> bytes:
    array = np.array([values] * 2, dtype=np.uint16 if mode == "I;16" else np.int32)
    return encoded(Image.fromarray(array), kind)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ROW_16 = b"\0" + struct.pack(">3H", 0, 257 * 100, 65535)
GAMMA_1 = {"gAMA": struct.pack(">I", 100_000)}
RED_LINE = b"\0" + bytes(RED) * 2

PICTURES: dict[str, tuple[bytes, tuple[int, int, int], tuple[int, int, int]]] = {
    "RGB": (encoded(solid("RGB", RED)), RED, RED),
    "grey": (encoded(solid("L", 90)), (90, 90, 90), (90, 90, 90)),
    "one bit": (encoded(solid("1", 1)), WHITE, WHITE),
    "RGBA": (encoded(half_clear("RGBA")), WHITE, RED),
    "RGBA in WebP": (encoded(half_clear("RGBA"), "WEBP", lossless=True), WHITE, RED),
    "RGBA, half transparent": (encoded(solid("RGBA", (0, 0, 0, 127))), (128, 128, 128), (128, 128, 128)),
    "LA": (encoded(half_clear("LA")), WHITE, (90, 90, 90)),
    "palette": (palette(), RED, (90, 90, 90)),
    "palette, first colour transparent": (palette(0), WHITE, (90, 90, 90)),
    "palette, transparency in steps": (palette(bytes([0, 255])), WHITE, (90, 90, 90)),
    "RGB with a transparent colour": (encoded(left_red().rotate(90), transparency=RED), WHITE, WHITE),
    "grey with a transparent value": (encoded(solid("L", 90), transparency=90), WHITE, WHITE),
    "16 bits of grey": (sixteen([0, 0, 257 * 100, 257 * 100]), BLACK, (100, 100, 100)),
    "16 bits of grey, white": (sixteen([65535, 0, 0, 65407]), WHITE, (255, 255, 255)),
    "16 bits of grey in TIFF": (sixteen([0, 65535], "TIFF"), BLACK, WHITE),
    "16 bits of grey in PGM": (sixteen([0, 255], "PPM"), BLACK, (1, 1, 1)),
    "16 bits of grey, big-endian": (
        encoded(Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 0, 257 * 7)), "TIFF"),
        BLACK,
        (7, 7, 7),
    ),
    "32-bit integers of 16 bits in TIFF": (sixteen([0, 257 * 9], "TIFF", "I"), BLACK, (9, 9, 9)),
    "16 bits of grey, one of them transparent": (
        png(3, 1, 16, 0, ROW_16, tRNS=struct.pack(">H", 0)),
        WHITE,
        WHITE,
    ),
    "16 bits of colour": (
        png(2, 1, 16, 2, b"\0" + struct.pack(">6H", *(257 * one for one in (*RED, *WHITE)))),
        RED,
        WHITE,
    ),
    "CMYK": (encoded(solid("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0), (255, 0, 0)),
    "CMYK in JPEG, which Adobe inverts": (encoded(solid("CMYK", (0, 0, 0, 255)), "JPEG"), BLACK, BLACK),
    "CMYK with a profile": (
        encoded(solid("CMYK", (0, 0, 0, 255)), "JPEG", icc_profile=cmyk_profile()),
        (119, 119, 119),
        (119, 119, 119),
    ),
    "YCbCr": (encoded(solid("RGB", (90, 90, 90)).convert("YCbCr"), "JPEG"), (90, 90, 90), (90, 90, 90)),
    "LAB": (encoded(solid("LAB", (255, 128, 128)), "TIFF"), WHITE, WHITE),
    "sRGB profile": (encoded(solid("RGB", RED), icc_profile=SRGB), RED, RED),
    "Adobe RGB profile": (encoded(solid("RGB", RED), icc_profile=ADOBE_RGB), (233, 24, 24), (233, 24, 24)),
    "Display P3 profile": (
        encoded(solid("RGB", (100, 200, 50)), "JPEG", quality=100, icc_profile=DISPLAY_P3),
        (43, 204, 0),
        (43, 204, 0),
    ),
    "Adobe RGB under transparency": (
        encoded(half_clear("RGBA"), icc_profile=ADOBE_RGB),
        WHITE,
        (233, 24, 24),
    ),
    "Adobe RGB of a palette": (
        encoded(Image.open(io.BytesIO(palette())), icc_profile=ADOBE_RGB),
        (233, 24, 24),
        (90, 90, 90),
    ),
    "a profile of colours in a grey picture": (
        encoded(solid("L", 90), icc_profile=ADOBE_RGB),
        (90, 90, 90),
        (90, 90, 90),
    ),
    "linear gamma": (png(2, 1, 8, 2, RED_LINE, **GAMMA_1), (228, 96, 96), (228, 96, 96)),
    "gamma beside sRGB": (png(2, 1, 8, 2, RED_LINE, **GAMMA_1, sRGB=b"\0"), RED, RED),
    "usual gamma": (png(2, 1, 8, 2, RED_LINE, gAMA=struct.pack(">I", 45455)), RED, RED),
    "turned by 90 degrees": (encoded(left_red(), exif=oriented(6)), WHITE, RED),
    "turned by 90 degrees, JPEG": (
        encoded(left_red(), "JPEG", quality=100, subsampling=0, exif=oriented(6)),
        WHITE,
        RED,
    ),
    "mirrored": (encoded(left_red().rotate(90), exif=oriented(2)), WHITE, RED),
    "animated GIF": (animation("GIF"), RED, RED),
    "animated PNG": (animation("PNG"), RED, RED),
    "one pixel": (encoded(solid("RGB", RED, (1, 1))), RED, RED),
    "a line": (encoded(solid("RGB", RED, (900, 2))), RED, RED),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_read_as_a_person_sees_it(name: str) -> None:
    """RGB of 8 bits; the pixels in the middle of the left and of the right edge."""
    file, left, right = PICTURES[name]
    image = read_image(file)
    assert image.mode == "RGB"
    near = 1 if any(kind in name for kind in ("JPEG", "LAB", "profile")) else 0
    middle = image.height // 2
    for place, colour in (((0, middle), left), ((image.width - 1, middle), right)):
        assert image.getpixel(place) == pytest.approx(colour, abs=near)
    # Reading what was read changes nothing, written to a file or not.
    assert read_image(encoded(image)).tobytes() == read_image(image).tobytes() == image.tobytes()
    # Pictures that PIL opened for someone else give the same, and stay as they were.
    theirs = Image.open(io.BytesIO(file))
    facts = dict(theirs.info)
    assert read_image(theirs).tobytes() == image.tobytes()
    assert {key: theirs.info.get(key) for key in facts} == facts


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_several_frames_the_first_is_read_and_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    from mmkd.data.images import _warn_first_frame

    _warn_first_frame.cache_clear()
    for _ in range(2):
        assert read_image(animation(kind)).getpixel((3, 3)) == pytest.approx(RED, abs=12)
    assert len([record for record in caplog.records if f"({kind}): its first one" in record.message]) == 1


def test_a_photo_with_a_preview_is_no_animation(caplog: pytest.LogCaptureFixture) -> None:
    file = encoded(solid("RGB", RED), "MPO", save_all=True, append_images=[solid("RGB", WHITE)])
    assert read_image(file).getpixel((3, 3)) == pytest.approx(RED, abs=2)
    assert not caplog.records


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA"])
def test_caches_of_pictures_whose_pixels_stay_are_found(mode: str) -> None:
    """The hash is that of the picture as its file has it: what caches were written with before."""
    theirs = left_red().convert(mode)
    old = image_hash(theirs)
    assert image_hash(read_image(theirs)) == image_hash(read_image(encoded(theirs, "TIFF"))) == old
    assert image_hash(read_image(theirs)) == image_hash(read_image(read_image(theirs)))


@pytest.mark.parametrize(
    "name", ["RGBA", "16 bits of grey", "Adobe RGB profile", "linear gamma", "CMYK with a profile"]
)
def test_pictures_that_look_otherwise_than_before_have_another_hash(name: str) -> None:
    file = PICTURES[name][0]
    assert image_hash(read_image(file)) != image_hash(Image.open(io.BytesIO(file)))


FILE = encoded(left_red())
BASE64 = base64.b64encode(FILE).decode()
ARRAY = np.asarray(left_red())


@pytest.mark.parametrize(
    "value",
    [
        FILE,
        bytearray(FILE),
        memoryview(FILE),
        left_red(),
        ARRAY,
        BASE64,
        BASE64.rstrip("="),
        base64.encodebytes(FILE).decode(),
        base64.urlsafe_b64encode(FILE).decode(),
        f"data:image/png;base64,{BASE64}",
        {"bytes": FILE, "path": None},
        {"bytes": FILE, "path": "/nowhere/name.png"},
        {"bytes": FILE},
        {"bytes": BASE64, "path": None},
        {"url": f"data:image/png;base64,{BASE64}"},
        {"bytes": None, "path": f"data:image/png;base64,{BASE64}"},
    ],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:12]}",
)
def test_every_form_gives_the_same_pixels(value: Any) -> None:
    assert read_image(value).tobytes() == left_red().tobytes()


def test_files_are_found_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "with spaces é.png"
    path.write_bytes(FILE)
    values: list[Any] = [path, str(path), {"path": str(path), "bytes": None}, {"path": str(path)}, path.as_uri()]
    for value in values:
        assert read_image(value).tobytes() == left_red().tobytes()
    assert read_image(path.name, folder=tmp_path).tobytes() == left_red().tobytes()
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        read_image(path.name)
    # A file whose name might be base64 is a file.
    (tmp_path / BASE64[:48].replace("/", "_")).write_bytes(FILE)
    monkeypatch.chdir(tmp_path)
    assert read_image(BASE64[:48].replace("/", "_")).size == (8, 8)


@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "nothing"),
        ("", "empty string"),
        (7, "of type int"),
        ([1, 2], "of type list"),
        ({"src": "a.png"}, r"a dict without bytes or path, its keys are \['src'\]"),
        ({"bytes": None, "path": None}, "a dict without bytes or path"),
        (b"no picture", "UnidentifiedImageError"),
        (FILE[:60], "truncated"),
        (encoded(left_red().resize((200, 200)), "JPEG")[:900], "truncated"),
        (encoded(left_red().resize((200, 200)), "BMP")[:900], "truncated"),
        (animation("GIF")[:40], "Error"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
        ("data:text/plain,hello", "no picture.s data URL"),
        ("data:image/png;base64,%%%", "base64"),
        (base64.b64encode(bytes(4000)).decode(), "UnidentifiedImageError"),
        ("x" * 5000, "too long for a path"),
        ("x" * 500, "there is no file"),
        ("nowhere/a.png", "FileNotFoundError.*nowhere/a.png"),
        ("https://example.org/a.png", "image_urls: true"),
        ("zip://a.png::https://example.org/a.zip", "not read through https://"),
        ("simplecache::http://127.0.0.1/a.png", "not read through http://"),
        ("ftp://example.org/a.png", "not read through ftp://"),
        ({"url": "http://example.org/a.png"}, "image_urls: true"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point numbers, from 1 to 1"),
        (Image.fromarray(np.full((4, 4), 200, np.int32)), "32-bit integers, from 200 to 200"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "32-bit integers"),
    ],
    ids=lambda value: None if isinstance(value, str) and "\\" in value else str(value)[:16],
)
def test_what_is_no_picture_is_refused_in_few_words(value: Any, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as error:
        read_image(value)
    assert len(str(error.value)) < 400
    assert "0x" not in str(error.value)


def test_a_decompression_bomb_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UnreadableImage, match=r"64 pixels.*MAX_IMAGE_PIXELS"):
        read_image(FILE)


def test_a_profile_that_cannot_be_read_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert read_image(encoded(solid("RGB", RED), icc_profile=b"no profile")).getpixel((0, 0)) == RED
    assert "colour profile cannot be read" in caplog.text
