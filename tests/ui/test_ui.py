"""`mmkd ui`: what is served, to whom, and that a real browser shows it."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from mmkd.commands.main import main
from mmkd.ui.run_list import RunList
from mmkd.ui.ui_server import TOKEN, build_app
from scripts.make_tiny_models import sentences
from tests.forked import Forked
from tests.ui.stand_ins import log_step, make_run

CHROMIUM = Path("/usr/bin/chromium")
SECRET = {TOKEN: "secret"}


@pytest.fixture
def root(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """Three runs under a folder: one that goes on, one that is finished, one in stages."""
    root = tmp_path / "runs"
    make_run(root / "going", finished=False)
    make_run(root / "deep/done <1>", tiny["student"], str(tiny["teacher"]), steps=10)
    for name in ("1-PT", "2-SFT"):
        make_run(root / "staged" / name, steps=10)
    (root / "empty").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    return root


@pytest.fixture
def client(root: Path) -> TestClient:
    return TestClient(build_app(root, "secret"), base_url="http://127.0.0.1:8765")


def test_all_runs_are_listed_with_how_they_stand(client: TestClient) -> None:
    rows = {row["name"]: row for row in client.get("/api/runs").json()["runs"]}
    assert set(rows) == {"going", "deep/done <1>", "staged"}
    going = rows["going"]
    shown = {key: going[key] for key in ("state", "method", "data", "step", "planned", "loss", "eta_minutes")}
    expected = {"state": "running", "method": "kd", "data": "words", "step": 3, "planned": 10}
    assert shown == {**expected, "loss": 1.0, "eta_minutes": 7.0}
    assert rows["deep/done <1>"]["state"] == "finished"
    assert rows["staged"]["part"] == "2-SFT"


def test_a_run_without_news_has_stopped(root: Path) -> None:
    import os

    old = time.time() - 3600
    os.utime(root / "going/log.jsonl", (old, old))
    (row,) = [row for row in RunList(root).rows() if row["name"] == "going"]
    assert row["state"] == "stopped"


def test_a_comparison_and_its_trainings_are_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "both/kd")
    make_run(tmp_path / "both/sft", steps=2)
    cost = {"unit": "CPU-hours", "hours": 1.0, "tokens_per_second": 9.0, "teacher_tokens": 5}
    facts = {"name": "kd", "role": "student", "folders": [str(tmp_path / "both/kd")], "parameters": 10, "tokens": [3]}
    more = {"metrics": {}, "tasks": {}, "retention": {}, "gain_over_sft": {}, "flips": {}, "cache": None, "cost": cost}
    machine = {"device": "cpu", "processor": "", "threads": 1, "versions": {"torch": "2"}}
    other = {**facts, "name": "sft", "role": "baseline", "folders": [str(tmp_path / "both/sft")]}
    rows = [{**other, **more}, {**facts, **more}]
    comparison = {"schema": 1, "seeds": [0], "machine": machine, "rows": rows}
    (tmp_path / "both/comparison.json").write_text(json.dumps(comparison))
    listed = {row["name"]: (row["kind"], row["step"]) for row in RunList(tmp_path).rows()}
    assert listed == {"both": ("comparison", 3), "both/kd": ("run", 3), "both/sft": ("run", 2)}


def test_curves_grow_with_the_log(client: TestClient, root: Path) -> None:
    def points(*names: str) -> dict[str, list[Any]]:
        panels = client.get("/api/curves", params={"run": names}).json()
        return {line["name"]: line["points"] for panel in panels for line in panel["lines"]}

    assert points("going")["kl"] == [[1, 1.0], [2, 0.5], [3, pytest.approx(1 / 3)]]
    log_step(root / "going", 4)
    assert points("going")["kl"][-1] == [4, 0.25]
    together = points("going", "deep/done <1>")
    assert (len(together["going: kl"]), len(together["deep/done <1>: kl"])) == (4, 10)
    staged = client.get("/api/curves", params={"run": "staged"}).json()
    assert staged[0]["spans"] == [["1-PT", 0, 10], ["2-SFT", 10, 20]]


def test_the_report_is_that_of_the_command_and_written_nowhere(client: TestClient, root: Path) -> None:
    page = client.get("/report", params={"run": "deep/done <1>"})
    assert page.status_code == 200
    assert "step 10 of 10: finished" in page.text
    assert "script-src" not in page.headers["content-security-policy"]
    assert not list(root.rglob("report.html"))


def test_samples_are_made_and_shown(client: TestClient, root: Path, tmp_path: Path) -> None:
    rows = [{"prompt": a, "completion": b} for a, b in zip(sentences(4), sentences(4, seed=1), strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"source": "json", "data_files": {"train": str(tmp_path / "rows.jsonl")}, "shuffle_seed": None}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(data))
    path = root / "deep/done <1>/run.json"
    record = json.loads(path.read_text())
    record["keys"]["data"] = str(tmp_path / "words.yaml")
    path.write_text(json.dumps(record))
    run = {"run": "deep/done <1>"}
    assert client.get("/api/samples", params=run).json() == [{**run, "samples": []}]
    assert client.post("/api/samples", json={**run, "count": 2}, headers=SECRET).json() == {"reason": ""}
    (answer,) = client.get("/api/samples", params=run).json()
    assert [sample["prompt"] for sample in answer["samples"]] == [row["prompt"] for row in rows[:2]]
    assert [side["model"] for side in answer["samples"][0]["answers"]] == ["student", "teacher"]


def test_student_and_teacher_answer(client: TestClient) -> None:
    sides = client.get("/api/sides", params={"run": "deep/done <1>"}).json()["sides"]
    assert [(side["name"], side["fits"]) for side in sides] == [("student", True), ("teacher", True)]
    asked = {"run": "deep/done <1>", "messages": [{"role": "user", "content": "the cat"}], "max_new_tokens": 8}
    answers = [client.post("/api/chat", json={**asked, "side": side["name"]}, headers=SECRET).text for side in sides]
    assert all(answers)
    assert answers[0] != answers[1]
    assert client.post("/api/unload", json={}, headers=SECRET).json() == {"unloaded": 2}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"messages": []}, "needs messages"),
        ({"messages": [{"role": "root", "content": "x"}]}, "needs a role"),
        ({"max_new_tokens": 10**9}, "at most 4096"),
        ({"temperature": "hot"}, "must be numbers"),
        ({"run": None}, "must have a text 'run'"),
        ({"side": 1}, "must have a text 'side'"),
        ({"images": ["/etc/passwd"]}, "data URL"),
        ({"images": ["data:image/png;base64,AAAA"]}, "cannot be read"),
    ],
)
def test_bad_questions_are_explained(client: TestClient, changed: dict[str, Any], says: str) -> None:
    asked = {"run": "deep/done <1>", "side": "student", "messages": [{"role": "user", "content": "x"}], **changed}
    reply = client.post("/api/chat", json=asked, headers=SECRET)
    assert reply.status_code == 400
    assert says in reply.json()["error"]


def test_other_bad_requests_are_explained_and_faults_of_the_server_are_not_taken_for_them(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "must name a run" in client.get("/api/curves").json()["error"]
    reply = client.post("/api/samples", json={"run": "deep/done <1>", "count": "many"}, headers=SECRET)
    assert (reply.status_code, reply.json()["error"]) == (400, "count is a whole number from 1 to 16.")
    asked = {"run": "deep/done <1>", "side": "nobody", "messages": [{"role": "user", "content": "x"}]}
    reply = client.post("/api/chat", json=asked, headers=SECRET)
    assert reply.status_code == 404
    assert "'nobody'" in reply.json()["error"]
    monkeypatch.setattr("mmkd.ui.ui_server.panels_of", lambda runs: {}["panels"])
    with pytest.raises(KeyError):
        client.get("/api/curves", params={"run": "deep/done <1>"})


def test_pictures_for_a_model_that_cannot_see_are_refused_in_the_stream(client: TestClient) -> None:
    import base64
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    asked = {"run": "deep/done <1>", "side": "student", "messages": [{"role": "user", "content": "x"}]}
    reply = client.post("/api/chat", json={**asked, "images": [picture]}, headers=SECRET)
    assert reply.text.startswith("\0This model reads text only")


@pytest.mark.parametrize("name", ["../secret.txt", "..", "deep", "empty", "/etc", "deep/../../secret.txt", "%2e%2e"])
def test_only_listed_runs_are_served(client: TestClient, name: str) -> None:
    for path in ("/report", "/api/curves", "/api/samples", "/api/sides"):
        assert client.get(path, params={"run": name}).status_code == 404
    asked = {"run": name, "side": "student", "messages": [{"role": "user", "content": "x"}]}
    assert client.post("/api/chat", json=asked, headers=SECRET).status_code == 404


@pytest.mark.parametrize(
    "path", ["/../secret.txt", "/ui.py", "/ui_server.py", "/ui.css/..%2fui_server.py", "/%2e%2e/secret.txt"]
)
def test_no_other_file_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_other_hosts_and_other_sites_are_refused(root: Path, client: TestClient) -> None:
    rebound = TestClient(build_app(root, "secret"), base_url="http://evil.example:8765")
    for path in ("/", "/api/runs", "/report?run=going"):
        assert rebound.get(path).status_code == 403
    assert client.get("/api/runs", headers={"Origin": "http://evil.example"}).status_code == 403
    for headers in ({}, {TOKEN: "wrong"}, {**SECRET, "Origin": "http://evil.example"}):
        assert client.post("/api/unload", json={}, headers=headers).status_code == 403
    assert client.post("/api/unload", json={}, headers=SECRET).status_code == 200
    assert (
        client.post("/api/unload", content=b"x", headers={**SECRET, "Content-Length": "99999999"}).status_code == 403
    )
    assert "secret" in client.get("/").text
    assert "http" not in client.get("/ui.js").text.replace("http://www.w3.org", "")


def test_what_the_command_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ui", str(tmp_path / "nowhere")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["ui", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "--port" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["ui", str(tmp_path)]) == 2
    assert "pip install 'mmkd[ui]'" in capsys.readouterr().err


@pytest.fixture
def served(root: Path) -> Iterator[str]:
    """The address of `mmkd ui` in a process of its own."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as printed:
        with os.fdopen(writing, "w") as output:
            process = Forked(["-m", "mmkd.commands.main", "ui", str(root), "--port", "0"], root, stdout=output)
        try:
            yield printed.readline().split()[0]
        finally:
            process.kill()


