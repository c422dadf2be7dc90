"""What a build would cost, from a timed sample: tokens, bytes and hours, before they are spent."""

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mmkd.cache.side_files import HEAD
from mmkd.errors import UserError
from mmkd.units import readable_size, with_noun

from .sequences import Sequences, TokenSequence, UnusableRow, usable

if TYPE_CHECKING:
    from .build_plan import ScorePlan

_SAMPLE_ROWS = 32


def report_estimate(plan: "ScorePlan", console: Console) -> None:
    """Asks the teacher about some sequences spread over the data, and prints what all of them would take."""
    sequences, total = plan.prepared.splits["train"], sum(plan.manifest.total_rows.values())
    count = min(_SAMPLE_ROWS, len(sequences))
    places = [index * len(sequences) // count for index in range(count)]
    results = [result for place in places for _, result in usable(sequences, range(place, place + 1))]
    asked = [result for result in results if isinstance(result, TokenSequence)]
    if not asked:
        reason = next(
            (result.reason for result in results if isinstance(result, UnusableRow)), "no token is supervised"
        )
        raise UserError(f"None of the {count} sampled rows can be read; the first: {reason}")
    # The first question loads the teacher and warms it up.
    plan.scorer.score(asked[:1], lambda tokens: None)
    start = time.perf_counter()
    answers = plan.scorer.score(asked, lambda tokens: None)
    seconds = (time.perf_counter() - start) / len(asked)
    scores = [answer for answer in answers if not isinstance(answer, UnusableRow)]
    if not scores:
        reason = next(answer.reason for answer in answers if isinstance(answer, UnusableRow))
        raise UserError(
            f"The teacher refused all {len(asked)} sampled rows, so nothing can be estimated; the first: {reason}"
        )
    supervised = sum(len(score) for score in scores)
    encoded = sum(len(plan.encoded(score)) for score in scores)
    read = sum(len(sequence.ids) for sequence in asked) / len(asked)
    tokens, labels = read * total, supervised / len(scores) * total
    counted = [split for split in plan.prepared.splits.values() if isinstance(split, Sequences)]
    if counted:
        tokens = sum(split.tokens for split in counted)
        labels = sum(split.supervised_tokens for split in counted)
    once = len(plan.files().get(HEAD, b""))
    hours = seconds / read * tokens / 3600
    workers = plan.arguments.cache_workers if plan.arguments.engine == "ray" else (plan.arguments.part or (0, 1))[1]
    table = Table(title="mmkd cache build: dry run", show_header=False)
    for name, value in (
        ("teacher", plan.manifest.identity["teacher"]["name"]),
        ("sequences", f"{total:,} in {with_noun(-(-total // plan.manifest.shard_rows), 'shard')} or more"),
        ("tokens to read", f"{tokens:,.0f}"),
        ("supervised tokens", f"{labels:,.0f}"),
        ("bytes per supervised token", f"{encoded / supervised:.1f}"),
        ("size of the cache", readable_size(encoded / supervised * labels + once)),
        *([("of which the head", readable_size(once))] if once else []),
        ("speed", f"{read / seconds:,.0f} tokens/s over {len(asked)} sampled sequences"),
        ("hours", f"{hours:.2f}" + (f", {hours / workers:.2f} with {workers} like this one" if workers > 1 else "")),
    ):
        table.add_row(name, value)
    console.print(table)
