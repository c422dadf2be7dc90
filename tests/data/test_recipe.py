"""Data recipes: what a YAML may say, what it is told when it may not, and the rows that come out."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st

from mmkd.data.columns import MessagesColumn
from mmkd.data.data_recipe import IDENTITY, DataRecipe
from mmkd.data.load_data import load_data, load_rows, mixture_counts

SHIPPED = Path(__file__).parents[2] / "data_recipes"
CHAT = [
    [{"from": "human", "value": f"question {i}"}, {"from": "gpt", "value": f"answer {i}", "weight": 1.0}]
    for i in range(5)
]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A current folder and a datasets cache of this test's own; no test can reach the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return tmp_path


def write_jsonl(path, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(name: str = "mine", folder: str = ".", **keys: Any) -> str:
    path = Path(folder) / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return f"./{path}"


def text_recipe(name: str = "mine", texts: Any = ("one", "two", "three"), folder: str = ".", **keys: Any) -> str:
    """A recipe over a JSONL file with a `text` column and an `id`."""
    file = write_jsonl(f"{name}.jsonl", [{"text": text, "id": i} for i, text in enumerate(texts)])
    defaults = {"source": "json", "data_files": {"train": str(file)}, "columns": {"text": "text"}}
    return write_recipe(name, folder, **(defaults | keys))


def numbered(n, prefix="row"):
    return [f"{prefix} {i}" for i in range(n)]


# What comes out


def test_rows_have_exactly_the_mapped_columns():
    rows = load_data(text_recipe(shuffle_seed=None))
    assert list(rows) == ["train"]
    assert rows["train"].column_names == ["text"]
    assert rows["train"]["text"][:] == ["one", "two", "three"]


def test_renamed_columns_are_not_copied():
    """A set of tens of gigabytes with the right columns must not be written once more."""
    path = text_recipe(columns={"text": "text"}, shuffle_seed=None)
    load_data(path)
    assert not list(Path("hf_cache").rglob("cache-*.arrow"))


def test_columns_can_swap_names():
    write_jsonl("a.jsonl", [{"prompt": "the answer", "completion": "the question"}])
    path = write_recipe(
        source="json", data_files={"train": "a.jsonl"}, columns={"prompt": "completion", "completion": "prompt"}
    )
    assert load_data(path)["train"][0] == {"prompt": "the question", "completion": "the answer"}


def test_template_joins_columns_and_reads_null_as_nothing():
    write_jsonl("a.jsonl", [{"a": "Add.", "b": "1 2", "n": 3}, {"a": "Sing.", "b": None, "n": 4}])
    path = write_recipe(
        source="json",
        data_files={"train": "a.jsonl"},
        columns={"prompt": "{a}\n{b} {{x}}", "completion": "{n}"},
        shuffle_seed=None,
    )
    rows = load_data(path)["train"]
    assert rows[0] == {"prompt": "Add.\n1 2 {x}", "completion": "3"}
    assert rows[1] == {"prompt": "Sing.\n {x}", "completion": "4"}


def test_one_column_can_serve_two():
    write_jsonl("a.jsonl", [{"a": "same"}])
    path = write_recipe(source="json", data_files={"train": "a.jsonl"}, columns={"prompt": "a", "completion": "a"})
    assert load_data(path)["train"][0] == {"prompt": "same", "completion": "same"}


def test_sharegpt_conversations_become_messages():
    write_jsonl("a.jsonl", [{"conversations": chat, "topic": "x"} for chat in CHAT])
    columns = {
        "messages": {
            "column": "conversations",
            "role_key": "from",
            "content_key": "value",
            "role_map": {"human": "user", "gpt": "assistant"},
        }
    }
    path = write_recipe(source="json", data_files={"train": "a.jsonl"}, columns=columns, shuffle_seed=None)
    rows = load_data(path)["train"]
    assert rows.column_names == ["messages"]
    assert rows[1]["messages"] == [
        {"role": "user", "content": "question 1"},
        {"role": "assistant", "content": "answer 1", "weight": 1.0},
    ]


def test_messages_keep_every_key():
    chat = [{"role": "user", "content": "hi", "id": 1}, {"role": "assistant", "content": "hello", "id": 2}]
    write_jsonl("a.jsonl", [{"messages": chat}])
    path = write_recipe(source="json", data_files={"train": "a.jsonl"}, columns={"messages": "messages"})
    assert load_data(path)["train"][0]["messages"] == chat


def test_prompt_and_completion_may_be_messages():
    prompt, completion = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    write_jsonl("a.jsonl", [{"p": prompt, "c": completion}])
    path = write_recipe(
        source="json", data_files={"train": "a.jsonl"}, columns={"prompt": {"column": "p"}, "completion": "c"}
    )
    assert load_data(path)["train"][0] == {"prompt": prompt, "completion": completion}


def test_messages_that_datasets_stores_as_json():
    """Parts and ragged keys come out of `datasets` as JSON text, mixed columns too; without images, text is text."""
    said = [{"type": "text", "text": "a cat"}]
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    mixed = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": said}]
    silent = [chat[0], {"role": "assistant", "content": [{"type": "text", "text": " "}]}]
    for rows, asked in (([chat, silent], "a cat"), ([mixed, silent], "what?")):
        kept = [[{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat"}]]
        write_jsonl("a.jsonl", [{"messages": row} for row in rows])
        path = write_recipe(source="json", data_files={"train": "a.jsonl"}, columns={"messages": "messages"})
        assert load_data(path)["train"]["messages"][:] == kept


def test_templates_read_json_columns():
    write_jsonl("a.jsonl", [{"the x": 1}, {"the x": "two"}])
    path = write_recipe(
        source="json", data_files={"train": "a.jsonl"}, columns={"text": "x = {the x}"}, shuffle_seed=None
    )
    assert load_data(path)["train"]["text"][:] == ["x = 1", "x = two"]


@pytest.mark.parametrize("column", ["photo", "photos"])
def test_images_become_lists_and_are_not_decoded(column):
    write_jsonl("a.jsonl", [{"photo": "cat.png", "photos": ["cat.png"], "q": "What?", "a": "A cat."}])
    path = write_recipe(
        source="json",
        data_files={"train": "a.jsonl"},
        columns={"prompt": "{q}", "completion": "a", "images": column},
        filters={"dedupe": True},
    )
    rows = load_data(path)["train"]
    assert rows.features["images"] == List(Image())
    undecoded = rows.cast_column("images", List(Image(decode=False)))
    # cat.png does not exist: any attempt to decode it would have failed.
    assert undecoded[0]["images"][0]["path"].endswith("cat.png")
    assert undecoded[0]["completion"] == "A cat."


def test_equal_questions_about_different_images_are_not_duplicates():
    write_jsonl("a.jsonl", [{"i": [f"{i % 2}.png"], "q": "What?", "a": "A cat."} for i in range(4)])
    path = write_recipe(
        source="json",
        data_files={"train": "a.jsonl"},
        columns={"prompt": "q", "completion": "a", "images": "i"},
        filters={"dedupe": True},
    )
    assert len(load_data(path)["train"]) == 2


# Sources


def test_parquet_csv_text_and_globs():
    Dataset.from_dict({"text": ["p"]}).to_parquet("a.parquet")
    Path("a.csv").write_text("text,n\nc,1\n")
    Path("a-1.txt").write_text("t1\n")
    Path("a-2.txt").write_text("t2\n")
    for source, files, expected in (("parquet", "a.parquet", ["p"]), ("csv", ["a.csv"], ["c"])):
        path = write_recipe(source=source, data_files={"train": files}, columns={"text": "text"})
        assert load_data(path)["train"]["text"][:] == expected
    path = write_recipe(source="text", data_files={"train": "a-*.txt"}, columns={"text": "text"}, shuffle_seed=None)
    assert load_data(path)["train"]["text"][:] == ["t1", "t2"]


def test_parquet_with_the_feature_types_of_the_hub():
    """Chat sets on the Hub are Parquet with a list of structs, in any order of keys."""
    features = Features({"messages": List({"content": Value("string"), "role": Value("string")}), "n": Value("int64")})
    rows = [{"messages": [{"content": "hi", "role": "user"}, {"content": "yo", "role": "assistant"}], "n": 1}]
    Dataset.from_list(rows, features=features).to_parquet("a.parquet")
    path = write_recipe(source="parquet", data_files={"train": "a.parquet"}, columns={"messages": "messages"})
    assert load_data(path)["train"][0]["messages"][1] == {"role": "assistant", "content": "yo"}


def test_saved_folder_with_and_without_splits():
    Dataset.from_dict({"text": ["a"]}).save_to_disk("plain")
    DatasetDict(
        {"train": Dataset.from_dict({"text": ["b"]}), "test": Dataset.from_dict({"text": ["c"]})}
    ).save_to_disk("d")
    assert load_data(write_recipe(source="./plain", columns={"text": "text"}))["train"]["text"][:] == ["a"]
    rows = load_data(write_recipe(source="d", splits={"train": "train", "eval": "test"}, columns={"text": "text"}))
    assert (rows["train"]["text"][:], rows["eval"]["text"][:]) == (["b"], ["c"])


def test_files_are_found_here_first_and_then_beside_the_yaml(tmp_path):
    write_jsonl("there/a.jsonl", [{"text": "beside the YAML"}])
    path = write_recipe(folder="there", source="json", data_files={"train": "a.jsonl"}, columns={"text": "text"})
    assert load_data(path)["train"]["text"][:] == ["beside the YAML"]
    write_jsonl("a.jsonl", [{"text": "here"}])
    assert load_data(path)["train"]["text"][:] == ["here"]


def test_hub_sets_are_asked_for_by_id_config_revision_and_split(monkeypatch):
    asked = []

    def load_dataset(source, **kwargs):
        asked.append((source, kwargs))
        return Dataset.from_dict({"text": [f"{kwargs['split']} text"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    keys = {"source": "owner/name", "columns": {"text": "text"}, "splits": {"train": "train_sft", "eval": "test_sft"}}
    rows = load_data(write_recipe(config="small", revision="abc", **keys))
    assert rows["eval"]["text"][:] == ["test_sft text"]
    assert asked == [
        ("owner/name", {"name": "small", "revision": "abc", "data_files": None, "split": split})
        for split in ("train_sft", "test_sft")
    ]
    asked.clear()
    keys |= {"splits": {"train": "train"}, "data_files": {"train": "sample/000.parquet"}}
    load_data(write_recipe(**keys))
    assert asked[0][1]["data_files"] == {"train": ["sample/000.parquet"]}


# Filters


def test_filters_by_length_and_value(caplog):
    path = text_recipe(
        texts=["", "  ", "ab", "abcd", "abcdefgh", "abc"],
        filters={"min_chars": 3, "max_chars": 5, "equals": {"id": 3}},
        shuffle_seed=None,
    )
    assert load_data(path)["train"]["text"][:] == ["abcd"]
    path = text_recipe(texts=["", "  ", "ab", "abcd", "abcdefgh", "abc"], filters={"min_chars": 3, "max_chars": 5})
    rows = load_data(path)["train"]
    assert sorted(rows["text"]) == ["abc", "abcd"]
    # Where everybody sees it, with the rows of the file.
    assert "2 of 6 mine train rows are left out: 2 without text (rows " in caplog.text
    assert "mine train: filters: max_chars removed 1, min_chars removed 1 of 6 rows." in caplog.text


def test_empty_answers_are_dropped_unless_asked_for():
    assert len(load_data(text_recipe(texts=["a", "", None]))["train"]) == 1
    assert len(load_data(text_recipe(texts=["a", "", None], filters={"drop_empty": False}))["train"]) == 3


def test_the_answer_is_the_completion_or_what_the_assistant_says():
    write_jsonl("a.jsonl", [{"p": "long question", "c": ""}, {"p": "", "c": "yes"}])
    keys = {"source": "json", "data_files": {"train": "a.jsonl"}}
    rows = load_data(write_recipe(columns={"prompt": "p", "completion": "c"}, **keys))["train"]
    assert rows["completion"][:] == ["yes"]
    chats = [
        [{"role": "user", "content": "no answer yet"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        [],
    ]
    write_jsonl("a.jsonl", [{"messages": chat} for chat in chats])
    assert len(load_data(write_recipe(columns={"messages": "messages"}, **keys))["train"]) == 1


def test_dedupe_removes_equal_rows_also_across_eval():
    write_jsonl("t.jsonl", [{"text": text} for text in ("a", "b", "a", "c", "b")])
    write_jsonl("e.jsonl", [{"text": "c"}, {"text": "d"}, {"text": "d"}])
    keys = {
        "source": "json",
        "data_files": {"train": "t.jsonl", "eval": "e.jsonl"},
        "splits": {"train": "train", "eval": "eval"},
        "columns": {"text": "text"},
    }
    rows = load_data(write_recipe(filters={"dedupe": True}, **keys))
    assert sorted(rows["train"]["text"]) == ["a", "b"]
    assert sorted(rows["eval"]["text"]) == ["c", "d"]
    assert len(load_data(write_recipe(**keys))["train"]) == 5


def test_all_filtered_away_says_how_many_each_filter_removed():
    path = text_recipe(texts=["", "ab", "ab", "ab"], filters={"min_chars": 3})
    with pytest.raises(
        ValueError, match=r"no train row is left of 4\. .* 1 without text \(row .* min_chars removed 3"
    ):
        load_data(path)
    path = text_recipe(filters={"equals": {"id": 99}})
    with pytest.raises(ValueError, match=r"equals removed 3.*equals asks for id 99, and rows have 0, 1, 2"):
        load_data(path)


# Held-out rows and caps


@pytest.mark.parametrize("held_out", [{"eval_rows": 10}, {"eval_fraction": 0.25}])
def test_held_out_rows_are_disjoint_repeatable_and_do_not_depend_on_the_cap(held_out):
    path = text_recipe(texts=numbered(40), **held_out)
    first, again, capped = load_data(path), load_data(path), load_data(path, max_train_rows=5, max_eval_rows=3)
    assert len(first["eval"]) == 10
    assert len(first["train"]) == 30
    assert not set(first["eval"]["text"]) & set(first["train"]["text"])
    for split in ("train", "eval"):
        assert first[split]["text"][:] == again[split]["text"][:]
    assert capped["train"]["text"][:] == first["train"]["text"][:5]
    assert capped["eval"]["text"][:] == first["eval"]["text"][:3]
    other = load_data(text_recipe(texts=numbered(40), shuffle_seed=1, **held_out))
    assert other["eval"]["text"][:] != first["eval"]["text"][:]


def test_eval_rows_are_counted_after_the_filters():
    path = text_recipe(texts=["", "x", "y", "z"] * 10, eval_rows=6, filters={"drop_empty": True})
    assert len(load_data(path)["eval"]) == 6


def test_no_held_out_row_comes_back_in_train_as_a_copy():
    rows = load_data(text_recipe(texts=numbered(8) * 3, eval_rows=3))
    assert not set(rows["eval"]["text"]) & set(rows["train"]["text"])


def test_caps_keep_the_first_rows_of_the_same_order():
    """Small caps read blocks of a large set; the rows must be those of a full read."""
    texts = ["" if i % 3 == 0 else f"row {i % 2000}" for i in range(5000)]
    path = text_recipe(texts=texts, filters={"dedupe": True})
    full = load_data(path)["train"]["text"][:]
    for cap in (1, 7, 900, 10_000):
        assert load_data(path, max_train_rows=cap)["train"]["text"][:] == full[:cap]
    assert load_data(text_recipe(texts=texts, max_rows=20))["train"].num_rows == 20
    assert load_data(text_recipe(texts=texts, max_rows=20), max_train_rows=9)["train"].num_rows == 9


@pytest.mark.parametrize("name", ["max_train_rows", "max_eval_rows"])
def test_caps_below_one_are_refused(name):
    caps: Any = {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        load_rows(DataRecipe.load(text_recipe()), **caps)


@pytest.mark.parametrize("held_out", [{"eval_rows": 3}, {"eval_rows": 9}, {"eval_fraction": 0.99}])
def test_holding_out_every_row_is_refused(held_out):
    with pytest.raises(ValueError, match="leaves none of 3 to train on"):
        load_data(text_recipe(**held_out))


# Mixtures


def parts(**sizes):
    for name, size in sizes.items():
        text_recipe(name, numbered(size, name), eval_rows=10)


def counts(rows):
    return {name: sum(text.startswith(name) for text in rows["text"]) for name in ("a", "b")}


def mix(*shares, name="mixed", **keys):
    return write_recipe(
        name, mixture=[{"data": f"./{data}.yaml", kind: value} for data, kind, value in shares], **keys
    )


def test_weights_are_shares_without_oversampling():
    parts(a=110, b=60)
    rows = load_data(mix(("a", "weight", 0.5), ("b", "weight", 0.5)))
    assert counts(rows["train"]) == {"a": 50, "b": 50}
    assert counts(rows["eval"]) == {"a": 10, "b": 10}
    assert len(set(rows["train"]["text"])) == 100
    rows = load_data(mix(("a", "weight", 3), ("b", "weight", 1)))
    assert counts(rows["train"]) == {"a": 100, "b": 33}


def test_mixture_caps_keep_the_shares_and_are_repeatable():
    parts(a=110, b=60)
    path = mix(("a", "weight", 0.75), ("b", "weight", 0.25), max_rows=40)
    first, again = load_data(path), load_data(path)
    assert counts(first["train"]) == {"a": 30, "b": 10}
    assert first["train"]["text"][:] == again["train"]["text"][:]
    assert counts(load_data(path, max_train_rows=8, max_eval_rows=4)["train"]) == {"a": 6, "b": 2}
    assert counts(load_data(path, max_eval_rows=4)["eval"]) == {"a": 3, "b": 1}
    # A cap is reached whether or not the shares divide it.
    assert [len(load_data(path, max_train_rows=cap)["train"]) for cap in (1, 5, 39)] == [1, 5, 39]
    # Mixed, not one part after the other.
    assert first["train"]["text"][:] != sorted(first["train"]["text"])


def test_mixture_by_rows():
    parts(a=110, b=60)
    path = mix(("a", "rows", 30), ("b", "rows", 50))
    assert counts(load_data(path)["train"]) == {"a": 30, "b": 50}
    assert counts(load_data(path, max_train_rows=8)["train"]) == {"a": 3, "b": 5}
    with pytest.raises(ValueError, match=r"51 rows of './b.yaml' are asked for, but it has 50"):
        load_data(mix(("a", "rows", 30), ("b", "rows", 51)))


def test_nested_mixtures_and_paths_beside_the_yaml():
    parts(a=110, b=60)
    mix(("a", "weight", 1), ("b", "weight", 1), name="inner")
    write_recipe("outer", "sub", mixture=[{"data": "../inner.yaml", "weight": 1}, {"data": "../a.yaml", "weight": 1}])
    rows = load_data("./sub/outer.yaml", max_train_rows=20)
    assert counts(rows["train"]) == {"a": 15, "b": 5}


def test_parts_of_a_mixture_may_differ_in_string_type():
    Dataset.from_dict({"text": ["a 1", "a 2"]}).cast_column("text", Value("large_string")).save_to_disk("large")
    text_recipe("b", ["b 1", "b 2"])
    write_recipe("a", source="./large", columns={"text": "text"})
    assert counts(load_data(mix(("b", "weight", 1), ("a", "weight", 1)))["train"]) == {"a": 2, "b": 2}


def test_cyclic_mixtures_are_refused():
    mix(("two", "weight", 1), name="one")
    mix(("one", "weight", 1), name="two")
    with pytest.raises(ValueError, match="cyclic: one -> two -> one"):
        DataRecipe.load("./one.yaml")


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.01, 10), min_size=5, max_size=5),
    cap=st.none() | st.integers(1, 20_000),
)
def test_mixture_counts_are_shares_of_the_whole(sizes, weights, cap):
    fractions = [Fraction(str(weight)) for weight in weights[: len(sizes)]]
    shares = [weight / sum(fractions) for weight in fractions]
    chosen = mixture_counts(sizes, shares, cap)
    total = sum(chosen)
    assert all(0 <= count <= size for count, size in zip(chosen, sizes, strict=True))
    assert all(abs(count - share * total) < 1 for count, share in zip(chosen, shares, strict=True))
    # One row more would break a part or the cap.
    assert total == cap or any(share * (total + 1) > size for share, size in zip(shares, sizes, strict=True))


# What a recipe is told when it cannot be


BASE: dict[str, Any] = {"source": "json", "data_files": {"train": "a.jsonl"}, "columns": {"text": "text"}}
PART: list[Any] = [{"data": "./part.yaml", "weight": 1}]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (BASE | {"licence": "mit"}, "unknown key 'licence'; did you mean 'license'"),
        (BASE | {"filters": {"min_char": 3}}, "unknown key 'min_char'; did you mean 'min_chars'"),
        (BASE | {"columns": {"texts": "a"}}, "columns has 'texts'; did you mean 'text'"),
        (BASE | {"columns": {"images": "a"}}, "columns gives no text; TRL reads"),
        (BASE | {"columns": {"completion": "a"}}, "columns gives completion; TRL reads"),
        (BASE | {"columns": {"text": "a", "messages": "b"}}, "columns gives text, messages; TRL reads"),
        (BASE | {"columns": {"text": 3}}, "columns.text is 3"),
        (BASE | {"columns": {"text": {"column": "a"}}}, "columns.text cannot be a list of messages"),
        (BASE | {"columns": {"messages": "{a}"}}, "columns.messages cannot be a template"),
        (BASE | {"columns": {"messages": {"role_key": "from"}}}, "columns.messages is"),
        (BASE | {"columns": {"messages": {"column": "a", "roles": "b"}}}, "unknown key 'roles'; did you mean 'role"),
        (
            BASE | {"columns": {"messages": {"column": "a", "role_map": {"gpt": "assistent"}}}},
            "'assistent' is no role; did you mean 'assistant'",
        ),
        (BASE | {"columns": {"text": "{a"}}, "braces that are text"),
        (BASE | {"columns": {"text": "{}"}}, "no plain column name"),
        (BASE | {"columns": {"text": "{0}"}}, "no plain column name"),
        (BASE | {"columns": {"text": "{a.b}"}}, "no plain column name"),
        (BASE | {"splits": {"training": "train"}}, "splits has 'training'"),
        (BASE | {"splits": {"train": 1}}, "splits has 'train': 1"),
        (BASE | {"splits": {"eval": "train"}}, "splits names no train split"),
        (BASE | {"splits": {"train": "train", "eval": "train"}}, "the same rows"),
        (BASE | {"splits": {"train": "trian"}}, "'trian', which data_files does not list; did you mean 'train'"),
        (BASE | {"data_files": {"train": []}}, r"data_files.train is \[\]"),
        (BASE | {"data_files": "a.jsonl"}, "data_files is 'a.jsonl', but must be {key: value}"),
        (BASE | {"eval_rows": "many"}, "eval_rows is 'many', but must be a whole number"),
        (BASE | {"eval_rows": True}, "eval_rows is True, but must be a whole number"),
        (BASE | {"eval_rows": 0}, "eval_rows is 0"),
        (BASE | {"max_rows": -1}, "max_rows is -1"),
        (BASE | {"eval_fraction": 1}, "eval_fraction is 1"),
        (BASE | {"eval_fraction": 0.1, "eval_rows": 5}, "keep one"),
        (BASE | {"eval_rows": 5, "shuffle_seed": None}, "eval_rows needs a shuffle_seed"),
        (
            BASE
            | {
                "eval_rows": 5,
                "data_files": {"train": "a", "eval": "b"},
                "splits": {"train": "train", "eval": "eval"},
            },
            "splits has an eval split already",
        ),
        (BASE | {"filters": {"min_chars": 9, "max_chars": 3}}, "min_chars 9 is above max_chars 3"),
        (BASE | {"filters": {"min_chars": -1}}, "filters.min_chars is -1"),
        (BASE | {"filters": {"dedupe": "yes"}}, "dedupe is 'yes', but must be true or false"),
        (BASE | {"rows": {"train": "many"}}, "rows has train: 'many'"),
        (BASE | {"source": 3}, "source is 3, but must be text"),
        ({"columns": {"text": "text"}}, "no source and no mixture"),
        ({"source": "json", "columns": {"text": "text"}}, "source 'json' needs data_files"),
        ({"mixture": []}, "mixture is empty"),
        ({"mixture": ["part"]}, "write each part as"),
        ({"mixture": [{"data": "./part.yaml"}]}, "needs either a weight or rows"),
        ({"mixture": [{"data": "./part.yaml", "weight": 1, "rows": 2}]}, "needs either a weight or rows"),
        ({"mixture": [{"data": "./part.yaml", "weight": "1"}]}, "weight of './part.yaml' is '1'"),
        ({"mixture": [{"data": "./part.yaml", "weight": 0}]}, "must be above 0"),
        ({"mixture": [{"data": "./part.yaml", "weights": 1}]}, "unknown key 'weights'; did you mean 'weight'"),
        ({"mixture": [*PART, {"data": "./part.yaml", "rows": 1}]}, "not both kinds"),
        ({"mixture": PART, "eval_rows": 3}, "a mixture takes its rows from other recipes, so it has no eval_rows"),
        ({"mixture": PART, "filters": {"dedupe": True}}, "so it has no filters"),
        ({"mixture": PART, "shuffle_seed": None}, "a mixture needs a shuffle_seed"),
        ({"mixture": [*PART, {"data": "./chat.yaml", "weight": 1}]}, "parts must share their columns"),
        ({"mixture": [*PART, {"data": "./held.yaml", "weight": 1}]}, "'./part.yaml' has none; give it an eval split"),
    ],
)
def test_impossible_recipes_are_refused_when_they_are_read(keys, message):
    write_recipe("part", **BASE)
    write_recipe("held", **BASE, eval_rows=1)
    chat: dict[str, Any] = BASE | {"columns": {"messages": "m"}}
    write_recipe("chat", **chat)
    with pytest.raises(ValueError, match=message):
        DataRecipe.load(write_recipe(**keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"text": "txet"}}, "columns.text reads 'txet'.*did you mean 'text'.*Its columns are text, id"),
        ({"columns": {"text": "{text} {ids}"}}, "columns.text reads 'ids'.*did you mean 'id'"),
        ({"filters": {"equals": {"idd": 1}}}, "filters.equals reads 'idd'.*did you mean 'id'"),
        ({"columns": {"text": "id"}}, "holds Value.*and not text; write a template, text: '{id}'"),
        ({"columns": {"text": "text", "images": "id"}}, "must hold images or their paths"),
        ({"columns": {"messages": "text"}}, "no list of messages"),
        ({"data_files": {"train": "gone.jsonl"}}, "there is no file .*gone.jsonl; check the path"),
        ({"data_files": {"train": "gone.jsonl"}, "prepare": "python make.py"}, "make it with `python make.py`"),
        ({"source": "jsonl"}, "'jsonl' is no folder here; did you mean 'json'"),
        ({"source": "./gone", "data_files": {}}, "source './gone' is no folder here"),
        ({"source": "./unsaved", "data_files": {}}, "was not written by save_to_disk; for the files in it"),
        ({"source": "./saved", "revision": "x", "data_files": {}}, "revision cannot apply to the saved folder"),
        (
            {"source": "./saved", "splits": {"train": "trian"}, "data_files": {}},
            "no split 'trian'; did you mean 'train'",
        ),
    ],
)
def test_what_the_source_lacks_is_named(keys, message):
    Path("unsaved").mkdir()
    Dataset.from_dict({"text": ["a"]}).save_to_disk("saved")
    path = text_recipe(**keys)
    with pytest.raises(ValueError, match=message):
        load_data(path)


def test_messages_with_other_keys_or_roles_are_named():
    write_jsonl("a.jsonl", [{"conversations": chat} for chat in CHAT])
    keys = {"source": "json", "data_files": {"train": "a.jsonl"}}
    with pytest.raises(ValueError, match="have no 'role'; set role_key to one of their keys: from, value"):
        load_data(write_recipe(columns={"messages": "conversations"}, **keys))
    column = {"column": "conversations", "role_key": "from", "content_key": "value", "role_map": {"human": "user"}}
    with pytest.raises(ValueError, match="have the role 'gpt'; map it to one of"):
        load_data(write_recipe(columns={"messages": column}, **keys))
    write_jsonl("a.jsonl", [{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}]}])
    with pytest.raises(ValueError, match=r"train row 0: messages\[0\].content is a number; it must be text"):
        load_data(write_recipe(columns={"messages": "messages"}, **keys))
    write_jsonl("a.jsonl", [{"messages": [{"role": "user"}, {"content": "a"}, {"content": "a", "id": 1}]}])
    with pytest.raises(ValueError, match="have no 'content'; set content_key to one of"):
        load_data(write_recipe(columns={"messages": "messages"}, **keys))


def test_files_that_are_no_recipe(tmp_path):
    Path("list.yaml").write_text("- a\n")
    Path("broken.yaml").write_text("a: [1\n")
    Path("data.jsonl").write_text("{}\n")
    for path, message in (
        ("./list.yaml", "holds list, not keys and values"),
        ("./broken.yaml", "is not valid YAML"),
        ("data.jsonl", "data.jsonl: there are no rows in it"),
        ("./gone.yaml", "no data recipe at .*gone.yaml"),
    ):
        with pytest.raises(ValueError, match=message):
            DataRecipe.load(path)


# Names, fingerprints, cards


def test_names_are_looked_up_under_the_root(tmp_path):
    text_recipe("alpha", folder="recipes")
    text_recipe("beta", folder="recipes")
    assert DataRecipe.load("alpha", root=tmp_path / "recipes").name == "alpha"
    with pytest.raises(ValueError, match=r"unknown data recipe 'alhpa'; did you mean 'alpha'.*alpha, beta"):
        DataRecipe.load("alhpa", root=tmp_path / "recipes")
    with pytest.raises(ValueError, match=r"unknown data recipe 'alpha'.*none"):
        DataRecipe.load("alpha", root=tmp_path / "empty")


def test_parts_of_a_mixture_are_looked_up_under_the_same_root(tmp_path):
    text_recipe("alpha", folder="recipes")
    write_recipe("mixed", "recipes", mixture=[{"data": "alpha", "weight": 1}])
    rows = load_data("mixed", root=tmp_path / "recipes")
    assert len(rows["train"]) == 3


def test_the_fingerprint_follows_what_decides_the_rows():
    base = DataRecipe.load(text_recipe())
    assert len(base.fingerprint) == 64
    same = DataRecipe.load(text_recipe(description="other words", license="mit", homepage="x", rows={"train": 3}))
    assert same.fingerprint == base.fingerprint
    changes: list[dict[str, Any]] = [{"max_rows": 2}, {"filters": {"dedupe": True}}, {"eval_rows": 1}]
    for change in [*changes, {"columns": {"text": "{text}!"}}]:
        assert DataRecipe.load(text_recipe(**change)).fingerprint != base.fingerprint


def test_the_fingerprint_of_a_mixture_follows_its_parts():
    parts(a=20, b=20)
    path = mix(("a", "weight", 1), ("b", "weight", 1))
    before = DataRecipe.load(path).fingerprint
    assert DataRecipe.load(path).fingerprint == before
    assert DataRecipe.load(mix(("a", "weight", 1), ("b", "weight", 2))).fingerprint != before
    mix(("a", "weight", 1), ("b", "weight", 1))
    text_recipe("b", numbered(20), eval_rows=5)
    assert DataRecipe.load(path).fingerprint != before


def test_every_field_decides_rows_or_describes():
    """A new field must be put on one side, or caches would outlive a change of the rows."""
    describes = {"name", "description", "license", "homepage", "prepare", "rows", "folder", "mixture"}
    # Where the same images lie on this machine.
    describes |= {"image_folder", "image_urls", "notes"}
    fields = {f.name for f in dataclasses.fields(DataRecipe)}
    assert fields == describes | set(IDENTITY)
    assert all(f.metadata["help"] for f in dataclasses.fields(DataRecipe))


def test_recipes_can_be_made_in_python():
    write_jsonl("a.jsonl", [{"text": "a"}])
    recipe = DataRecipe(name="mine", source="json", data_files={"train": ("a.jsonl",)}, columns={"text": "text"})
    assert load_rows(recipe)["train"]["text"][:] == ["a"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_describe_names_what_a_reader_asks_for():
    card = DataRecipe.load("openhermes_2_5", root=SHIPPED).describe()
    for words in (
        "teknium/OpenHermes-2.5@b820",
        "licence",
        "not stated",
        "train 1,001,551",
        "2,000 held out",
        "messages",
    ):
        assert words in card
    assert "smoltalk 0.5 + ultrachat_200k 0.3" in DataRecipe.load("chat_mixture", root=SHIPPED).describe()


# The recipes that ship


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_complete(path):
    recipe = DataRecipe.load(path)
    assert recipe.name == path.stem
    assert recipe.description
    assert recipe.license
    assert recipe.output_columns
    # Pairs without labels measure nothing.
    assert recipe.has_eval or recipe.name == "python_sentences"
    assert recipe.mixture or (recipe.source and "splits" in yaml.safe_load(path.read_text()))
    if recipe.source and "/" in recipe.source:
        assert recipe.homepage == f"https://huggingface.co/datasets/{recipe.source}"
        # Where no commit could be looked up, the recipe must say so.
        unpinned = "# Not pinned to a commit" in path.read_text()
        assert recipe.revision == "main" if unpinned else len(recipe.revision or "") == 40


def test_shipped_names_are_found_without_a_root():
    assert DataRecipe.load("python_docs") == DataRecipe.load(SHIPPED / "python_docs.yaml")
    with pytest.raises(ValueError, match="did you mean 'ultrachat_200k'"):
        DataRecipe.load("ultrachat")


def test_shipped_files_that_are_missing_say_how_to_make_them():
    with pytest.raises(ValueError, match=r"make it with `mmkd prepare python_docs`"):
        load_data("python_docs", root=SHIPPED)


def test_shipped_sharegpt_mapping():
    recipe = DataRecipe.load("openhermes_2_5", root=SHIPPED)
    assert recipe.columns["messages"] == MessagesColumn(
        "conversations", "from", "value", {"human": "user", "gpt": "assistant"}
    )
