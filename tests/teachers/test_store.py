"""A cache on disk: whatever stops its writer or changes its bytes, it is whole, or says what is wrong with it."""

import faulthandler
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console

from mmkd.cache.codec import Codec, TokenOrder, TokenScores
from mmkd.cache.manifest import Manifest, Skipped
from mmkd.cache.side_files import TOKEN_ORDER, codec_of, order_bytes
from mmkd.cache.store import (
    LOG,
    SIGNAL_FEATURES,
    Cache,
    CacheWriter,
    damaged_shards,
    read_log,
    shard_path,
)
from mmkd.capture.build import build
from mmkd.capture.build_plan import Plan
from mmkd.files import write_file
from scripts.make_tiny_models import sentences
from tests.teachers.caches import contents, plan_of, random_scores, write_recipe

CODEC = Codec("top_k", 4, 3, TokenOrder(np.random.default_rng(0).permutation(300).astype(np.int32)))
ROWS = {"train": 11, "eval": 3}
SHARD_ROWS = 4


def manifest(**changes: Any) -> Manifest:
    signal = {"kind": "top_k", "k": 4, "tail_draws": 3, "vocab_size": 300}
    signal["token_order"] = hashlib.sha256(order_bytes(CODEC.order)).hexdigest()
    identity = {"teacher": {"name": "t", "weights": "ab"}, "signal": signal, "data": {"fingerprint": "f"}}
    arguments: dict[str, Any] = {"identity": identity, "shard_rows": SHARD_ROWS, "total_rows": ROWS}
    return Manifest(**{**arguments, **changes})


def key(split: str, row: int) -> bytes:
    return hashlib.blake2b(f"{split} {row}".encode(), digest_size=16).digest()


def scores(split: str, row: int) -> TokenScores:
    return random_scores(300, 4, 3, tokens=1 + row % 5, seed=row + 100 * (split == "eval"))


def cache_rows(split: str, span: range) -> list[dict[str, Any]]:
    """Rows as `mmkd cache build` writes them; every third one has images."""
    return [
        {
            "key": key(split, row),
            "tokens": len(scores(split, row)),
            "blob": CODEC.encode(scores(split, row)),
            "images": [f"{row:064x}"] * (row % 3 == 0),
            "image_tokens": 4 * (row % 3 == 0),
        }
        for row in span
    ]


def fill(folder: Path, wanted: Manifest | None = None, before: Callable[[int], None] | None = None) -> list[Any]:
    """Writes what is missing of a cache and returns which shards that were; `before` is called with how many are."""
    with CacheWriter(folder, wanted or manifest()) as writer:
        write_file(folder / TOKEN_ORDER, order_bytes(CODEC.order))
        missing = writer.manifest.missing()
        for place, (split, number) in enumerate(missing):
            if before is not None:
                before(place)
            rows = cache_rows(split, writer.manifest.span(split, number))
            writer.write(split, number, rows, {}, {"seconds": 0.5})
        writer.finish()
    return missing


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system keeps what a killed process wrote; waiting for the disk, as builds do, takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache that nobody may change."""
    folder = tmp_path_factory.mktemp("finished") / "cache"
    fill(folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A finished cache to damage."""
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def assert_says_what_was_written(cache: Cache) -> None:
    for split, rows in ROWS.items():
        for row in range(rows):
            place = cache.find(key(split, row))
            assert place is not None
            found, expected = cache.scores(place), scores(split, row)
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(np.sort(found.draws), np.sort(expected.draws))
            np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=0.1)


