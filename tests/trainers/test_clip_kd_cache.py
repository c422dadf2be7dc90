"""A teacher's embeddings on disk: what training makes of them, and what a build that was killed or damaged leaves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mmkd.cache.store import Cache
from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.methods.clip_kd.clip_build import build_clip_trainer
from mmkd.methods.clip_kd.embedding_cache import EmbeddingPlan
from mmkd.recipe.recipe import Recipe
from mmkd.teachers.cached_encoder import CachedEncoder
from tests.dual_encoders import caption, make_clip, photo


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures of one and of two captions, and a recipe from a cache of several shards."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(14):
        photo(number).save(tmp_path / f"{number}.png")
        texts = [caption(number), f"the {caption(number)}"][: 1 + number % 2]
        rows.append({"image": f"{number}.png", "text": texts})
    for split, own in (("train", rows[:10]), ("eval", rows[10:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, own)))
    recipe = {
        "method": "clip_kd",
        "data": "train.jsonl",
        "student": str(make_clip(tmp_path / "student", seed=0)),
        "teacher": str(make_clip(tmp_path / "teacher", seed=1, width=20, layers=2, image_size=12)),
        "teacher_cache": "cache",
        "cache_shard_rows": 3,
        "cache_embedding_dtype": "float32",
        "output_dir": "out",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1.0e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 3,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def losses(**keys: Any) -> list[float]:
    """The losses of a training by the recipe with some keys."""
    recipe = Recipe.read("recipe.yaml").with_(**{name: value for name, value in keys.items() if value is not None})
    without = [name for name, value in keys.items() if value is None]
    trainer = build_clip_trainer(recipe.without(*without).parse())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("log.jsonl", ".lock")
    }


def test_a_cached_teacher_teaches_as_the_live_one(workplace: Path) -> None:
    assert main(["cache", "build", "recipe.yaml"]) == 0
    live = losses(teacher_cache=None)
    assert losses() == pytest.approx(live, rel=1e-5)
    assert losses(teacher=None) == pytest.approx(live, rel=1e-5)
    (workplace / "half").mkdir()
    assert (
        main(["cache", "build", "recipe.yaml", "--teacher_cache", "half/cache", "--cache_embedding_dtype", "float16"])
        == 0
    )
    assert losses(teacher_cache="half/cache") == pytest.approx(live, rel=1e-3)


def test_students_see_the_view_that_was_embedded(workplace: Path) -> None:
    views = ["--cache_views", "3", "--augmentation", "crop_flip"]
    assert main(["cache", "build", "recipe.yaml", *views]) == 0
    teacher: Any = CachedEncoder("cache")
    trainer = build_clip_trainer(Recipe.read("recipe.yaml").with_(augmentation="crop_flip").parse())
    rows, live = (
        trainer.train_dataset,
        build_clip_trainer(Recipe.read("recipe.yaml").without("teacher_cache").parse()).teachers[""],
    )
    shown = set()
    for epoch in range(6):
        pair = rows[1, epoch]
        assert pair.view is not None
        shown.add(pair.view[0])
        image, text = teacher.prepare_pairs([pair])
        expected = live.encode_images(live.prepare_images([pair.first]))
        np.testing.assert_allclose(image["embedding"][0], (expected / expected.norm()).detach()[0], atol=1e-5)
        expected = live.encode_texts(live.prepare_texts([pair.caption]))
        np.testing.assert_allclose(text["embedding"][0], (expected / expected.norm()).detach()[0], atol=1e-5)
    assert len(shown) > 1
    with pytest.raises(UserError, match="views of augmentation: crop_flip"):
        build_clip_trainer(Recipe.read("recipe.yaml").parse())


def killed_after(shards: int) -> Callable[..., Any]:
    original, left = EmbeddingPlan.shard, [shards]

    def shard(self: EmbeddingPlan, *args: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(self, *args)

    return shard


def test_a_killed_or_damaged_build_goes_on_to_the_same_cache(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["cache", "build", "recipe.yaml", "--teacher_cache", "./whole"]) == 0
    whole = files_of(workplace / "whole")
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(EmbeddingPlan, "shard", killed_after(int(np.random.default_rng().integers(0, 3))))
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                raise SystemExit(main(["cache", "build", "recipe.yaml"]))
    assert main(["cache", "build", "recipe.yaml"]) == 0
    assert files_of(workplace / "cache") == whole
    shard = workplace / "cache" / "train" / "00001.arrow"
    content = bytearray(shard.read_bytes())
    blob = Cache("cache")._blob(4)[0]
    place = bytes(content).index(bytes(blob)) + len(blob) - 3
    content[place] ^= 4
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"00001.arrow is damaged"):
        [Cache("cache").embeddings(row) for row in range(10)]
    assert main(["cache", "verify", "cache"]) == 1
    assert main(["cache", "build", "recipe.yaml"]) == 0
    assert files_of(workplace / "cache") == whole


def test_parts_merge_and_other_data_are_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "build", "recipe.yaml"]) == 0
    for part in ("0/2", "1/2"):
        assert main(["cache", "build", "recipe.yaml", "--teacher_cache", "joined", "--shard", part]) == 0
    assert main(["cache", "merge", "joined"]) == 0
    assert files_of(workplace / "joined") == files_of(workplace / "cache")
    capsys.readouterr()
    assert main(["cache", "info", "cache"]) == 0
    shown = capsys.readouterr().out
    assert "embeddings" in shown
    assert "10 of 10 pairs" in shown
    text = (workplace / "train.jsonl").read_text().replace("red circle", "red star")
    (workplace / "train.jsonl").write_text(text)
    with pytest.raises(UserError, match="does not know this pair"):
        losses()
    shutil.rmtree("cache")
    with pytest.raises(UserError, match="does not exist"):
        losses()


def test_caches_that_cannot_be(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (["--cache_views", "3"], "without an augmentation all views"),
        (["--engine", "ray"], "in parts with shard"),
        (["--teacher", "null"], "teacher"),
    ):
        assert main(["cache", "build", "recipe.yaml", *flags]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
