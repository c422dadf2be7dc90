"""Tiny tokenizers of every family, trained in a moment, and chat templates."""

import json
from collections import Counter
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "def add(one, two):\n    return one + two\n\nprint(add(1, 23))",
    "Größe, café and naïve: 日本語のテキスト 🙂🙃 in one line.",
    "A user asks the assistant; the model answers the user.\tTabs and  double  spaces.",
    "What is the capital of France? The capital of France is Paris.",
] * 4

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (message['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ (message['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def _fast(
    tokenizer: Tokenizer, special: tuple[str, ...], template: str | None, **names: str
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


@cache
def byte_level(
    size: int = 320, special: tuple[str, ...] = (), template: str | None = None, nfc: bool = False, **names: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2, Qwen and Llama 3; 256 tokens are the bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer, special, template, **names)


def normalising(normalizer: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    """Byte-level BPE behind a normalizer."""
    tokenizer = Tokenizer.from_str(byte_level(320).backend_tokenizer.to_str())
    tokenizer.normalizer = normalizer
    return _fast(tokenizer, (), None)


@cache
def metaspace(
    size: int = 420, special: tuple[str, ...] = (), template: str | None = None, scheme: str = "always", **names: str
) -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback: Llama 2 ("always" or "normalizer"), Mistral ("first"), Gemma ("never")."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    replace = normalizers.Replace(" ", "▁")
    # Named, since the trainer draws lots between characters that are equally common.
    counts = Counter("".join(TEXTS).replace(" ", "▁"))
    alphabet = sorted(counts, key=lambda character: (-counts[character], character))[:60]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    if scheme in ("never", "normalizer"):
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.train_from_iterator(TEXTS, trainer)
        tokenizer.pre_tokenizer = None
        if scheme == "normalizer":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.train_from_iterator(TEXTS, trainer)
    # The trainer made specials of the bytes; in a real vocabulary they are ordinary tokens.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] == "<unk>"]
    return _fast(Tokenizer.from_str(json.dumps(data)), special, template, unk_token="<unk>", **names)


@cache
def unigram(size: int = 200) -> PreTrainedTokenizerFast:
    """SentencePiece Unigram, as of T5, without byte fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer, (), None, unk_token="<unk>")


@cache
def wordpiece(size: int = 200) -> PreTrainedTokenizerFast:
    """WordPiece that lower-cases and strips accents, as of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer, ("[CLS]", "[SEP]"), None, unk_token="[UNK]")


CHATTERS = {
    "chatml": lambda: byte_level(
        340,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        CHATML,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    ),
    "llama": lambda: byte_level(
        400,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        LLAMA,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    ),
    "gemma": lambda: metaspace(
        420,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        GEMMA,
        "never",
        bos_token="<bos>",
        eos_token="<eos>",
    ),
    "mistral": lambda: metaspace(
        380, ("<s>", "</s>", "[INST]", "[/INST]"), MISTRAL, "first", bos_token="<s>", eos_token="</s>"
    ),
    "llama2": lambda: metaspace(
        380, ("<s>", "</s>", "[INST]", "[/INST]"), MISTRAL, "normalizer", bos_token="<s>", eos_token="</s>"
    ),
}
"""Tokenizers with the chat templates of families."""


def of_tokens(tokens: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of these tokens, in the alphabet of bytes; those in angle brackets are special."""
    special = tuple(dict.fromkeys(token for token in tokens if token.startswith("<") and token.endswith(">")))
    ordinary = dict.fromkeys(token for token in tokens if token not in special)
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(ordinary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, special, None)
