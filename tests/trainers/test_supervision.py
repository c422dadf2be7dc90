"""What is supervised: answers and their end, whatever the template; never an image; counted, and said."""

import copy
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl.chat_template_utils as templates
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from rich.console import Console

from mmkd.data.load_data import load_data
from mmkd.errors import UserError
from mmkd.methods.kd import KDTrainer
from mmkd.methods.sft import SFTBaselineConfig
from mmkd.preflight.dry_run import report
from mmkd.preparation.prepared_rows import PreparedRows
from mmkd.preparation.supervision import TokenCounts, kept
from mmkd.preparation.template import look_at
from mmkd.preparation.turns import Turns, assistant_labels
from mmkd.teachers.batch import View
from mmkd.training.answers import answer_starts
from scripts.make_tiny_models import CHAT_TEMPLATE, make_tokenizer, sentences
from tests.families import FAMILIES, made
from tests.helpers import Build
from tests.vlms import picture, vision_rows

TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "a mat"},
    {"role": "user", "content": "one dog"},
    {"role": "assistant", "content": "an old tree"},
]
UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TRIMMED = UNMARKED.replace("['content'] }}", "['content'] | trim }}")
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of_template(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def said(template: str, messages: list[Any], **row: Any) -> list[str]:
    """The texts that are supervised, turn by turn, where a template marks nothing."""
    text, spans = Turns.of(tokenizer_of_template(template)).read({"messages": messages, **row})
    return [text[start:end] for start, end in spans]


def rows_of(processing_class: Any, data: Dataset | IterableDataset, **settings: Any) -> PreparedRows:
    config = SFTBaselineConfig("unused", bf16=False, use_cpu=True, **{"max_length": None, **settings})
    return PreparedRows.of(config, processing_class, data)


def labels_of(processing_class: Any, data: Dataset, **settings: Any) -> tuple[Any, list[str]]:
    """A collated batch of rows with images, and the text that each row supervises."""
    batch = rows_of(processing_class, data, **settings).collator([dict(row) for row in data])
    tokenizer = processing_class.tokenizer
    return batch, [tokenizer.decode(row[row != -100]) for row in batch["labels"]]


# Turns of the assistant


def test_turns_of_any_template_end_with_their_own_token() -> None:
    """SmolLM2 marks nothing; its default system prompt and the headers are no answers."""
    assert said(SMOLLM2, TALK) == ["a mat<|im_end|>\n", "an old tree<|im_end|>\n"]


@pytest.mark.parametrize(
    "family",
    ["cohere2", "gemma3", "gemma", "idefics3", "lfm2", "llama3", "qwen2_5_vl", "qwen3_instruct_2507", "smolvlm"],
)
def test_turns_told_by_rendering_are_those_that_trl_marks(family: str) -> None:
    tokenizer = tokenizer_of_template(getattr(templates, f"{family}_chat_template"))
    tokenizer.bos_token = "<|system|>"
    parts = family in ("idefics3", "qwen2_5_vl", "smolvlm")
    told = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in TALK] if parts else TALK
    marks = Turns.of(tokenizer)
    assert marks.how == "marks"
    labels = [
        assistant_labels({"messages": told}, 0, turns, False, "train")
        for turns in (marks, Turns(tokenizer, None, "turns"))
    ]
    assert labels[0] == labels[1]
    assert any(label != -100 for label in labels[0]["labels"])


def test_a_marked_template_gives_the_masks_of_transformers() -> None:
    tokenizer = make_tokenizer()
    theirs: Any = tokenizer.apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = assistant_labels({"messages": TALK}, 0, Turns.of(tokenizer), False, "train")
    assert ours["input_ids"] == theirs["input_ids"]
    assert [int(label != -100) for label in ours["labels"]] == theirs["assistant_masks"]


