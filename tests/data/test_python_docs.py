"""The quickstart's corpus: rows of whole paragraphs, nothing held out that is also trained on."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from mmkd.data.load_data import load_data
from mmkd.prepare import python_docs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return python_docs


@pytest.fixture(scope="module")
def rows(script):
    return script.make_rows(topics)


def test_about_a_tenth_is_held_out(rows):
    train, held_out = (sum(len(row["text"]) for row in rows[split]) for split in ("train", "eval"))
    assert train + held_out > 250_000
    assert 0.04 < held_out / (train + held_out) < 0.2


def test_no_topic_and_no_paragraph_is_on_both_sides(script, rows):
    assert not {row["topic"] for row in rows["train"]} & {row["topic"] for row in rows["eval"]}
    sides = [
        {" ".join(part.split()) for row in rows[split] for part in script.paragraphs(row["text"])}
        for split in ("train", "eval")
    ]
    assert all(len(part) < script.DISTINCT for part in sides[0] & sides[1])


def test_rows_are_about_a_thousand_characters(script, rows):
    lengths = sorted(len(row["text"]) for row in rows["train"] + rows["eval"])
    assert script.SHORT < lengths[len(lengths) // 2] <= script.LONG
    # Tables are one paragraph and stay whole.
    assert sum(length > 1.2 * script.LONG for length in lengths) < 0.05 * len(lengths)


def test_rows_hold_whole_paragraphs_in_order(script):
    parts = [f"{i} " + "word " * (20 + 7 * i % 90) for i in range(60)]
    cut = script.cut(parts)
    assert "\n\n".join(cut) == "\n\n".join(parts)
    assert all(len(row) <= script.LONG + script.SHORT / 4 for row in cut)
    assert script.cut(["x" * 9000]) == ["x" * 9000]
    assert script.cut([]) == []


def test_underlines_go_and_code_keeps_its_indentation(script):
    text = 'The "x" statement\n*****************\n\nSay:\n\n   if x:\n       y\n\n\nSub\n===\n\nEnd.\n'
    assert script.paragraphs(text) == ['The "x" statement', "Say:", "   if x:\n       y", "Sub", "End."]


def test_the_recipe_reads_what_the_script_writes(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf_cache")
    script.main([])
    first = {path.name: path.read_bytes() for path in (tmp_path / script.OUTPUT_DIR).iterdir()}
    assert set(first) == {"train.jsonl", "eval.jsonl"}
    script.main([])
    assert first == {path.name: path.read_bytes() for path in (tmp_path / script.OUTPUT_DIR).iterdir()}
    assert "rows" in capsys.readouterr().out
    loaded = load_data("python_docs", root=ROOT / "data_recipes")
    for split in ("train", "eval"):
        assert loaded[split].column_names == ["text"]
        assert len(loaded[split]) == len(first[f"{split}.jsonl"].splitlines())


def test_output_dir(script, tmp_path):
    script.main(["--output_dir", str(tmp_path / "a" / "b")])
    assert set(json.loads((tmp_path / "a" / "b" / "eval.jsonl").read_text().splitlines()[0])) == {"topic", "text"}
