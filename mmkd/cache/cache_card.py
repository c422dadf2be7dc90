"""The card of a teacher's cache: teacher, data, licences, content and fidelity."""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from mmkd import __version__
from mmkd.errors import UserError
from mmkd.results.markdown_text import cell, code, fenced, said

from .embedding_codec import EMBEDDINGS
from .kept_answers import chosen_by, parquet_configs, read_summary, summary_lines
from .manifest import Manifest
from .side_files import HEAD
from .store import Cache

DATA_RECIPE = "data.yaml"
"""The file in a cache of answers with the recipe to train on them."""

# The values of `license` that the Hub accepts; it rejects cards with others.
HUB_LICENSE = re.compile(
    r"apache-2\.0|mit|unlicense|wtfpl|zlib|isc|bsl-1\.0|bsd-[23]-clause|artistic-2\.0|mpl-2\.0|eupl-1\.[12]"
    r"|a?gpl-3\.0|gpl-2\.0|lgpl-(2\.1|3\.0)|gfdl|ofl-1\.1|cc0-1\.0|cc-by-[234]\.0|cc-by-sa-[34]\.0|cc-by-nd-4\.0"
    r"|cc-by-nc(-sa)?-[234]\.0|cc-by-nc-nd-[34]\.0|c-uda|cdla-(permissive-[12]|sharing-1)\.0|odc-by|odbl|pddl"
    r"|etalab-2\.0|openrail|gemma|llama2|llama3(\.[123])?|llama4"
)


def cache_card(
    folder: Path,
    manifest: Manifest,
    repo_id: str,
    columns: Sequence[str],
    fidelity: Mapping[str, float] | None = None,
    method: str | None = None,
) -> str:
    """The card (Markdown with a YAML header) of a complete cache.

    `fidelity` is the measurement of `mmkd cache verify`: `kl_live_cache` in nats per token, over `rows` rows. `method`
    is the name of a method that learns from such a cache.
    """
    identity = manifest.identity
    kind = identity["signal"]["kind"]
    is_text = kind == "text"
    header = DatasetCardData(
        **hub_license(identity["data"]["license"]),
        task_categories=[_task(identity)],
        tags=["mmkd", "distillation", "teacher-cache"],
        configs=[
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": f"data/{split}-*.parquet"}
                    for split, shards in manifest.shards.items()
                    if shards
                ],
            },
            *parquet_configs(folder),
        ],
    )
    teacher, data = identity["teacher"], identity["data"]
    subject = f"What {code(teacher['name'])} says about every supervised token of the data {code(data['name'])}"
    if kind == EMBEDDINGS:
        subject = f"The embeddings by {code(teacher['name'])} of every pair of the data {code(data['name'])}"
    if is_text:
        subject = f"The answers of {code(teacher['name'])} to the prompts of the data {code(data['name'])}"
    card = DatasetCard.from_template(
        header,
        template_str=files("mmkd.cache").joinpath("cache_card.md").read_text(encoding="utf-8"),
        title=f"{said(teacher['name'])} on {said(data['name'])}",
        summary=f"{subject}, written down once by mmkd, so that students learn from it without running the teacher.",
        facts={name: cell(value) for name, value in {**_source(identity), **_content(folder, manifest)}.items()},
        fidelity=_embedding_fidelity(identity) if kind == EMBEDDINGS else _fidelity(fidelity, is_text),
        usage=_text_usage(folder, repo_id) if is_text else _usage(identity, repo_id, method),
        columns=", ".join(f"`{column}`" for column in columns),
        repo_id=repo_id,
        teacher=said(teacher["name"]),
        data=code(data["name"]),
        data_license=said(data["license"] or "not stated"),
    )
    return str(card)


def hub_license(license: str | None) -> dict[str, Any]:
    """A data recipe's licence as the Hub's card fields."""
    if license is None:
        return {"license": "unknown"}
    name = license.lower()
    if HUB_LICENSE.fullmatch(name):
        return {"license": name}
    # Recipes may also describe the licences of their sources in words, which go into the text of the card.
    return {"license": "other", **({"license_name": name} if re.fullmatch(r"[a-z0-9.-]+", name) else {})}


def mass_kept(cache: Cache, rows: int = 1000) -> float:
    """The mean probability that the teacher gives to the stored outcomes of a token, over evenly spaced rows."""
    places = np.unique(np.linspace(0, len(cache) - 1, min(rows, len(cache)), dtype=np.int64))
    tails = np.concatenate([cache.scores(place).tail_log_probs for place in places.tolist()])
    return float(1 - np.exp(tails.astype(np.float64)).mean())


