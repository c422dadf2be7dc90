"""Merging of the parts of a cache that several machines have built."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Features

from mmkd.errors import UserError
from mmkd.files import write_file

from .manifest import Manifest, identity_differences
from .store import LOG, CacheWriter, damaged_shards, read_shard, shard_path, whole_lines


def merge_parts(folder: Path, parts: Sequence[Path]) -> None:
    """Writes the same cache as a build on a single machine, from all n parts of a build.

    Raises UserError if a part is missing, incomplete, damaged or of another build. The parts are not changed.
    """
    manifests = [Manifest.read(part) for part in parts]
    if not manifests:
        raise UserError(f"There are no parts of {folder} to merge; build them with shard: i/n, or name their folders.")
    first = manifests[0]
    for part, manifest in zip(parts, manifests, strict=True):
        _check_part(part, manifest, parts[0], first)
    assert first.part is not None
    absent = {(index, first.part[1]) for index in range(first.part[1])} - {manifest.part for manifest in manifests}
    if absent or len(parts) != first.part[1]:
        numbers = ", ".join(f"{index}/{count}" for index, count in sorted(absent)) or "none, but some are named twice"
        raise UserError(f"A build of {first.part[1]} parts needs each of them once; missing: {numbers}.")
    whole = Manifest(first.identity, first.shard_rows, first.total_rows)
    with CacheWriter(folder, whole, _features(parts, manifests)) as writer:
        for file in parts[0].iterdir():
            if file.suffix in (".npy", ".safetensors", ".yaml"):
                write_file(folder / file.name, file.read_bytes())
        for part, manifest in zip(parts, manifests, strict=True):
            for split, shards in manifest.shards.items():
                for number, entry in shards.items():
                    write_file(shard_path(folder, split, number), shard_path(part, split, number).read_bytes())
                    writer.manifest.shards[split][number] = entry
                writer.manifest.skipped[split] |= manifest.skipped[split]
        writer.manifest.write(folder)
        logs = [part / LOG for part in parts]
        write_file(folder / LOG, b"".join(map(whole_lines, logs)))
        writer.finish()


def _check_part(part: Path, manifest: Manifest, other: Path, first: Manifest) -> None:
    if manifest.part is None:
        raise UserError(f"{part} is no part of a build: it was not built with shard: i/n.")
    different = identity_differences(first.identity, manifest.identity)
    if different or (manifest.total_rows, manifest.shard_rows) != (first.total_rows, first.shard_rows):
        raise UserError(f"{part} is of another build than {other}: {'; '.join(different) or 'its rows differ'}.")
    damaged = list(damaged_shards(part, manifest))
    if manifest.missing() or damaged:
        raise UserError(
            f"{part} lacks {len(manifest.missing())} shards and {len(damaged)} are damaged. Run its build again: it "
            "goes on, and repairs what is damaged."
        )


def _features(parts: Sequence[Path], manifests: Sequence[Manifest]) -> Features:
    # If there are more parts than shards, some parts have no shard.
    part, manifest = next(pair for pair in zip(parts, manifests, strict=True) if pair[1].planned())
    split, number = manifest.planned()[0]
    return Features.from_arrow_schema(read_shard(part, split, number, manifest.shards[split][number]).schema)
