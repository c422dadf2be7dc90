"""Checks of `mmkd doctor` on tokens: vocabulary, special tokens, templates, images, supervision and lengths."""

from collections import Counter
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from trl.data_utils import is_conversational

from mmkd.alignment.vocab import shared_tokens
from mmkd.capture.sequences import TokenSequence
from mmkd.preparation.fit import answer_ends, lacking_tokens
from mmkd.recipe.recipe import Run
from mmkd.training.method import METHODS

from .facts import Finding, Rendered, Sample, Side, clones_template, finding_of, listed

# Rows whose rendering by both sides is compared.
COMPARED = 32
# Tokens shown on each side of a difference.
CONTEXT = 4


def compares_tokens(run: Run) -> bool:
    """Whether the run's method compares distributions over one vocabulary, as most do."""
    return METHODS[run.arguments.method].one_vocabulary


def vocabulary(student: Side, teacher: Side, rendered: Rendered | None) -> list[Finding]:
    """Whether an id means the same to both, and which tokens are compared."""
    name, counts = "vocabulary", Counter() if rendered is None else rendered.counts[0]
    renamed = _renamed(student, teacher)
    if renamed:
        used = [index for index, _, _ in renamed if counts[index]]
        names = listed(f"{index} is {ours} to the student, {theirs} to the teacher" for index, ours, theirs in renamed)
        return [
            Finding(
                "problem",
                name,
                f"{len(renamed)} added tokens differ although their ids lie among the shared ones: "
                f"{names}. The sample uses {len(used)} of them"
                + (f", {sum(counts[index] for index in used):,} times." if used else "."),
                "Training refuses this. All other tokens are the same, so give the student the teacher's tokenizer: "
                f"copy the tokenizer files of {teacher.name} over those in a copy of {student.name}.",
            )
        ]
    tokens = shared_tokens(student.tokenizer, teacher.tokenizer, student.rows, teacher.rows)
    padding = [f"{side.rows - tokens:,} of the {side.role}'s {side.rows:,}" for side in (student, teacher)]
    left_out = student.rows > tokens or teacher.rows > tokens
    same = Finding(
        "ok",
        name,
        f"{tokens:,} tokens are the same to both and compared"
        + (f"; rows left out (padding, or one side's own): {' and '.join(padding)}." if left_out else "."),
    )
    beyond = [] if rendered is None else _unknown_tokens(rendered, tokens, teacher)
    return beyond or [same]


def is_related(student: Side, teacher: Side) -> bool:
    """Whether the tokenizers differ in added tokens at most, so that text splits alike."""
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    added = {*student.tokenizer.get_added_vocab(), *teacher.tokenizer.get_added_vocab()}
    return {item for item in ours.items() if item[0] not in added} == {
        item for item in theirs.items() if item[0] not in added
    }


def _renamed(student: Side, teacher: Side) -> list[tuple[int, str, str]]:
    """(id, the student's token, the teacher's) where only added tokens differ and stand among shared ids."""
    if not is_related(student, teacher):
        return []
    ours = {index: token for token, index in student.tokenizer.get_vocab().items()}
    theirs = {index: token for token, index in teacher.tokenizer.get_vocab().items()}
    last = max((index for index, token in ours.items() if theirs.get(index) == token), default=-1)
    different = [index for index in sorted({*ours, *theirs}) if ours.get(index) != theirs.get(index)]
    return [(index, _name(ours.get(index)), _name(theirs.get(index))) for index in different if index < last]


def _unknown_tokens(rendered: Rendered, tokens: int, teacher: Side) -> list[Finding]:
    everything, supervised = rendered.counts
    unknown = sorted(index for index in everything if index >= tokens)
    if not unknown:
        return []
    judged = [index for index in unknown if supervised[index]]
    worst = judged or [index for index in unknown if index >= teacher.rows]
    text = listed(f"{show(rendered.tokenizer, index)} ({index})" for index in worst or unknown)
    return [
        Finding(
            "problem" if worst else "warning",
            "vocabulary",
            f"The sample has {sum(everything[index] for index in unknown):,} tokens that the teacher does not know, "
            f"{sum(supervised[index] for index in unknown):,} of them supervised: {text}. "
            f"{tokens:,} tokens are compared.",
            "Use a template and special tokens that the teacher has too (chat_template_path, eos_token).",
        )
    ]


