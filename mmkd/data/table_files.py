"""JSON, CSV and tar files as rows on disk, read by our own readers: those of `datasets` guess types of text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ArrowBasedBuilder, BuilderConfig, Dataset, DatasetInfo, DownloadManager, SplitGenerator
from datasets.exceptions import DatasetGenerationError

from mmkd.errors import UserError
from mmkd.seams.datasets_seam import Key

from .csv_rows import csv_features, csv_tables
from .json_rows import json_features, json_tables
from .tar_shards import shard_features, shard_notes, shard_tables

READERS = {"json": (json_features, json_tables), "csv": (csv_features, csv_tables)}
READERS |= {"webdataset": (shard_features, shard_tables)}

# Raise it when the same file gives other rows than before: it is part of the key of the cache.
_VERSION = 1


def read_table_files(kind: str, files: list[str], split: str) -> Dataset:
    """The rows of the files of one split, read once and kept in the cache of `datasets`.

    Raises UserError for files that are broken or empty, with the line.
    """
    builder = TableFiles(
        dataset_name=f"mmkd_{kind}", hash=f"{kind}-{_VERSION}", kind=kind, data_files={split: files}, split=split
    )
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        # `datasets` wraps errors of `_generate_tables`.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    rows = builder.as_dataset(split=split)
    assert isinstance(rows, Dataset)
    return rows


def _file_in(path: str, name: str) -> str:
    """The file at a path, or the only one in the folder to which a .zip was unpacked."""
    if not Path(path).is_dir():
        return path
    files = [str(file) for file in Path(path).rglob("*") if file.is_file()]
    if len(files) != 1:
        raise UserError(
            f"{name} holds {len(files)} files, and can be read if it holds one. Unpack it and name the folder."
        )
    return files[0]


@dataclass
class TableConfig(BuilderConfig):
    """The reader of the files, and their split."""

    kind: str = "json"
    split: str = "train"


class TableFiles(ArrowBasedBuilder):
    """The builder with which `datasets` caches rows on disk as long as the files do not change."""

    BUILDER_CONFIG_CLASS = TableConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo()

    def _split_generators(self, dl_manager: DownloadManager) -> list[SplitGenerator]:
        config: Any = self.config
        names = list(config.data_files[config.split])
        # The reader of archives opens them itself; extracting them would fill the disk with small files.
        archives = config.kind == "webdataset"
        paths = dl_manager.download(names) if archives else dl_manager.download_and_extract(names)
        files = [(_file_in(path, name), name) for path, name in zip(paths, names, strict=True)]
        self.info.features = READERS[config.kind][0](files)
        # Kept with the rows, so that it is known when the rows come from the cache.
        self.info.description = shard_notes(files) if archives else ""
        return [SplitGenerator(name=config.split, gen_kwargs={"files": files})]

    def _generate_shards(self, files: list[tuple[str, str]]) -> Iterator[str]:
        yield from (path for path, _ in files)

    def _generate_tables(self, files: list[tuple[str, str]]) -> Iterator[tuple[Key, pa.Table]]:
        config: Any = self.config
        assert self.info.features is not None
        for shard, (path, name) in enumerate(files):
            for number, table in enumerate(READERS[config.kind][1](path, name, self.info.features)):
                yield Key(shard, number), table