def test_a_turn_with_tools_is_supervised_whole() -> None:
    template = (
        "{% for tool in tools or [] %}<tool>{{ tool.function.name }}{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{% endfor %}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}
    told = [TALK[0], call, {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "wet"}]
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert said(template, told, tools=tools) == ["<call>look<end>", "wet<end>"]
    text, _ = Turns.of(tokenizer_of_template(template)).read(
        {"messages": told, "tools": '[{"function": {"name": "x"}}]'}
    )
    assert text.startswith("<tool>x")


def test_a_talk_that_begins_with_the_assistant() -> None:
    assert said(SMOLLM2, TALK[1:])[0] == "a mat<|im_end|>\n"


def test_the_eos_that_ends_a_whole_conversation_is_supervised_once() -> None:
    template = UNMARKED + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert said(template, TALK) == ["a mat<|end|>", "an old tree<|end|><|end|>"]


def test_a_prompt_that_opens_a_thought_parts_from_the_answer_at_a_token() -> None:
    template = UNMARKED.replace("<|assistant|>{% endif %}", "<|assistant|><|system|>{% endif %}")
    assert said(template, TALK[:2]) == ["a mat<|end|>"]


def test_a_turn_that_later_ones_change_is_refused_with_the_way_out() -> None:
    forgetful = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last or m.role == 'user' else '...' }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(UserError, match=r"Row 7 of the train data: .* message 1 .*chat_template_path"):
        assistant_labels({"messages": TALK}, 7, Turns.of(tokenizer_of_template(forgetful)), False, "train")
    assert said(forgetful, TALK[:2]) == ["a mat<end>"]


def test_assistant_only_loss_trains_a_student_whose_template_marks_nothing(build: Build) -> None:
    trainer = build(
        KDTrainer,
        Dataset.from_list([{"messages": TALK}] * 8),
        trainer={"processing_class": tokenizer_of_template(UNMARKED)},
        assistant_only_loss=True,
        max_steps=1,
    )
    row, tokenizer = trainer.train_dataset[0], make_tokenizer()
    marked = assistant_labels({"messages": TALK}, 0, Turns.of(tokenizer), False, "train")
    assert (row["input_ids"], row["labels"]) == (marked["input_ids"], marked["labels"])
    assert trainer.args.assistant_only_loss
    trainer.train()


def test_prompt_and_completion_are_supervised_in_the_completion_only() -> None:
    data = Dataset.from_list([{"prompt": TALK[:3], "completion": TALK[3:]}] * 2)
    row = rows_of(tokenizer_of_template(UNMARKED), data, assistant_only_loss=True).train[0]
    told = [index for index in row["labels"] if index != -100]
    assert make_tokenizer().decode(told) == "an old tree<|end|>"


def test_plain_text_has_no_assistant(texts: Dataset) -> None:
    with pytest.raises(UserError, match="needs conversations"):
        rows_of(make_tokenizer(), texts, assistant_only_loss=True)


# Images


@pytest.fixture(params=list(FAMILIES))
def processor(request: pytest.FixtureRequest) -> Any:
    return made(request.param)[1]


def test_no_token_of_an_image_is_a_target(processor: Any) -> None:
    """Without masks, in an answer, and in plain text."""
    question = [{"type": "image", "text": None}, {"type": "text", "text": "the cat"}]
    answer = [{"type": "text", "text": "a mat"}, {"type": "image", "text": None}]
    placeholder = getattr(processor, "boi_token", None) or processor.image_token
    talk = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    processor.chat_template = processor.chat_template.replace(
        "{{ message['content'][0]['text'] }}",
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + placeholder
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}",
    )
    shown = {"images": [picture(0), picture(1)]}
    plain = {"text": f"{placeholder}the cat{placeholder} a mat"}
    for row, settings, expected in (
        (talk, {}, "<|user|>the cat<|end|><|assistant|>a mat<|end|>"),
        (talk, {"assistant_only_loss": True}, "a mat<|end|>"),
        (plain, {}, "the cat a mat<|end|>"),
    ):
        batch, told = labels_of(processor, Dataset.from_list([{**row, **shown}]), **settings)
        assert int((batch["input_ids"] == processor.image_token_id).sum()) > 0
        assert told == [expected]


def test_assistants_are_told_apart_in_rows_with_images(processor: Any) -> None:
    """By marks and by rendering alike, in every family, with two images, one and none."""
    data = vision_rows([2, 1, 0])
    _, marked = labels_of(processor, data, assistant_only_loss=True)
    processor.chat_template = processor.chat_template.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    _, rendered = labels_of(processor, data, assistant_only_loss=True)
    answers = [messages[1]["content"][0]["text"] for messages in data["messages"]]
    assert marked == rendered == [f"{answer}<|end|>" for answer in answers]


def test_plain_completions_with_images_end_like_those_without() -> None:
    processor = made("LLaVA-OneVision")[1]
    rows = [{"prompt": "<image>the cat", "completion": completion} for completion in (" a mat", " a mat<|end|>")]
    _, told = labels_of(processor, Dataset.from_list([{**row, "images": [picture(0)]} for row in rows]))
    assert told == [" a mat<|end|>"] * 2
    text = rows_of(processor.tokenizer, Dataset.from_list(rows)).train
    assert [[i for i in row["labels"] if i != -100] for row in text] == [
        processor.tokenizer(" a mat<|end|>")["input_ids"]
    ] * 2


