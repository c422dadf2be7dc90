"""`mmkd trim-vocabulary`: a model without the tokens that texts do not use."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from mmkd.alignment.vocabulary_state import Trimmed, Vocabulary
from mmkd.errors import UserError
from mmkd.files import new_folder, write_file
from mmkd.units import readable_size

from .load import load_processing_class, tokenizer_of
from .token_counts import count_tokens, frequencies, template_tokens, texts_of
from .trimmed_model import ids_in_configs, load_any_model, save_trimmed, trimmed_model, vocabulary_of

REPORT = "trim_report.json"
_SAMPLES = 200
_COMPARED, _COMPARED_TOKENS = 8, 128


@dataclass(frozen=True)
class Trimming:
    """Which tokens to keep: those with at least `min_frequency`, or the `keep` most frequent ones.

    Where the texts use fewer than `keep`, the unused ones with the lowest ids are kept too.
    """

    min_frequency: float | None = None
    keep: int | None = None
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        if (self.min_frequency is None) == (self.keep is None):
            raise UserError("Set either --min_frequency or --keep: how rare a token may be, or how many stay.")
        if self.min_frequency is not None and not 0 < self.min_frequency < 1:
            raise UserError(
                f"--min_frequency is {self.min_frequency:g}; give a share of all tokens above 0 and below 1, such as "
                "1e-6, or --keep with a number of tokens."
            )
        if self.keep is not None and self.keep < 1:
            raise UserError(f"--keep is {self.keep}; give the number of tokens that stay.")
        if self.pad_to_multiple_of < 1:
            raise UserError(f"--pad_to_multiple_of is {self.pad_to_multiple_of}; give 1 or more.")


@dataclass(frozen=True)
class TrimReport:
    """What became smaller, and what the smaller model still does alike."""

    tokens_before: int
    tokens_after: int
    rows_before: int
    rows_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    held_out_texts: int
    held_out_tokens: int
    held_out_fall_apart: float
    """Share of the held-out tokens that are not in the smaller vocabulary."""
    held_out_growth: float
    """Tokens of the held-out texts after, divided by those before."""
    sample_lines: int
    sample_lines_alike: int
    """Sample lines that are cut into the same tokens."""
    compared_lines: int
    largest_difference: float
    """Of logits, or hidden states, on such lines: 0 up to rounding."""


def chosen_tokens(
    vocabulary: Vocabulary, counts: Sequence[Counter[int]], needed: set[int], trimming: Trimming
) -> set[int]:
    """The tokens to keep, with all that they are merged from. `needed` are kept whatever the texts say.

    Raises UserError for a choice that keeps nothing of the texts, everything, or less than what is needed.
    """
    shares = frequencies(counts)
    size = len(vocabulary.ids)
    kept = vocabulary.closed(vocabulary.always | needed | vocabulary.letters({*shares, *needed}))
    if trimming.keep is None:
        frequent = {token for token, share in shares.items() if share >= (trimming.min_frequency or 0)}
        if not frequent:
            raise UserError(
                f"No token makes up {trimming.min_frequency:g} of the texts: the most frequent one makes up "
                f"{max(shares.values(), default=0):g}. Set a lower --min_frequency."
            )
        kept |= vocabulary.closed(frequent)
    else:
        if trimming.keep < len(kept):
            raise UserError(
                f"--keep is {trimming.keep:,}, and {len(kept):,} tokens must stay: special and added tokens, bytes or "
                "the characters of the texts, the tokens of the chat template, and what these are merged from. Set "
                f"--keep to {len(kept):,} or more."
            )
        # Of tokens that the texts do not use those with low ids come first: tokenizers number them by how common they
        # are.
        for token in sorted(vocabulary.ids.values(), key=lambda token: (-shares.get(token, 0), token)):
            further = vocabulary.closed([token]) - kept
            if len(kept) + len(further) <= trimming.keep:
                kept |= further
    if len(kept) >= size:
        raise UserError(
            f"All {size:,} tokens would be kept, so that nothing becomes smaller. Set "
            f"{'a higher --min_frequency' if trimming.keep is None else 'a lower --keep'}."
        )
    return kept


def trim_command(
    model: str, texts: Sequence[str], output: str, trimming: Trimming, held_out: str | None, console: Console
) -> TrimReport:
    """Writes the folder of a model without the tokens that the texts do not use, and prints what became of it.

    Raises UserError as `chosen_tokens` and `trimmed_model` do, for unreadable texts, and if the folder exists.
    """
    folder = Path(output)
    if folder.exists():
        raise UserError(f"{folder} exists already. Name another folder, or delete it first.")
    processing: Any = load_processing_class(model)
    tokenizer: Any = tokenizer_of(processing)
    vocabulary = vocabulary_of(tokenizer)
    sources = [texts_of(name, tokenizer) for name in texts]
    apart = [text for _, own in sources for text in own]
    if held_out is not None:
        apart = [text for part in texts_of(held_out, tokenizer) for text in part]
    with _progress(console, sum(len(own) for own, _ in sources)) as advance:
        counts = [count_tokens(own, tokenizer, advance) for own, _ in sources]
    before = load_any_model(model)
    needed = template_tokens(tokenizer) | (ids_in_configs(before) & set(vocabulary.ids.values()))
    trimmed = vocabulary.without_others(chosen_tokens(vocabulary, counts, needed, trimming))
    after = trimmed_model(before, trimmed, trimming.pad_to_multiple_of)
    with new_folder(folder) as complete:
        console.print(f"Writing {len(trimmed.old_ids):,} of {len(vocabulary.ids):,} tokens to {folder} ...")
        smaller = save_trimmed(model, processing, after, trimmed, complete)
        samples = _lines(apart or [text for own, _ in sources for text in own])
        report = _report((before, after), (tokenizer, smaller), trimmed, apart, samples)
        write_file(complete / REPORT, json.dumps(asdict(report), indent=2))
    for line in summary(report, folder):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return report


def _lines(texts: Sequence[str]) -> list[str]:
    """Lines of texts, spread over all of them: a whole text seldom has no rare token."""
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    return lines[:: max(1, len(lines) // _SAMPLES)][:_SAMPLES]


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Any]:
    columns = [TextColumn("Counting tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("texts", total=total)
        yield lambda texts: bar.advance(task, texts)


def _report(
    models: tuple[Any, Any],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    trimmed: Trimmed,
    held_out: Sequence[str],
    samples: Sequence[str],
) -> TrimReport:
    kept = {old: new for new, old in enumerate(trimmed.old_ids)}
    old_counts, new_counts = (count_tokens(held_out, tokenizer) for tokenizer in tokenizers)
    total = old_counts.total()
    lost = sum(count for token, count in old_counts.items() if token not in kept)
    alike = [text for text in samples if _same_tokens(text, tokenizers, kept)]
    compared = alike[:_COMPARED]
    sizes = [_sizes(model) for model in models]
    return TrimReport(
        tokens_before=len(tokenizers[0].get_vocab()),
        tokens_after=len(kept),
        rows_before=len(models[0].get_input_embeddings().weight),
        rows_after=len(models[1].get_input_embeddings().weight),
        parameters_before=sizes[0][0],
        parameters_after=sizes[1][0],
        bytes_before=sizes[0][1],
        bytes_after=sizes[1][1],
        held_out_texts=len(held_out),
        held_out_tokens=total,
        held_out_fall_apart=lost / max(1, total),
        held_out_growth=new_counts.total() / max(1, total),
        sample_lines=len(samples),
        sample_lines_alike=len(alike),
        compared_lines=len(compared),
        largest_difference=max((_difference(text, models, tokenizers[0], trimmed) for text in compared), default=0.0),
    )


def _sizes(model: Any) -> tuple[int, int]:
    weights = list(model.parameters())
    return sum(weight.numel() for weight in weights), sum(weight.numel() * weight.element_size() for weight in weights)


def _same_tokens(text: str, tokenizers: Sequence[Any], kept: Mapping[int, int]) -> bool:
    """Whether a text is cut into the same tokens, which are the same text again."""
    old, new = (tokenizer(text)["input_ids"] for tokenizer in tokenizers)
    if [kept.get(token) for token in old] != new:
        return False
    return tokenizers[0].decode(old) == tokenizers[1].decode(new)


@torch.no_grad()
def _difference(text: str, models: Sequence[Any], tokenizer: Any, trimmed: Trimmed) -> float:
    """The largest difference of the kept tokens' logits (of a model without: of hidden states) on a text."""
    kept = {old: new for new, old in enumerate(trimmed.old_ids)}
    old_ids = tokenizer(text)["input_ids"][:_COMPARED_TOKENS]
    outputs = []
    for model, ids in zip(models, (old_ids, [kept[token] for token in old_ids]), strict=True):
        given = torch.tensor([ids], device=model.device)
        further = {"decoder_input_ids": given} if model.config.is_encoder_decoder else {}
        made = model(input_ids=given, **further)
        logits = getattr(made, "logits", None)
        outputs.append(made[0] if logits is None else logits)
    rows = models[0].get_output_embeddings()
    before, after = (output.float() for output in outputs)
    if rows is not None and before.shape[-1] == len(rows.weight):
        before, after = before[..., trimmed.old_ids], after[..., : len(trimmed.old_ids)]
    return float((before - after).abs().max())


def summary(report: TrimReport, folder: Path) -> list[str]:
    """What a report says, in lines."""
    saved = report.parameters_before - report.parameters_after
    lines = [
        f"Tokens: {report.tokens_before:,} -> {report.tokens_after:,}. Parameters: {report.parameters_before:,} -> "
        f"{report.parameters_after:,} ({saved / report.parameters_before:.1%} fewer), "
        f"{readable_size(report.bytes_before)} -> {readable_size(report.bytes_after)}.",
    ]
    if report.held_out_tokens:
        lines.append(
            f"Of {report.held_out_tokens:,} tokens in {report.held_out_texts:,} held-out texts, "
            f"{report.held_out_fall_apart:.2%} are not in the smaller vocabulary and fall apart; the texts have "
            f"{report.held_out_growth - 1:.2%} more tokens."
        )
    lines.append(
        f"{report.sample_lines_alike:,} of {report.sample_lines:,} sample lines are cut into the same tokens."
        + (
            f" On {report.compared_lines} of them the outputs of the two models differ by at most "
            f"{report.largest_difference:.1e}."
            if report.compared_lines
            else ""
        )
    )
    return [*lines, f"{folder} loads in plain transformers. {folder / REPORT} has these numbers."]
