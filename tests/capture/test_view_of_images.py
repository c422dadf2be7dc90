"""Caches of a teacher that sees other images behind another prompt than the student."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from mmkd.errors import UserError
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from tests.helpers import losses_of, steps
from tests.teachers.caches import build_cache, write_recipe
from tests.vlms import make_llava, picture

VIEW = '{"template": "{prompt} {hint}", "columns": ["hint"], "images_column": "clean"}'


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of method llava_kd and rows with noisy images, and clean ones for the teacher."""
    folder = tmp_path_factory.mktemp("viewed")
    vlms = {
        "teacher": make_llava(folder / "teacher", seed=1, layers=3, width=48),
        "student": make_llava(folder / "student", seed=2),
    }
    rows = []
    for number, count in enumerate([1, 0, 2, 1]):
        paths = [[folder / f"{number}-{index}-{kind}.png" for index in range(count)] for kind in ("noisy", "clean")]
        for seed, path in enumerate([*paths[0], *paths[1]]):
            picture(20 * number + seed).save(path)
        user = {"role": "user", "content": "<image>" * count + f"what is {number}"}
        messages = [user, {"role": "assistant", "content": f"one cat and {number} dogs"}]
        images, clean = ([str(path) for path in shown] for shown in paths)
        rows.append({"messages": messages, "images": images, "clean": clean, "hint": f"so {number}"})
    data = {"train": Dataset.from_list(rows), "eval": Dataset.from_list(rows[:2])}
    keys: dict[str, Any] = {"method": "llava_kd", "max_length": 60, "assistant_only_loss": True}
    keys |= {"cache_signal": "hidden", "cache_hidden_dtype": "float32", "per_device_train_batch_size": 2}
    recipe = write_recipe(folder, vlms, data, teacher_view=VIEW, max_steps=2, **keys)
    source = folder / "words.yaml"
    columns = {"messages": "messages", "images": "images"}
    source.write_text(yaml.safe_dump({**yaml.safe_load(source.read_text()), "columns": columns}))
    return recipe


@pytest.mark.parametrize("dropout", ["0", pytest.param("0.5", marks=pytest.mark.slow)])
def test_a_cache_says_what_the_teacher_says_of_its_own_view(pictures: Path, tmp_path: Path, dropout: str) -> None:
    cache = ["--teacher_cache", str(tmp_path / "cache"), "--privileged_dropout", dropout]
    build_cache(pictures, *cache)
    results = []
    for number, flags in enumerate((cache, ["--teacher_cache", "null", "--privileged_dropout", dropout])):
        flags = [*flags, "--output_dir", str(tmp_path / f"run{number}")]
        trainer: Any = build_trainer(recipe_of(str(pictures), flags).parse())
        results.append([*steps(trainer), *losses_of(trainer, "visual_kl"), *losses_of(trainer, "relation_distance")])
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    longer = ["--teacher_max_length", "20", "--teacher_cache", str(tmp_path / "short")]
    with pytest.raises(UserError, match="tokens behind the teacher's prompt; teacher_max_length is 20"):
        build_cache(pictures, *longer)
    with pytest.raises(UserError, match="teacher_view"):
        build_trainer(
            recipe_of(str(pictures), [*cache, "--teacher_view", "null", "--output_dir", str(tmp_path / "no")]).parse()
        )
