"""The data card of a teacher's cache: who said what about which data, under which licences, and how faithfully."""

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

from .manifest import Manifest
from .store import Cache

DATA_RECIPE = "data.yaml"
"""What a cache of answers has beside its shards: the recipe to train on them."""

# What the Hub takes as `license`; it refuses a card with anything else.
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

    `fidelity` is what `mmkd cache verify` measures: `kl_live_cache` in nats per token, over `rows` rows;
    `method` a method that learns from such a cache.
    """
    identity = manifest.identity
    is_text = identity["signal"]["kind"] == "text"
    header = DatasetCardData(
        **hub_license(identity["data"]["license"]),
        task_categories=["image-text-to-text" if identity["preparation"]["image_processor"] else "text-generation"],
        tags=["mmkd", "distillation", "teacher-cache"],
        configs=[
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": f"data/{split}-*.parquet"}
                    for split, shards in manifest.shards.items()
                    if shards
                ],
            }
        ],
    )
    teacher, data = identity["teacher"], identity["data"]
    what = f"What `{teacher['name']}` says about every supervised token of the data `{data['name']}`"
    if is_text:
        what = f"The answers of `{teacher['name']}` to the prompts of the data `{data['name']}`"
    card = DatasetCard.from_template(
        header,
        template_str=files("mmkd.cache").joinpath("cache_card.md").read_text(encoding="utf-8"),
        title=f"{teacher['name']} on {data['name']}",
        summary=f"{what}, written down once by mmkd, so that students learn from it without running the teacher.",
        facts={**_source(identity), **_content(folder, manifest)},
        fidelity=_fidelity(fidelity, is_text),
        usage=_text_usage(folder, repo_id) if is_text else _usage(identity, repo_id, method),
        columns=", ".join(f"`{column}`" for column in columns),
        repo_id=repo_id,
        teacher=teacher,
        data=data,
    )
    return str(card)


def hub_license(license: str | None) -> dict[str, Any]:
    """A data recipe's licence as the Hub's card fields."""
    if license is None:
        return {"license": "unknown"}
    name = license.lower()
    if HUB_LICENSE.fullmatch(name):
        return {"license": name}
    # Recipes may also say in words what their sources' licences are; the text of the card has room for that.
    return {"license": "other", **({"license_name": name} if re.fullmatch(r"[a-z0-9.-]+", name) else {})}


def mass_kept(cache: Cache, rows: int = 1000) -> float:
    """The share of its probability that the teacher gave to a token's exact outcomes; mean over evenly spread rows."""
    places = np.unique(np.linspace(0, len(cache) - 1, min(rows, len(cache)), dtype=np.int64))
    tails = np.concatenate([cache.scores(place).tail_log_probs for place in places.tolist()])
    return float(1 - np.exp(tails.astype(np.float64)).mean())


def _source(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Who was asked what."""
    teacher, data, preparation = identity["teacher"], identity["data"], identity["preparation"]
    precision = [teacher["dtype"], teacher["quantization"], f"by {teacher['backend']}"]
    return {
        "Teacher": f"`{teacher['name']}`, revision {teacher['revision'] or 'not pinned'}",
        "Teacher's weights": f"sha256 `{teacher['weights']}`" if teacher["weights"] else "not known to the builder",
        "Teacher's numbers": ", ".join(filter(None, precision)),
        "Data recipe": f"`{data['name']}`, fingerprint `{data['fingerprint']}`",
        "Data licence": data["license"] or "not stated",
        "Preparation": ", ".join(
            f"{name} {_short(value)}" for name, value in preparation.items() if value is not None
        ),
        **({"Sampling": _pairs(identity["sampling"])} if "sampling" in identity else {}),
        "Written by": f"mmkd {identity['mmkd']}, card by mmkd {__version__}",
    }


def _content(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What came of it."""
    signal, found = manifest.identity["signal"], {}
    for split, shards in manifest.shards.items():
        rows, tokens = (sum(getattr(entry, name) for entry in shards.values()) for name in ("rows", "tokens"))
        found[f"Split `{split}`"] = f"{rows:,} rows, {tokens:,} tokens"
    entries = [entry for shards in manifest.shards.values() for entry in shards.values()]
    size, tokens = sum(entry.bytes for entry in entries), sum(entry.tokens for entry in entries)
    found["Size on disk"] = f"{size:,} bytes, {size / max(1, tokens):.1f} bytes per token"
    if signal["kind"] == "top_k":
        found["Kept per token"] = (
            f"the {signal['k']} most likely tokens with their log-probs, {signal['tail_draws']} draws from the tail, "
            f"and the tail's mass; of a vocabulary of {signal['vocab_size']:,}"
        )
        if signal["k"] and tokens:
            found["Mean mass kept"] = f"{mass_kept(Cache(folder)):.4f} of 1, in the most likely tokens"
    elif signal["kind"] == "log_probs":
        found["Kept per token"] = "the token's own log-prob"
    found["Rows left out"] = manifest.skipped_summary() if manifest.skipped_rows() else "0"
    return found


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
        "The teacher is not loaded. Data, tokenizer, chat template and lengths must be those of the table above; mmkd "
        "checks this and names what differs."
    )


def _text_usage(folder: Path, repo_id: str) -> str:
    path = folder / DATA_RECIPE
    if not path.is_file():
        raise UserError(f"{path} is missing. Run `mmkd cache build` with the recipe that made it to write it anew.")
    recipe = {**yaml.safe_load(path.read_text(encoding="utf-8")), "source": repo_id}
    return f"As a data recipe of mmkd, to train on or to score:\n\n{_yaml_block(recipe)}"


def _short(value: Any) -> str:
    """A setting, or the first digits of a checksum: the manifest has the rest."""
    is_checksum = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    return f"`{value[:12]}`" if is_checksum else f"`{value}`"


def _yaml_block(keys: Mapping[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(dict(keys), sort_keys=False)}```"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