def stops_after_training(student: Side, rendered: Rendered | None, run: Run) -> set[int]:
    """The ids at which the trained student's generation will end: transformers adds its tokenizer's EOS to its own."""
    if rendered is None:
        return student.stops()
    eos = rendered.tokenizer.eos_token_id
    # Training adds what most answers end with.
    sequences = ((sequence.ids, sequence.supervised) for sequence in rendered.usable)
    own = {*answer_ends(sequences, rendered.tokenizer), eos} - {None}
    return own if clones_template(run.training) else student.stops() | own


def special_tokens(student: Side, teacher: Side | None, rendered: Rendered | None, run: Run) -> list[Finding]:
    """The special ids of both sides, and whether the student stops where the teacher does."""
    name = "special tokens"
    ours = student.tokenizer if rendered is None else rendered.tokenizer
    stops = stops_after_training(student, rendered, run)
    lines = [_specials("student", student.tokenizer, stops)]
    if teacher is not None:
        lines.append(_specials("teacher", teacher.tokenizer, teacher.stops()))
    findings = [Finding("ok", name, "\n".join(lines))]
    if ours.eos_token is None:
        return [
            *findings,
            Finding(
                "problem",
                name,
                "The student's tokenizer has no EOS token, so nothing tells the student where an answer ends.",
                "Set eos_token to the token that ends a turn in the chat template.",
            ),
        ]
    if teacher is not None:
        theirs = teacher.tokenizer
        teacher_stops = {theirs.convert_ids_to_tokens(index) for index in teacher.stops()}
        if not teacher_stops & {*ours.convert_ids_to_tokens(sorted(stops))}:
            findings.append(
                Finding(
                    "warning",
                    name,
                    f"The student may never stop: its EOS {ours.eos_token!r} is none of the tokens at which the "
                    f"teacher stops ({listed(map(repr, sorted(map(str, teacher_stops))))}), so the teacher hardly "
                    "ever says it.",
                    f"Set eos_token: {theirs.eos_token!r}, or chat_template_path: {teacher.name}.",
                )
            )
        elif theirs.eos_token is not None and ours.convert_tokens_to_ids(theirs.eos_token) not in stops:
            findings.append(
                Finding(
                    "warning",
                    name,
                    f"The student may never stop: the teacher ends its turns with {theirs.eos_token!r}, which does "
                    "not stop the student.",
                    f"Set eos_token: {theirs.eos_token!r}, or chat_template_path: {teacher.name}.",
                )
            )
    if rendered is not None:
        needed = {} if run.training.padding_free else {"the padding token": ours.pad_token_id}
        rows, highest = student.prepared_as(rendered, run).rows, max(rendered.counts[0], default=-1)
        findings += [finding_of(misfit, name) for misfit in lacking_tokens("student", rows, highest, needed)]
    if rendered is not None and ours.pad_token_id == ours.eos_token_id:
        findings.append(_padding_with_eos(rendered))
    return findings


