"""What messages say besides role and content reaches the tokens that a student learns."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerFast

from mmkd.capture.sequences import prepare
from mmkd.data.load_data import load_data
from mmkd.errors import UserError
from mmkd.methods.kd import KDTrainer
from tests.helpers import Build

TEMPLATE = """
{%- if tools %}<|user|>{{ tools | tojson }}<|end|>{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}<|assistant|>{% generation %}
{%- if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}
{{- message.content or '' }}
{%- for one in message.tool_calls or [] %}[{{ one.function.name }} {{ one.function.arguments | tojson }}]{% endfor %}
{{- '<|end|>' }}{% endgeneration %}
{%- else %}<|user|>{{ message.content }}<|end|>{% endif %}
{%- endfor %}"""

TOOLS = [{"name": "zip"}]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def asked(*answers: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, *({"role": "assistant", **one} for one in answers)]}


ROWS = [
    {**asked({"content": None, "tool_calls": [call("zip", code=150)]}), "tools": TOOLS},
    {**asked({"content": "a", "reasoning_content": "r"}), "tools": TOOLS},
    {**asked({"content": "", "tool_calls": [call("weather", city="Oslo")]}), "tools": TOOLS},
]
WHOLE = '<|user|>[{"name": "zip"}]<|end|><|user|>q<|end|><|assistant|>'
SUPERVISED = ['[zip {"code": 150}]<|end|>', "(r)a<|end|>", '[weather {"city": "Oslo"}]<|end|>']


@pytest.fixture
def speaker(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    own = deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


def said(rows: Any, tokenizer: Any) -> list[tuple[str, str]]:
    """What each row says in all, and what of it is supervised."""
    labels = [[label for label in row["labels"] if label != -100] for row in rows]
    return [(tokenizer.decode(row["input_ids"]), tokenizer.decode(one)) for row, one in zip(rows, labels, strict=True)]


EXPECTED = [(WHOLE + answer, answer) for answer in SUPERVISED]


def stream() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(ROWS))


@pytest.mark.parametrize("make", [lambda: Dataset.from_list(ROWS), stream], ids=["rows", "stream"])
def test_calls_thoughts_and_tools_are_trained_on(build: Build, speaker: Any, make: Any) -> None:
    trainer = build(
        KDTrainer, make(), {"processing_class": speaker}, assistant_only_loss=True, max_length=256, max_steps=1
    )
    # No argument of another row's tool is null in a call.
    assert said(trainer.train_dataset, speaker) == EXPECTED
    trainer.train()


def test_recipes_caches_and_evaluations_see_the_same(
    build: Build, speaker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {"source": "json", "data_files": {"train": "rows.jsonl"}, "columns": {"messages": "messages"}}
    Path("mine.yaml").write_text(yaml.safe_dump({**recipe, "shuffle_seed": None}))
    rows = load_data("./mine.yaml")["train"]
    trainer = build(
        KDTrainer, rows, {"processing_class": speaker, "eval_dataset": rows}, assistant_only_loss=True, max_length=256
    )
    assert said(trainer.train_dataset, speaker) == EXPECTED
    assert said(trainer.eval_dataset, speaker) == EXPECTED
    prepared = prepare(DatasetDict({"train": rows}), trainer.args, speaker)
    sequences: list[Any] = [prepared.splits["train"][number] for number in range(3)]
    assert [(speaker.decode(one.ids), speaker.decode(one.ids[one.supervised])) for one in sequences] == EXPECTED


def test_rows_of_other_layouts_are_trained_on_as_what_they_say(build: Build, tokenizer: Any) -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    trainer = build(KDTrainer, Dataset.from_list([{"conversations": talk}, {"conversations": None}]))
    assert said(trainer.train_dataset, tokenizer) == [("<|user|>q<|end|><|assistant|>a<|end|>",) * 2]
    evaluated: Any = trainer.evaluate(Dataset.from_list([{"instruction": "q", "input": "", "output": "a"}]))
    assert evaluated["eval_loss"] > 0
    with pytest.raises(UserError, match="The eval data: no layout is known with the columns x, y"):
        trainer.evaluate(Dataset.from_list([{"x": 1, "y": 2}]))


@pytest.mark.parametrize("assistant_only", [False, True])
def test_of_an_answer_in_a_column_of_its_own_only_that_is_learnt(
    build: Build, tokenizer: Any, assistant_only: bool
) -> None:
    row = {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["x", "y"]]}
    trainer = build(KDTrainer, Dataset.from_list([row, {**row, "output": None}]), assistant_only_loss=assistant_only)
    whole = "<|system|>s<|end|><|user|>x<|end|><|assistant|>y<|end|><|user|>q<|end|><|assistant|>a<|end|>"
    assert said(trainer.train_dataset, tokenizer) == [(whole, "a<|end|>")]


def test_evaluation_rows_by_name_are_read_too(build: Build, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list([{"prompt": "q", "completion": " a"}, {"prompt": "q", "completion": None}])
    trainer = build(KDTrainer, rows.select([0]), {"eval_dataset": {"mine": rows}})
    evaluation: Any = trainer.eval_dataset
    assert len(evaluation["mine"]) == 1
    assert "1 of 2 mine rows are left out: 1 without completion (row 1)." in caplog.messages


def test_a_formatting_function_reads_rows_itself(build: Build, tokenizer: Any) -> None:
    rows = Dataset.from_list([{"x": "the cat", "y": None}])
    trainer = build(KDTrainer, rows, {"formatting_func": lambda row: row["x"]})
    assert said(trainer.train_dataset, tokenizer) == [("the cat<|end|>", "the cat<|end|>")]
