"""`mmkd report`: what stands on the pages of runs, whole and half-finished, and that a real browser shows it."""

import html
import json
import math
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmkd.commands.main import main
from mmkd.publish import curves, runs
from mmkd.publish.curves import PANELS, POINTS, STYLES, draw, thinned
from mmkd.publish.report_page import FIGURES, write_report
from mmkd.publish.runs import read_log, read_run
from mmkd.recipe.run_record import RECORD
from mmkd.training.log import LOG

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# Says of the page that it is added to what a reader would see of it.
PROBE = """<script>
window.addEventListener("load", () => {
  const images = [...document.images], box = document.documentElement;
  document.title = JSON.stringify({
    broken: images.filter((one) => !one.naturalWidth).map((one) => one.alt),
    images: images.length,
    unnamed: images.filter((one) => !one.alt).length,
    wider: box.scrollWidth > box.clientWidth,
    fetched: performance.getEntriesByType("resource").filter((one) => !one.name.startsWith("data:")).length,
    headings: [...document.querySelectorAll("h2")].map((one) => one.textContent),
    height: box.scrollHeight,
  });
});
</script>"""


def entry(step: int, **more: float) -> dict[str, Any]:
    facts = {"loss": 3.0 / step, "divergence": 1.0 / step, "kl": 2.0 / step, "top1_agreement": step / 100}
    return {**facts, "ce": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "step": step, "max_steps": 100, **more}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def spread(mean: float, title: str) -> dict[str, Any]:
    return {"mean": mean, "std": None, "values": [mean], "title": title, "higher_is_better": title == "acc"}


