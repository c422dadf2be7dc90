"""Checks of `mmkd doctor` on rows: images, supervision and lengths."""

import json
from collections import Counter

from mmkd.capture.sequences import TokenSequence, UnusableRow
from mmkd.preparation.fit import lacking_positions
from mmkd.preparation.supervision import TokenCounts, kept
from mmkd.recipe.recipe import Run
from mmkd.teachers.several import SeveralTeachers
from mmkd.training.method import METHODS
from mmkd.training.teaching import check_several

from .facts import Finding, Rendered, Sample, Side, finding_of, listed

# What, set differently, makes the same pixels mean something else.
PIXEL_KEYS = {"do_normalize", "do_rescale", "image_mean", "image_std", "rescale_factor"}


def images(student: Rendered, teacher: Rendered | None, sample: Sample, run: Run) -> list[Finding]:
    """Whether images can be read, and whether they become as many tokens on both sides."""
    skip = run.arguments.teacher_cache is not None and run.cache.on_error == "skip"
    findings = unusable_rows(sample, student, "warning" if skip else "problem")
    rows = enumerate(student.sequences)
    ours = {row: sequence for row, sequence in rows if isinstance(sequence, TokenSequence) and sequence.images}
    counts = sorted(sequence.image_tokens for sequence in ours.values())
    blind = [row for row, sequence in ours.items() if not sequence.image_tokens]
    if blind and student.image_token is not None:
        findings.append(
            Finding(
                "problem",
                "images",
                f"{len(blind)} of {len(ours)} rows have images but no image token, the first of them row {blind[0]}: "
                "the template drops their images.",
                "Give the messages a content of parts with {type: image}, or use a template that places images.",
            )
        )
    if teacher is None:
        return findings or [Finding("ok", "images", f"{len(ours)} rows have {_range(counts)} image tokens each.")]
    theirs = dict(enumerate(teacher.sequences))
    failed = [
        (row, result.reason) for row, result in theirs.items() if row in ours and isinstance(result, UnusableRow)
    ]
    if failed:
        findings.append(
            Finding(
                "problem",
                "images",
                f"The teacher's processor cannot prepare {len(failed)} of {len(ours)} rows; row {failed[0][0]}: "
                f"{failed[0][1]}",
                "Use a teacher whose processor reads these rows, or another template (chat_template_path).",
            )
        )
    unequal = [
        (row, ours[row].image_tokens, sequence.image_tokens)
        for row, sequence in theirs.items()
        if row in ours and isinstance(sequence, TokenSequence) and sequence.image_tokens != ours[row].image_tokens
    ]
    if unequal:
        row, mine, other = unequal[0]
        text = f"{len(unequal)} of {len(ours)} rows have other numbers of image tokens: row {row} has {mine} with "
        text += f"the student's processor, {other} with the teacher's."
        # Only llava_kd has the key.
        how = vars(run.training).get("visual_tokens", "same")
        if how != "same":
            return [*findings, Finding("ok", "images", f"{text} They are compared by visual_tokens: {how}.")]
        advice = "Use a teacher with the same patches and image sizes, or give both processors the same size."
        findings.append(Finding("problem", "images", f"{text} Their tokens cannot be compared.", advice))
    local = run.arguments.teacher_server is None
    findings += _pixels(student, teacher) if local and not unequal else []
    equal = Finding(
        "ok", "images", f"{len(ours)} rows have {_range(counts)} image tokens each, the same on both sides."
    )
    return findings or [equal]


def routes(sample: Sample, run: Run) -> list[Finding]:
    """How many of the sample's rows name each of several teachers. Raises UserError where they name others."""
    column, teachers = run.arguments.teacher_column, run.arguments.teachers
    assert isinstance(teachers, dict)
    assert column is not None
    several = SeveralTeachers(dict.fromkeys(teachers), column=column)
    check_several(METHODS[run.arguments.method].trainer, several, run.training, sample.rows)
    named = Counter(sample.rows["train"][column])
    message = (
        f"Of {named.total()} rows, by {column}: " + ", ".join(f"{named[name]} for {name}" for name in teachers) + "."
    )
    if all(named[name] for name in teachers):
        return [Finding("ok", "routes", message)]
    advice = "The run is refused if no later row names a teacher either: look at the names."
    return [Finding("warning", "routes", message, advice)]


