"""Students of clip_kd that begin with a part of their teacher's weights, by hand or by masks that are learnt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.methods.clip_kd.clip_build import build_clip_trainer
from mmkd.methods.clip_kd.clip_config import ContrastiveKDConfig
from mmkd.methods.kd import METHOD as KD
from mmkd.models.dual_encoder import load_dual_encoder
from mmkd.models.inherit import TowerSize, tower_sizes
from mmkd.recipe.arguments import RunArguments
from mmkd.recipe.recipe import Recipe
from tests.dual_encoders import caption, make_clip, photo
from tests.pairs import clip_kd


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with captioned pictures, and a recipe whose student inherits of its teacher."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(12):
        photo(number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": caption(number)})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "method": "clip_kd",
        "data": "train.jsonl",
        "teacher": str(make_clip(tmp_path / "teacher", seed=1, width=16, layers=4, image_size=12)),
        "student_init": "inherit",
        "output_dir": "out",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1.0e-3,
        "report_to": "none",
        "save_strategy": "no",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_a_student_inherits_sizes_of_its_teacher(workplace: Path) -> None:
    sizes = {"vision": {"layers": 2, "width": 8}, "text": 0.25}
    assert main(["train", "recipe.yaml", "--inherit_target", json.dumps(sizes)]) == 0
    saved = AutoModel.from_pretrained("out")
    ours = tower_sizes(saved.config)
    assert ours["vision"] == TowerSize(2, 8, 1, 16)
    assert ours["text"].weights < tower_sizes(AutoModel.from_pretrained("teacher").config)["text"].weights / 2
    assert load_dual_encoder("out").width == 16


def test_doctor_knows_the_smaller_student(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "recipe.yaml", "--inherit_target", "0.5"]) == 0
    assert "M parameters" in capsys.readouterr().out


def test_learnt_masks_leave_a_smaller_ordinary_model_that_computes_the_same(workplace: Path) -> None:
    keys = {"inherit": "auto", "inherit_target": 0.4, "max_steps": 24, "logging_steps": 1}
    trainer: Any = build_clip_trainer(Recipe.read("recipe.yaml").with_(**keys).parse())
    trainer.train()
    trainer.save_model()
    history = [entry["kept_share"] for entry in trainer.state.log_history if "kept_share" in entry]
    assert history[0] == pytest.approx(1, abs=0.01)
    assert history[-1] == pytest.approx(0.4, abs=0.15)
    saved = load_dual_encoder("out")
    before, after = (tower_sizes(model.config) for model in (trainer.model, saved.model))
    assert all(after[tower].weights < 0.7 * before[tower].weights for tower in before)
    batch = trainer.collate([trainer.train_dataset[row] for row in range(4)])
    with torch.no_grad():
        for masked, cut in (
            (trainer.student.encode_images(batch["student"]["first"]), saved.encode_images(batch["student"]["first"])),
            (trainer.student.encode_texts(batch["student"]["second"]), saved.encode_texts(batch["student"]["second"])),
        ):
            torch.testing.assert_close(masked, cut, rtol=1e-4, atol=1e-5)


def test_masks_are_the_same_after_a_resume_and_in_accumulated_batches(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "inherit": "auto",
        "inherit_target": 0.5,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    runs = []
    for batch, accumulation, checkpoint in ((8, 1, None), (4, 2, None), (8, 1, 4)):
        sizes: dict[str, Any] = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer: Any = clip_kd(tmp_path, **settings, **sizes)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / "out" / "checkpoint-4"))
        runs.append({name: tensor.clone() for name, tensor in trainer.masks.shrinking.state_dict().items()})
    assert runs[0]["frozen"]
    for other in runs[1:]:
        for name, tensor in runs[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inherit_target": 1.5}, "above 0 and at most 1"),
        ({"inherit_target": "half"}, "no JSON"),
        ({"inherit_target": {"audio": 0.5}}, "inherit_target sets 'audio'"),
        ({"inherit_target": {"text": {"depth": 3}}}, "inherit_target.text sets 'depth'"),
        ({"inherit_target": {"text": {"layers": 1.5}}}, "must be a whole number"),
        ({"inherit": "auto", "inherit_target": {"text": {"layers": 3}}}, "give the text tower a share"),
        ({"inherit": "auto", "inherit_target": 0.5, "inherit_freeze": 0.1}, "before the end of inherit_ramp"),
    ],
)
def test_targets_that_cannot_be(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        ContrastiveKDConfig(output_dir=str(tmp_path), **settings)


def test_inherit_goes_with_its_target_and_its_method(workplace: Path) -> None:
    with pytest.raises(UserError, match="go together"):
        build_clip_trainer(Recipe.read("recipe.yaml").parse())
    with pytest.raises(UserError, match="go together"):
        build_clip_trainer(
            Recipe.read("recipe.yaml").with_(student_init="random", student="teacher", inherit_target=0.5).parse()
        )
    with pytest.raises(UserError, match="student_init: inherit is for dual encoders"):
        RunArguments(method=KD.name, data="x", teacher="t", student="s", student_init="inherit")


def test_a_student_shrinks_in_stages(workplace: Path) -> None:
    stages = {
        "half": {"student_init": "inherit", "inherit_target": {"vision": {"layers": 2}, "text": {"layers": 2}}},
        "quarter": {"student_init": "inherit", "inherit_target": {"vision": {"layers": 1}, "text": {"layers": 2}}},
        "distil": {},
    }
    recipe = yaml.safe_load((workplace / "recipe.yaml").read_text()) | {"stages": stages, "max_steps": 1}
    del recipe["student_init"]
    (workplace / "staged.yaml").write_text(yaml.safe_dump(recipe | {"student": recipe["teacher"]}, sort_keys=False))
    assert main(["train", "staged.yaml"]) == 0
    left = [AutoModel.from_pretrained(folder) for folder in ("out/1-half", "out/2-quarter", "out/3-distil")]
    sizes = [(own.config.vision_config.num_hidden_layers, own.config.text_config.num_hidden_layers) for own in left]
    assert sizes == [(2, 2), (1, 2), (1, 2)]