def row(name: str, role: str, folder: str, kl: float) -> dict[str, Any]:
    cost = {"unit": "CPU-hours", "hours": 1.0, "tokens_per_second": 9.0, "teacher_tokens": 5}
    gain = {"kl": {"gain": 0.5, "low": 0.25, "high": 0.75, "level": 0.95}} if role == "student" else {}
    return {
        "name": name,
        "role": role,
        "recipe": "kd.yaml",
        "folders": [folder],
        "parameters": 1_000_000,
        "tokens": [100],
        "metrics": {"kl": spread(kl, "KL to teacher (nats)")},
        "tasks": {},
        "retention": {},
        "flips": {},
        "gain_over_sft": gain,
        "cost": cost if role in ("baseline", "student") else None,
        "cache": None,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run in a comparison, with results on questions about pictures."""
    root = tmp_path / "compare"
    folder, baseline = root / "kd <1>", root / "sft"
    write_lines(folder / LOG, [entry(step, taid_t=step / 100) for step in range(1, 101)])
    write_lines(baseline / LOG, [entry(step) for step in range(1, 101)])
    machine = {"device": "cpu", "processor": "a CPU", "threads": 1, "versions": {"torch": "2.13.0"}}
    record = {"method": "taid", "recipe": "kd.yaml", "keys": {"method": "taid", "temperature": 2}, "machine": machine}
    data = {"name": "words", "license": "cc0-1.0", "homepage": None, "source": "json"}
    part = {"name": "part", "license": None, "homepage": "https://example.org", "source": ""}
    record |= {"data": {**data, "parts": [part]}, "started": "2026-01-01", "finished": "2026-01-02"}
    write_json(folder / RECORD, record)
    rows = [row("teacher", "teacher", "big", 0), row("sft", "baseline", str(baseline), 2)]
    rows.append(row("kd", "student", str(folder), 1.5))
    write_json(root / "comparison.json", {"schema": 1, "seeds": [0], "flags": [], "machine": machine, "rows": rows})
    Image.new("RGB", (400, 300), "red").save(tmp_path / "red.png")
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "blue.png")
    for one, said in ((folder, ["red|", "<b>no</b>"]), (baseline, ["blue", "no"])):
        scores = {"results": {"vqa": {"acc,none": 0.5}}, "groups": {}, "higher_is_better": {}, "n_samples": {}}
        task = {"task": "vqa", "metric": None, "samples": "samples/vqa-1.jsonl", **scores}
        write_json(one / "eval/results.json", {"schema": 1, "weights": "a", "tasks": {"1": task}, "measures": {}})
        images = [[str(tmp_path / "red.png"), str(tmp_path / "gone.png")], [str(tmp_path / "blue.png")]]
        facts = {"task": "vqa", "doc_hash": "x", "filter": "none", "prompt": "which <image>?", "choices": []}
        answers = [
            {**facts, "doc_id": i, "images": images[i], "target": "red", "response": [text], "metrics": {"acc": 1 - i}}
            for i, text in enumerate(said)
        ]
        write_lines(one / "eval/samples/vqa-1.jsonl", answers)
    return folder


def test_the_page_of_a_finished_run(run, tmp_path, capsys):
    assert main(["report", str(run), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert capsys.readouterr().out.split() == [str(tmp_path / "out/report.html"), str(tmp_path / "out/report.md")]
    assert len(page) < 3_000_000
    for words in (
        "step 100 of 100: finished",
        "+0.500 [+0.250, +0.750]",
        "Gain over SFT",
        "temperature: 2",
        "cc0-1.0",
        "not stated",
        "2.13.0",
        "sft: kl: 0.02 at 100",
        "&lt;b&gt;no&lt;/b&gt;",
        "gone.png is not here",
        "TAID&#39;s t",
    ):
        assert words in page, words
    assert page.count("data:image/svg+xml") == 7
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_run_stands_for_its_row_whatever_its_seed(run):
    path = run.parent / "comparison.json"
    comparison = json.loads(path.read_text())
    comparison["rows"][-1]["folders"].insert(0, str(run.parent / "another seed"))
    write_json(path, comparison)
    found = read_run(run)
    assert found.lines["kd"][0].folder == run
    assert list(found.results) == ["sft", "kd"]
    assert [name for name in found.lines] == ["sft", "kd"]


def test_measurements_and_generations(tmp_path):
    folder, picture = tmp_path / "run", tmp_path / "blue.png"
    Image.new("RGB", (16, 16), "blue").save(picture)
    speed = [{"batch_size": 1, "tokens_per_second": 12345.6}]
    sample = {"prompt": "who?", "reference": "me", "student": "you", "teacher": "me", "images": [str(picture)]}
    settings = {"held": {"data": "words"}}
    values = {
        "cost": {"student": {"parameters": 1000, "speed": speed}, "teacher": {"parameters": 2000}},
        "agreement": {"kl": 0.25, "rows": 6},
        "generation": {"student": {"tokens": 7.5}, "samples": [sample]},
    }
    measures = {name: {"measure": name, "settings": settings, "values": one} for name, one in values.items()}
    write_json(folder / "eval/results.json", {"schema": 1, "weights": "a", "tasks": {}, "measures": measures})
    pages = write_report(folder)
    text = pages[1].read_text()
    for line in (
        "| cost | parameters | 1,000 | 2,000 |",
        "| cost | tokens_per_second, batch 1 | 12,346 |  |",
        "| agreement | kl | 0.25 |  |",
        "| generation | tokens | 7.5 |  |",
        "### run on words, greedy",
        "| student |  | you |",
    ):
        assert line in text
    assert "data:image/png" in pages[0].read_text()


def test_the_markdown_page(run, tmp_path):
    _, page = write_report(run, tmp_path / "out")
    text = page.read_text()
    figures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(figures) == 7
    assert all((tmp_path / "out" / name).read_text().startswith("<?xml") for name in figures)
    assert "| kd | right | red\\| |" in text
    assert "| kd | wrong | &lt;b&gt;no&lt;/b&gt; |" in text
    assert re.search(r"\| model \| parameters \| tokens seen \| KL to teacher \(nats\) \| tokens/s \|\n\| --- ", text)
    # No line of a table is cut off by an empty one.
    assert not re.search(r"\|\n\n\|", text)


def test_a_run_that_goes_on(tmp_path):
    folder = tmp_path / "run"
    write_lines(folder / LOG, [entry(step) for step in range(1, 31)])
    with (folder / LOG).open("a") as file:
        file.write('{"loss": 0.1, "st')
    write_json(folder / RECORD, {"keys": {}, "started": "2026", "finished": None})
    page = write_report(folder)[0].read_text()
    assert "step 30 of 100: not finished, or still running" in page
    assert "kl: 0.06667 at 30" in page


def test_a_comparison_under_way(tmp_path):
    for number, name in enumerate(("taid", "kd")):
        write_lines(tmp_path / name / LOG, [entry(50 + 50 * (1 - number))])
        finished = None if number else "2026-01-03"
        write_json(tmp_path / name / RECORD, {"method": name, "started": f"2026-01-0{number}", "finished": finished})
    (tmp_path / "measured").mkdir()
    found = read_run(tmp_path)
    assert list(found.lines) == ["taid", "kd"]
    assert found.state == "kd, step 50 of 100: not finished, or still running."
    assert found.record["method"] == "kd"


def test_a_run_without_a_log_file_is_read_from_its_newest_state(tmp_path):
    for step in (9, 10):
        state = {"max_steps": 20, "log_history": [entry(step)]}
        write_json(tmp_path / f"checkpoint-{step}/trainer_state.json", state)
    assert [one["step"] for one in read_log(tmp_path)] == [10]
    write_json(tmp_path / "trainer_state.json", {"max_steps": 20, "log_history": [entry(20)]})
    assert [one["step"] for one in read_log(tmp_path)] == [20]


def test_stages_follow_one_another(tmp_path):
    for name in ("1-PT", "2-SFT", "10-DFT"):
        write_lines(tmp_path / name / LOG, [entry(50), entry(100)])
    run = read_run(tmp_path)
    (parts,) = run.lines.values()
    assert [part.name for part in parts] == ["1-PT", "2-SFT", "10-DFT"]
    loss = next(figure for figure in draw(run) if figure.title == PANELS[0].title)
    assert "loss: 0.03 at 300" in loss.words
    assert "2-SFT" in loss.svg.decode()


def test_a_report_knows_all_stages(tmp_path):
    """Recipes, data, licences and tokens of all of them, not of the last one only."""
    for number, (name, method, data) in enumerate((("1-PT", "kd", "captions"), ("2-SFT", "sft", "questions"))):
        counts = {"supervised_tokens": 2701 - 1832 * number, "training_seconds": 3600.0}
        write_lines(tmp_path / name / LOG, [entry(50), entry(100, **counts), {"eval_loss": 1.0, "step": 100}])
        facts = {"name": data, "license": f"licence-{data}", "source": "org/rows", "homepage": None}
        times = {"started": "2026-01-02", "finished": "2026-01-03"}
        keys = {"method": method, "data": data}
        write_json(
            tmp_path / name / RECORD, {"method": method, "keys": keys, "recipe": "x.yaml", "data": facts, **times}
        )
    for text in (path.read_text() for path in write_report(tmp_path)):
        for words in ("kd, sft", "licence-captions", "licence-questions", "data: captions", "data: questions"):
            assert words in text
    header = "| training | method | data | steps | supervised tokens | time |"
    first = "| 1-PT | kd | captions | 100 | 2,701 | 1 h |"
    second = "| 2-SFT | sft | questions | 100 | 869 | 1 h |"
    assert (
        f"{header}\n| --- | --- | --- | --- | --- | --- |\n{first}\n{second}\n| all |  |  | 200 | 3,570 | 2 h |"
        in text
    )
    assert "Stage 1-PT: x.yaml with its flags, started on 2026-01-02." in text


def test_a_line_is_broken_where_a_stage_says_nothing(tmp_path):
    for name in ("1-DPT", "2-SFT", "3-DFT", "4-SFT"):
        silent = name.endswith("SFT")
        rows = [entry(step) for step in (50, 100)]
        rows = [{key: value for key, value in one.items() if key != "kl"} for one in rows] if silent else rows
        write_lines(tmp_path / name / LOG, rows)
    kl = next(panel for panel in PANELS if panel.names[0] == "kl")
    ((_, xs, ys),) = curves._lines(kl, read_run(tmp_path).lines)
    assert xs == [50, 100, 150, 250, 300]
    assert [math.isnan(y) for y in ys] == [False, False, True, False, False]
    write_report(tmp_path)


def test_a_loop_goes_on_when_one_of_its_rounds_is_finished(tmp_path):
    write_lines(tmp_path / "1-CoMD/round-0/student" / LOG, [entry(100)])
    write_json(tmp_path / "1-CoMD/round-0/student" / RECORD, {"method": "sft", "finished": "2026-01-02"})
    write_json(tmp_path / "1-CoMD" / RECORD, {"method": "comd", "finished": None})
    assert read_run(tmp_path).record["method"] == "comd"
    assert read_run(tmp_path).state == "round-0, step 100 of 100: not finished, or still running."
    write_json(tmp_path / "1-CoMD" / RECORD, {"finished": "2026-01-02"})
    assert read_run(tmp_path).state == "round-0, step 100 of 100: finished."


def test_rounds_and_the_choice_of_heads(tmp_path):
    for number in range(3):
        report = {"round": number, "pool": 10 * number, "hard": 5 - number, "assessed": 10}
        held = {"student": 0.5, "teacher": 0.9}
        write_json(tmp_path / f"round-{number}/report.json", {**report, "held_out": held})
        write_lines(tmp_path / f"round-{number}/student" / LOG, [entry(10)])
    score = {"key": "a", "hard": True, "gap": 1.0, "teacher_answer": "cat", "student_answer": "dog"}
    write_lines(tmp_path / "round-2/scores.jsonl", [score])
    asked = {"key": "a", "prompt": [{"role": "user", "content": "who?"}], "images": []}
    write_lines(tmp_path / "round-2/pool.jsonl", [asked])
    grid = [{"alpha": a / 10, "beta": b, "accuracy": 0.5} for a in range(3) for b in (0.5, 1)]
    write_json(tmp_path / "interpolation.json", {"alpha": 0.1, "beta": 1, "accuracy": 0.9, "grid": grid})
    page = html.unescape(write_report(tmp_path)[0].read_text())
    assert "hard: 0.3 at 2; student: 0.5 at 2; teacher: 0.9 at 2; pool: 20 at 2" in page
    assert "chosen: 0.9 at 0.1" in page
    assert "round-2, hard: gap 1" in page
    assert "dog" in page


def test_lines_are_told_apart_without_colour():
    assert len({(style["linestyle"], style["marker"]) for style in STYLES}) == len(STYLES)


def test_long_logs_are_thinned_and_keep_their_end():
    points = [(float(x), 0.0) for x in range(10 * POINTS + 7)]
    found = thinned(points)
    assert POINTS / 2 <= len(found) <= POINTS
    assert found[-1] == points[-1]
    assert thinned(points[:3]) == points[:3]


def test_a_long_run_with_many_pictures_stays_small_and_fast(run, tmp_path):
    """Ten times the steps cost little more than the page itself does, on any machine."""
    noise = Image.effect_noise((2000, 2000), 100)
    noise.save(tmp_path / "red.png")
    write_report(run)

    def seconds(steps: int) -> float:
        write_lines(run / LOG, [entry(step, **{f"loss/{n}": 1.0 for n in range(6)}) for step in range(1, steps + 1)])
        start = time.process_time()
        page, _ = write_report(run)
        took = time.process_time() - start
        assert page.stat().st_size < 3_000_000
        return took

    short, long = (min(seconds(steps) for _ in range(2)) for steps in (2_000, 20_000))
    # 2.2 measured: the log is read once, and its drawing is thinned. Work that grew by the square would give 13.
    assert long < 5 * short


def test_weights_that_are_newer_than_their_results_are_said(run):
    assert "evaluate it again" not in write_report(run)[0].read_text()
    time.sleep(0.02)
    (run / "model.safetensors").write_bytes(b"new")
    assert "The weights of kd were written after its results: evaluate it again." in write_report(run)[0].read_text()


@pytest.mark.parametrize("place", ["nothing", "empty"])
def test_folders_with_nothing_to_report(tmp_path, place, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / place)]) == 2
    assert ("is no folder of a run" if place == "nothing" else "holds nothing to report") in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())


def test_without_matplotlib(run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", str(run)]) == 2
    assert "pip install 'mmkd[plot]'" in capsys.readouterr().err


def test_a_comparison_that_is_none(run, tmp_path, capsys):
    assert main(["report", str(run), "--comparison", str(tmp_path)]) == 2
    assert "is no comparison" in capsys.readouterr().err


def test_file_names_are_those_that_training_writes():
    assert (runs.LOG, runs.RECORD) == (LOG, RECORD)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_all_of_it(run, tmp_path):
    page = write_report(run)[0].read_text()
    assert "<script" not in page
    shutil.rmtree(run / FIGURES)
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", f"{PROBE}</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=3000", "--window-size=1200,900", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = json.loads(html.unescape(done.stdout.partition("<title>")[2].partition("</title>")[0]))
    height = seen.pop("height")
    assert height > 1500
    assert seen == {
        "broken": [],
        "images": 7 + 2,
        "unnamed": 0,
        "wider": False,
        "fetched": 0,
        "headings": ["Comparison", "Training", "Benchmarks", "Curves", "Samples", "Recipe", "Data", "Versions"],
    }