def in_child(work: Callable[[], Any]) -> tuple[Any, int]:
    """What a forked process returns from `work` (an exception as itself, None when it died), and its exit status."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        try:
            result = work()
        except BaseException as error:
            result = error
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    return pickle.loads(answer) if answer else None, status


# Reading


def test_every_sequence_is_found_by_its_key(finished: Path) -> None:
    cache = Cache(finished)
    assert len(cache) == 14
    assert sorted(map(cache.find, (key(s, r) for s in ROWS for r in range(ROWS[s])))) == list(range(14))  # pyright: ignore
    assert_says_what_was_written(cache)


def test_unknown_keys_are_not_found(finished: Path) -> None:
    cache = Cache(finished)
    known = key("train", 5)
    near = [known[:-1] + bytes([known[-1] ^ 1]), bytes([known[0] ^ 128]) + known[1:], known[::-1]]
    for unknown in (bytes(16), b"\xff" * 16, *near):
        assert cache.find(unknown) is None


def test_keys_of_any_bytes_are_told_apart(tmp_path: Path) -> None:
    """Zeros at either end, high bits and common beginnings are bytes like any other."""
    keys = [
        bytes(16),
        bytes(15) + b"\1",
        b"\1" + bytes(15),
        b"\xff" * 16,
        b"\x7f" * 16,
        b"\x80" * 16,
        b"ab" + bytes(14),
    ]
    with CacheWriter(tmp_path, manifest(total_rows={"train": len(keys)}, shard_rows=3)) as writer:
        write_file(tmp_path / TOKEN_ORDER, order_bytes(CODEC.order))
        for split, number in writer.manifest.missing():
            span = writer.manifest.span(split, number)
            rows = [{**row, "key": keys[place]} for place, row in zip(span, cache_rows(split, span), strict=True)]
            writer.write(split, number, rows, {}, {})
    cache = Cache(tmp_path)
    assert [cache.find(one) for one in keys] == list(range(len(keys)))
    assert cache.find(b"ab" + bytes(13) + b"\1") is None


def test_it_opens_as_a_memory_mapped_dataset(finished: Path) -> None:
    before = pa.total_allocated_bytes()
    opened = datasets.load_from_disk(str(finished))
    assert isinstance(opened, DatasetDict)
    assert {split: len(rows) for split, rows in opened.items()} == ROWS
    assert pa.total_allocated_bytes() - before < 1000
    assert len(opened["train"].cache_files) == 3
    assert opened["train"].features == SIGNAL_FEATURES
    for row, found in enumerate(opened["train"]):
        assert isinstance(found, dict)
        assert (found["key"], found["blob"]) == (key("train", row), CODEC.encode(scores("train", row)))
        assert found["tokens"] == 1 + row % 5
        assert (len(found["images"]), found["image_tokens"]) == ((1, 4) if row % 3 == 0 else (0, 0))
    alone = datasets.load_from_disk(str(finished / "eval"))
    assert isinstance(alone, Dataset)
    assert len(alone) == 3


def test_opening_reads_no_blobs_into_memory(tmp_path: Path) -> None:
    big = manifest(total_rows={"train": 8})
    with CacheWriter(tmp_path, big) as writer:
        write_file(tmp_path / TOKEN_ORDER, order_bytes(CODEC.order))
        for number in range(2):
            rows = [{**row, "blob": bytes(1_000_000)} for row in cache_rows("train", big.span("train", number))]
            writer.write("train", number, rows, {}, {})
    before = pa.total_allocated_bytes()
    cache = Cache(tmp_path)
    assert cache.find(key("train", 7)) == 7
    assert pa.total_allocated_bytes() - before < 100_000


def test_it_travels_to_other_processes(finished: Path) -> None:
    cache = Cache(finished)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        dumped = pickle.dumps(cache, protocol)
        assert len(dumped) < 500
        assert_says_what_was_written(pickle.loads(dumped))
    # Forked with the memory maps open, as the data loader's workers are.
    assert in_child(lambda: assert_says_what_was_written(cache)) == (None, 0)


def test_rows_without_an_answer(tmp_path: Path) -> None:
    """A shard may be empty; what was skipped is known by its key where there is one."""
    with CacheWriter(tmp_path, manifest()) as writer:
        write_file(tmp_path / TOKEN_ORDER, order_bytes(CODEC.order))
        for split, number in writer.manifest.missing():
            span = writer.manifest.span(split, number)
            skip = {row: Skipped("bad", key(split, row).hex() if row % 2 else None) for row in span}
            keep = number != 1
            writer.write(split, number, cache_rows(split, span) if keep else [], {} if keep else skip, {})
        writer.finish()
    cache = Cache(tmp_path)
    assert len(cache) == 10
    assert cache.skipped_keys == {key("train", 5), key("train", 7)}
    assert cache.manifest.skipped["train"][4] == Skipped("bad")
    assert cache.find(key("train", 8)) is not None
    assert fill(tmp_path) == []
    opened = datasets.load_from_disk(str(tmp_path))
    assert len(opened["train"]) == 7


def test_nothing_but_empty_shards(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, manifest(total_rows={"train": 4})) as writer:
        write_file(tmp_path / TOKEN_ORDER, order_bytes(CODEC.order))
        writer.write("train", 0, [], {row: Skipped("bad") for row in range(4)}, {})
        writer.finish()
    cache = Cache(tmp_path)
    assert len(cache) == 0
    assert cache.find(key("train", 0)) is None
    assert len(datasets.load_from_disk(str(tmp_path))["train"]) == 0


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    rows = 150

    def opens() -> int:
        # The child has what its parent holds open, which grows with the tests before this one.
        held = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 60, hard))
        cache = Cache(tmp_path)
        return sum(cache.find(key("train", row)) == row and len(cache.scores(row)) > 0 for row in range(rows))

    many = manifest(total_rows={"train": rows}, shard_rows=1)
    with CacheWriter(tmp_path, many) as writer:
        write_file(tmp_path / TOKEN_ORDER, order_bytes(CODEC.order))
        for number in range(rows):
            writer.write("train", number, cache_rows("train", range(number, number + 1)), {}, {})
        writer.finish()
    assert in_child(opens) == (rows, 0)
    opened = datasets.load_from_disk(str(tmp_path / "train"))
    assert opened[149]["key"] == key("train", 149)


# Stopping and going on


def test_the_same_rows_give_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    fill(tmp_path)
    assert contents(tmp_path) == contents(finished)
    assert fill(tmp_path) == []
    assert contents(tmp_path) == contents(finished)


class Killed(BaseException):
    """The end of a process, in this one."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    raise Killed