def _source(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about teacher, data and preparation."""
    teacher, data, preparation = identity["teacher"], identity["data"], identity["preparation"]
    precision = [teacher["dtype"], teacher["quantization"], f"by {teacher['backend']}"]
    return {
        "Teacher": f"{code(teacher['name'])}, revision {teacher['revision'] or 'not pinned'}",
        "Teacher's weights": f"sha256 {code(teacher['weights'])}"
        if teacher["weights"]
        else "not known to the builder",
        "Teacher's numbers": ", ".join(filter(None, precision)),
        "Data recipe": f"{code(data['name'])}, fingerprint {code(data['fingerprint'])}",
        "Data licence": data["license"] or "not stated",
        "Preparation": ", ".join(
            f"{name} {_short(value)}" for name, value in preparation.items() if value is not None
        ),
        **({"Sampling": _pairs(identity["sampling"])} if "sampling" in identity else {}),
        "Written by": f"mmkd {identity['mmkd']}, card by mmkd {__version__}",
    }


def _content(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The facts about the rows of the cache."""
    signal, facts = manifest.identity["signal"], {}
    unit = "embedding" if signal["kind"] == EMBEDDINGS else "token"
    for split, shards in manifest.shards.items():
        rows, tokens = (sum(getattr(entry, name) for entry in shards.values()) for name in ("rows", "tokens"))
        facts[f"Split `{split}`"] = f"{rows:,} rows, {tokens:,} {unit}s"
    entries = [entry for shards in manifest.shards.values() for entry in shards.values()]
    size, tokens = sum(entry.bytes for entry in entries), sum(entry.tokens for entry in entries)
    facts["Size on disk"] = f"{size:,} bytes, {size / max(1, tokens):.1f} bytes per {unit}"
    if signal["kind"] == EMBEDDINGS:
        facts["Kept per pair"] = (
            f"{signal['views']} views of the first ({signal['augmentation']}) and up to {signal['captions']} "
            f"captions, {signal['width']:,} numbers each in {signal['dtype']}"
        )
    if signal["kind"] == "top_k":
        facts["Kept per token"] = (
            f"the {signal['k']} most likely tokens with their log-probs, {signal['tail_draws']} draws from the tail, "
            f"and the tail's mass; of a vocabulary of {signal['vocab_size']:,}"
        )
        if signal["k"] and tokens:
            facts["Mean mass kept"] = f"{mass_kept(Cache(folder)):.4f} of 1, in the most likely tokens"
    elif signal["kind"] == "hidden":
        facts["Kept per token"] = (
            f"the last hidden state, {signal['width']:,} numbers in {signal['dtype']}"
            + (f" with a scale for {signal['block']} of a channel" if "block" in signal else "")
            + (", also of visual tokens" if signal["visual"] else "")
        )
        head = (folder / HEAD).stat().st_size
        facts["Kept once"] = f"the head over {signal['vocab_size']:,} tokens, {head:,} bytes"
    elif signal["kind"] == "log_probs":
        facts["Kept per token"] = "the token's own log-prob"
        if "boundaries" in signal:
            facts["Kept per token"] += ", and the log-prob that a new word begins or the text ends there"
    summary = read_summary(folder)
    if summary is not None:
        facts["Answers kept"] = f"{' '.join(summary_lines(summary))} ({chosen_by(summary)})"
    facts["Rows left out"] = manifest.skipped_summary() if manifest.skipped_rows() else "0"
    return facts


def _task(identity: Mapping[str, Any]) -> str:
    """The Hub's name of what the data are for."""
    images = identity["preparation"]["image_processor"]
    if identity["signal"]["kind"] == EMBEDDINGS:
        return "zero-shot-image-classification" if images else "sentence-similarity"
    return "image-text-to-text" if images else "text-generation"


def _embedding_fidelity(identity: Mapping[str, Any]) -> str:
    return f"Embeddings of length 1, rounded to {identity['signal']['dtype']}."


def _fidelity(fidelity: Mapping[str, float] | None, is_text: bool) -> str:
    if is_text:
        return "These are the teacher's own words: nothing is approximated."
    if fidelity is None:
        return (
            "Not measured. `mmkd cache verify RECIPE`, with the recipe that built this cache, measures the divergence "
            "of the live teacher from it."
        )
    rest = {name: value for name, value in fidelity.items() if name not in ("kl_live_cache", "rows")}
    return (
        f"KL(live teacher || cache) is {fidelity['kl_live_cache']:.3g} nats per token, measured on "
        f"{fidelity['rows']:,} rows with `mmkd cache verify`.{f' Also: {_pairs(rest)}.' if rest else ''}"
    )


def _usage(identity: Mapping[str, Any], repo_id: str, method: str | None) -> str:
    signal = identity["signal"]
    recipe = {
        **({} if method is None else {"method": method}),
        "data": identity["data"]["name"],
        "teacher_cache": repo_id,
        **({"teacher_tail": "unbiased"} if signal["kind"] == "top_k" and not signal["k"] else {}),
    }
    return (
        f"In a recipe for `mmkd-train`, beside `student` and the training arguments:\n\n{_yaml_block(recipe)}\n\n"
        "The teacher is not loaded. "
        + (
            "Every pair of the data must be one of the cache."
            if signal["kind"] == EMBEDDINGS
            else "Data, tokenizer, chat template and lengths must be those of the table above; mmkd checks this and "
            "names what differs."
        )
    )


def _text_usage(folder: Path, repo_id: str) -> str:
    path = folder / DATA_RECIPE
    if not path.is_file():
        raise UserError(f"{path} is missing. Run `mmkd cache build` with the recipe that made it to write it anew.")
    recipe = {**yaml.safe_load(path.read_text(encoding="utf-8")), "source": repo_id}
    return f"As a data recipe of mmkd, to train on or to score:\n\n{_yaml_block(recipe)}"


def _short(value: Any) -> str:
    """A setting as text; of a checksum the first digits, as the manifest has all."""
    is_checksum = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    return code(value[:12] if is_checksum else value)


def _yaml_block(keys: Mapping[str, Any]) -> str:
    return fenced(yaml.safe_dump(dict(keys), sort_keys=False), "yaml")


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
