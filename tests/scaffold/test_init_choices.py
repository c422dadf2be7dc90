"""What `mmkd init` chooses, says and refuses; nothing is trained here."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from mmkd.commands.main import main
from mmkd.recipe.recipe import Recipe
from mmkd.scaffold.draft import Draft
from mmkd.scaffold.init_tasks import PREPARED, PRUNE, TASKS
from scripts.make_tiny_models import make_tokenizer


def init(models: dict[str, Path], *flags: str, data: str = "chats.jsonl", teacher: str = "teacher") -> int:
    base = ["init", "mine.yaml", "--data", data, "--gpu", "none", "--teacher", str(models.get(teacher, teacher))]
    return main([*base, *flags])


def test_defaults_make_a_recipe_that_says_why(
    workplace: Path, models: dict[str, Path], capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert init(models, "--yes", "--student", str(models["student"])) == 0
    text, shown = Path("mine.yaml").read_text(), capsys.readouterr().out
    keys = yaml.safe_load(text)
    assert keys["data"] == "chats.jsonl"
    assert keys["assistant_only_loss"] is True
    assert keys["max_length"] == 64
    assert keys["per_device_train_batch_size"] == 4
    assert {"eval_strategy", "save_steps", "learning_rate"} <= keys.keys()
    assert text.count("\n# ") > 15
    assert "chats.jsonl: conversations (24 train rows)." in shown
    assert "--task text (the default)" in shown
    commands = shown.partition("Next:")[2]
    assert commands.index("mmkd-train mine.yaml --dry_run") < commands.index("mmkd report runs/mine")
    # As many lines of it as there were readings of the data, before.
    assert caplog.text.count("held out for evaluation") == 1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--task", "text"],
            "no terminal to ask on: The student? Give --student, or --yes, which takes prune",
        ),
        (["--task", "txt", "--student", "x"], "--task 'txt' is none of text, vlm, classify"),
        (["--yes", "--student", "nowhere/to/be/found"], "The student 'nowhere/to/be/found' cannot be loaded"),
        (["--yes", "--task", "vlm"], "reads text only. Name a vision-language model"),
        (["--yes", "--task", "other-tokenizer", "--student", "prune"], "which task other-tokenizer has no use for"),
        (["--yes", "--student", "prune", "--keep_layers", "9"], "'9' is no number of layers from 1 to 3"),
        (["--yes", "--gpu", "huge"], "'huge' is no device: give its memory in GiB, such as 24, one of L4"),
        (["--yes", "--server", "localhost:8000"], "'localhost:8000' is no URL"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    workplace: Path, models: dict[str, Path], capsys: Any, flags: list[str], reason: str
) -> None:
    assert init(models, *flags) == 2
    assert reason in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize(
    ("data", "flags", "reason"),
    [
        ("chats.jsonl", ["--task", "vlm", "--student", "small_vlm"], "has no pictures (its rows have messages)"),
        ("vqa.json", ["--task", "text", "--student", "small_vlm"], "has pictures, and task text is about text"),
        ("prompts.jsonl", ["--task", "text", "--student", "small_vlm"], "has prompts and no answers"),
        ("nothing.jsonl", [], "nothing.jsonl"),
    ],
)
def test_data_of_another_task_are_refused(
    workplace: Path, models: dict[str, Path], capsys: Any, data: str, flags: list[str], reason: str
) -> None:
    words = [str(models.get(word, word)) for word in flags]
    assert init(models, "--yes", *words, data=data, teacher="large_vlm") == 2
    assert reason in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


def test_a_recipe_that_is_there_stays(workplace: Path, capsys: Any) -> None:
    Path("mine.yaml").write_text("method: kd\n")
    assert main(["init", "mine.yaml", "--yes"]) == 2
    assert "mine.yaml is there already and would be replaced; name another file, or give --force." in (
        capsys.readouterr().err
    )
    assert main(["init", "mine", "--yes"]) == 2
    assert "name it mine.yaml" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "method: kd\n"


def test_other_tokenizers_make_it_alm_and_that_is_said(workplace: Path, models: dict[str, Path], capsys: Any) -> None:
    Path("mine.yaml").write_text("method: kd\n")
    assert init(models, "--yes", "--force", "--task", "text", "--student", str(models["other"])) == 0
    assert "have different tokenizers, so the method is alm" in " ".join(capsys.readouterr().out.split())
    assert Recipe.read("mine.yaml").method == "alm"


@pytest.mark.parametrize(
    ("data", "task"), [("vqa.json", "vlm"), ("classes", "classify"), ("prompts.jsonl", "on-policy")]
)
def test_the_data_suggest_the_task(workplace: Path, capsys: Any, data: str, task: str) -> None:
    assert main(["init", "mine.yaml", "--data", data, "--gpu", "none"]) == 2
    assert f"or --yes, which takes {task} and every other default" in capsys.readouterr().err


def test_pictures_suggest_models_that_see_them(workplace: Path, capsys: Any) -> None:
    assert main(["init", "mine.yaml", "--data", "vqa.json", "--task", "comd", "--gpu", "none"]) == 2
    assert "which takes HuggingFaceTB/SmolVLM-500M-Instruct and every other default" in capsys.readouterr().err


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs and tokenizers of models of 7 and 0.5 billion parameters, without weights."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"teacher": (8192, 22016, 8), "student": (2048, 5504, 9)}
    for name, (width, inner, layers) in sizes.items():
        LlamaConfig(
            vocab_size=300,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=width // 128,
            dtype="bfloat16",
            eos_token_id=1,
        ).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in sizes}


@pytest.mark.parametrize(
    ("gpu", "student", "saved"),
    [
        ("16", "student", {"activation_checkpointing": True, "teacher_load_in_4bit": True}),
        ("10", "student", {"teacher_cache": "runs/teacher_caches/mine", "teacher_load_in_4bit": True}),
        (
            "5",
            "student",
            {"use_peft": True, "load_in_4bit": True, "teacher_load_in_4bit": True, "dtype": "bfloat16"},
        ),
        ("24", "prune", {"student_init": "prune", "student_layers": 1, "teacher_load_in_4bit": True}),
    ],
)
def test_what_does_not_fit_is_made_to_fit(
    workplace: Path, large: dict[str, Path], capsys: Any, gpu: str, student: str, saved: dict[str, Any]
) -> None:
    flags = ["--yes", "--student", str(large.get(student, student)), "--gpu", gpu]
    flags += ["--keep_layers", "1"] if student == "prune" else []
    assert init(large, *flags) == 0
    keys = Recipe.read("mine.yaml").keys
    assert {key: keys.get(key) for key in saved} == saved
    if student == "prune":
        assert keys["student"] == str(large["teacher"])
    shown = capsys.readouterr().out
    assert ("mmkd cache build mine.yaml" in shown) == ("teacher_cache" in saved)


def test_what_never_fits_is_said(workplace: Path, large: dict[str, Path], capsys: Any) -> None:
    init(large, "--yes", "--student", str(large["student"]), "--gpu", "1")
    assert "It does not fit a GPU of 1 GiB" in capsys.readouterr().out
    assert "IT DOES NOT FIT" in Path("mine.yaml").read_text()


def test_every_task_suggests_models_for_every_device(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for task in TASKS.values():
        memories = [pair.memory for pair in task.pairs]
        assert memories == sorted(memories)
        assert memories[0] == 0
        assert task.pair(1000) == task.pairs[-1]
        assert task.pair(1) == task.pairs[0]
    assert TASKS["text"].pair(0).student != PRUNE
    PREPARED.mkdir(parents=True)
    assert TASKS["text"].pair(0).student == PRUNE


def test_a_draft_reads_back_as_its_keys() -> None:
    draft = Draft()
    draft.set("training", "learning_rate", 1e-5)
    draft.set("data", "data", "no: it's #1")
    draft.set("models", "teacher_server", ["http://127.0.0.1:8000"], "A long reason. " * 20)
    draft.set("models", "method", "kd")
    draft.set("models", "method", "alm")
    text = draft.text(["# head"])
    assert yaml.safe_load(text) == draft.keys
    assert list(draft.keys) == ["teacher_server", "method", "data", "learning_rate"]
    assert max(map(len, text.splitlines())) <= 100
