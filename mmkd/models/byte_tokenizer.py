"""Tokenizer of bytes with the special tokens of another tokenizer."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmkd.seams.transformers_seam import byte_letters


def byte_tokenizer(source: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """A fast tokenizer that `AutoTokenizer` loads without mmkd: the id of a byte is its value; special tokens follow.

    Special tokens, their roles and the chat template are the source's. It adds the same special tokens around a text
    as the source.
    """
    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in byte_letters().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {token.content: token for _, token in sorted(source.added_tokens_decoder.items()) if token.special}
    for name in dict.fromkeys((*special, *source.all_special_tokens)):
        tokenizer.add_special_tokens([special.get(name, AddedToken(name, special=True, normalized=False))])
    tokenizer.post_processor = _around_texts(source, tokenizer)
    roles = {role: name for role, name in source.special_tokens_map.items() if isinstance(name, str)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=source.model_max_length,
        padding_side=source.padding_side,
        clean_up_tokenization_spaces=False,
        **roles,
    )
    fast.chat_template = source.chat_template
    return fast


def _around_texts(source: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> processors.PostProcessor:
    """The post-processor that adds the same special tokens before and after a text as the source."""
    added = source.convert_ids_to_tokens(source("", add_special_tokens=True)["input_ids"])
    around = [name for name in added if tokenizer.token_to_id(name) is not None]
    plain = processors.ByteLevel(trim_offsets=False)
    if not around:
        return plain
    # For an empty text it is unknown which of them come before it: encode a letter to see.
    whole = source.convert_ids_to_tokens(source("a", add_special_tokens=True)["input_ids"])
    before = next(i for i, name in enumerate(whole) if name not in around)
    template = processors.TemplateProcessing(
        single=[*around[:before], "$A", *around[before:]],
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in dict.fromkeys(around)],
    )
    return processors.Sequence([plain, template])
