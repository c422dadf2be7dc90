"""What mmkd borrows of datasets beyond its documentation."""

from typing import Any

from datasets import Dataset
from datasets.builder import Key as Key  # What `_generate_tables` of a builder yields.
from datasets.utils.file_utils import xopen as xopen  # By which its Image type opens files and addresses.


def indices_of(dataset: Dataset) -> Any:
    """The table of the rows that a shuffle or a selection took; None where the data set has all its rows in order.

    `flatten_indices` copies the rows, and nothing public says where they came from.
    """
    return dataset._indices


def fingerprint_of(dataset: Dataset) -> str:
    """What changes with every transform of the data set; hashing its table anew would read all of it."""
    return dataset._fingerprint