@contextmanager
def stopping(call: int, end: Callable[[], None]) -> Iterator[None]:
    """Comes to an end right before the n-th fsync or rename."""
    seen = 0

    def counted(function: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call:
                end()
            return function(*arguments, **keywords)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "replace", counted(os.replace))
        yield


def stopped_at_every_stage(work: Callable[[], Any]) -> Iterator[int]:
    """Runs `work`, which is stopped ever later, until it comes to its end."""
    for call in range(1, 1000):
        with stopping(call, stop):
            try:
                work()
            except Killed:
                pass
            else:
                return
        yield call


def killed_at_stages(work: Callable[[], Any], step: int) -> Iterator[int]:
    """The same in processes of their own, which are really killed; every `step`-th stage."""
    for call in range(1, 1000, step):

        def run(call: int = call) -> None:
            with stopping(call, die):
                work()

        error, status = in_child(run)
        if status != signal.SIGKILL:
            assert (error, status) == (None, 0)
            return
        yield call


def test_stopped_at_any_moment_it_goes_on_to_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    expected, stages, written = contents(finished), 0, set()
    folder = tmp_path / "cache"
    for _ in stopped_at_every_stage(lambda: fill(folder)):
        stages += 1
        written.add(len(fill(folder)))
        assert contents(folder) == expected
        shutil.rmtree(folder)
    # A manifest and an order, then a shard, a log and a manifest four times, then the two splits' files and one for
    # both: each is synced, renamed, and its folder synced.
    assert stages >= 3 * (2 + 4 * 2 + 5)
    assert written == {0, 1, 2, 3, 4}


def test_killed_again_and_again_it_still_arrives(finished: Path, tmp_path: Path) -> None:
    """Each attempt dies after a few more calls than the one before, in the same folder."""
    assert sum(1 for _ in killed_at_stages(lambda: fill(tmp_path), step=2)) > 3
    assert contents(tmp_path) == contents(finished)


