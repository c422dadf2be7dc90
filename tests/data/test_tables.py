"""What files say is what rows say: values of CSV, JSON and Parquet, broken files, and rows that are left out."""

import datetime
import gzip
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmkd.commands.main import main
from mmkd.data.arrow import read_rows
from mmkd.data.classification import ClassificationRecipe, load_classification
from mmkd.data.data_recipe import DataRecipe
from mmkd.data.json_rows import WrittenNumber, json_text, parse_json
from mmkd.data.load_data import load_data
from mmkd.data.table_files import read_table_files


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A current folder and a datasets cache of this test's own; no test can reach the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf_cache")
    return tmp_path


def recipe(file: str | list[str], columns: Any, source: str | None = None, **keys: Any) -> str:
    """The path of a data recipe of a file, in the order of the file."""
    first = file if isinstance(file, str) else file[0]
    kind = {"csv": "csv", "tsv": "csv", "parquet": "parquet", "txt": "text"}.get(first.split(".")[-1], "json")
    keys = {"source": source or kind, "data_files": {"train": file}, "columns": columns, "shuffle_seed": None, **keys}
    Path("data.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    return "./data.yaml"


def answers(file: str, content: str | bytes, column: str = "a", **keys: Any) -> list[str]:
    """What the student learns to say, from a file with the columns q and a."""
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_data(recipe(file, {"prompt": "q", "completion": column}, **keys))["train"]["completion"][:]


# Values

WORDS = ["None", "NA", "null", "N/A", "nan", "NaN", "true", "FALSE", "02139", "1.0", "2.50", "1e5", "2024-01-31", "-"]


@pytest.mark.parametrize("column", ["a", "{a}"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet", "txt"])
def test_text_is_what_the_file_says(suffix: str, column: str) -> None:
    rows = [{"q": f"question {number}", "a": word} for number, word in enumerate(WORDS)]
    content: Any = {
        "csv": "q,a\n" + "".join(f"{row['q']},{row['a']}\n" for row in rows),
        "tsv": "q\ta\n" + "".join(f"{row['q']}\t{row['a']}\n" for row in rows),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows, indent=1),
    }
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet("t.parquet")
        content["parquet"] = Path("t.parquet").read_bytes()
    if suffix == "txt":
        Path("t.txt").write_text("\n".join(WORDS))
        text = "text" if column == "a" else "{text}"
        assert load_data(recipe("t.txt", {"text": text}))["train"]["text"][:] == WORDS
        return
    assert answers(f"t.{suffix}", content[suffix], column) == WORDS


@pytest.mark.parametrize("words", [["2024-01-31", "2024-02-01"], ["2024-01-31T10:00:00Z"], ["10:30"], ["1", "2"]])
def test_text_that_looks_like_dates_or_numbers_everywhere_stays_text(words: list[str]) -> None:
    assert answers("t.jsonl", "".join(json.dumps({"q": "q", "a": word}) + "\n" for word in words)) == words
    assert answers("t.csv", "q,a\n" + "".join(f"q,{word}\n" for word in words)) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("true", "true"),
        ("false", "false"),
        ("3", "3"),
        ("2.0", "2.0"),
        ("2.50", "2.50"),
        ("1e5", "1e5"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ('"02139"', "02139"),
        ('{"name": "é", "x": [1.50, null]}', '{"name": "é", "x": [1.50, null]}'),
        ('["a", true]', '["a", true]'),
    ],
)
@pytest.mark.parametrize("beside", ["", '{"q": "q", "a": "text"}\n', '{"q": "q", "a": 7}\n'])
def test_json_values_in_templates_are_written_as_in_the_file(value: str, text: str, beside: str) -> None:
    """Alone, and beside rows whose value is of another type."""
    assert answers("t.jsonl", f'{{"q": "q", "a": {value}}}\n' + beside, "{a}")[0] == text


def test_whole_numbers_beside_others_stay_whole() -> None:
    assert answers("t.jsonl", '{"q": "q", "a": 3}\n{"q": "q", "a": 0.5}\n', "{a}") == ["3", "0.5"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("q;a\nred?;1,5\n", ["1,5"]),
        ("q|a\nred?|x, y\n", ["x, y"]),
        ('q,a\nred?,"say ""hi"", please"\n', ['say "hi", please']),
        ('q,a\nred?,"two\nlines"\nblue?,x\n', ["two\nlines", "x"]),
        (b"\xef\xbb\xbfa,q\r\nyes,red?\r\n\r\nno,blue?\r\n", ["yes", "no"]),
        (",q,a\n0,red?, spaces stay \n", [" spaces stay "]),
        ("q,a\nred?," + "long " * 50_000 + "\n", ["long " * 50_000]),
    ],
)
def test_forms_of_csv(content: str | bytes, expected: list[str]) -> None:
    assert answers("t.csv", content) == expected


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"q": "q", "a": "x"}\n\n  \n{"q": "q", "a": "y"}',
        b'[{"q": "q", "a": "x"},\n {"q": "q", "a": "y"}]\n',
        b'{"q": "q", "a": "x", "more": {"n": 1}}\r\n{"a": "y", "q": "q", "more": null}\r\n',
    ],
)
def test_forms_of_json(content: bytes) -> None:
    assert answers("t.json", content) == ["x", "y"]