def _specials(role: str, tokenizer: Any, stops: Iterable[int]) -> str:
    tokens = ("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("pad", tokenizer.pad_token_id)
    names = [f"{kind} {_token(tokenizer, index) if index is not None else 'none'}" for kind, index in tokens]
    ends = ", ".join(_token(tokenizer, index) for index in sorted(stops)) or "nothing"
    return f"{role}: {', '.join(names)}; stops at {ends}"


def _padding_with_eos(rendered: Rendered) -> Finding:
    """Whether a batch keeps the EOS of its rows supervised when padding is the same token."""
    eos = rendered.tokenizer.eos_token_id
    by_length = sorted(rendered.usable, key=lambda sequence: len(sequence.ids))
    rows = [by_length[0], by_length[-1]]
    before = sum(int(((sequence.ids == eos) & sequence.supervised).sum()) for sequence in rows)
    if rendered.prepared.vision:
        batch = rendered.prepared.collator([dict(sequence.example) for sequence in rows])
    else:
        examples = [{"input_ids": sequence.ids.tolist(), "labels": _labels(sequence).tolist()} for sequence in rows]
        batch = rendered.prepared.collator(examples)
    after = int((batch["labels"][:, 1:] == eos).sum())
    if after == before:
        return Finding("ok", "special tokens", "Padding is EOS; a batch masks the padding and keeps the EOS of rows.")
    return Finding(
        "problem",
        "special tokens",
        f"Padding is EOS, and in a batch {after} EOS tokens are supervised where its rows have {before}.",
        "Set pad_token to another token of the vocabulary.",
    )


def end_of_sequence(student: Side, rendered: Rendered, sample: Sample, run: Run) -> list[Finding]:
    """Whether the student is taught to stop: what follows the last supervised words, and whether it is supervised."""
    name, tokenizer = "end of answer", rendered.tokenizer
    stops = stops_after_training(student, rendered, run)
    taught, other, masked, absent = _ends(rendered, stops)
    total, findings = taught.total() + other.total() + masked.total() + absent, []
    # Of messages; plain text does not go through a template.
    templated = is_conversational(dict(next(iter(sample.rows["train"]))))
    unless = "warning" if taught else "problem"
    if taught:
        ends = listed(_token(tokenizer, index) for index in taught)
        known = student.stops() | {tokenizer.eos_token_id}
        added = listed(_token(tokenizer, index) for index in taught if index not in known)
        findings.append(
            Finding(
                "ok",
                name,
                f"{ends} is supervised in {taught.total()} of {total} rows."
                + (f" Training lets the student's generation stop at {added}." if added else ""),
            )
        )
    if other:
        ends = listed(repr(tokenizer.convert_ids_to_tokens(index)) for index in other)
        findings.append(
            Finding(
                "warning",
                name,
                f"The student may never stop: {other.total()} of {total} rows end with {ends}, which does not end its "
                f"generation (it stops at {listed(_token(tokenizer, index) for index in sorted(stops))}).",
                f"Set eos_token: {tokenizer.convert_ids_to_tokens(next(iter(other)))!r}.",
            )
        )
    if masked:
        ends = listed(_token(tokenizer, index) for index in masked)
        findings.append(
            Finding(
                unless,
                name,
                f"{ends} follows the answer in {masked.total()} of {total} rows but is not supervised: the student "
                "is not taught to stop.",
                "With assistant_only_loss, put the token inside {% generation %} ... {% endgeneration %} of the chat "
                "template (chat_template_path), or take these marks out of it: the turns are then found without them.",
            )
        )
    if absent:
        findings.append(
            Finding(
                unless,
                name,
                f"{absent} of {total} rows end without EOS or an end-of-turn token: the student is not taught to "
                "stop.",
                "Use a chat template that ends a turn with a token of its own, and set eos_token to it."
                if templated
                else "Plain text ends with the tokenizer's EOS, which is added; these rows were tokenised before, so "
                "add it to their input_ids and labels.",
            )
        )
    return findings


def _ends(rendered: Rendered, stops: set[int]) -> tuple[Counter[int], Counter[int], Counter[int], int]:
    """How many rows end with which supervised stop, other special token or unsupervised end, and with none of them."""
    tokenizer = rendered.tokenizer
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    taught, other, masked, absent = Counter(), Counter(), Counter(), 0
    for sequence in rendered.usable:
        if not sequence.supervised.any():
            continue
        last = _last_word(sequence, tokenizer)
        following = next((i for i in sequence.ids[last + 1 :].tolist() if tokenizer.decode([i]).strip()), None)
        index = int(sequence.ids[last])
        if index in stops:
            taught[index] += 1
        elif index in special:
            other[index] += 1
        elif following in stops or following in special:
            masked[following] += 1
        else:
            absent += 1
    return taught, other, masked, absent


def _last_word(sequence: TokenSequence, tokenizer: Any) -> int:
    """The place of the last supervised token that is not white space, which templates write after the EOS."""
    places = np.flatnonzero(sequence.supervised)[::-1].tolist()
    return next((place for place in places if tokenizer.decode([sequence.ids[place]]).strip()), places[0])


def chat_template(student: Rendered, teacher: Rendered, teacher_name: str) -> list[Finding]:
    """Whether the teacher's own template and tokenizer give the tokens that it will be asked about."""
    name = "chat template"
    pairs = list(zip(student.sequences[:COMPARED], teacher.sequences[:COMPARED], strict=True))
    read = [
        (row, ours, theirs)
        for row, (ours, theirs) in enumerate(pairs)
        if isinstance(ours, TokenSequence) and isinstance(theirs, TokenSequence)
    ]
    different = [
        (row, ours, theirs)
        for row, ours, theirs in read
        if _strings(student.tokenizer, ours) != _strings(teacher.tokenizer, theirs)
    ]
    if not different:
        return [Finding("ok", name, f"Both sides render the first {len(read)} rows to the same tokens.")]
    row, ours, theirs = different[0]
    place = _first_difference(_strings(student.tokenizer, ours), _strings(teacher.tokenizer, theirs))
    learnt = any(_differs_where_supervised(student, teacher, ours, theirs) for _, ours, theirs in different)
    return [
        Finding(
            "problem" if learnt else "warning",
            name,
            f"{len(different)} of {len(read)} rows are other tokens to the teacher. Row {row} differs from token "
            f"{place} on:\n"
            f"student: {_around(student.tokenizer, ours, place)}\n"
            f"teacher: {_around(teacher.tokenizer, theirs, place)}\n"
            + (
                "Supervised tokens differ: the student would learn to write what its teacher never writes there."
                if learnt
                else "Only the context differs, but the teacher judges answers to a prompt it does not know like this."
            ),
            f"Set chat_template_path: {teacher_name}, unless the difference is meant.",
        )
    ]


def rendering(rendered: Rendered) -> list[Finding]:
    """Whether the student's template says what the rows say, and nothing else."""
    name, report = "rendering", rendered.prepared.template
    findings = [Finding("warning", name, warning) for warning in report.warnings]
    if report.note is not None:
        findings.append(Finding("ok", name, report.note))
    complete = Finding("ok", name, f"The chat template writes all that {report.rows} rows say.")
    return findings or ([complete] if report.rows else [])


def without_template(sample: Sample, teacher: Side) -> Finding | None:
    """A finding when the rows are messages and the teacher has no template to render them."""
    row = dict(next(iter(sample.rows["train"])))
    if not is_conversational(row) or teacher.processing_class.chat_template is not None:
        return None
    return Finding(
        "warning",
        "chat template",
        f"The teacher {teacher.name} has no chat template: it has never seen messages in the student's format.",
        "Use the instruction-tuned version of the teacher, or data of plain text.",
    )


def _strings(tokenizer: Any, sequence: TokenSequence) -> list[str]:
    return tokenizer.convert_ids_to_tokens(sequence.ids.tolist())


def _first_difference(ours: list[str], theirs: list[str]) -> int:
    shorter = min(len(ours), len(theirs))
    return next((place for place in range(shorter) if ours[place] != theirs[place]), shorter)


def _differs_where_supervised(
    student: Rendered, teacher: Rendered, ours: TokenSequence, theirs: TokenSequence
) -> bool:
    """Whether the teacher's rendering lacks or replaces a token that the student is to learn."""
    ours_text, theirs_text = _strings(student.tokenizer, ours), _strings(teacher.tokenizer, theirs)
    matcher = SequenceMatcher(None, ours_text, theirs_text, autojunk=False)
    return any(
        ours.supervised[start:stop].any() for kind, start, stop, _, _ in matcher.get_opcodes() if kind != "equal"
    )


def _around(tokenizer: Any, sequence: TokenSequence, place: int) -> str:
    """The tokens around a place, the one there between > and <."""
    ids = sequence.ids.tolist()
    start, stop = max(0, place - CONTEXT), min(len(ids), place + CONTEXT + 1)
    shown = [f"> {show(tokenizer, ids[i])} <" if i == place else show(tokenizer, ids[i]) for i in range(start, stop)]
    end = [] if stop < len(ids) else ["> end <" if place >= len(ids) else "end"]
    return " ".join([*(["..."] if start else []), *shown, *(end or ["..."])])


def show(tokenizer: Any, index: int) -> str:
    """A token as text in quotes."""
    return repr(tokenizer.decode([index]))


def _token(tokenizer: Any, index: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(index)} ({index})"


def _labels(sequence: TokenSequence) -> np.ndarray:
    return np.where(sequence.supervised, sequence.ids, -100)


def _name(token: str | None) -> str:
    return "nothing" if token is None else repr(token)