def test_leftovers_of_a_crash_do_no_harm(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("manifest.json.tmp", "train/00001.arrow.tmp", "train/state.json.tmp", "token_order.npy.tmp"):
        (tmp_path / name).write_bytes(b"half of")
    (tmp_path / "train" / "00002.arrow").write_bytes(b"not in the manifest")
    assert len(fill(tmp_path)) == 4
    assert contents(tmp_path) == contents(finished)


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no teacher cache: it has no manifest.json"):
        Cache(tmp_path)

    def stop(place: int) -> None:
        if place == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, before=stop)
    with pytest.raises(ValueError, match=r"2 of 4 shards are missing. Run `mmkd cache build` again"):
        Cache(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_parts_share_the_shards_among_them(count: int) -> None:
    parts = [manifest(part=(index, count)).planned() for index in range(count)]
    together = [shard for part in parts for shard in part]
    assert len(together) == len(set(together))
    assert set(together) == set(manifest().planned())
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_part_alone_is_refused_and_reports_what_to_do(tmp_path: Path) -> None:
    assert fill(tmp_path, manifest(part=(1, 2))) == manifest().planned()[1::2]
    with pytest.raises(ValueError, match=r"0 of 2 shards are missing.*mmkd cache merge"):
        Cache(tmp_path)
    with pytest.raises(ValueError, match=r"plan.part: \[?\(?0, 2.* here"):
        fill(tmp_path, manifest(part=(0, 2)))


def test_a_log_that_ends_in_half_a_line_is_read_and_continued(folder: Path) -> None:
    """What a writer killed in the middle of a line leaves; damage anywhere else is named."""
    log = folder / LOG
    whole = log.read_bytes()
    entries = read_log(folder)
    assert [(entry["split"], entry["shard"]) for entry in entries] == manifest().planned()
    log.write_bytes(whole + whole.splitlines()[-1][:20])
    assert read_log(folder) == entries
    shard_path(folder, "train", 1).unlink()
    assert fill(folder) == [("train", 1)]
    assert read_log(folder) == [*entries, entries[1]]
    log.write_bytes(whole.replace(b'"seconds": 0.5}', b'"seconds', 1))
    with pytest.raises(ValueError, match=r"Line 1 of .*log.jsonl is damaged .* delete the line"):
        read_log(folder)
    log.unlink()
    assert read_log(folder) == []


def test_a_newer_mmkd_and_other_batches_go_on_with_a_cache(tmp_path: Path) -> None:
    """Both are written down as they were when the build began."""

    def made_by(version: str, batch_tokens: int, **teacher: Any) -> Manifest:
        identity = {**manifest().identity, "mmkd": version, "batch_tokens": batch_tokens}
        return manifest(identity={**identity, "teacher": {"name": "t", "revision": None, "weights": "ab", **teacher}})

    fill(tmp_path, made_by("0.1.0", 8192))
    shard_path(tmp_path, "train", 2).unlink()
    assert fill(tmp_path, made_by("0.2.0", 64)) == [("train", 2)]
    # One folder by another path, or at the Hub: its weights say that it is the same teacher.
    assert fill(tmp_path, made_by("0.2.0", 64, name="/models/t", revision="main")) == []
    found = Manifest.read(tmp_path).identity
    assert (found["mmkd"], found["batch_tokens"], found["teacher"]["name"]) == ("0.1.0", 8192, "t")
    with pytest.raises(ValueError, match=r"something else: teacher.weights: 'cd' here"):
        fill(tmp_path, made_by("0.1.0", 8192, weights="cd"))
    # Without weights to compare, behind a server say, the name is all that is known.
    with pytest.raises(ValueError, match=r"teacher.name: 'u' here, 't' there; teacher.weights: None here"):
        fill(tmp_path, made_by("0.1.0", 8192, weights=None, name="u"))


def test_reasons_are_counted_whatever_numbers_and_names_they_hold() -> None:
    told = ["It has 300 tokens.", "cannot identify 'a.png'", "It has 29 tokens.", "It has 31 tokens."]
    wanted = manifest(skipped={"train": {row: Skipped(reason) for row, reason in enumerate(told)}, "eval": {}})
    assert wanted.skipped_reasons() == [(3, "It has 300 tokens."), (1, "cannot identify 'a.png'")]
    assert wanted.skipped_summary().startswith("4 of 14 rows (28.6%) have no answer of the teacher's: 3 times: It has")


def test_without_posix_locks_a_cache_is_read_and_not_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ValueError, match=r"has no POSIX file locks. Build or download it on Linux, macOS or WSL"):
        fill(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    assert len(Cache(finished)) == 14


# Two writers, and writers of something else


def test_a_second_process_may_not_write_until_the_first_is_gone(finished: Path, tmp_path: Path) -> None:
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:

        def wait(place: int) -> None:
            if place == 1:
                os.write(ready[1], b"!")
                os.read(go[0], 1)

        try:
            fill(tmp_path, before=wait)
        finally:
            os._exit(1)
    assert os.read(ready[0], 1) == b"!"
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"Another process is writing the cache .* split the work with --shard i/n"):
        fill(tmp_path)
    assert contents(tmp_path) == before
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert len(fill(tmp_path)) == 3
    assert contents(tmp_path) == contents(finished)