def test_packed_files_and_several_files() -> None:
    Path("a.jsonl.gz").write_bytes(gzip.compress(b'{"q": "q", "a": null}\n{"q": "q", "a": "x"}\n'))
    Path("b.jsonl").write_text('{"a": "007", "q": "q"}\n')
    rows = load_data(recipe(["a.jsonl.gz", "b.jsonl"], {"prompt": "q", "completion": "a"}))["train"]
    assert rows["completion"][:] == ["x", "007"]
    Path("a.csv").write_text("q,a\nq,1\n")
    Path("b.csv").write_text("a,q\n2.0,q\n")
    rows = load_data(recipe(["a.csv", "b.csv"], {"prompt": "q", "completion": "a"}))["train"]
    assert rows["completion"][:] == ["1", "2.0"]


def test_values_after_the_first_block_do_not_depend_on_it(monkeypatch) -> None:
    """A column that is null, or whole, for millions of rows may hold anything after them."""
    monkeypatch.setattr("mmkd.data.json_rows._BLOCK", 50)
    rows = ['{"q": "q", "a": null}'] * 5 + ['{"q": "q", "a": 1}'] * 5 + ['{"q": "q", "a": "x"}']
    assert answers("t.jsonl", "\n".join(rows), "{a}")[-2:] == ["1", "x"]
    assert answers("u.jsonl", "\n".join([*rows[:5], rows[-1]])) == ["x"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "rows",
    [
        [{"b": [{"a": "x", "name": None}, {"a": "y", "name": None}]}] * 2,
        [{"b": None}, {"b": [None, None, {"a": None}]}, {"b": [{"a": None}]}],
        [{"b": [[{"a": {"c": None}}, {"a": {"c": None}}]]}],
    ],
)
def test_keys_of_list_items_that_are_always_null_come_back(rows: list[dict[str, Any]]) -> None:
    Path("null.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = list(read_rows(read_table_files("json", [str(Path("null.jsonl").resolve())], "train"), ["b"]))
    assert [json.loads(json_text(row)) for row in read] == rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({"a": JSON, "b": JSON}), min_size=1, max_size=6), whole=st.booleans())
def test_any_json_comes_back(rows: list[dict[str, Any]], whole: bool) -> None:
    """Whatever its types: as lines and as one list, and by both ways of reading."""
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    Path("any.json").write_text(f"[{','.join(texts)}]" if whole else "\n".join(texts) + "\n", encoding="utf-8")
    found = list(read_rows(read_table_files("json", [str(Path("any.json").resolve())], "train"), ["a", "b"]))
    assert [json.loads(json_text(row)) for row in found] == rows


