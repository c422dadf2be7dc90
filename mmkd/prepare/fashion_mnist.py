"""Write Fashion-MNIST (Zalando, MIT) as Parquet for data_recipes/classification/fashion_mnist.yaml.

The four original files come from the Debian package dataset-fashion-mnist, or from a folder to which you downloaded
them. The 60,000 training images are divided by a fixed seed into captions.parquet (for a teacher that must not see the
student's images), train.parquet and validation.parquet; test.parquet is the original test split, complete and in
order.
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from jaxtyping import UInt8
from PIL import Image as PILImage

from mmkd.errors import UserError

CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SIZES = {"captions": 10_000, "train": 6_000, "validation": 1_000}
SOURCE = Path("/usr/share/datasets/fashion-mnist")
OUTPUT_DIR = Path(".cache/mmkd/fashion_mnist")


def make_fashion_mnist(source: Path, output_dir: Path) -> None:
    """Writes all four files. Raises UserError if the original files are missing."""
    images, labels = read(source, "train")
    order = np.random.default_rng(0).permutation(len(images))
    output_dir.mkdir(parents=True, exist_ok=True)
    first = 0
    for name, size in SIZES.items():
        rows = order[first : first + size]
        write(output_dir / f"{name}.parquet", images[rows], labels[rows])
        first += size
    write(output_dir / "test.parquet", *read(source, "t10k"))


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_fashion_mnist.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of the four *-ubyte.gz files")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR)
    options = parser.parse_args(arguments)
    make_fashion_mnist(options.source, options.output_dir)


def read(folder: Path, part: str) -> tuple[UInt8[np.ndarray, "row 28 28"], UInt8[np.ndarray, "row"]]:
    """Images and labels of one part. Raises UserError if the files are missing."""
    paths = [folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"]
    if not all(path.is_file() for path in paths):
        raise UserError(
            f"{folder} lacks {paths[0].name}: apt-get install dataset-fashion-mnist, or download the four files "
            "(github.com/zalandoresearch/fashion-mnist) into a folder and name it with --source."
        )
    images, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths)
    # The IDX format has a header of 16 bytes for images and of 8 bytes for labels.
    return images[16:].reshape(-1, 28, 28), labels[8:]


def write(path: Path, images: UInt8[np.ndarray, "row 28 28"], labels: UInt8[np.ndarray, "row"]) -> None:
    """One Parquet file of PNGs and class numbers."""
    rows = {"image": [{"bytes": _png(image), "path": None} for image in images], "label": labels.tolist()}
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    # Only a complete file gets its name, which later calls rely on.
    partial = path.with_name(f".{path.name}.partial")
    Dataset.from_dict(rows, features=features).to_parquet(str(partial))
    partial.replace(path)
    print(f"{path}: {len(labels):,} images")


def _png(image: UInt8[np.ndarray, "28 28"]) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
