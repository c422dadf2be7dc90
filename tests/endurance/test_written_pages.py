"""What data and models say stands in reports, cards and pages as text: it makes no tags, links, pictures or tables."""

import html.parser
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from starlette.testclient import TestClient

from mmkd.preflight.data_preview import preview_data
from mmkd.preflight.preview_page import write_page
from mmkd.publish.licences import LicensedSource
from mmkd.publish.model_card import Student, model_card
from mmkd.publish.report_page import write_report
from mmkd.publish.run_samples import FOLDER, NAME
from mmkd.results.markdown_text import cell, code, fenced, said
from mmkd.results.tables import markdown_table
from mmkd.ui.ui_server import build_app

EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![seen](http://evil.example/pixel.png)",
    "a | b | <b>c</b>",
    "x\n\n# A heading\n\n| a | b |\n|---|---|\n| 1 | 2 |",
    "`code` **bold** _it_ ~~no~~ [ref]: http://evil.example",
    "{{ 7 * 7 }}{% raw %}",
    "</code></pre></td><svg onload=alert(1)>",
    "\\[x](http://evil.example)",
    "<http://evil.example>",
    "```\n<script>alert(1)</script>\n```",
]
SAFE = MarkdownIt("commonmark", {"html": True}).enable("table")


class Tags(html.parser.HTMLParser):
    """The tags and their attributes on a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def check(page: str) -> None:
    """No tag that could run, load or lead somewhere comes of what the data said."""
    for tag, attributes in Tags(page).tags:
        assert tag not in ("script", "svg", "iframe", "object", "b", "base", "form"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("href", "src"):
            assert not (attributes.get(name) or "").startswith(("javascript:", "http://evil", "x")), attributes


@pytest.mark.parametrize("text", EVIL)
def test_a_cell_stays_a_cell(text: str) -> None:
    table = f"| a | b |\n|---|---|\n| {said(text)} | {said(text)} |\n\nend"
    page = SAFE.render(table)
    check(page)
    tags = [tag for tag, _ in Tags(page).tags]
    assert tags.count("td") == 2
    assert not {"a", "img", "em", "strong", "code", "h1", "del"} & {*tags}
    plain = SAFE.render(markdown_table(["a", "b"], [[text, "2"]]))
    assert [tag for tag, _ in Tags(plain).tags].count("td") == 2
    assert not {"script", "svg", "b"} & {tag for tag, _ in Tags(plain).tags}
    check(SAFE.render(f"Of {code(text)}: {cell(text)}") if "](" not in text and "http" not in text else "")
    whole = SAFE.render(f"before\n\n{fenced(text, 'yaml')}\n\nafter")
    assert [tag for tag, _ in Tags(whole).tags] == ["p", "pre", "code", "p"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run whose models and data say all of it."""
    folder = tmp_path / "run"
    folder.mkdir()
    log = [{"loss": 1.0, "step": 1, "max_steps": 1}, {"train_runtime": 1.0, "step": 1, "max_steps": 1}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    data = {"name": EVIL[0], "license": EVIL[4], "homepage": EVIL[2], "source": EVIL[1]}
    record = {"schema": 1, "method": "kd", "recipe": "r.yaml", "data": data, "finished": "2026-01-01T00:00:00"}
    record |= {"keys": {"method": "kd", "student": EVIL[0], "teacher": EVIL[3], "run_name": EVIL[11]}}
    record |= {"machine": {"cpu": EVIL[1], "versions": {"torch": EVIL[0]}}, "started": "2026-01-01T00:00:00"}
    (folder / "run.json").write_text(json.dumps({**record, "cautions": [EVIL[0]]}))
    rows = [
        {"prompt": text, "target": text, "answers": {"student": text, text: text}, "source": text, "images": []}
        for text in EVIL
    ]
    (folder / FOLDER).mkdir()
    (folder / FOLDER / NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_report_shows_what_was_said(run: Path, tmp_path: Path) -> None:
    page, text = write_report(run, tmp_path / "out", samples=0)
    check(page.read_text(encoding="utf-8"))
    rendered = SAFE.render(text.read_text(encoding="utf-8"))
    check(rendered)
    assert "alert(1)" in html.unescape(page.read_text(encoding="utf-8"))
    assert "49" not in html.unescape(rendered).replace("{{ 7 * 7 }}", "")[:2000]


def test_a_card_shows_what_was_said(tmp_path: Path) -> None:
    sources = [LicensedSource(text, text) for text in EVIL]
    keys: dict[str, Any] = {"repo_id": "me/student", "methods": ["kd"], "pipeline_tag": "text-generation"}
    keys |= {"adapter": False, "parameters": 1, "base": sources, "teachers": sources, "data": sources, "datasets": []}
    keys |= {"license": EVIL[4], "recipe": {"method": "kd", "run_name": EVIL[11]}, "scores": [], "machine": {}}
    keys |= {
        "held_out": {"loss": 1.0},
        "held_out_data": EVIL[0],
        "held_out_id": None,
        "comparison": None,
        "tokens": [1],
    }
    card = model_card(Student(**keys, warnings=[EVIL[0]], answers=[EVIL[1]]))
    assert isinstance(card, ModelCard)
    page = SAFE.render(card.text)
    check(page)
    assert "{{ 7 * 7 }}" in html.unescape(page)
    headings = [tag for tag, _ in Tags(page).tags if tag == "h1"]
    assert len(headings) == 1


def test_the_page_of_the_browser_takes_text_as_text(run: Path) -> None:
    """The script makes no HTML of what it is told, and the page may run no other script."""
    root = Path(__file__).resolve().parents[2] / "mmkd" / "ui"
    script = (root / "ui.js").read_text(encoding="utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert way not in script
    with TestClient(build_app(run.parent), base_url="http://127.0.0.1") as client:
        page, report = client.get("/"), client.get("/report", params={"run": run.name})
        for answer in (page, report):
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
        check(report.text)
        assert client.get("/report", params={"run": "../../etc"}).status_code == 404


def test_a_preview_of_data_shows_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": text, "completion": text}) + "\n" for text in EVIL))
    write_page(preview_data("rows.jsonl", rows=len(EVIL)), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    check(page)
    assert "alert(1)" in page