def test_numbers_keep_their_spelling() -> None:
    number = parse_json("[1.10]")[0]
    assert isinstance(number, WrittenNumber)
    assert (number, f"{number}", f"{number:.3f}", json_text([number])) == (1.1, "1.10", "1.100", "[1.10]")


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (pa.array(["yes", "no"], pa.large_string()), ["yes", "no"]),
        (pa.array(["yes", "no"], pa.string_view()), ["yes", "no"]),
        (pa.array(["yes", "no"]).dictionary_encode(), ["yes", "no"]),
    ],
)
def test_texts_of_pandas_and_polars(array: pa.Array, text: list[str]) -> None:
    pq.write_table(pa.table({"q": ["a", "b"], "a": array}), "t.parquet")
    rows = load_data(recipe("t.parquet", {"prompt": "q", "completion": "a"}))["train"]
    assert rows["completion"][:] == text
    assert rows.features["completion"].dtype in ("string", "large_string")


@pytest.mark.parametrize(
    ("array", "name", "text"),
    [
        (pa.array([3]), "int64", "3"),
        (pa.array([1.0, None]), "float64", "1.0"),
        (pa.array([Decimal("1.50")]), "decimal128", "1.50"),
        (pa.array([True]), "bool", "true"),
        (pa.array([datetime.date(2024, 1, 31)]), "date32", "2024-01-31"),
        (pa.array([datetime.datetime(2024, 1, 31, 10)]), "timestamp", "2024-01-31 10:00:00"),
    ],
)
def test_other_types_are_text_where_a_template_says_so(array: pa.Array, name: str, text: str) -> None:
    pq.write_table(pa.table({"q": ["a"] * len(array), "a": array}), "t.parquet")
    with pytest.raises(ValueError, match=rf"columns.completion reads 'a', which holds .*{name}.*write a template"):
        load_data(recipe("t.parquet", {"prompt": "q", "completion": "a"}))
    rows = load_data(recipe("t.parquet", {"prompt": "q", "completion": "{a}"}))["train"]
    assert rows["completion"][0] == text


