"""The lab: cards that can be run, a card that is run on tiny models, and the page of what is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

from mmkd.commands.train import train
from mmkd.errors import UserError
from mmkd.recipe.recipe import Recipe
from scripts.lab.__main__ import LAB, PAGE, written_page
from scripts.lab.card import Card
from scripts.lab.experiment import key_of_card, read_results, run_card, verdict_of
from scripts.lab.prepare import SIZES, docstrings, make_models, split_of
from scripts.lab.tables import page
from scripts.make_tiny_models import sentences

CARDS = sorted((LAB / "cards").glob("*.yaml"))
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"metric": "beauty"}, "metric 'beauty' is none of"),
    ({"seeds": []}, "seeds needs at least one value"),
    ({"seeds": [1, 1]}, "seeds needs at least one value"),
    ({"search": {"seed": 0, "learning_rate": [0.1]}}, "search.seed 0 is among seeds"),
    ({"equal": ["minutes"]}, "equal takes steps and time"),
    ({"claims": [{"claim": "c", "paper": "p", "better": [["kd", "magic"]]}]}, "about 'magic', which is no line"),
    ({"more": 1}, "too much or missing: more"),
    ({"lines": {"kd": {"method": "kd", "seed": 3}, "sft": {"method": "sft"}}}, "seed of 'kd' is the lab's"),
]


@pytest.fixture
def card_keys(tiny: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A card of two lines of tiny models, which train for three steps."""
    files = {}
    for split, seed in (("train", 0), ("validation", 1), ("test", 2)):
        files[split] = tmp_path / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(24, seed)))
    for name in ("validation", "test"):
        data = {"name": f"tiny_{name}", "source": "json", "columns": {"text": "text"}, "license": "CC0-1.0"}
        data |= {"splits": {"train": "train", "eval": "eval"}, "description": "tiny"}
        data |= {"data_files": {"train": str(files["train"]), "eval": str(files[name])}}
        (tmp_path / f"data_{name}.yaml").write_text(yaml.safe_dump(data))
    return {
        "title": "Tiny",
        "method": "kd",
        "metric": "perplexity",
        "seeds": [0, 1],
        "search": {"seed": 5, "learning_rate": [0.0001, 0.01]},
        "test_data": str(tmp_path / "data_test.yaml"),
        "equal": ["steps", "time"],
        "base": {
            "student": str(tiny["student"]),
            "teacher": str(tiny["teacher"]),
            "data": str(tmp_path / "data_validation.yaml"),
            "max_steps": 3,
            "max_length": 32,
            "per_device_train_batch_size": 4,
            "lr_scheduler_type": "constant",
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
        },
        "lines": {"kd": {"method": "kd"}, "sft": {"method": "sft", "teacher": None}},
        "claims": [{"claim": "KL is better than SFT", "paper": "+1", "better": [["kd", "sft"]]}],
    }


def written(keys: dict[str, Any], folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_a_card_that_cannot_be_run_is_refused(
    card_keys: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Card.read(written({**card_keys, **change}, tmp_path))


@pytest.mark.parametrize("path", CARDS, ids=[path.stem for path in CARDS])
def test_every_line_of_every_card_is_a_recipe(path: Path) -> None:
    for keys in Card.read(path).lines.values():
        Recipe.of({**keys, "learning_rate": 0.1}, path).parse()


def test_a_card_is_run_once(
    card_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    card, kept = Card.read(written(card_keys, tmp_path)), tmp_path / "results.json"

    results = run_card(card, tmp_path / "lab", kept, train)

    assert read_results(kept) == json.loads(json.dumps(results))
    for name, rates in results["rates"].items():
        assert set(rates["validation"]) == {"0.0001", "0.01"}
        assert rates["chosen"] == 0.01, f"{name} learns something with it"
    for equal in ("steps", "time"):
        lines = results["lines"][equal]
        for line in lines.values():
            assert len(set(line["values"])) == 2, "the order of the data differs between seeds"
        (claim,) = results["claims"][equal]
        (pair,) = claim["pairs"]
        assert pair["gain"] == pytest.approx(lines["sft"]["mean"] - lines["kd"]["mean"])
        assert claim["verdict"] == verdict_of([pair])
    tokens = {name: line["tokens"] for name, line in results["lines"]["steps"].items()}
    assert tokens["kd"] == tokens["sft"], "equal steps are equal tokens"
    assert max(results["lines"]["time"]["sft"]["tokens"]) >= max(tokens["sft"])
    # Validation rows choose, test rows count.
    recipes = tmp_path / "lab" / "recipes"
    assert {Recipe.read(path).keys["data"] for path in (recipes / "test").glob("*")} == {card.test_data}
    assert {Recipe.read(path).keys["data"] for path in (recipes / "search").glob("*")} == {card_keys["base"]["data"]}

    monkeypatch.setattr("mmkd.eval.trainings.measure", None)
    capsys.readouterr()
    assert run_card(card, tmp_path / "lab", kept, train) == results, "what is finished is kept"
    assert "All 4 trainings are finished already" in capsys.readouterr().err

    text = page(card, results)
    verdict = results["claims"]["steps"][0]["verdict"]
    assert f"{results['claims']['steps'][0]['pairs'][0]['gain']:+.3g}" in text
    assert verdict in text


def test_a_claim_needs_all_its_pairs() -> None:
    above, across, below = ({"low": low, "high": low + 2} for low in (1.0, -1.0, -3.0))

    assert verdict_of([above, above]) == "holds"
    assert verdict_of([above, across]) == "cannot tell"
    assert verdict_of([above, across, below]) == "does not"


def test_the_page_is_that_of_the_kept_results() -> None:
    """Written by `python -m scripts.lab page`; there is none before the first results."""
    assert bool(list((LAB / "results").glob("*.json"))) == PAGE.is_file()
    if PAGE.is_file():
        assert PAGE.read_text(encoding="utf-8") == written_page()


def test_results_of_another_card_are_seen(card_keys: dict[str, Any], tmp_path: Path) -> None:
    card = Card.read(written(card_keys, tmp_path))
    other = Card.read(written({**card_keys, "seeds": [0, 2]}, tmp_path))

    assert key_of_card(card) == key_of_card(Card.read(written({**card_keys, "seeds": [0, 1]}, tmp_path)))
    assert key_of_card(card) != key_of_card(other)


def test_text_is_of_docstrings_and_split_by_module(tmp_path: Path) -> None:
    long = "A sentence about something. " * 10
    (tmp_path / "one.py").write_text(f'"""{long}"""\n\ndef f():\n    """{long}Two."""\n\ndef g():\n    """Short."""\n')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "two.py").write_text(f'"""{long}"""')

    found = list(docstrings(tmp_path, "package"))

    assert [module for module, _ in found] == ["package/one.py", "package/one.py"]
    assert found[1][1].endswith("Two.")
    shares = [split_of(f"module{number}") for number in range(2000)]
    assert 60 < shares.count("validation") < 140
    assert 60 < shares.count("test") < 140


def test_models_have_the_sizes_they_are_said_to_have(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(50)))

    make_models(tmp_path)

    for name, (width, layers) in SIZES.items():
        config = AutoConfig.from_pretrained(tmp_path / "models" / name)
        assert (config.hidden_size, config.num_hidden_layers) == (width, layers)
        assert len(AutoTokenizer.from_pretrained(tmp_path / "models" / name)) <= config.vocab_size