def test_text_with_images_trains(build: Build, vlms: Any) -> None:
    features = Features({"text": Value("string"), "images": List(Image())})
    rows = [{"text": f"<image>{text}", "images": [picture(i)]} for i, text in enumerate(sentences(4))]
    models = {"model": str(vlms["student"]), "teacher": str(vlms["teacher"])}
    trainer = build(KDTrainer, Dataset.from_list(rows, features=features), trainer=models, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    tokens = sum(len(make_tokenizer()(text)["input_ids"]) + 1 for text in sentences(4))
    # The first token after an image is predicted by its last patch.
    assert logged["supervised_tokens"] == tokens


def test_a_row_that_supervises_all_but_its_image_has_no_prompt() -> None:
    labels = torch.tensor([[1, -100, -100, 4, 5], [-100, -100, -100, 4, 5]])
    visual = torch.tensor([[0, 1, 1, 0, 0]] * 2, dtype=torch.bool)
    view = View({"input_ids": labels.abs()}, labels, visual, torch.tensor([[0, 2], [1, 2]]))
    assert answer_starts(view) == [None, 3]


def test_tools_reach_the_template_of_rows_with_images() -> None:
    processor = made("LLaVA-OneVision")[1]
    processor.chat_template = "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + processor.chat_template
    data = vision_rows([1, 1]).add_column("tools", [f'[{{"name": "{name}"}}]' for name in ("dog", "bird")])
    batch, _ = labels_of(processor, data)
    texts = processor.tokenizer.batch_decode(batch["input_ids"])
    assert [text.split("<|user|>")[0] for text in texts] == ["dog", "bird"]


@pytest.mark.parametrize("how", ["recipe", "python"])
def test_rows_with_images_and_tools_train(how: str, build: Build, vlms: Any, tmp_path: Path, monkeypatch: Any) -> None:
    models = {"model": str(vlms["student"]), "teacher": str(vlms["teacher"])}
    rows = [
        {"messages": TALK, "images": [picture(n)], "tools": [{"name": name}]}
        for n, name in enumerate(["dog", "bird"] * 4)
    ]
    if how == "python":
        data = Dataset.from_list(rows)
    else:
        monkeypatch.chdir(tmp_path)
        for n, row in enumerate(rows):
            row["images"][0].save(f"{n}.png")
        lines = [json.dumps({**row, "images": [f"{n}.png"]}) for n, row in enumerate(rows)]
        Path("rows.jsonl").write_text("\n".join(lines))
        Path("mine.yaml").write_text("source: json\ndata_files: {train: rows.jsonl}\nshuffle_seed: null\n")
        data = load_data("./mine.yaml")["train"]
    trainer = build(KDTrainer, data, trainer=models, assistant_only_loss=True, max_steps=1)
    processor: Any = trainer.processing_class
    processor.chat_template = "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + processor.chat_template
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset.select(range(2))])
    texts = processor.tokenizer.batch_decode(batch["input_ids"])
    assert [text.split("USER")[0] for text in texts] == ["dog", "bird"]
    trainer.train()


# Weights of turns

WEIGHED = [TALK[0], {**TALK[1], "weight": 0}, TALK[2], {**TALK[3], "weight": 1}]
# A turn of the assistant in two pieces, as templates that write thoughts apart mark it.
TWICE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'][:2] }}{% endgeneration %}"
    "{% generation %}{{ message['content'][2:] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED, TWICE], ids=["marks", "turns", "pieces"])
def test_turns_of_weight_0_are_read_and_not_learnt(template: str) -> None:
    assert "".join(said(template, WEIGHED)) == "an old tree<|end|>"
    assert "".join(said(template, [{**one, "weight": 1} for one in TALK])) == "a mat<|end|>an old tree<|end|>"
    pair = Turns.of(tokenizer_of_template(template)).read({"prompt": WEIGHED[:1], "completion": WEIGHED[1:]})
    assert "".join(pair.text[start:end] for start, end in pair.spans) == "an old tree<|end|>"


