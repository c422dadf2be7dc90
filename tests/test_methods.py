"""A method is complete: module, card, recipe, test, public names."""

from pathlib import Path

import pytest

import mmkd
from mmkd.run import parse_run
from mmkd.trainers import METHODS
from mmkd.trainers.base import DistillationConfig, DistillationTrainer

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_has_all_its_parts(method: str) -> None:
    assert (ROOT / "mmkd" / "trainers" / f"{method}.py").is_file()
    assert (ROOT / "tests" / "trainers" / f"test_{method}.py").is_file()
    assert (ROOT / "trainers" / method / "README.md").is_file()
    assert list((ROOT / "trainers" / method).glob("*.yaml"))


@pytest.mark.parametrize("method", list(METHODS))
def test_trainer_and_config_are_public(method: str) -> None:
    trainer = METHODS[method]
    assert getattr(mmkd, trainer.__name__) is trainer
    assert getattr(mmkd, trainer.config_class.__name__) is trainer.config_class
    assert issubclass(trainer, DistillationTrainer)
    assert issubclass(trainer.config_class, DistillationConfig)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "trainers").glob("*/*.yaml")), ids=lambda path: "/".join(path.parts[-2:])
)
def test_every_shipped_recipe_parses(path: Path) -> None:
    run = parse_run(str(path), [])
    assert run.arguments.method == path.parent.name


@pytest.mark.parametrize("method", list(METHODS))
def test_every_field_says_what_it_does(method: str) -> None:
    fields = METHODS[method].config_class.__dataclass_fields__
    ours = [name for name in fields if name not in DistillationConfig.__mro__[1].__dataclass_fields__]
    for name in ours:
        assert len(fields[name].metadata.get("help", "")) > 20, name