def unusable_rows(sample: Sample, rendered: Rendered, severity: str) -> list[Finding]:
    """A finding about rows that cannot be decoded or prepared, if there are any."""
    bad = dict(sample.unreadable)
    # The sequences are those of the rows that could be decoded.
    readable = (row for row in range(len(bad) + len(rendered.sequences)) if row not in bad)
    for row, sequence in zip(list(readable), rendered.sequences, strict=True):
        if isinstance(sequence, UnusableRow):
            bad[row] = sequence.reason
    if not bad:
        return []
    total = len(sample.unreadable) + len(rendered.sequences)
    reasons = listed(f"row {row}: {reason.splitlines()[0]}" for row, reason in sorted(bad.items()))
    return [
        Finding(
            severity,
            "images",
            f"{len(bad)} of {total} rows cannot be read (numbers from 0, after filters and shuffle): {reasons}",
            "Correct them. on_bad_row: skip leaves such rows out of training, on_error: skip out of a cache.",
        )
    ]


def _pixels(student: Rendered, teacher: Rendered) -> list[Finding]:
    ours, theirs = (
        json.loads(side.prepared.processing_class.image_processor.to_json_string()) for side in (student, teacher)
    )
    ignored = {"image_processor_type", "processor_class"}
    different = [key for key in sorted({*ours, *theirs} - ignored) if ours.get(key) != theirs.get(key)]
    if not different:
        return []
    return [
        Finding(
            "problem" if PIXEL_KEYS & {*different} else "warning",
            "images",
            "A local teacher is given the student's pixels, but its own image processor differs: "
            + listed(f"{key} is {theirs.get(key)} and not {ours.get(key)}" for key in different),
            "Give the student the teacher's image processor (preprocessor_config.json).",
        )
    ]


def lengths(rendered: Rendered, run: Run, sides: list[Side]) -> list[Finding]:
    """The share of supervised tokens, and what max_length costs."""
    rows = rendered.usable
    counts = TokenCounts.count([sequence.supervised for sequence in rows], run.training)
    findings = [
        Finding(
            "problem" if counts.silent == counts.rows else "warning" if counts.silent else "ok",
            "supervision",
            f"{counts.size}.",
            "Check the completion and assistant masks of the data." if counts.silent else "",
        )
    ]
    return [*findings, _truncation(counts, run), *_positions(rows, run, sides), *_lost_images(rendered, run)]


def _truncation(counts: TokenCounts, run: Run) -> Finding:
    message = f"{counts.cutting[0].upper()}{counts.cutting[1:]}"
    if counts.max_length is None:
        training = run.training
        how = "no max_length" if training.max_length is None else f"packing_strategy {training.packing_strategy}"
        return Finding("ok", "length", f"{message} ({how}).")
    if not counts.cut:
        return Finding("ok", "length", f"{message}.")
    costly = max(counts.lost_tokens / counts.tokens, counts.lost_supervised / max(1, counts.supervised)) >= 0.01
    return Finding(
        "problem" if counts.emptied == counts.rows else "warning" if costly else "ok",
        "length",
        f"{message}.",
        f"Raise max_length (to {counts.longest} for all of this sample), or filter long rows in the data recipe.",
    )


def _positions(rows: list[TokenSequence], run: Run, sides: list[Side]) -> list[Finding]:
    """Findings about sequences that are longer than a model is made for."""
    training = run.training
    findings: list[Finding] = []
    longest = max(len(sequence.ids) for sequence in rows)
    if training.max_length is not None:
        # Packs that ignore where rows begin are read as one sequence.
        wrapped = training.packing and training.packing_strategy == "wrapped"
        longest = training.max_length if wrapped else min(longest, training.max_length)
    for side in sides:
        misfits = lacking_positions(side.role, side.config, longest, training.max_length)
        findings += [finding_of(misfit, "length") for misfit in misfits]
    return findings


def _lost_images(rendered: Rendered, run: Run) -> list[Finding]:
    """A finding when max_length cuts image tokens off, which no vision model survives."""
    lost = [
        row
        for row, sequence in enumerate(rendered.sequences)
        if isinstance(sequence, TokenSequence)
        and sequence.images
        and int((sequence.ids[kept(len(sequence.ids), run.training)] == rendered.image_token).sum())
        < sequence.image_tokens
    ]
    if not lost:
        return []
    return [
        Finding(
            "problem",
            "length",
            f"max_length {run.training.max_length} cuts image tokens off {len(lost)} rows (row {lost[0]} first): "
            "their images and tokens no longer fit together.",
            "Raise max_length, or set it to null.",
        )
    ]


def _range(counts: list[int]) -> str:
    if not counts or counts[0] == counts[-1]:
        return str(counts[0] if counts else 0)
    return f"{counts[0]} to {counts[-1]}"