@pytest.mark.skipif(not CHROMIUM.is_file(), reason="there is no /usr/bin/chromium here")
def test_a_browser_shows_runs_live_curves_and_answers(served: str, root: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(served)
        expect(page.locator("#runs li")).to_have_count(3, timeout=60_000)
        page.locator(".run", has_text="going").click()
        line = page.locator(".chart", has_text="KL to the teacher").locator("path.line")
        expect(line).to_have_attribute("data-points", "3", timeout=30_000)
        log_step(root / "going", 4)
        expect(line).to_have_attribute("data-points", "4", timeout=30_000)
        expect(page.locator(".run", has_text="going")).to_contain_text("step 4 of 10")
        page.get_by_label("compare deep/done <1>").check()
        expect(page.locator(".chart", has_text="KL to the teacher").locator("path.line")).to_have_count(2)
        page.get_by_role("tab", name="Report").click()
        expect(page.frame_locator("iframe").first.locator("h1")).to_have_text("Run going", timeout=30_000)
        page.locator(".run", has_text="done").click()
        page.get_by_role("tab", name="Talk").click()
        expect(page.locator(".column")).to_have_count(2, timeout=60_000)
        page.fill("#tokens", "4")
        page.fill("#question", "the cat")
        page.press("#question", "Enter")
        expect(page.locator("#send")).to_be_enabled(timeout=60_000)
        expect(page.locator(".message.waiting, .message.error")).to_have_count(0)
        assert all(page.locator(".message.assistant").all_inner_texts())
        page.get_by_role("button", name="Unload models").click()
        expect(page.locator("#talk-note")).to_have_text("2 models are unloaded.")
        width = page.evaluate("() => document.documentElement.scrollWidth")
        browser.close()
    assert errors == []
    assert width == 390