def test_weights_hold_for_rows_with_images() -> None:
    processor = made("LLaVA-OneVision")[1]
    data = Dataset.from_list([{"messages": WEIGHED, "images": [picture(0)]}])
    _, texts = labels_of(processor, data, assistant_only_loss=True)
    assert [text.strip() for text in texts] == ["an old tree<|end|>"]
    with pytest.raises(UserError, match=r"Row 0 of the train data: messages\[1\] has weight 0.*assistant_only_loss"):
        rows_of(processor, data)


def test_weights_are_refused_where_every_turn_is_learnt() -> None:
    tokenizer, plain = make_tokenizer(), {"messages": TALK}
    data = Dataset.from_list([plain, {"messages": WEIGHED}])
    rows = rows_of(tokenizer, data, assistant_only_loss=True).train
    told = [[label for label in row["labels"] if label != -100] for row in rows]
    assert tokenizer.decode(told[1]) == "an old tree<|end|>"
    with pytest.raises(UserError, match=r"Row 1 of the train data: messages\[1\] has weight 0"):
        rows_of(tokenizer, data)
    with pytest.raises(UserError, match=r"Row 0 of the train data: completion\[0\] has weight 0"):
        rows_of(tokenizer, Dataset.from_list([{"prompt": WEIGHED[:1], "completion": WEIGHED[1:]}]))
    # A prompt is only read anyway.
    rows_of(tokenizer, Dataset.from_list([{"prompt": WEIGHED[:3], "completion": TALK[3:]}]))
    stream = IterableDataset.from_generator(lambda: iter([{"messages": WEIGHED}]))
    with pytest.raises(UserError, match="Row 0 of the train data"):
        next(iter(rows_of(tokenizer, stream, max_steps=1).train))


# Answers that were cut off

CUT = {"messages": TALK, "truncated": True}


def learnt(tokenizer: Any, rows: list[Any], **settings: Any) -> list[str]:
    """The text that each row supervises."""
    found = rows_of(tokenizer, Dataset.from_list(rows), **settings).train
    return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in found]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED, SMOLLM2], ids=["marks", "turns", "no token of its own"])
def test_the_end_of_an_answer_that_was_cut_off_is_not_learnt(template: str) -> None:
    tokenizer = tokenizer_of_template(template)
    whole = {"messages": TALK, "truncated": False}
    both = learnt(tokenizer, [whole, CUT], assistant_only_loss=True)
    end = "<|im_end|>\n" if template == SMOLLM2 else "<|end|>"
    assert both == [f"a mat{end}an old tree{end}", f"a mat{end}an old tree"]
    everything, but_its_end = learnt(tokenizer, [whole, CUT])
    assert everything == but_its_end + end
    pair = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert learnt(tokenizer, [{**pair, "truncated": "stop"}, {**pair, "truncated": "length"}]) == [
        f"an old tree{end}",
        "an old tree",
    ]


def test_plain_text_that_was_cut_off_does_not_end() -> None:
    tokenizer = make_tokenizer()
    pair, eos = {"prompt": "the", "completion": " cat"}, tokenizer.eos_token
    cut = [{**pair, "truncated": None}, {**pair, "truncated": "length"}]
    assert learnt(tokenizer, cut) == [f" cat{eos}", " cat"]
    text = [{"text": "the cat", "truncated": False}, {"text": "the cat", "truncated": True}]
    assert learnt(tokenizer, text) == [f"the cat{eos}", "the cat"]
    # A question is no answer.
    asked = {"messages": TALK[:3], "truncated": True}
    assert learnt(tokenizer, [asked], assistant_only_loss=True) == ["a mat<|end|>"]


@pytest.mark.parametrize("masked", [True, False])
def test_answers_about_images_that_were_cut_off_do_not_end(masked: bool) -> None:
    processor = made("LLaVA-OneVision")[1]
    rows = [{"messages": TALK, "images": [picture(0)], "truncated": cut} for cut in (False, True)]
    _, (whole, cut) = labels_of(processor, Dataset.from_list(rows), assistant_only_loss=masked)
    assert whole.startswith(cut)
    assert (whole.strip()[-7:], cut[-4:]) == ("<|end|>", "tree")


def test_a_row_whose_end_cannot_be_told_is_named() -> None:
    template = "{% if messages | length > 2 %}" + UNMARKED + "{% else %}" + SMOLLM2 + "{% endif %}"
    with pytest.raises(UserError, match="Row 1 of the train data is marked as truncated, and does not end"):
        learnt(tokenizer_of_template(template), [{"messages": TALK, "truncated": False}, CUT])