# Files that are broken


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t.jsonl", '{"q": 1}\n' * 6 + '{"q": }\n', "t.jsonl, line 7, column 7: this is no JSON"),
        ("t.jsonl", '{"q": 1}\n{"q": 1', "t.jsonl, line 2, column 8: this is no JSON"),
        ("t.jsonl", '{"q": 1}\n{"q": \n{"q": 3}\n', "t.jsonl, line 2, column .: this is no JSON"),
        ("t.jsonl", '{"q": 1,}\n', "t.jsonl, line 1, column .: this is no JSON .a comma before the closing bracket"),
        ("t.json", '[{"q": 1},\n {"q": 2},\n]', "t.json, line ., column .*a comma before the closing bracket"),
        ("t.json", '[{"q": 1},\n {"q" 2}]', "t.json, line 2, column 7: this is no JSON"),
        ("t.jsonl", "", "t.jsonl: there are no rows in it"),
        ("t.json", "[]", "t.json: there are no rows in it"),
        ("t.jsonl", '"a"\n"b"\n', "t.jsonl, line 1: a row is an object .*, and this is text"),
        ("t.jsonl", '{"q": "a"}\nnull\n', "t.jsonl, line 2: a row is an object .*, and this is null"),
        ("t.jsonl", '{"q": 1}\n{"q": 1, "q": 2}\n', "t.jsonl, line 2: the key 'q' stands twice"),
        ("t.jsonl", '{"q": 1}\n{"q": "é"}\n'.encode("latin-1"), "t.jsonl, line 2: byte 0xe9 is not UTF-8.*LATIN1"),
        ("t.json", '[{"q": 1},\n{"q": "é"}]\n'.encode("latin-1"), "t.json, line 2: byte 0xe9 is not UTF-8"),
        ("t.jsonl", '{"q": 1}'.encode("utf-16"), "t.jsonl, line 1: byte 0xf[ef] is not UTF-8.*UTF-16"),
        ("t.jsonl", '{"q": "\\ud800"}\n', "t.jsonl.*half of a character"),
        ("t.jsonl", '{"q": "\\ud800"}\n{"q": 1}\n', "t.jsonl, line 1: half of a character"),
        ("t.csv", "", "t.csv is empty; its first line must name the columns"),
        ("t.csv", "q,a\n", "t.csv: there are no rows below the names"),
        (
            "t.csv",
            "q,a\nx,y\nHello, world,yes\n",
            "t.csv, line 3: 3 cells, but there are 2 columns .q, a., told apart by c",
        ),
        ("t.csv", 'q,a\n"two\nlines",y\nx\n', "t.csv, line 4: 1 cells, but there are 2 columns"),
        ("t.csv", 'q,a\nx,"no end\n', "t.csv, line .: this is no CSV"),
        ("t.csv", 'q,a\n"x"y,z\n', "t.csv, line 2: this is no CSV"),
        ("t.csv", "q,q\n1,2\n", "t.csv: two columns are named 'q'"),
        ("t.csv", "q,a\nx,é\n".encode("latin-1"), "t.csv, line 2: byte 0xe9 is not UTF-8"),
        ("t.parquet", "q,a\n", "t.parquet cannot be read as parquet: "),
    ],
)
def test_broken_files_are_named_with_the_line(file: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        answers(file, content, "q")
    assert "\n" not in str(error.value)
    assert type(error.value).__module__ == "mmkd.errors"


def test_what_else_is_wrong_with_files() -> None:
    Path("t.jsonl").write_text('{"q": 1}\n')
    Path("u.csv").write_text("x,y\n1,2\n")
    Path("v.csv").write_text("q,a\n1,2\n")
    Path("folder").mkdir()
    cases: list[tuple[Any, str | None, str]] = [
        ("t.jsonl", "csv", "t.jsonl looks like json, and not like csv; write `source: json`"),
        ("v.csv", "json", "v.csv looks like csv, and not like json; write `source: csv`"),
        (["v.csv", "u.csv"], None, "u.csv has the columns x, y, but .*v.csv has q, a"),
        ("folder/*.csv", "csv", "there is no file .*folder/.*check the path"),
        ("./folder", "csv", r"folder is a folder; .* write ./folder/\*"),
    ]
    for file, source, message in cases:
        with pytest.raises(ValueError, match=message):
            load_data(recipe(file, {"text": "q"}, source or "csv"))


# The Hub


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach 'o/n' on the Hub (OfflineModeIsEnabled)"),
            "cannot be reached .*Unset HF_HUB_OFF",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist"),
            "the Hub has no data set o/n at rev",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("'o/n' is a gated dataset"),
            "o/n is gated. Accept its terms at http",
        ),
        (
            ValueError("Unknown split \"trian\". Should be one of ['train']."),
            "split 'train' of o/n cannot be read: Unknown",
        ),
    ],
)
def test_the_hub_is_explained_in_one_line(monkeypatch, error: Exception, message: str) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    Path("data.yaml").write_text("source: o/n\nrevision: abc\ncolumns: {text: text}\n")
    with pytest.raises(ValueError, match=message) as raised:
        load_data("./data.yaml")
    assert "\n" not in str(raised.value)


# Classes


@pytest.mark.parametrize(
    ("names", "cells", "expected"),
    [
        (["cat", "dog"], ["1", "0"], [1, 0]),
        (["cat", "dog"], ["dog", "cat"], [1, 0]),
        (["0", "1"], ["1", "0"], [1, 0]),
        (["7", "8"], ["8", "7"], [1, 0]),
        (["1", "0"], ["1", "0"], "'[01]' of train is one class as a name and another as a number"),
        (["cat", "dog"], ["1", "2"], "label 2, but there are 2 class names, for 0 to 1"),
        (["cat", "dog"], ["1", ""], "label '1', which is none of the class names"),
    ],
)
def test_labels_in_csv(names: list[str], cells: list[str], expected: list[int] | str) -> None:
    Path("t.csv").write_text("body,label\n" + "".join(f"text,{cell}\n" for cell in cells))
    keys = {"source": "csv", "data_files": {"train": "t.csv"}, "splits": {"train": "train"}, "text": "body"}
    Path("data.yaml").write_text(yaml.safe_dump({**keys, "class_names": names}))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            load_classification(ClassificationRecipe.load("./data.yaml"))
    else:
        assert load_classification(ClassificationRecipe.load("./data.yaml")).train["label"][:] == expected


