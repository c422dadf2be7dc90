"""transfer-tokenizer: the new model is the old one as far as its tokens are old ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from mmkd.alignment.pieces import TokenPieces
from mmkd.alignment.token_rows import token_rows
from mmkd.commands import main as cli
from mmkd.models import byte_tokenizer as bytes_module
from mmkd.models import transfer
from scripts.make_tiny_models import make_model, make_tokenizer, save
from tests.alignment.tiny_tokenizers import CHATTERS, TEXTS, byte_level, metaspace, unigram, wordpiece

# Tests reach into models by attribute, and nn.Module types none of those.
Model = Any
transfer_tokenizer: Callable[..., Any] = transfer.transfer_tokenizer
byte_tokenizer: Callable[[Any], Any] = bytes_module.byte_tokenizer
TEXT = "Größe: the café answers 23 users.\n\n\tdef add(x) 🙂"
MESSAGES = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello."}]
SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def ids_of(tokenizer: Any) -> dict[str, Any]:
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}


def llama(tokenizer: Any, tied: bool = True, padding: int = 0, **settings: Any) -> Model:
    rows = max(tokenizer.get_vocab().values()) + 1 + padding
    return model_of(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **SHAPE, **ids_of(tokenizer)), **settings)


def phi(tokenizer: Any) -> Model:
    return model_of(PhiConfig(vocab_size=len(tokenizer), **SHAPE, **ids_of(tokenizer)))


def gemma(tokenizer: Any) -> Model:
    return model_of(Gemma3TextConfig(vocab_size=len(tokenizer), head_dim=12, **SHAPE, **ids_of(tokenizer)))


def gpt2(tokenizer: Any) -> Model:
    rows = len(tokenizer)
    return model_of(GPT2Config(vocab_size=rows, n_positions=64, n_embd=24, n_layer=2, n_head=2, **ids_of(tokenizer)))


def untied_llama(tokenizer: Any) -> Model:
    return llama(tokenizer, tied=False)


def padded_llama(tokenizer: Any) -> Model:
    return llama(tokenizer, padding=13)


MODELS = [llama, untied_llama, padded_llama, phi, gemma, gpt2]


@torch.no_grad()
def logits_of(model: Model, ids: Any) -> Tensor:
    return model(input_ids=torch.as_tensor(ids)[None]).logits[0]


def permuted(tokenizer: Any, seed: int = 0) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer with other ids for the same tokens, and the new id of each old one."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    order = np.random.default_rng(seed).permutation(len(tokenizer)).tolist()
    data["model"]["vocab"] = {token: order[index] for token, index in data["model"]["vocab"].items()}
    for token in data["added_tokens"]:
        token["id"] = order[token["id"]]
        # Added tokens get the ids after the model's, unless they are in its vocabulary.
        data["model"]["vocab"][token["content"]] = token["id"]
    data["added_tokens"].sort(key=lambda token: token["id"])
    data["post_processor"] = None
    roles = {role: name for role, name in tokenizer.special_tokens_map.items() if isinstance(name, str)}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **roles)
    other.chat_template = tokenizer.chat_template
    return other, order


@pytest.mark.parametrize("build", MODELS)
def test_a_transfer_to_the_same_tokenizer_changes_no_logit(build: Any) -> None:
    tokenizer = CHATTERS["llama"]()
    model = build(tokenizer)
    done = transfer_tokenizer(model, tokenizer, tokenizer)
    size = len(tokenizer)
    assert (done.rows.copied, done.rows.averaged, len(done.rows)) == (size, 0, size)
    ids = tokenizer(TEXT)["input_ids"]
    assert torch.equal(logits_of(done.model, ids), logits_of(model, ids)[:, :size])
    assert done.model.config.vocab_size == size
    assert type(done.model) is type(model)
    before, after = ({key: getattr(one.config, key) for key in ids_of(tokenizer)} for one in (model, done.model))
    assert after == before


@pytest.mark.parametrize("family", ["chatml", "llama", "gemma", "llama2"])
@pytest.mark.parametrize("build", [llama, untied_llama, phi])
def test_a_permuted_vocabulary_gives_permuted_logits(build: Any, family: str) -> None:
    tokenizer: Any = CHATTERS[family]()
    other, order = permuted(tokenizer)
    model = build(tokenizer)
    done = transfer_tokenizer(model, tokenizer, other)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    theirs = other(TEXT, add_special_tokens=False)["input_ids"]
    assert theirs == [order[index] for index in ids]
    torch.testing.assert_close(logits_of(done.model, theirs)[:, order], logits_of(model, ids), rtol=0, atol=1e-5)
    assert done.model.config.eos_token_id == order[tokenizer.eos_token_id]


@pytest.mark.parametrize("make", [*CHATTERS.values(), unigram, wordpiece])
def test_every_vocabulary_is_itself(make: Any) -> None:
    tokenizer = make()
    rows = token_rows(tokenizer, tokenizer)
    assert rows.lengths.tolist() == [1] * len(tokenizer)
    assert rows.pieces.tolist() == list(range(len(tokenizer)))


@pytest.mark.parametrize("source, target", [("chatml", "gemma"), ("gemma", "chatml"), ("llama2", "llama")])
def test_ordinary_tokens_are_the_old_pieces_of_their_bytes(source: str, target: str) -> None:
    old, new = CHATTERS[source](), CHATTERS[target]()
    rows, ours, theirs = token_rows(old, new), TokenPieces.of(old), TokenPieces.of(new)
    ends = np.cumsum(rows.lengths)
    several = 0
    for index in range(len(new)):
        pieces = rows.pieces[ends[index] - rows.lengths[index] : ends[index]].tolist()
        if not theirs.special[index] and theirs.lengths[index]:
            assert b"".join(ours[piece] for piece in pieces) == theirs[index]
            several += len(pieces) > 1
    assert several > 10
    assert rows.copied > 256


def test_a_token_is_what_the_old_tokenizer_makes_of_it_and_its_row_the_mean() -> None:
    old, new = byte_level(300), byte_level(400)
    model = llama(old)
    done = transfer_tokenizer(model, old, new)
    before, after = (one.get_input_embeddings().weight for one in (model, done.model))
    assert done.rows.averaged > 50
    for token, index in new.get_vocab().items():
        pieces = old(new.convert_tokens_to_string([token]), add_special_tokens=False)["input_ids"]
        if "\ufffd" not in new.convert_tokens_to_string([token]):
            torch.testing.assert_close(after[index], before[pieces].mean(0), rtol=0, atol=1e-6)


def test_special_tokens_are_copied_by_role() -> None:
    def row(source: Any, target: Any, token: str) -> list[str]:
        rows, index = token_rows(source, target), target.convert_tokens_to_ids(token)
        start = rows.lengths[:index].sum()
        return source.convert_ids_to_tokens(rows.pieces[start : start + rows.lengths[index]].tolist())

    chatml, chatty, gemma = CHATTERS["chatml"](), CHATTERS["llama"](), CHATTERS["gemma"]()
    assert row(chatml, chatty, "<|start_header_id|>") == ["<|im_start|>"]
    assert row(chatml, chatty, "<|end_header_id|>") == ["Ċ"]
    assert row(chatml, chatty, "<|eot_id|>") == ["<|im_end|>"]
    assert row(chatml, chatty, "<|begin_of_text|>") == ["<|im_start|>"]
    assert row(chatty, chatml, "<|im_start|>") == ["<|start_header_id|>"]
    assert row(chatty, chatml, "<|im_end|>") == ["<|eot_id|>"]
    # Neither a role nor its name is known there: the mean of what its name is split into.
    assert "".join(row(chatty, chatml, "<|endoftext|>")) == "<|endoftext|>"
    assert len(row(chatty, chatml, "<|endoftext|>")) > 1
    assert row(gemma, chatty, "<|begin_of_text|>") == ["<bos>"]
    assert row(gemma, chatty, "<|eot_id|>") == ["<end_of_turn>"]
    assert row(chatty, gemma, "<start_of_turn>") == ["<|start_header_id|>"]
    plain = byte_level(300, ("<|endoftext|>",), eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    assert row(chatty, plain, "<|endoftext|>") == ["<|eot_id|>"]


def test_what_has_no_counterpart_is_drawn_around_the_mean_row_and_padding_is_that_mean() -> None:
    # Without a fallback to bytes, most bytes beyond ASCII are nothing to it.
    old, new = unigram(), byte_level(300)
    model = llama(old, padding=50)
    with torch.no_grad():
        model.get_input_embeddings().weight[len(old) :] = 1e4
    done = transfer_tokenizer(model, old, new, pad_to_multiple_of=512)
    rows = done.rows
    assert rows.random > 100
    assert rows.copied + rows.averaged + rows.random == len(new) < done.model.config.vocab_size == 512
    known = model.get_input_embeddings().weight[: len(old)]
    weight = done.model.get_input_embeddings().weight
    drawn = (weight[:300][torch.from_numpy(rows.lengths == 0)] - known.mean(0)) / known.std(0)
    assert abs(drawn.mean()) < 0.1
    assert abs(drawn.std() - 1) < 0.1
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(weight[300:], known.mean(0).expand(212, -1))
    again = transfer_tokenizer(model, old, new, pad_to_multiple_of=512)
    assert torch.equal(again.model.get_input_embeddings().weight, weight)


def test_untied_students_of_tied_models_start_as_tied_ones_and_the_bias_follows() -> None:
    old, new = CHATTERS["chatml"](), CHATTERS["gemma"]()
    tied, untied = (transfer_tokenizer(llama(old), old, new, untie=untie).model for untie in (False, True))
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight
    assert untied.get_output_embeddings().weight.data_ptr() != untied.get_input_embeddings().weight.data_ptr()
    assert torch.equal(logits_of(tied, [5, 300]), logits_of(untied, [5, 300]))
    model = phi(old)
    done = transfer_tokenizer(model, old, new)
    rows = done.rows
    first = np.flatnonzero(rows.lengths > 1)[0]
    pieces = rows.pieces[rows.lengths[:first].sum() :][: rows.lengths[first]]
    torch.testing.assert_close(done.model.lm_head.bias[first], model.lm_head.bias[pieces].mean())


def test_nothing_is_shared_and_nothing_given_is_changed() -> None:
    old, new = CHATTERS["chatml"](), byte_level(340)
    model = llama(old)
    config, state = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    template, size = new.chat_template, len(new)
    done = transfer_tokenizer(model, old, new)
    with torch.no_grad():
        for parameter in done.model.parameters():
            parameter.fill_(7.0)
    assert model.config.to_dict() == config
    assert (new.chat_template, len(new)) == (template, size)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_missing_chat_template_comes_with_its_special_tokens() -> None:
    old, new = CHATTERS["chatml"](), metaspace(420, ("<eos>",), eos_token="<eos>")
    done = transfer_tokenizer(llama(old), old, new)
    assert done.added == ("<|im_start|>", "<|im_end|>")
    starts = np.cumsum(done.rows.lengths) - done.rows.lengths
    for name in done.added:
        index = done.tokenizer.convert_tokens_to_ids(name)
        assert done.rows.pieces[starts[index]] == old.convert_tokens_to_ids(name)
    text = done.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == old.apply_chat_template(MESSAGES, tokenize=False)
    end = done.tokenizer.convert_tokens_to_ids("<|im_end|>")
    # The model stops at its old end of turn and at the tokenizer's own eos, which is a copy of it.
    assert done.model.generation_config.eos_token_id == [new.eos_token_id, end]
    kept = transfer_tokenizer(llama(old), old, CHATTERS["llama"]())
    assert kept.added == ()
    assert kept.tokenizer.chat_template == CHATTERS["llama"]().chat_template


@pytest.mark.parametrize("family", [*CHATTERS, "made"])
def test_a_tokenizer_of_bytes_spells_every_text(family: str, tmp_path: Path) -> None:
    source = make_tokenizer() if family == "made" else CHATTERS[family]()
    made = byte_tokenizer(source)
    made.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (made, again):
        assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == list(TEXT.encode())
        assert tokenizer.decode(list(TEXT.encode())) == TEXT
        assert (tokenizer.eos_token, tokenizer.bos_token) == (source.eos_token, source.bos_token)
        rendered, ids = (tokenizer.apply_chat_template(MESSAGES, tokenize=tokenize) for tokenize in (False, True))
        assert rendered == source.apply_chat_template(MESSAGES, tokenize=False)
        assert tokenizer.decode(ids["input_ids"]) == rendered
        assert min(tokenizer.added_tokens_decoder) == 256
    assert TokenPieces.of(made).lossless
    assert TokenPieces.of(made)[200] == b"\xc8"


def test_a_tokenizer_of_bytes_adds_the_specials_that_the_source_adds() -> None:
    data = json.loads(CHATTERS["llama"]().backend_tokenizer.to_str())
    begin = CHATTERS["llama"]().bos_token_id
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [begin], "tokens": ["<|begin_of_text|>"]}
        },
    }
    source = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<|begin_of_text|>"
    )
    made = byte_tokenizer(source)
    assert made("ab")["input_ids"] == [made.bos_token_id, 97, 98]
    assert made("é", return_offsets_mapping=True)["offset_mapping"] == [(0, 0), (0, 1), (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokenizer", ["bytes", "gemma"])
def test_the_command_writes_a_folder_that_transformers_loads_and_runs(
    tokenizer: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = CHATTERS["chatml"]()
    save(llama(source, dtype=dtype), source, tmp_path / "model")
    CHATTERS["gemma"]().save_pretrained(tmp_path / "gemma")
    name = "bytes" if tokenizer == "bytes" else str(tmp_path / "gemma")
    arguments = ["transfer-tokenizer", str(tmp_path / "model"), name, str(tmp_path / "out" / "student"), "--untie"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert " copied, " in printed
    assert " averaged, " in printed
    assert "Chat template: " in printed

    student: Model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out" / "student")
    expected = byte_tokenizer(source) if tokenizer == "bytes" else CHATTERS["gemma"]()
    assert loaded.get_vocab() == expected.get_vocab()
    assert student.config.vocab_size == len(loaded)
    assert student.dtype == dtype
    assert not student.config.tie_word_embeddings
    assert student.config.bos_token_id == loaded.bos_token_id
    assert student.config.pad_token_id == loaded.pad_token_id
    inputs = loaded.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_tensors="pt")
    generated = student.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert isinstance(loaded.decode(generated[0]), str)
    assert generated.max() < len(loaded)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["student"]

    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_student_of_bytes_learns_from_the_model_it_was(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    save(make_model(rows=len(tokenizer)), tokenizer, tmp_path / "model")
    assert cli.main(["transfer-tokenizer", str(tmp_path / "model"), "bytes", str(tmp_path / "student")]) == 0
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data.yaml").write_text(
        f"name: rows\nsource: json\ndata_files: {{train: {tmp_path / 'rows.jsonl'}}}\nsplits: {{train: train}}\n"
        "columns: {text: text}\n"
    )
    flags = {
        "student": tmp_path / "student",
        "teacher": tmp_path / "model",
        "data": tmp_path / "data.yaml",
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "max_length": 128,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": "false",
    }
    recipe = "alm/smollm2_to_bytes"
    assert (
        cli.main(["train", recipe, *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]) == 0
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "run")("é", add_special_tokens=False)["input_ids"] == [195, 169]


@pytest.mark.parametrize(
    "model, tokenizer, flags, complaint",
    [
        ("model", "nowhere", [], "nowhere' is no tokenizer"),
        ("nowhere", "bytes", [], "has no loadable tokenizer"),
        ("untied", "bytes", ["--untie"], "separate already"),
        ("model", "bytes", ["--pad_to_multiple_of", "0"], "pad_to_multiple_of is 0"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(
    model: str, tokenizer: str, flags: list[str], complaint: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    source = CHATTERS["chatml"]()
    save(llama(source), source, tmp_path / "model")
    save(untied_llama(source), source, tmp_path / "untied")
    assert cli.main(["transfer-tokenizer", model, tokenizer, "out", *flags]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_besides_the_embeddings_is_refused() -> None:
    tokenizer = CHATTERS["chatml"]()
    model = llama(tokenizer)
    model.model.second = nn.Embedding(model.config.vocab_size, 8)
    with pytest.raises(ValueError, match=r"model\.second of LlamaForCausalLM has one row per token"):
        transfer_tokenizer(model, tokenizer, tokenizer)
