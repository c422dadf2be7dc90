"""The runner of pages fails where a page is wrong."""

from pathlib import Path

import pytest

from tests.docs.page_blocks import read_page
from tests.docs.page_runner import PageError, PageRunner


def play(text: str, run: bool = True) -> PageRunner:
    Path("page.md").write_text(text)
    runner = PageRunner("page.md", read_page(Path("page.md")), run)
    runner.play()
    return runner


def block(language: str, text: str, before: str = "") -> str:
    return f"# A page\n\n{before}\n```{language}\n{text}\n```\n"


GPU = "<!-- test: skip needs a GPU -->"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMKD_PAGE_COMMANDS", str(tmp_path))


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (block("bash", "mmkd recipes show kd/quikstart"), "ended with status 2"),
        (block("bash", "true\nfalse"), "`false` ended with status 1"),
        (block("bash", "for i in 1 2; do\n  test $i = 1\ndone"), "ended with status 1"),
        (block("bash", "mmkd comparre kd/quickstart", GPU), "no command `comparre kd/quickstart`"),
        (block("bash", "mmkd report runs/kd --outputt x", GPU), "unknown words ['--outputt', 'x']"),
        (block("bash", "mmkd-train kd/quickstart --max_step 1", GPU), "--max_step is no flag of method kd"),
        (block("bash", "mmkd-train kd/quikstart", GPU), "neither a file nor a recipe"),
        (block("bash", "mmkd-train mine.yaml", GPU), "neither a file nor a recipe"),
        (block("bash", "pip install 'mmkd[plott]'"), "no extra ['plott']"),
        (block("bash", "bash scripts/quikstart.sh"), "there is no scripts/quikstart.sh"),
        (block("python", "import torch\ntorch.zeros(2)[3]"), "raises IndexError"),
        (block("python", "from mmkd import KDTrainerr", GPU), "mmkd has no KDTrainerr"),
        (block("python", "from mmkd import KDConfig\nKDConfig(temprature=2)", GPU), "KDConfig: got an unexpected"),
        (block('yaml title="a.yaml"', "method: kd\ntemprature: 2"), "sets 'temprature'"),
        (block("bash", "echo a") + block("text", "b", "<!-- test: output -->"), "the page promises"),
    ],
)
def test_what_does_not_work_is_named_with_its_line(page: str, reason: str) -> None:
    with pytest.raises(PageError) as error:
        play(page)
    assert reason in str(error.value)
    line = int(str(error.value).split(":")[1])
    assert page.splitlines()[line - 2].startswith("```")


@pytest.mark.parametrize(
    "page",
    [
        block("bash", "mmkd recipes cp kd/quickstart mine.yaml\ntest -f mine.yaml"),
        block("bash", "mmkd doctor \\\n  kd/quickstart --max-steps 3  # a comment", GPU),
        block("bash", "mmkd cache merge runs/mine\nmmkd-train runs/mine/recipe.yaml", GPU).replace(
            "merge runs/mine", "info runs/mine/recipe.yaml"
        ),
        block("bash", "echo one; echo two") + block("text", "one\n...", "<!-- test: output -->"),
        block("python", "a = 1") + block("python", "assert a == 1"),
        block('json title="folder/a.json"', "{}") + block("bash", "cat folder/a.json | grep '{}'"),
        block("text", "anything"),
    ],
)
def test_what_works_passes(page: str) -> None:
    play(page)


def test_nothing_of_a_card_is_run() -> None:
    play(block("bash", "false\nmmkd-train kd/quickstart") + block("python", "1 / 0"), run=False)


def test_a_reason_that_nobody_agreed_on_is_refused() -> None:
    with pytest.raises(ValueError, match="line 5: 'test: skip for now' means nothing"):
        play(block("bash", "false", "<!-- test: skip for now -->"))


def test_settings_reach_every_training() -> None:
    runner = PageRunner("page.md", read_page(Path(__file__)))
    assert runner.page.settings == {}
    Path("page.md").write_text("---\ntest: {max_steps: 2}\n---\n\n" + block("bash", "mmkd-train kd/no_such_recipe"))
    runner = PageRunner("page.md", read_page(Path("page.md")))
    with pytest.raises(PageError, match=r"mmkd train kd/no_such_recipe --max_steps 2` ended with status 2"):
        runner.play()