def test_caches_of_before_stay_readable() -> None:
    """Their fingerprints are this recipe's where rows cannot differ, and accepted where most of them do not."""
    Path("t.jsonl").write_text('{"q": "a"}\n')
    same = DataRecipe.load(recipe("t.jsonl", {"text": "q"}))
    assert same.fingerprints == (same.fingerprint,)
    template = DataRecipe.load(recipe("t.jsonl", {"text": "{q}"}))
    assert template.fingerprints[0] == template.fingerprint
    assert len(template.fingerprints) == 2


# Rows that are left out


def left_out(caplog: Any, rows: list[dict[str, Any]], columns: Any, **keys: Any) -> tuple[list[Any], str]:
    """The numbers of the rows that stay, and what is said of the others."""
    Path("t.jsonl").write_text("".join(json.dumps({"id": f"{i}", **row}) + "\n" for i, row in enumerate(rows)))
    found = load_data(recipe("t.jsonl", {**columns, "domain": "id"}, **keys))["train"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return sorted(found["domain"]), "\n".join(warnings)


ASKED = {"role": "user", "content": "q"}
TOLD = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        (
            [{"q": "q", "a": "a"}, {"q": None, "a": "a"}],
            {"prompt": "q", "completion": "a"},
            "1 without prompt (row 1)",
        ),
        ([{"q": "q", "a": "a"}, {"q": "q"}], {"prompt": "q", "completion": "a"}, "1 without completion (row 1)"),
        (
            [{"q": "q", "a": "a"}, {"q": "q", "a": " "}],
            {"prompt": "q", "completion": "a"},
            "1 without completion (row 1)",
        ),
        (
            [{"q": "q", "a": "a"}, {"q": "q"}],
            {"prompt": "q", "completion": "Answer: {a}"},
            "1 without completion (row 1)",
        ),
        ([{"a": "x", "b": None}, {"a": "", "b": None}], {"text": "{a}/{b}."}, "1 without text (row 1)"),
        (
            [{"q": "q", "a": "a"}, {"q": "q"}],
            {"messages": {"user": "{q}", "assistant": "So: {a}"}},
            "1 without an answer",
        ),
        ([{"m": [ASKED, TOLD]}, {"m": None}], {"messages": "m"}, "1 without messages (row 1)"),
        ([{"m": [ASKED, TOLD]}, {"m": [ASKED]}], {"messages": "m"}, "1 without a turn of the assistant (row 1)"),
        (
            [{"m": [ASKED, TOLD]}, {"m": [{**ASKED, "content": None}, TOLD]}],
            {"messages": "m"},
            "empty message of a user",
        ),
        ([{"q": "q"}, {"q": " "}], {"prompt": "q"}, "1 without prompt (row 1)"),
    ],
)
def test_rows_that_lack_a_text_are_left_out_and_counted(caplog, rows: Any, columns: Any, said: str) -> None:
    kept, warnings = left_out(caplog, rows, columns)
    assert kept == ["0"]
    assert f"1 of 2 data train rows are left out: {said}" in warnings or said in warnings
    assert warnings.count("\n") == 0


def test_row_numbers_are_those_of_the_file_however_rows_are_shuffled(caplog) -> None:
    rows = [{"a": None if i in (3, 17, 41) else f"text {i}"} for i in range(60)]
    _, warnings = left_out(caplog, rows, {"text": "a"}, shuffle_seed=7, eval_rows=20)
    named = [int(row) for listed in re.findall(r"\(rows? ([^)]*)\)", warnings) for row in listed.split(", ")]
    assert sorted(named) == [3, 17, 41]


def test_nothing_is_said_where_no_row_is_left_out(caplog) -> None:
    assert left_out(caplog, [{"a": "x"}, {"a": "y"}], {"text": "a"}) == (["0", "1"], "")


def test_empty_rows_stay_where_that_is_asked_for(caplog) -> None:
    rows = [{"q": "q", "a": ""}, {"q": None, "a": "a"}]
    columns = {"prompt": "q", "completion": "a"}
    assert left_out(caplog, rows, columns, filters={"drop_empty": False}) == (["0", "1"], "")


def test_an_empty_cell_of_csv_is_nothing(caplog) -> None:
    assert answers("t.csv", "q,a\nred?,yes\n,no\nblue?,\n") == ["yes"]
    assert (
        "2 of 3 data train rows are left out: 1 without prompt (row 1); 1 without completion (row 2)." in caplog.text
    )


