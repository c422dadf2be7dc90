"""Each private touch of another package: these fail, with the name of the touch, where upstream moves it.

They run on tiny objects, so that raising a cap in pyproject.toml is one commit: new versions, these tests, repairs.
"""

import inspect
from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from mmkd.seams import trl_seam
from scripts.make_tiny_models import make_tokenizer


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


# TRL


def test_trl_prepares_rows_without_a_trainer(tmp_path) -> None:
    expected = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert parameters_of(SFTTrainer._prepare_dataset) == expected
    rows = Dataset.from_list([{"prompt": "the cat", "completion": " sat"}] * 3)
    args, tokenizer = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, max_length=None), make_tokenizer()
    settings: Any = {"chat_template": None, "completion_only": True}
    prepared = trl_seam.prepare_rows(rows, tokenizer, args, False, None, "train", **settings)
    ids, labels = prepared[0]["input_ids"], prepared[0]["labels"]
    prompt = len(tokenizer("the cat")["input_ids"])
    assert ids == tokenizer("the cat sat" + tokenizer.eos_token)["input_ids"]
    assert labels == [-100] * prompt + ids[prompt:]
    args.max_length = 64
    (packed,) = trl_seam.prepare_rows(prepared, tokenizer, args, True, None, "train", **settings)
    assert packed["seq_lengths"] == [len(ids)] * 3


def test_trl_clones_a_template_without_a_model(tmp_path) -> None:
    source, tokenizer = make_tokenizer(), make_tokenizer()
    source.add_tokens(["<|turn|>"])
    source.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    source.save_pretrained(tmp_path)
    trl_seam.clone_template(tokenizer, str(tmp_path))
    assert tokenizer.chat_template == source.chat_template
    assert "<|turn|>" in tokenizer.get_vocab()
    assert len(tokenizer) % 64 == 0
