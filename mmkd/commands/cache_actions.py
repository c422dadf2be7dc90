"""What `mmkd cache` does, as functions that print."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmkd.cache.cache_card import mass_kept
from mmkd.cache.embedding_codec import EMBEDDINGS
from mmkd.cache.hub import local_cache, push_cache
from mmkd.cache.kept_answers import chosen_by, read_summary, summary_lines
from mmkd.cache.manifest import Manifest
from mmkd.cache.merge import merge_parts
from mmkd.cache.side_files import HEAD, SIDE_FILES, damage, damaged_side_files
from mmkd.cache.store import Cache, damaged_shards, read_log, shard_path
from mmkd.capture.build import build
from mmkd.capture.build_estimate import report_estimate
from mmkd.capture.build_plan import ScorePlan, check_place, make_plan
from mmkd.capture.fidelity import measure_fidelity
from mmkd.capture.generate import DATA_RECIPE, describe_answers
from mmkd.errors import UserError
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.recipe import Recipe, Run
from mmkd.shipped import list_recipes
from mmkd.teachers.cached import SIGNALS
from mmkd.training.method import METHODS, Method, learns_from
from mmkd.units import readable_size

_MEASURED = ("top_k", "hidden")
"""Kinds whose distance to the live teacher is measured."""


def build_cache(recipe: Recipe) -> int:
    """Builds the cache of a recipe, or those of its teachers, and prints the folders; with dry_run, what they cost.

    A method that does not predict tokens has a cache of its own. Raises UserError for one that has none.
    """
    run, method = recipe.parse(), METHODS[recipe.method]
    if method.predicts != "tokens":
        return _build_own(run, method)
    plans = []
    for part in _runs_with_cache(run):
        check_place(part)
        plans.append(make_plan(part))
    for plan in plans:
        if run.arguments.dry_run:
            if not isinstance(plan, ScorePlan):
                raise UserError(
                    "A dry run estimates scoring; how long answers to generate get is not known before.",
                    because="not built",
                )
            report_estimate(plan, Console())
            continue
        print(build(plan, Console(stderr=True)))
        if run.cache.part is not None:
            index, count = run.cache.part
            print(
                f"Part {index} of {count} is done. With all parts in one place: mmkd cache merge {_cache_of(plan.run)}"
            )
    return 0


def _build_own(run: Run, method: Method) -> int:
    if method.build_cache is None:
        raise UserError(
            f"Method {method.name} predicts {method.predicts} and keeps nothing of its teacher on disk.",
            because="not built",
        )
    if run.arguments.dry_run:
        assert method.dry_run is not None
        method.dry_run(run, Console())
    else:
        print(method.build_cache(run))
    return 0


def describe_cache(name: str) -> int:
    """Prints what a cache is, how large, how much of the teacher's mass it keeps, and what it cost."""
    folder = local_cache(name)
    manifest = Manifest.read(folder)
    identity, entries = manifest.identity, [entry for shards in manifest.shards.values() for entry in shards.values()]
    tokens, size = sum(entry.tokens for entry in entries), sum(entry.bytes for entry in entries)
    missing = len(manifest.missing())
    unit = "embedding" if identity["signal"]["kind"] == EMBEDDINGS else "token"
    held = "embeddings" if unit == "embedding" else "supervised tokens"
    # Shards that were built twice cost twice.
    cost = sum(line["seconds"] for line in read_log(folder))
    rows: list[tuple[str, str]] = [
        ("teacher", " ".join(str(part) for part in identity["teacher"].values() if part)),
        ("data", f"{identity['data']['name']} ({identity['data']['license'] or 'licence not stated'})"),
        ("signal", ", ".join(f"{key} {value}" for key, value in identity["signal"].items() if key not in SIDE_FILES)),
        *[(split, _progress(manifest, split)) for split in manifest.shards],
        ("skipped rows", manifest.skipped_summary() if manifest.skipped_rows() else "0"),
        (held, f"{tokens:,}"),
        ("size", f"{readable_size(size)}, {size / max(1, tokens):.1f} bytes per {unit}"),
        ("cost", f"{cost / 3600:.2f} hours, {tokens / max(cost, 1e-9):,.0f} {held}/s"),
        ("state", f"{missing} of {len(manifest.planned())} shards are missing" if missing else "complete"),
    ]
    if identity["signal"]["kind"] == "top_k" and not missing and manifest.part is None:
        rows.insert(3, ("mass kept by the top-k", f"{mass_kept(Cache(folder)):.4f}"))
    if (folder / HEAD).is_file():
        rows.append(("head, once", readable_size((folder / HEAD).stat().st_size)))
    if identity["signal"]["kind"] == "text" and (folder / DATA_RECIPE).is_file():
        rows.append(("answers", describe_answers(folder, manifest)))
        rows += _kept(folder)
    if manifest.part is not None:
        rows.append(("part", f"{manifest.part[0]} of {manifest.part[1]}"))
    table = Table(title=str(folder), show_header=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return 0


def _kept(folder: Path) -> list[tuple[str, str]]:
    """Which answers of a folder were kept, and what a chat API has counted for them."""
    summary, log = read_summary(folder), read_log(folder)
    rows = [] if summary is None else [("kept", "\n".join([*summary_lines(summary), chosen_by(summary)]))]
    read, written = (sum(line.get(name, 0) for line in log) for name in ("prompt_tokens", "completion_tokens"))
    if read or written:
        rows.append(("tokens of the API", f"{read:,} read, {written:,} written"))
    return rows


def _progress(manifest: Manifest, split: str) -> str:
    """How much of a split is there: sequences one by one, of answers those to a prompt together."""
    shards, total = manifest.shards[split], manifest.total_rows[split]
    held = sum(entry.rows for entry in shards.values())
    kind = manifest.identity["signal"]["kind"]
    if kind != "text":
        return f"{held:,} of {total:,} {'pairs' if kind == EMBEDDINGS else 'sequences'}"
    done = {row for number in shards for row in manifest.span(split, number)}
    return f"{held:,} answers to {len(done - manifest.skipped[split].keys()):,} of {total:,} prompts"


@dataclass(frozen=True)
class CacheTarget:
    """A cache to look after: its own name, or that of the recipe that made it."""

    cache: str
    run: Run | None

    @classmethod
    def of(cls, name: str, flags: Sequence[str], known: Sequence[str]) -> "CacheTarget":
        """The cache with a name, or of a recipe, given by path or as a shipped one, with the flags after it.

        Raises UserError for flags after a cache, for which there are only those in `known`.
        """
        if name.endswith((".yaml", ".yml")) or f"{name}.yaml" in list_recipes("trainers"):
            run = recipe_of(name, flags).parse()
            return cls(_cache_of(run), run)
        if flags:
            near = difflib.get_close_matches(flags[0].partition("=")[0], known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"it takes {' and '.join(known)}."
            raise UserError(f"For a cache without its recipe, this command does not know {flags[0]!r}; {advice}")
        return cls(name, None)


def verify_cache(target: CacheTarget, rows: int) -> int:
    """Checks a cache's checksums; of a recipe also KL(live || cache) on some rows. Exit status 1 when damaged."""
    folder = local_cache(target.cache)
    manifest = Manifest.read(folder)
    damaged = list(damaged_shards(folder, manifest))
    for split, number in damaged:
        print(f"{shard_path(folder, split, number)} is damaged; `mmkd cache build` repairs just that shard.")
    total = sum(len(shards) for shards in manifest.shards.values())
    print(f"{total - len(damaged)} of {total} shards are intact.")
    beside = damaged_side_files(folder, manifest)
    for path in beside:
        print(damage(path))
    if damaged or beside:
        return 1
    if manifest.identity["signal"]["kind"] not in _MEASURED:
        return 0
    if target.run is None:
        print("For the distance to the live teacher, give the recipe: mmkd cache verify RECIPE.yaml")
        return 0
    fidelity = measure_fidelity(target.run, Cache(folder), rows)
    print(
        f"KL(live || cache) on {fidelity['rows']} sequences, {fidelity['tokens']:,} tokens: mean "
        f"{fidelity['kl_live_cache']:.2e} nats, largest {fidelity['kl_live_cache_max']:.2e}"
    )
    return 0


def publish_cache(target: CacheTarget, repo_id: str, private: bool, rows: int) -> int:
    """Publishes a cache on the Hub; of a recipe, with KL(live || cache) on its card."""
    folder = Path(target.cache)
    kind = Manifest.read(folder).identity["signal"]["kind"]
    fidelity = None
    if target.run is not None and kind in _MEASURED:
        fidelity = measure_fidelity(target.run, Cache(folder), rows)
    method = None if kind not in SIGNALS else learns_from(SIGNALS[kind])
    print(push_cache(folder, repo_id, private=private, fidelity=fidelity, method=method))
    return 0


def merge_cache(target: str, parts: Sequence[str]) -> int:
    """Joins the parts of a build; without their names, those that lie beside the folder to write."""
    folder = Path(target)
    folders = [Path(part) for part in parts] or sorted(folder.parent.glob(f"{folder.name}.part-*-of-*"))
    merge_parts(folder, folders)
    print(folder)
    return 0


def _runs_with_cache(run: Run) -> list[Run]:
    """The run itself; of several teachers, the runs of those who have weights and a cache to write."""
    if run.arguments.teachers is None:
        return [run]
    runs = [part for part in run.by_teacher().values() if part.arguments.teacher and part.arguments.teacher_cache]
    if not runs:
        raise UserError("None of the `teachers` has both a teacher and a teacher_cache, so there is nothing to build.")
    return runs


def _cache_of(run: Run) -> str:
    if run.arguments.teachers is not None:
        raise UserError(
            "The recipe has several teachers; give this command the folder of the cache of one of them.",
            because="not built",
        )
    if run.arguments.teacher_cache is None:
        raise UserError("The recipe names no teacher_cache.")
    return run.arguments.teacher_cache
