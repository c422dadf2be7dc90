"""A model and its tokenizer with some of their tokens: the folder that `mmkd trim-vocabulary` writes."""

import copy
import inspect
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mmkd.alignment.token_rows import TokenRows
from mmkd.alignment.vocabulary_state import Trimmed, Vocabulary
from mmkd.errors import UserError, first_line
from mmkd.seams.transformers_seam import byte_letters, generates_text

from .load import load_model, tokenizer_of
from .vocabulary_rows import OLD_IDS, embedding_rows, with_token_rows

# What a folder of sentence-transformers has beside a model.
_SIDE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "*/config.json")
_SIDE_FILES += ("*/model.safetensors", "preprocessor_config.json")


def load_any_model(name: str) -> PreTrainedModel:
    """The model of the class that its config names: one that generates text, classifies, or encodes.

    Raises UserError where nothing loadable is there.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name!r} has no config that transformers knows ({first_line(error)}).") from error
    auto_class = getattr(transformers, (config.architectures or [""])[0], None)
    if auto_class is None and not generates_text(config) and not hasattr(config, "vision_config"):
        auto_class = AutoModel
    try:
        return load_model(name, dtype="auto", auto_class=auto_class).eval()
    except UserError as error:
        # Encoders of sentences are often saved without the pooler that their class has.
        takes = inspect.signature(auto_class).parameters if auto_class is not None else {}
        if "pooler." not in str(error) or "add_pooling_layer" not in takes:
            raise
        return load_model(name, dtype="auto", auto_class=auto_class, add_pooling_layer=False).eval()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The tokens of a tokenizer. Raises UserError for one that is written in Python, without a tokenizer.json."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, written in Python. Only tokenizers with a "
            "tokenizer.json can be trimmed: convert it with transformers first.",
            because="not built",
        )
    return Vocabulary.of(json.loads(backend.to_str()), byte_letters().values())


def ids_in_configs(model: PreTrainedModel) -> set[int]:
    """The ids that the model's configs name, such as those of the end of a text and of images."""
    ids = {number for config in _configs(model) for _, value in _named_ids(config) for number in _flat(value)}
    return {number for number in ids if number >= 0}


def trimmed_model(model: PreTrainedModel, trimmed: Trimmed, pad_to_multiple_of: int = 1) -> Any:
    """The model with the rows of the tokens that are kept; rows that pad are the mean row.

    Raises UserError for a model that is quantised, or whose weights of other parts have a row per token.
    """
    rows = TokenRows.of(
        {new: [old] for new, old in enumerate(trimmed.old_ids)}, len(trimmed.old_ids), trimmed.old_ids, ()
    )
    count = -(-len(rows) // pad_to_multiple_of) * pad_to_multiple_of
    last, available = max(trimmed.old_ids), len(embedding_rows(model))
    if last >= available:
        raise UserError(
            f"The tokenizer has tokens up to id {last:,}, and the model {available:,} rows: one of the two is of "
            "another model."
        )
    new = {old: number for number, old in enumerate(trimmed.old_ids)}
    config = copy.deepcopy(model.config)
    for part in _parts(config):
        _renumber(part, new)
    config.get_text_config().vocab_size = count
    smaller = with_token_rows(model, config, rows, count)
    if smaller.can_generate() and smaller.generation_config is not None:
        _renumber(smaller.generation_config, new)
    return smaller.eval()


def _configs(model: PreTrainedModel) -> list[Any]:
    generation = model.generation_config if model.can_generate() else None
    return [*_parts(model.config), *([] if generation is None else [generation])]


def _parts(config: PreTrainedConfig) -> list[Any]:
    """A config and those inside it, of towers and language models."""
    inside = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for own in inside for part in _parts(own))]


def _named_ids(config: Any) -> list[tuple[str, Any]]:
    named = [(key, value) for key, value in vars(config).items() if key.endswith(("_token_id", "_token_index"))]
    named += [(key, getattr(config, key, None)) for key in OLD_IDS]
    return [(key, value) for key, value in named if value is not None and not isinstance(value, bool)]


def _flat(value: Any) -> Iterable[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping):
        yield from _flat([list(key) if isinstance(key, tuple) else key for key in value])
    elif isinstance(value, list | tuple):
        for part in value:
            # The entries of sequence_bias end in a number that is no id.
            yield from () if isinstance(part, float) else _flat(part)


def _renumber(config: Any, new: Mapping[int, int]) -> None:
    for key, value in _named_ids(config):
        setattr(config, key, _renumbered(value, new))


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, bool | float) or value is None:
        return value
    if isinstance(value, int):
        # Ids of nothing, such as -1, and of rows without a token stay what they are.
        return new.get(value, value if value < 0 else None)
    if isinstance(value, Mapping):
        return {_renumbered(key, new): bias for key, bias in value.items()}
    return type(value)(_renumbered(part, new) for part in value)


def save_trimmed(source: str, processing: Any, model: Any, trimmed: Trimmed, folder: Path) -> PreTrainedTokenizerBase:
    """Writes model, tokenizer (or processor) and what sentence-transformers keeps beside them; returns the tokenizer.

    Raises UserError where the smaller tokenizer, loaded again, gives its tokens other ids than the model has rows.
    """
    model.save_pretrained(folder)
    processing.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(trimmed.state, ensure_ascii=False), encoding="utf-8")
    for name in ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    _copy_side_files(source, folder)
    names = tokenizer_of(processing).convert_ids_to_tokens(trimmed.old_ids)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("added_tokens_decoder", None)
    # A tokenizer's own class may make more of its vocabulary than its file says.
    for kind in (settings.get("tokenizer_class"), "PreTrainedTokenizerFast"):
        settings["tokenizer_class"] = kind
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))
        loaded = AutoTokenizer.from_pretrained(folder)
        same_text = json.loads(loaded.backend_tokenizer.to_str())["model"] == trimmed.state["model"]
        if same_text and loaded.convert_tokens_to_ids(names) == list(range(len(names))) == list(range(len(loaded))):
            return loaded
    raise UserError(
        f"{type(tokenizer_of(processing)).__name__} does not load a smaller vocabulary as it was written: its tokens "
        "get other ids. Its vocabulary cannot be trimmed.",
        because="not built",
    )


def _copy_side_files(source: str, folder: Path) -> None:
    """Copies what makes a folder one of sentence-transformers, if it is."""
    original = Path(source)
    if not original.is_dir():
        original = Path(snapshot_download(source, allow_patterns=list(_SIDE_FILES)))
    if not (original / "modules.json").is_file():
        return
    for pattern in _SIDE_FILES:
        for path in original.glob(pattern):
            target = folder / path.relative_to(original)
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