def test_the_same_process_may_not_write_twice(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, manifest()), pytest.raises(ValueError, match="Another process"):
        fill(tmp_path)
    fill(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": {"name": "t", "weights": "cd"}}, "teacher.weights: 'cd' here, 'ab' there"),
        ({"data": {"fingerprint": "g"}}, "data.fingerprint: 'g' here, 'f' there"),
        ({"more": 1}, "more: 1 here, None there"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_left_alone(folder: Path, change: Any, named: str) -> None:
    before = contents(folder)
    other = manifest()
    with pytest.raises(ValueError, match=f"holds a cache of something else: .*{named}"):
        fill(folder, manifest(identity={**other.identity, **change}))
    for plan, words in (
        ({"shard_rows": 5}, "was begun with cache_shard_rows: 4, and now it is 5"),
        ({"total_rows": {**ROWS, "train": 12}}, "plan.rows.train: 12 here"),
    ):
        with pytest.raises(ValueError, match=words):
            fill(folder, manifest(**plan))
    assert contents(folder) == before
    # Nobody holds the lock after a refusal.
    assert fill(folder) == []


# Damage


def outcome_of(folder: Path, name: str, expected: list[Any]) -> str:
    """What is wrong with how damage to a shard is dealt with, or an empty text."""
    wanted = Manifest.read(folder)
    found = list(damaged_shards(folder, wanted))
    if found not in ([], [("train", 0)]):
        return f"damaged_shards gives {found}"
    try:
        cache = Cache(folder)
        same = [as_lists(cache.scores(row)) for row in range(len(cache))] == expected
        same = same and all(cache.find(key("train", row)) == row for row in range(len(cache)))
    except ValueError as error:
        if name not in str(error):
            return f"reading does not name the shard: {error}"
        same = False
    # A key that changed is simply unknown, so that only the check of whole shards can tell.
    return "" if same or found else "the damage shows when reading, but damaged_shards finds none"


def as_lists(found: TokenScores) -> list[Any]:
    return [part.tolist() for part in (found.ids, found.log_probs, found.draws, found.tail_log_probs)]


def test_no_byte_of_a_shard_can_change_unnoticed(tmp_path: Path) -> None:
    """Each byte in turn: the damage is found and named, or makes no difference; nothing crashes on it."""
    fill(tmp_path, manifest(total_rows={"train": 3}))
    cache = Cache(tmp_path)
    expected = [as_lists(cache.scores(row)) for row in range(len(cache))]
    path = shard_path(tmp_path, "train", 0)
    good = path.read_bytes()
    log = tmp_path / "outcomes"

    def change_from(first: int) -> None:
        faulthandler.disable()
        # What looks like a huge length must not take the machine's memory, nor its time.
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (1 << 26)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with open(log, "a", buffering=1) as outcomes:
            for place in range(first, len(good)):
                signal.alarm(5)
                changed = bytearray(good)
                changed[place] ^= 1 << (place % 8)
                path.write_bytes(changed)
                try:
                    problem = outcome_of(tmp_path, path.name, expected)
                except BaseException as error:
                    problem = f"{type(error).__name__}: {error}"
                outcomes.write(f"{place} {problem}\n")

    place, problems = 0, []
    while place < len(good):
        log.unlink(missing_ok=True)
        _, status = in_child(lambda place=place: change_from(place))
        lines = log.read_text().splitlines()
        problems += [line for line in lines if line.partition(" ")[2]]
        place += len(lines)
        if status:
            problems.append(f"{place} kills the process with signal {status}")
            place += 1
    assert not problems, f"{len(problems)} of {len(good)} bytes:\n" + "\n".join(problems)


def test_a_damaged_checksum_is_damage_too(folder: Path) -> None:
    """What reading complains about, `mmkd cache build` must repair."""
    path = shard_path(folder, "train", 0)
    row: Any = datasets.load_from_disk(str(folder / "train"))[2]
    content, crc32 = path.read_bytes(), row["crc32"].to_bytes(4, "little")
    assert content.count(crc32) == 1
    path.write_bytes(content.replace(crc32, bytes([crc32[0] ^ 1]) + crc32[1:]))
    with pytest.raises(ValueError, match=r"Row 2 of .*train/00000.arrow is damaged: its crc32 does not fit"):
        Cache(folder).scores(2)
    assert list(damaged_shards(folder, manifest_of(folder))) == [("train", 0)]


def manifest_of(folder: Path) -> Manifest:
    return Manifest.read(folder)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flipped blob":
        place = content.index(CODEC.encode(scores("train", 6)))
        path.write_bytes(content[: place + 9] + bytes([content[place + 9] ^ 64]) + content[place + 10 :])
    elif how == "missing":
        path.unlink()
    elif how == "other shard":
        path.write_bytes(path.with_name("00000.arrow").read_bytes())
    else:
        path.write_bytes({"truncated": content[:-100], "empty": b"", "longer": content + b"\0" * 8}[how])


DAMAGES = ["flipped blob", "missing", "other shard", "truncated", "empty", "longer"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_shard_is_named_and_alone_built_again(folder: Path, finished: Path, how: str) -> None:
    path = shard_path(folder, "train", 1)
    damage(path, how)
    assert list(damaged_shards(folder, manifest_of(folder))) == [("train", 1)]
    if how != "other shard":
        with pytest.raises(
            ValueError, match=r"train/00001.arrow (is damaged|cannot be read).*repairs just that shard"
        ):
            assert_says_what_was_written(Cache(folder))
    kept = {file: os.stat(file).st_ino for file in folder.rglob("*.arrow") if file != path}
    assert fill(folder) == [("train", 1)]
    assert contents(folder) == contents(finished)
    assert kept == {file: os.stat(file).st_ino for file in kept}


def test_rows_skipped_in_a_damaged_shard_are_asked_about_again(folder: Path) -> None:
    whole = manifest_of(folder)
    whole.skipped["train"] = {row: Skipped("bad") for row in (3, 4, 7, 8)}
    whole.write(folder)
    damage(shard_path(folder, "train", 1), "truncated")
    with CacheWriter(folder, manifest()) as writer:
        assert writer.manifest.missing() == [("train", 1)]
        assert set(writer.manifest.skipped["train"]) == {3, 8}


def test_an_edited_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    edits: list[Any] = []
    for name in good:
        changed = json.loads(path.read_text())
        changed[name] = {"other": 1} if isinstance(changed[name], dict) else f"{changed[name]}0"
        edits.append(changed)
        edits.append({key: value for key, value in good.items() if key != name})
    edits += [{**good, "extra": 1}, [], None, "manifest", 3]
    texts = [json.dumps(edit) for edit in edits]
    texts += [path.read_text()[:-50], "", "{", '{"format": 1}', "\x00\xff" * 10]
    for text in texts:
        path.write_text(text)
        for use in (Cache, lambda folder: fill(folder)):
            with pytest.raises(ValueError, match=r"manifest.json (was edited|is damaged|has format)"):
                use(folder)
    path.write_bytes(b"\xff\xfe" * 9)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        Cache(folder)
    # Only what it says counts, not how it is laid out.
    path.write_text(json.dumps(good, indent=4, sort_keys=True))
    assert_says_what_was_written(Cache(folder))


def test_a_manifest_of_a_newer_format_says_so(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2, "new": {}}))
    with pytest.raises(ValueError, match=r"has format 2, this mmkd reads 1"):
        Cache(folder)


@pytest.mark.parametrize("how", ["missing", "edited", "truncated", "other"])
def test_a_token_order_that_is_not_the_one_it_was_written_with(folder: Path, finished: Path, how: str) -> None:
    path = folder / TOKEN_ORDER
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    if how == "missing":
        path.unlink()
    else:
        other = order_bytes(TokenOrder(np.arange(300, dtype=np.int32)))
        path.write_bytes({"edited": bytes(content), "truncated": content[:-9], "other": other}[how])
    with pytest.raises(ValueError, match=r"token_order.npy is missing or damaged; run `mmkd cache build` again"):
        Cache(folder)
    assert fill(folder) == []
    assert contents(folder) == contents(finished)


def test_caches_of_single_log_probs_need_no_token_order(tmp_path: Path) -> None:
    wanted = manifest(identity={"signal": {"kind": "log_probs", "k": 1, "tail_draws": 0, "vocab_size": 300}})
    codec = codec_of(tmp_path, wanted)
    assert isinstance(codec, Codec)
    nothing = np.zeros((2, 0), dtype=np.int32)
    one = TokenScores(nothing, np.array([[-0.5], [-7.0]], np.float32), nothing, np.zeros(2, np.float32))
    with CacheWriter(tmp_path, wanted) as writer:
        for split, number in writer.manifest.missing():
            rows = [
                {**row, "tokens": 2, "blob": codec.encode(one)}
                for row in cache_rows(split, wanted.span(split, number))
            ]
            writer.write(split, number, rows, {}, {})
    np.testing.assert_allclose(Cache(tmp_path).scores(3).log_probs, one.log_probs, rtol=1e-3)


def test_a_cache_of_answers_is_no_cache_of_scores(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, manifest(identity={"signal": {"kind": "text"}})) as writer:
        assert writer.manifest.missing()
    with pytest.raises(ValueError, match="holds the teacher's answers, not its scores"):
        Cache(tmp_path)


# A full disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["train/00001.arrow", "manifest.json", "train/state.json", LOG])
def test_a_full_disk_stops_the_build_and_it_goes_on_later(finished: Path, tmp_path: Path, name: str) -> None:
    """Each file in turn is the one that does not fit: written to a device that is always full."""

    # The log is the only file that is added to, and not replaced.
    written = tmp_path / (name if name == LOG else f"{name}.{os.getpid()}.tmp")

    def disk_is_full(place: int) -> None:
        if place == 1:
            written.unlink(missing_ok=True)
            written.symlink_to("/dev/full")

    with pytest.raises(ValueError, match=r"cannot be written: No space left on device\. Make room"):
        fill(tmp_path, before=disk_is_full)
    assert not list(tmp_path.rglob("*.tmp"))
    if name == LOG:
        written.unlink()
    assert len(fill(tmp_path)) <= 3
    assert contents(tmp_path) == contents(finished)


def test_a_file_that_fits_only_in_part_is_not_left_behind(finished: Path, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in finished.rglob("*.arrow"))

    def fill_a_small_disk() -> list[str]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1))
        try:
            fill(tmp_path)
        except ValueError as error:
            return [str(error)]
        return []

    (error,), status = in_child(fill_a_small_disk)
    assert status == 0
    assert f"({largest:,} bytes) cannot be written: File too large" in error
    assert not list(tmp_path.rglob("*.tmp"))
    fill(tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_a_folder_that_cannot_be_made_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ValueError, match=str(folder)):
            fill(folder)