# Counts


def test_counts_say_what_max_length_costs() -> None:
    args = SFTBaselineConfig("unused", bf16=False, use_cpu=True, max_length=4)
    flags = [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1], [0, 0]]
    counts = TokenCounts.count([np.array(one, dtype=bool) for one in flags], args)
    assert (counts.rows, counts.tokens, counts.supervised, counts.longest) == (4, 16, 7, 6)
    assert (counts.cut, counts.lost_tokens, counts.lost_supervised) == (2, 3, 3)
    assert (counts.silent, counts.emptied) == (1, 1)
    assert "7 of them supervised (44%)" in str(counts)
    assert "max_length 4 cuts 2 of 4 rows (50%)" in str(counts)
    args.truncation_mode = "keep_end"
    assert kept(6, args) == slice(2, 6)


def test_rows_without_anything_to_learn_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    short, silent = {"prompt": "the", "completion": " cat"}, {"prompt": "the cat", "completion": ""}
    data = Dataset.from_list([short, {"prompt": "a mat " * 20, "completion": " dog"}, short])
    with caplog.at_level(logging.WARNING):
        rows = rows_of(make_tokenizer(), data, max_length=8)
    assert len(rows.train) == 2
    assert "1 of 3 train rows are left out: 1 with no supervised token within max_length 8 (row 1)." in caplog.text
    talks = Dataset.from_list([{"messages": TALK}, {"messages": TALK[:1]}])
    with caplog.at_level(logging.WARNING):
        rows = rows_of(make_tokenizer(), talks, assistant_only_loss=True, max_length=64)
    assert len(rows.train) == 1
    assert "1 without a supervised token (row 1)" in caplog.text
    # EOS alone is an answer.
    assert len(rows_of(make_tokenizer(), Dataset.from_list([short, silent])).train) == 2


def test_training_begins_with_what_it_learns_from(build: Build, vlms: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(KDTrainer, Dataset.from_list([{"messages": TALK}] * 8), assistant_only_loss=True, max_steps=1).train()
    note = [record.getMessage() for record in caplog.records if "Training data" in record.getMessage()]
    assert len(note) == 1
    assert note[0].startswith("Training data: 8 rows, ")
    assert "of them supervised" in note[0]
    assert "max_length 64 cuts none" in note[0]
    models = {"model": str(vlms["student"]), "teacher": str(vlms["teacher"])}
    trainer = build(KDTrainer, vision_rows([1] * 40), trainer=models, assistant_only_loss=True)
    counts = trainer.count_tokens()
    assert counts is not None
    assert (counts.rows, counts.of) == (14, 40)
    assert "a sample of 14 of 40 rows" in str(counts)


def test_a_dry_run_says_the_same(build: Build) -> None:
    data = Dataset.from_list([{"messages": [{**one, "mood": 1} for one in TALK]}] * 8)
    trainer, sink = build(KDTrainer, data, assistant_only_loss=True), io.StringIO()
    report(trainer, {}, Console(file=sink, width=400))
    counts = trainer.count_tokens()
    assert counts is not None
    assert f"{counts.size}." in sink.getvalue()
    assert f"{counts.cutting}." in sink.getvalue()
    assert "leaves them out: mood" in sink.getvalue()
    # 4 steps of 4 rows.
    assert f"about {16 * counts.supervised // 8} tokens" in sink.getvalue()


def test_settings_are_left_as_they_were(tokenizer: Any) -> None:
    config = SFTBaselineConfig("unused", bf16=False, use_cpu=True, assistant_only_loss=True, max_length=None)
    before = copy.copy(config)
    with pytest.raises(UserError):
        PreparedRows.of(config, tokenizer, Dataset.from_dict({"text": ["a"]}))
    assert config.assistant_only_loss
    assert before.to_dict() == config.to_dict()


# What a template makes of the rows


def report_of(template: str, rows: list[dict[str, Any]]) -> Any:
    report = look_at(rows, Turns(tokenizer_of_template(template)), "train")
    if report.error is not None:
        raise UserError(report.error)
    return report


SOUND = [
    {"messages": TALK},
    {"messages": [{"role": "system", "content": " be kind \n"}, *TALK]},
    # The same words twice, and one inside of the other.
    {"messages": [{"role": "user", "content": "ok"}, {"role": "assistant", "content": "ok ok"}]},
    {
        "messages": [
            {"role": "user", "content": "日本\n\n```py\nx = 1\n```  "},
            {"role": "assistant", "content": '"a" <b>'},
        ]
    },
    {"prompt": TALK[:1], "completion": TALK[1:2]},
    {"messages": [{**one, "tool_calls": None, "name": ""} for one in TALK]},
    {"text": "plain"},
]


@pytest.mark.parametrize("template", [UNMARKED, CHAT_TEMPLATE, SMOLLM2, TRIMMED])
def test_sound_rows_are_passed_in_silence(template: str) -> None:
    report = report_of(template, SOUND)
    assert report.warnings == []
    assert report.rows == 6


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5", "llama3_2", "gptoss", "glm4moe", "nemotron_3_nano"])
def test_tools_and_thoughts_that_a_family_writes_are_found(family: str) -> None:
    call = {"function": {"name": "look", "arguments": {"where": 'the "old" tree', "at": [1, "noon"]}}}
    talk: list[dict[str, Any]] = [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **call}]},
        {"role": "tool", "name": "look", "content": "rain"},
    ]
    last = {"role": "assistant", "content": "it is wet"}
    if family in ("qwen3", "glm4moe", "nemotron_3_nano"):
        last["reasoning_content"] = "it rains, so"
    tools = [{"type": "function", "function": {"name": "look", "description": "looks", "parameters": {}}}]
    report = report_of(getattr(templates, f"{family}_chat_template"), [{"messages": [*talk, last], "tools": tools}])
    assert [one for one in report.warnings if "leaves out" in one] == []


