"""Tiny causal LMs with a real tokenizer, built from configs in a second: what the tests train and distil.

`python scripts/make_tiny_models.py FOLDER` writes FOLDER/teacher and FOLDER/student (Llama, one vocabulary).
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the cat sat on a mat and saw one dog run from two birds to some red house near an old green tree"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def sentences(count: int, seed: int = 0, low: int = 4, high: int = 12) -> list[str]:
    """Random word sequences of different lengths, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    words = WORDS.split()
    return [" ".join(words[i] for i in torch.randint(len(words), (n,), generator=generator)) for n in lengths]


def make_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `sentences`, with a chat template that marks what the assistant says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sentences(500), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(
    layers: int = 2, width: int = 32, rows: int = 300, seed: int = 0, tied: bool = True
) -> LlamaForCausalLM:
    """A random Llama with two query heads per key-value head and `rows` rows of vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Model and tokenizer as a folder that `from_pretrained` loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_models(folder: Path) -> dict[str, Path]:
    """`teacher` (3 layers of 48) and `student` (2 layers of 32), saved under `folder`."""
    tokenizer = make_tokenizer()
    return {
        "teacher": save(make_model(layers=3, width=48, seed=1, rows=len(tokenizer)), tokenizer, folder / "teacher"),
        "student": save(make_model(seed=2, rows=len(tokenizer)), tokenizer, folder / "student"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, path in make_tiny_models(parser.parse_args().folder).items():
        print(f"{name}: {path}")
