"""`mmkd data preview`: what is shown of rows, as they are written and as a student's tokens."""

import re
from pathlib import Path

import pytest

from mmkd.commands.main import main
from mmkd.data.data_recipe import DataRecipe
from mmkd.preflight.data_preview import preview_data
from mmkd.preflight.token_preview import reader_of
from tests.data.sources import rows_of, turn, write_jsonl, write_png
from tests.vlms import make_llava


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf_cache")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["data", "preview", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("chat", "user: asked 0\nassistant: [[told 0]]"),
        ("sharegpt", "user: asked 0\nassistant: [[told 0]]"),
        ("alpaca", "user: asked 0\nassistant: [[told 0]]"),
        ("preference", "asked 0[[told 0]]"),
        ("text", "[[told 0]]"),
        ("prompts_only", "user: asked 0\n"),
    ],
)
def test_what_is_learnt_is_marked(kind: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = shown(capsys, write_jsonl("rows.jsonl", rows_of(kind)), "--rows", "2")
    assert text in printed
    assert "row 2 of 2 shown" in printed
    assert ("[[ and ]]" in printed) == (kind != "prompts_only")
    assert "none of the 24 rows checked" in printed


def test_the_classes_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    printed = shown(capsys, write_jsonl("rows.jsonl", rows_of("classes")), "--rows", "2")
    assert re.search(r"classes +2: bad, good", printed)
    assert "class bad" in printed
    assert "told 0" in printed
    assert main(["data", "preview", "rows.jsonl", "--model", "any"]) == 2
    assert "remove it" in capsys.readouterr().err


def test_what_is_left_out_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*rows_of("chat", 20), {"messages": [turn("user", "asked")]}, {"messages": [turn("user", "x")]}]
    printed = shown(capsys, write_jsonl("rows.jsonl", rows))
    assert "2 of 22" in printed
    assert "without a turn of the assistant" in printed
    assert "none of the" not in printed


def test_a_page_with_thumbnails(capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"from": "human", "value": "<image>\n<b>Colour?</b>"}, {"from": "gpt", "value": "red & <i>round</i>"}]
    write_jsonl("vqa/rows.jsonl", [{"image": f"{i}.png", "conversations": talk} for i in range(3)])
    for i in range(2):
        write_png(f"vqa/{i}.png")
    Path("vqa/2.png").write_bytes(b"no picture")
    printed = shown(capsys, "vqa/rows.jsonl", "--html", "page.html", "--write", "data.yaml")
    assert "picture: 8 x 8 pixels" in printed
    assert "picture: cannot be read" in printed
    page = Path("page.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 2
    assert "<mark>red &amp; &lt;i&gt;round&lt;/i&gt;</mark>" in page
    assert "&lt;b&gt;Colour?&lt;/b&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs no other file"
    assert DataRecipe.load("./data.yaml").fingerprint == DataRecipe.load("vqa/rows.jsonl").fingerprint
    printed = shown(capsys, "./data.yaml", "--rows", "1")
    assert "picture: 8 x 8 pixels" in printed
    assert main(["data", "preview", "./data.yaml", "--write", "again.yaml"]) == 2
    assert "is a data recipe already" in capsys.readouterr().err


def test_rows_as_tokens(tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl("rows.jsonl", rows_of("chat"))
    printed = shown(capsys, source, "--rows", "1", "--model", str(tiny["student"]))
    match = re.search(r"(\d+) tokens, (\d+) of them learnt", printed)
    assert match is not None
    assert 0 < int(match[2]) < int(match[1])
    everything = preview_data(source, rows=1, reader=reader_of(str(tiny["student"]), assistant_only=False)).rows[0]
    assistant = preview_data(source, rows=1, reader=reader_of(str(tiny["student"]))).rows[0]
    assert "".join(piece.text for piece in assistant.pieces) == "".join(piece.text for piece in everything.pieces)
    learnt = "".join(piece.text for piece in assistant.pieces if piece.supervised)
    assert "told" in learnt
    assert "asked" not in learnt


def test_prompts_as_tokens(tiny: dict[str, Path]) -> None:
    source = write_jsonl("rows.jsonl", rows_of("prompts_only"))
    row = preview_data(source, rows=1, reader=reader_of(str(tiny["student"]))).rows[0]
    assert "asked" in row.pieces[0].text
    assert not any(piece.supervised for piece in row.pieces)


@pytest.mark.parametrize("flag", ["--rows", "--check_rows"])
def test_numbers_of_rows(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", "rows.jsonl", flag, "0"]) == 2
    assert "give 1 or more" in capsys.readouterr().err


def test_pictures_as_tokens(tmp_path: Path) -> None:
    model = str(make_llava(tmp_path / "vlm"))
    talk = [{"from": "human", "value": "<image>\nasked"}, {"from": "gpt", "value": "told"}]
    write_jsonl("rows.jsonl", [{"image": f"{i}.png", "conversations": talk} for i in range(2)])
    write_png("0.png")
    Path("1.png").write_bytes(b"no picture")
    first, second = preview_data("rows.jsonl", reader=reader_of(model)).rows
    texts = [piece.text for piece in first.pieces]
    assert "<picture, 4 tokens>" in texts
    assert "told" in "".join(piece.text for piece in first.pieces if piece.supervised)
    assert not isinstance(first.pictures[0], str)
    assert first.pictures[0].size == (8, 8)
    assert second.note == "This row cannot be used."
    assert isinstance(second.pictures[0], str)


def test_prompts_with_pictures_as_tokens(tmp_path: Path) -> None:
    model = str(make_llava(tmp_path / "vlm"))
    write_jsonl("rows.jsonl", [{"image": "0.png", "question": f"asked {i}"} for i in range(2)])
    write_png("0.png")
    first, _ = preview_data("rows.jsonl", reader=reader_of(model)).rows
    assert "<picture, 4 tokens>" in [piece.text for piece in first.pieces]
    assert "asked" in "".join(piece.text for piece in first.pieces)
