"""A teacher's view of a row: what is rewritten, what stays, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mmkd.data.layouts import canonical
from mmkd.data.load_data import load_data
from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.methods.comd.comd_trainer import CoMDConfig
from mmkd.publish.model_card import _own_prompts

QUESTION = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}


def view(**settings: Any) -> TeacherView:
    made = TeacherView.of(settings)
    assert made is not None
    return made


def test_a_template_takes_the_place_of_the_question_and_the_answer_stays() -> None:
    row = {"prompt": [QUESTION], "completion": [ANSWER], "solution": "count {up}", "domain": "sums"}
    told = view(template="{prompt}\nHint: {solution}; answer {answer}", columns=["solution"]).rewrite(row)
    hint = "2 + 2?\nHint: count {up}; answer 4"
    assert told == {**row, "prompt": [{"role": "user", "content": hint}]}
    assert row["prompt"] == [QUESTION]


def test_a_system_message_is_added_or_takes_the_place_of_the_rows_own() -> None:
    system = {"role": "system", "content": "Be brief."}
    told = {"role": "system", "content": "Think hard."}
    own = view(system="Think hard.")
    assert own.rewrite({"messages": [QUESTION, ANSWER]})["messages"] == [told, QUESTION, ANSWER]
    assert own.rewrite({"messages": [system, QUESTION, ANSWER]})["messages"] == [told, QUESTION, ANSWER]


def test_the_turn_before_the_first_answer_that_is_learnt_from_is_rewritten() -> None:
    unlearnt, again = {**ANSWER, "weight": 0}, {"role": "user", "content": "3 + 3?"}
    hinted = view(template="{prompt} Hint.")
    all_learnt = hinted.rewrite({"messages": [QUESTION, ANSWER, again, ANSWER]})["messages"]
    assert [turn["content"] for turn in all_learnt] == ["2 + 2? Hint.", "4", "3 + 3?", "4"]
    one_learnt = hinted.rewrite({"messages": [QUESTION, unlearnt, again, ANSWER]})["messages"]
    assert [turn["content"] for turn in one_learnt] == ["2 + 2?", "4", "3 + 3? Hint.", "4"]
    in_prompt = hinted.rewrite({"prompt": [QUESTION, ANSWER, again], "completion": [ANSWER]})["prompt"]
    assert [turn["content"] for turn in in_prompt] == ["2 + 2?", "4", "3 + 3? Hint."]


def test_plain_prompts_and_plain_text() -> None:
    row = {"prompt": "2 + 2 =", "completion": " 4", "fact": None}
    assert view(template="{fact}{prompt}", columns="fact").rewrite(row) == row
    told = view(template="About {topic}: ", columns=["topic"])
    assert told.rewrite({"text": "one two", "topic": "sums"})["text"] == "About sums: one two"
    for wrong in (view(system="Be wise."), view(template="{prompt} {topic}", columns=["topic"])):
        with pytest.raises(UserError, match="plain text") as refused:
            wrong.prefix({"text": "one two", "topic": "sums"})
        assert refused.value.because == "meaning"


def test_images_stay_where_they_are_around_the_prompt() -> None:
    content = [{"type": "text", "text": "Left:"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["small"], "large": ["a", "b"]}
    asked = view(template="See. {prompt} Look.").rewrite(row)["messages"][0]["content"]
    assert [part.get("text") for part in asked] == ["See. Left:", None, "Which? Look."]
    more = view(images_column="large").rewrite(row)
    assert more["images"] == ["a", "b"]
    assert [part["type"] for part in more["messages"][0]["content"]] == ["image", "image", "text", "text"]
    alone = view(images_column="large").rewrite({"messages": [QUESTION, ANSWER], "large": "a"})
    assert alone["images"] == ["a"]
    assert alone["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "2 + 2?"}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "sets neither"),
        ({"columns": []}, "sets neither"),
        ({"sytem": "x"}, "did you mean 'system'"),
        ({"system": 5}, "is no text"),
        ("{system", "is no JSON"),
        ([1], "write a mapping"),
        ({"template": "{prompt} {solution}"}, "reads {solution}, which is not among"),
        ({"template": "{prompt}", "columns": ["solution"]}, "does not read"),
        ({"template": "{prompt", "columns": []}, "template"),
        ({"template": ""}, "is empty"),
        ({"template": "{completion}", "columns": ["completion"]}, "holds what is trained on"),
        ({"columns": ["solution"], "system": "x"}, "has no template to read them"),
    ],
)
def test_a_view_that_cannot_be_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TeacherView.of(value)


def test_a_conversation_without_a_turn_to_rewrite_and_a_column_that_is_not_there() -> None:
    with pytest.raises(UserError, match="has none before"):
        view(template="Hint: {prompt}").rewrite({"messages": [ANSWER, QUESTION, ANSWER]})
    with pytest.raises(UserError, match=r"'answer', which the train rows do not have; .* \{answer\}"):
        view(template="{answer}", columns=["answer"]).check(["prompt", "completion"], "train")


def test_facts_and_json_say_the_same_view() -> None:
    told = view(system="s", template="{b} {a}", columns=["a", "b"])
    assert told.facts == {"system": "s", "template": "{b} {a}", "columns": ["a", "b"]}
    assert TeacherView.of('{"system": "s", "template": "{b} {a}", "columns": ["a", "b"]}') == told
    assert TeacherView.of(None) is None


def test_columns_of_the_view_come_through_a_data_recipe_and_change_no_other(tmp_path: Path) -> None:
    rows = [{"instruction": f"{n} + 1?", "output": str(n + 1), "why": f"count to {n}", "other": n} for n in range(8)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "sums.yaml"
    columns = "columns: {prompt: instruction, completion: output}"
    recipe.write_text(f"name: sums\nsource: json\ndata_files: {{train: {file}}}\n{columns}\n")
    for source in (file, recipe):
        plain, kept = load_data(source)["train"], load_data(source, also=["why", "output"])["train"]
        assert {*kept.column_names} - {*plain.column_names} == {"why", "output"}
        assert sorted(kept["why"]) == [row["why"] for row in rows]
        assert kept.remove_columns(["why", "output"]).to_list() == plain.to_list()
    mixture = tmp_path / "both.yaml"
    mixture.write_text(f"name: both\nmixture: [{{data: {recipe}, weight: 1}}, {{data: {recipe}, weight: 1}}]\n")
    assert "why" in load_data(mixture, also=["why"])["train"].column_names
    with pytest.raises(UserError, match="'wy'"):
        load_data(recipe, also=["wy"])


def test_rows_of_python_keep_a_column_that_their_layout_reads() -> None:
    rows = Dataset.from_dict({"instruction": ["a?"], "output": ["b"], "why": ["c"]})
    for data in (rows, rows.to_iterable_dataset()):
        (row,) = canonical(data, keep=["output"])
        assert (row["completion"], row["output"], row["why"]) == ([{"role": "assistant", "content": "b"}], "b", "c")


def test_a_card_names_what_the_teacher_read_and_comd_takes_no_view() -> None:
    stages = {"KD": {"teacher_view": {"system": "Be brief."}}, "SFT": {"method": "sft"}}
    assert _own_prompts([{"stages": stages}]) == '`{"system": "Be brief."}`'
    assert (
        _own_prompts([{"teacher": "a"}, {"method": "sft", "teacher_view": {"system": "A baseline is not taught."}}])
        == ""
    )
    with pytest.raises(UserError, match="comd has the teacher answer") as refused:
        CoMDConfig(output_dir="run", bf16=False, teacher_view={"system": "Be brief."})
    assert refused.value.because == "not built"
