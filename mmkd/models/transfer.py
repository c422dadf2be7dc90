"""A model with another tokenizer: rows of embeddings and head are made of the rows of the old tokens (FVT).

    mmkd transfer-tokenizer MODEL TOKENIZER OUTPUT_DIR     # TOKENIZER may be the word bytes
    mmkd-train alm/smollm2_to_gemma_tokenizer              # student: OUTPUT_DIR, teacher: MODEL

The first command writes a model that runs but has yet to learn its tokens. The second, self-distillation by ALM,
restores the abilities of the original: the teacher is the original model, and the data are texts of any kind.
"""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mmkd.alignment.token_rows import TokenRows, missing_specials, token_rows
from mmkd.errors import UserError

from .backbone import full_head
from .byte_tokenizer import byte_tokenizer
from .load import load_model, load_processing_class
from .vocabulary_rows import OLD_IDS, embedding_rows, with_token_rows


@dataclass(frozen=True)
class Transfer:
    """A model with its new tokenizer, the origin of its rows, and the special tokens added for its chat template."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: TokenRows
    added: tuple[str, ...]


def transfer_tokenizer(
    model: PreTrainedModel,
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    *,
    untie: bool = False,
    pad_to_multiple_of: int = 1,
    seed: int = 0,
) -> Transfer:
    """A new model with the tokens of `target`; the model and both tokenizers are not changed.

    Each row of the embeddings, of the head and of its bias is the old token's where there is one of the same bytes or
    the same role, and otherwise the mean over the old tokens of the same text (FVT, arXiv 2402.09977); see
    `token_rows`. A row with neither is drawn from a normal around the mean row, by channel; rows that only pad to
    `pad_to_multiple_of` are that mean. Tied embeddings stay tied unless `untie` is set. Types are kept. If the new
    tokenizer has no chat template it gets the old one as it is, with the special tokens that this writes.

    Raises UserError for a tokenizer whose tokens are not bytes, a model that is quantised, reads images, or sizes
    other weights by its vocabulary, and for `untie` where nothing is tied.
    """
    embedding, head = _require_transferable(model), full_head(model)
    if untie and head.weight is not embedding:
        raise UserError("The model's embeddings and head are separate already: leave out untie.", because="meaning")
    if pad_to_multiple_of < 1:
        raise UserError(f"pad_to_multiple_of is {pad_to_multiple_of}; the rows of a vocabulary pad to 1 or more.")
    target, added = _with_chat_template(source, target)
    target.model_max_length = source.model_max_length
    rows = token_rows(source, target, len(embedding))
    count = -(-len(rows) // pad_to_multiple_of) * pad_to_multiple_of

    config = copy.deepcopy(model.config)
    config.vocab_size = count
    config.tie_word_embeddings = head.weight is embedding and not untie
    _set_special_ids(config, model.config, target, rows)
    student = with_token_rows(model, config, rows, count, seed)
    if model.generation_config is not None:
        _set_special_ids(student.generation_config, model.generation_config, target, rows)
    return Transfer(student, target, rows, added)


def transfer_command(
    model: str, tokenizer: str, output_dir: str, untie: bool = False, pad_to_multiple_of: int = 1
) -> int:
    """Writes the folder of a model with another tokenizer (`bytes`: one token per byte) and prints a summary.

    Raises UserError as `transfer_tokenizer` does, and if the folder exists.
    """
    folder = Path(output_dir)
    if folder.exists():
        raise UserError(f"{folder} exists already. Name another folder, or delete it first.")
    source: Any = load_processing_class(model)
    target = byte_tokenizer(source) if tokenizer == "bytes" else _load_tokenizer(tokenizer)
    loaded = load_model(model, dtype="auto")
    done = transfer_tokenizer(loaded, source, target, untie=untie, pad_to_multiple_of=pad_to_multiple_of)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside it and renamed, so that the folder appears only when complete.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        complete = Path(scratch) / folder.name
        done.model.save_pretrained(complete)
        done.tokenizer.save_pretrained(complete)
        complete.rename(folder)
    rows, size = done.rows, done.model.config.get_text_config().vocab_size
    print(
        f"{size:,} rows: {rows.copied:,} copied, {rows.averaged:,} averaged, {rows.random:,} random, "
        f"{size - len(rows):,} padding."
    )
    print(_about_template(done, source))
    print(f"Next: mmkd-train RECIPE.yaml with method: alm, student: {folder}, teacher: {model}")
    return 0


def _about_template(done: Transfer, source: PreTrainedTokenizerBase) -> str:
    if done.tokenizer.chat_template is None:
        return "Chat template: none."
    if done.tokenizer.chat_template != source.chat_template:
        return "Chat template: the tokenizer's own."
    names = f", with the special tokens {' '.join(done.added)} added" if done.added else ""
    return f"Chat template: the model's{names}."


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{name!r} is no tokenizer: neither a Hub id that can be reached, nor a folder with a tokenizer.json, nor "
            f"the word bytes. ({(str(error).strip().splitlines() or [''])[0]})"
        ) from error


def _require_transferable(model: PreTrainedModel) -> Float[Tensor, "row width"]:
    if hasattr(model.config, "vision_config"):
        raise UserError(
            f"{type(model).__name__} reads images, and its processor writes image tokens of the old tokenizer. Only "
            "text models can get a new tokenizer.",
            because="not built",
        )
    if model.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__} has no output embeddings, so it cannot generate text. Use a causal LM.",
            because="meaning",
        )
    return embedding_rows(model)


def _with_chat_template(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase
) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    """A copy of the target, which gets the source's chat template and its special tokens if it has no template."""
    target = copy.deepcopy(target)
    if target.chat_template is not None or source.chat_template is None:
        return target, ()
    target.chat_template = source.chat_template
    missing = missing_specials(source, target)
    target.add_tokens(missing, special_tokens=True)
    return target, tuple(token.content for token in missing)


def _set_special_ids(
    config: PreTrainedConfig | GenerationConfig, old: Any, target: PreTrainedTokenizerBase, rows: TokenRows
) -> None:
    """Sets the new ids of special tokens; eos are the tokenizer's own and all special copies of the old eos tokens."""
    for name, value in vars(old).items():
        if name.endswith("_token_id") and value is not None:
            copies = rows.copies(value) if isinstance(value, int) else []
            setattr(config, name, copies[0] if copies else None)
    for name in OLD_IDS:
        if getattr(old, name, None) is not None:
            setattr(config, name, None)
    ends = old.eos_token_id if isinstance(old.eos_token_id, list) else [old.eos_token_id]
    copies = [index for end in ends for index in rows.copies(end) if index in rows.special]
    eos_ids = list(dict.fromkeys(index for index in (target.eos_token_id, *copies) if index is not None))
    config.eos_token_id = eos_ids[0] if len(eos_ids) == 1 else eos_ids or None
    config.bos_token_id, config.pad_token_id = target.bos_token_id, target.pad_token_id