# The same with a real teacher


@pytest.fixture(scope="module")
def plan(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A build of 32 texts by the tiny teacher, which is loaded already."""
    folder = tmp_path_factory.mktemp("plan")
    data = {"train": Dataset.from_dict({"text": sentences(24)}), "eval": Dataset.from_dict({"text": sentences(8, 7)})}
    recipe = write_recipe(folder, tiny, data, teacher_top_k=4, cache_tail_draws=3)
    plan = plan_of(recipe)
    build(plan, Console(quiet=True))
    return plan


def build_in(plan: Plan, folder: Path) -> Path:
    empty = Manifest(plan.manifest.identity, plan.manifest.shard_rows, plan.manifest.total_rows)
    plan.folder, plan.manifest = folder, empty
    return build(plan, Console(quiet=True))


def test_a_build_killed_at_any_moment_continues_to_the_same_cache(plan: Plan, tmp_path: Path) -> None:
    expected = contents(plan.folder)
    folder, stages = tmp_path / "cache", 0
    for _ in killed_at_stages(lambda: build_in(plan, folder), step=5):
        stages += 1
        build_in(plan, folder)
        assert contents(folder) == expected
        shutil.rmtree(folder)
    assert stages > 5


def test_building_again_repairs_only_what_is_damaged(plan: Plan, tmp_path: Path) -> None:
    folder = build_in(plan, tmp_path / "cache")
    expected, log = contents(folder), (folder / LOG).read_text().splitlines()
    path = shard_path(folder, "train", 2)
    content = bytearray(path.read_bytes())
    content[-200] ^= 2
    path.write_bytes(content)
    (folder / TOKEN_ORDER).unlink()
    build_in(plan, folder)
    assert contents(folder) == expected
    (line,) = (folder / LOG).read_text().splitlines()[len(log) :]
    assert {name: json.loads(line)[name] for name in ("split", "shard")} == {"split": "train", "shard": 2}
    assert Cache(folder).find(bytes(16)) is None