def test_what_a_template_swallows_is_found() -> None:
    call = {"function": {"name": "look", "arguments": '{"where": "here"}'}}
    told = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(UserError, match=r"Row 1 of the train data: .* tool call of the assistant in message 1"):
        report_of(UNMARKED, [{"messages": TALK}, {"messages": told}])
    thought = {"role": "assistant", "content": "a mat", "reasoning_content": "it sat"}
    with pytest.raises(UserError, match=r"reasoning_content of the assistant in message 1 \('it sat'\)"):
        report_of(UNMARKED, [{"messages": [TALK[0], thought]}])
    # Thoughts before the last question, as Qwen3 leaves them out on purpose.
    qwen3 = templates.qwen3_chat_template
    earlier = [TALK[0], {"role": "assistant", "content": "<think>\nit sat\n</think>\n\na mat"}, *TALK[2:]]
    warnings = report_of(qwen3, [{"messages": earlier}]).warnings
    assert len(warnings) == 1
    assert "row 0: the thought of the assistant in message 1 ('it sat')" in warnings[0]
    skipped = "{% if message['role'] == 'system' %}{% continue %}{% endif %}"
    silent = UNMARKED.replace("<|{{ message['role'] }}|>", skipped)
    system = {"messages": [{"role": "system", "content": "be kind"}, *TALK]}
    assert "the content of the system in message 0 ('be kind')" in report_of(silent, [system]).warnings[0]
    moody = {"messages": [{**one, "mood": 0} for one in TALK]}
    assert "mood" in report_of(UNMARKED, [moody]).warnings[0]
    # It says what is learnt from, and belongs into no text.
    assert report_of(UNMARKED, [{"messages": [{**one, "weight": 1} for one in TALK]}]).warnings == []


def test_what_a_template_adds_is_found() -> None:
    assert "named SmolLM, trained by Hugging Face" in report_of(SMOLLM2, [{"messages": TALK}]).note
    system = {"messages": [{"role": "system", "content": "be kind"}, *TALK]}
    assert report_of(SMOLLM2, [system]).note is None
    assert report_of(UNMARKED, [{"messages": TALK}]).note is None
    dated = "{{ strftime_now('%d %b %Y') }}" + UNMARKED
    assert "today's date" in report_of(dated, [{"messages": TALK}]).warnings[0]


def test_a_refused_conversation_is_named() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + UNMARKED
    system = {"messages": [{"role": "system", "content": "be kind"}, *TALK]}
    with pytest.raises(UserError, match="Row 1 of the train data: the chat template refuses it: no system"):
        report_of(strict, [{"messages": TALK}, system])


def test_a_trainer_says_once_what_its_template_does(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    data = Dataset.from_list([{"messages": [{**one, "mood": 1} for one in TALK]}] * 8)
    with caplog.at_level(logging.WARNING):
        build(KDTrainer, data, max_steps=1).train()
    assert caplog.text.count("does not know these keys of messages, and leaves them out: mood") == 1