@pytest.mark.parametrize(
    ("cells", "asked", "kept"),
    [
        (["3", "3.0", "4"], 3, ["0"]),
        (["no", "yes", "off"], "no", ["0"]),
        (["true", "True", "false"], True, ["0"]),
        (["02139", "2139"], "02139", ["0"]),
        (["", "x"], None, ["0"]),
        ([3, 4, None], 3, ["0"]),
        ([3, 4], "3", ["0"]),
        ([2.5, 4.0], "2.50", ["0"]),
        ([True, False], "yes", ["0"]),
        ([True, "true", 1], True, ["0", "1", "2"]),
        ([None, "x"], None, ["0"]),
    ],
)
def test_equals_compares_what_the_file_says(cells: list[Any], asked: Any, kept: list[str]) -> None:
    keys: Any = {"filters": {"equals": {"c": asked}}}
    if all(isinstance(cell, str) for cell in cells):
        Path("t.csv").write_text("id,c\n" + "".join(f"{number},{cell}\n" for number, cell in enumerate(cells)))
        rows = load_data(recipe("t.csv", {"text": "id"}, **keys))
    else:
        lines = [json.dumps({"id": f"{number}", "c": cell}) for number, cell in enumerate(cells)]
        Path("t.jsonl").write_text("\n".join(lines))
        rows = load_data(recipe("t.jsonl", {"text": "id"}, **keys))
    assert rows["train"]["text"][:] == kept


def test_equals_that_no_row_has_names_what_rows_have() -> None:
    Path("t.csv").write_text("q,n\na,3.0\nb,4.0\n")
    with pytest.raises(ValueError, match=r"equals asks for n 3, and rows have 3\.0, 4\.0"):
        load_data(recipe("t.csv", {"text": "q"}, filters={"equals": {"n": 3}}))


def test_filters_for_answers_of_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"filters\.min_chars is about answers, and these rows are prompts"):
        DataRecipe.load(recipe("t.jsonl", {"prompt": "q"}, filters={"min_chars": 3}))


# Types that were guessed elsewhere


@pytest.mark.parametrize(
    ("values", "template", "said"),
    [
        ([1.0, None], "{n}", True),
        ([1.0, None], "{n:.0f}", False),
        ([1.0, 2.0], "{n}", False),
        ([1.5, None], "{n}", False),
    ],
)
def test_whole_numbers_that_became_floats_are_said(caplog, values: list[Any], template: str, said: bool) -> None:
    Dataset.from_dict({"q": ["x", "y"], "n": values}).to_parquet("t.parquet")
    load_data(recipe("t.parquet", {"prompt": "q", "completion": template}))
    assert ("column n holds whole numbers as 1.0" in caplog.text) == said


@pytest.mark.parametrize(("kind", "said"), [("csv", True), ("json", False), ("parquet", False)])
def test_tables_on_the_hub_are_read_by_guesses(monkeypatch, caplog, kind: str, said: bool) -> None:
    def load_dataset(*_: Any, **__: Any) -> Dataset:
        rows = Dataset.from_dict({"text": ["a"]})
        rows.info.builder_name = kind
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    Path("data.yaml").write_text("source: o/n\ncolumns: {text: text}\n")
    load_data("./data.yaml")
    assert ("o/n holds csv files, and their reader on the Hub reads None, NA" in caplog.text) == said


def test_the_command_line_says_it_in_one_line(capsys, monkeypatch) -> None:
    """Before anything is loaded: a broken line is the recipe's fault, not the library's."""
    Path("t.jsonl").write_text('{"q": 1}\n{"q": }\n')
    data = recipe("t.jsonl", {"text": "q"})
    keys = {"method": "kd", "teacher": "nobody/here", "student": "nobody/here", "data": data, "output_dir": "run"}
    Path("run.yaml").write_text(yaml.safe_dump(keys))
    assert main(["doctor", "run.yaml"]) != 0
    said = capsys.readouterr()
    assert "t.jsonl, line 2, column 7: this is no JSON" in said.out + said.err
    assert "Traceback" not in said.out + said.err
