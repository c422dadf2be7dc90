"""Write emoji with their names as pictures with captions: Noto's drawings (OFL) and the names of Unicode's CLDR.

The font comes from the Debian package fonts-noto-color-emoji, or from a folder to which you downloaded it
(NotoColorEmoji.ttf of github.com/googlefonts/noto-emoji). The names are those of the Python package emoji, checked
against its sha256. Flags of countries are left out, since no picture of a flag tells an unseen country's name. Of one
emoji in several skin tones, all are in the same split. Writes train.parquet, validation.parquet and test.parquet.
"""

import argparse
import hashlib
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont, features

from mmkd.errors import UserError

from .packages import check_sha256, download

PACKAGE = "emoji==2.15.0"
SHA256 = "205296793d66a89d88af4688fa57fd6496732eb48917a87175a023c8138995eb"
FONT = "NotoColorEmoji.ttf"
SOURCE = Path("/usr/share/fonts/truetype/noto")
OUTPUT_DIR = Path(".cache/mmkd/emoji_names")
SIDE = 64

FULLY_QUALIFIED = 2
"""The status, in the package, of an emoji that is drawn in colour as it stands."""
_GLYPH = (0, 0, 136, 128)
"""The box of one drawing in the font; a sequence that the font does not know takes several, or an empty one."""
_FONT_SIZE = 109
"""The only size of the font, which consists of bitmaps."""
_SKIN_TONES = re.compile(r"[_ ](?:medium-light|medium-dark|light|medium|dark)[_ ]skin[_ ]tone")
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)

Named = tuple[str, str]
"""An emoji and its name."""


def named_emoji(content: str) -> list[Named]:
    """The emoji of the package's JSON with their names in words, without flags of countries and regions."""
    return [
        (emoji, facts["en"].strip(":").replace("_", " "))
        for emoji, facts in json.loads(content).items()
        if facts["status"] == FULLY_QUALIFIED
        and not any(ord(sign) in _FLAG_LETTERS or ord(sign) in _TAGS for sign in emoji)
    ]


def split_of(name: str) -> str:
    """The split of an emoji: a tenth is for validation and a tenth for tests, by a hash of its name without tones."""
    base = _SKIN_TONES.sub("", name)
    number = int(hashlib.sha256(base.encode()).hexdigest(), 16) % 10
    return {0: "validation", 1: "test"}.get(number, "train")


def picture_of(emoji: str, font: ImageFont.FreeTypeFont) -> PILImage.Image | None:
    """An emoji on white, SIDE pixels wide and high; None for one that the font does not draw."""
    if font.getbbox(emoji) != _GLYPH:
        return None
    width, height = _GLYPH[2:]
    canvas = PILImage.new("RGB", (width, width), "white")
    ImageDraw.Draw(canvas).text((0, (width - height) // 2), emoji, font=font, embedded_color=True)
    return canvas.resize((SIDE, SIDE), PILImage.Resampling.LANCZOS)


def make_emoji_names(source: Path, output_dir: Path) -> dict[str, int]:
    """Writes all splits; returns the number of rows of each.

    Raises UserError where the font is missing, and where Pillow cannot compose emoji of several characters.
    """
    path = source if source.is_file() else source / FONT
    if not path.is_file():
        raise UserError(
            f"{source} has no {FONT}: apt-get install fonts-noto-color-emoji, or download it "
            "(github.com/googlefonts/noto-emoji) into a folder and name that with --source."
        )
    if not features.check("raqm"):
        raise UserError("This Pillow was built without libraqm, which composes emoji: pip install --upgrade pillow.")
    font = ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as scratch:
        (wheel,) = download([PACKAGE], Path(scratch))
        check_sha256(wheel, SHA256, PACKAGE)
        with zipfile.ZipFile(wheel) as content:
            named = named_emoji(content.read("emoji/unicode_codes/emoji.json").decode("utf-8"))
    rows: dict[str, list[tuple[PILImage.Image, str]]] = {"train": [], "validation": [], "test": []}
    for emoji, name in named:
        picture = picture_of(emoji, font)
        if picture is not None:
            rows[split_of(name)].append((picture, name))
    for split, pairs in rows.items():
        write_captioned(output_dir / f"{split}.parquet", pairs)
    return {split: len(pairs) for split, pairs in rows.items()}


def write_captioned(path: Path, pairs: Sequence[tuple[PILImage.Image, str]]) -> None:
    """One Parquet file of PNGs with a caption each; it gets its name when it is complete."""
    pictures = [{"bytes": png(picture), "path": None} for picture, _ in pairs]
    rows = {"image": pictures, "text": [text for _, text in pairs]}
    kinds: Any = {"image": Image(), "text": Value("string")}
    partial = path.with_name(f".{path.name}.partial")
    Dataset.from_dict(rows, features=Features(kinds)).to_parquet(str(partial))
    partial.replace(path)
    print(f"{path}: {len(pairs):,} pictures")


def png(picture: PILImage.Image) -> bytes:
    """The bytes of a picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_emoji_names.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help="the font, or the folder that holds it")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help=f"where to write (default: {OUTPUT_DIR})")
    options = parser.parse_args(arguments)
    make_emoji_names(options.source, options.output_dir)
