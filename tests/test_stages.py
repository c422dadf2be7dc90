"""Recipes in stages: order, resuming, ablations, and students that plain transformers loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration

from mmkd.commands.main import main
from mmkd.eval.model import find_model
from mmkd.models.load import load_model
from mmkd.publish.lineage import trainings_of
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.stages import plan
from scripts.make_tiny_models import make_model, make_tokenizer, save
from tests.vlms import make_llava, make_tower, vision_rows


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two defined orders on six rows with images."""
    rows = vision_rows([1] * 6)
    (tmp_path / "images").mkdir()
    lines = []
    for number, row in enumerate(rows):
        data: Any = row
        path = tmp_path / "images" / f"{number}.png"
        data["images"][0].save(path)
        lines.append(json.dumps({"messages": data["messages"], "images": [str(path)]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = {"source": "json", "data_files": {"train": str(tmp_path / "rows.jsonl")}}
    columns = {"columns": {"messages": "messages", "images": "images"}, "shuffle_seed": None}
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({**source, **columns}))
    tokenizer = make_tokenizer()
    keys = {
        "method": "llava_kd",
        "teacher": str(make_llava(tmp_path / "teacher", seed=1, layers=3)),
        "student_init": "llava",
        "student": str(save(make_model(rows=len(tokenizer)), tokenizer, tmp_path / "llm")),
        "student_vision_tower": str(make_tower(tmp_path / "tower")),
        "data": str(tmp_path / "rows.yaml"),
        "output_dir": str(tmp_path / "run"),
        "schedule": ["DPT", "SFT", "DFT"],
        "stages": {
            "PT": {"method": "sft", "teacher": None, "trainable": ["connector"]},
            "DPT": {"trainable": ["connector"], "learning_rate": 1e-2},
            "SFT": {"method": "sft", "teacher": None, "trainable": ["connector", "language_model"]},
            "DFT": {"trainable": ["connector", "language_model"], "beta": 0.5},
        },
        "assistant_only_loss": True,
        "max_length": 128,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(str(folder)).state_dict()


def test_three_stages_train_what_they_say_and_load_anywhere(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = recipe.parent / "run"
    assert main(["train", str(recipe)]) == 0
    assert sorted(path.name for path in root.iterdir()) == ["1-DPT", "2-SFT", "3-DFT"]
    first, second, third = (weights(root / name) for name in ("1-DPT", "2-SFT", "3-DFT"))
    llm = load_model(str(recipe.parent / "llm")).state_dict()
    for name, tensor in first.items():
        word = name.removeprefix("model.language_model.")
        if f"model.{word}" in llm and "embed" not in name:
            assert torch.equal(tensor, llm[f"model.{word}"]), name
        if "vision_tower" in name:
            assert torch.equal(tensor, third[name]), name
    assert not torch.equal(*(one["model.language_model.norm.weight"] for one in (first, second)))
    assert not torch.equal(*(one["model.language_model.norm.weight"] for one in (second, third)))
    # The names of a published LLaVA, which vLLM reads.
    with safe_open(root / "3-DFT" / "model.safetensors", framework="pt") as file:
        assert "vision_tower.vision_model.post_layernorm.weight" in file.keys()  # noqa: SIM118
    # Plain transformers, without mmkd.
    model: Any = LlavaForConditionalGeneration.from_pretrained(root / "3-DFT")
    processor: Any = AutoProcessor.from_pretrained(root / "3-DFT")
    conversation = [{"role": "user", "content": [{"type": "image", "image": vision_rows([1])[0]["images"][0]}]}]
    inputs = processor.apply_chat_template(
        [conversation], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    # Again: everything is finished and kept.
    before = (root / "3-DFT" / "model.safetensors").stat().st_mtime_ns
    assert main(["train", str(recipe)]) == 0
    assert (root / "3-DFT" / "model.safetensors").stat().st_mtime_ns == before
    assert "finished, kept" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["kd", "taid"])
def test_methods_without_stages_train_the_same_student(method: str, recipe: Path, tmp_path: Path) -> None:
    keys = yaml.safe_load(recipe.read_text())
    del keys["schedule"], keys["stages"]
    recipe.write_text(yaml.safe_dump(keys | {"method": method, "trainable": ["connector", "language_model"]}))
    assert main(["train", str(recipe)]) == 0
    model: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "run")
    given = dict(CLIPVisionModel.from_pretrained(keys["student_vision_tower"]).named_parameters())
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.model.vision_tower.named_parameters())
    logs = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["kl"] > 0 for entry in logs if "loss" in entry] == [True, True]


def test_a_stage_alone_is_the_stage_in_its_place(recipe: Path) -> None:
    assert main(["train", str(recipe), "--stages", "PT", "SFT"]) == 0
    root, alone = recipe.parent / "run", recipe.parent / "alone"
    assert main(["train", str(root / "2-SFT" / "recipe.yaml"), "--output_dir", str(alone)]) == 0
    for name, tensor in weights(alone).items():
        assert torch.equal(tensor, weights(root / "2-SFT")[name]), name
    start = ["--student", str(root / "1-PT"), "--output_dir", str(recipe.parent / "third")]
    assert main(["train", str(recipe), "--stages", "SFT", *start]) == 0
    assert torch.equal(
        weights(recipe.parent / "third" / "1-SFT")["lm_head.weight"], weights(root / "2-SFT")["lm_head.weight"]
    )


def test_an_interrupted_schedule_goes_on(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    whole = recipe.parent / "whole"
    assert main(["train", str(recipe), *saving, "--output_dir", str(whole)]) == 0

    from mmkd.methods.sft import SFTBaselineTrainer

    plain = SFTBaselineTrainer.training_step

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SFTBaselineTrainer, "training_step", fails)
        assert main(["train", str(recipe), *saving]) == 130
    root = recipe.parent / "run"
    assert json.loads((root / "2-SFT" / "stage.json").read_text())["finished"] is False
    assert (root / "2-SFT" / "checkpoint-1").is_dir()
    assert main(["train", str(recipe), *saving]) == 0
    for name, tensor in weights(root / "2-SFT").items():
        torch.testing.assert_close(
            tensor, weights(whole / "2-SFT")[name], msg=lambda text, name=name: f"SFT {name}: {text}"
        )
    for name, tensor in weights(root / "3-DFT").items():
        torch.testing.assert_close(
            tensor, weights(whole / "3-DFT")[name], msg=lambda text, name=name: f"{name}: {text}"
        )


def test_another_way_to_a_folder_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--stages", "PT", "SFT", "--max_steps", "1"]) == 0
    assert main(["train", str(recipe), "--stages", "DPT", "SFT", "--max_steps", "1"]) == 2
    assert "trained after PT" in capsys.readouterr().err


def test_bad_stages(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--stages", "DFTT"]) == 2
    assert "did you mean 'DFT'" in capsys.readouterr().err
    assert main(["train", str(recipe), "--stages"]) == 2
    assert "names no stage" in capsys.readouterr().err
    assert main(["train", "kd/quickstart", "--stages", "SFT"]) == 2
    assert "has no stages" in capsys.readouterr().err
    keys = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**keys, "stages": ["DPT", "SFT"]}))
    assert main(["train", str(recipe)]) == 2
    assert "must be a mapping" in capsys.readouterr().err


def test_keys_of_stages(recipe: Path) -> None:
    stages = plan(recipe_of(recipe, ["--seed", "1", "--stages", "PT", "SFT", "SFT", "--output-dir=there"]))
    assert all(stage.recipe.overrides == {"seed": 1} for stage in stages)
    assert [str(stage.folder) for stage in stages] == ["there/1-PT", "there/2-SFT", "there/3-SFT"]
    assert [stage.recipe.keys["student"] for stage in stages[1:]] == ["there/1-PT", "there/2-SFT"]
    assert "student_vision_tower" in stages[0].recipe.keys
    assert not any({"student_vision_tower", "teacher", "stages"} & stage.recipe.keys.keys() for stage in stages[1:])
    assert len({stage.identity for stage in stages}) == 3


def test_flags_of_stages(recipe: Path) -> None:
    assert recipe_of(recipe, ["--seed", "1", "--stages", "X", "Y", "--bf16"]).overrides["schedule"] == ["X", "Y"]
    assert recipe_of(recipe, ["--stages=X"]).overrides == {"schedule": ["X"]}
    assert recipe_of(recipe, ["--seed", "1"]).overrides == {"seed": 1}


def test_an_adapter_is_merged_for_the_next_stage(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter on the new weights of `student_init: llava` too."""
    keys = yaml.safe_load(recipe.read_text())
    keys["stages"]["SFT"] |= {"use_peft": True, "lora_target_modules": ["q_proj"], "trainable": None}
    recipe.write_text(yaml.safe_dump(keys))
    flags = ["--stages", "SFT", "DFT", "--max_steps", "1"]
    assert main(["train", str(recipe), *flags, "--dry_run"]) == 0
    run = recipe.parent / "run"
    assert not run.exists()
    assert main(["train", str(recipe), *flags]) == 0
    assert "Merging the adapter of" in capsys.readouterr().err
    first, second = plan(recipe_of(recipe, flags))
    assert second.recipe.keys["student"] == str(run / "1-SFT" / "merged")
    merged, expected = load_model(second.recipe.keys["student"]), find_model(str(first.folder)).load()
    weights = expected.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in merged.state_dict().items())
    assert isinstance(load_model(str(second.folder)), LlavaForConditionalGeneration)
    record = json.loads((second.folder / "run.json").read_text())
    assert [training.folder.name for training in trainings_of(record, second.folder)] == ["merged", "2-DFT"]


def edit(recipe: Path, stage: str, **keys: Any) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["stages"][stage] |= keys
    recipe.write_text(yaml.safe_dump(content))


def test_a_bad_stage_is_refused_before_the_first_is_trained(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = recipe.read_text()
    for stage, keys, reason in [
        ("DFT", {"learning_rat": 1.0}, "Stage DFT: it sets 'learning_rat', which"),
        ("DFT", {"max_steps": "many"}, "Stage DFT: max_steps is 'many', which is no whole number"),
        ("DFT", {"teacher": "not/there/at/all"}, "Stage DFT could not be trained: The teacher 'not/there/at/all'"),
        ("SFT", {"data": "no_such_data"}, "Stage SFT could not be trained: unknown data recipe 'no_such_data'"),
        ("DFT", {"method": "kd", "teacher_cache": "./not_there"}, "build it first with `mmkd cache build`"),
    ]:
        edit(recipe, stage, **keys)
        assert main(["train", str(recipe)]) == 2
        assert reason in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (recipe.parent / "run").exists()
        recipe.write_text(sound)


def test_a_folder_in_which_nothing_was_trained_is_used_again(recipe: Path) -> None:
    stages = plan(recipe_of(recipe))
    stages[0].record(["DPT"], finished=False)
    edit(recipe, "DPT", learning_rate=2e-2)
    plan(recipe_of(recipe))[0].check()
    (stages[0].folder / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="with other settings than now"):
        plan(recipe_of(recipe))[0].check()


def test_doctor_plan_and_dry_run_look_at_every_stage(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(recipe)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    # The image token that the student is given is a token like any other to its teacher.
    for words in ("stage 1 of 3: DPT", "stage 2 of 3: SFT", "stage 3 of 3: DFT", "Sound: 0 problems"):
        assert words in text
    assert text.count("tokens are the same to both") == 2
    assert main(["plan", str(recipe), "--memory", "8"]) == 0
    assert capsys.readouterr().out.count("steps of the run") == 3
    assert main(["train", str(recipe), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert [text.count(words) for words in ("llava_kd: dry run", "sft: dry run", "Stage 3 of 3, DFT")] == [2, 1, 1]
    assert not (recipe.parent / "run").exists()
    edit(recipe, "DFT", teacher=str(recipe.parent / "llm"))
    assert main(["doctor", str(recipe)]) == 1
    assert "reads text only" in " ".join(capsys.readouterr().out.split())


def test_what_an_earlier_stage_leaves_may_teach_a_later_one(recipe: Path) -> None:
    edit(recipe, "DFT", method="kd", teacher=str(recipe.parent / "run" / "1-DPT"))
    assert main(["doctor", str(recipe)]) == 0
    assert main(["train", str(recipe), "--max_steps", "1"]) == 0


def test_a_distilled_tower_becomes_that_of_the_student(recipe: Path) -> None:
    keys = yaml.safe_load(recipe.read_text())
    large = make_tower(recipe.parent / "large", hidden_size=24, num_hidden_layers=3)
    keys["stages"]["VT"] = {"method": "tower_kd", "teacher": str(large), "learning_rate": 1e-2}
    keys["schedule"] = ["VT", *keys["schedule"]]
    recipe.write_text(yaml.safe_dump(keys))
    assert main(["doctor", str(recipe)]) == 0
    root = recipe.parent / "run"
    assert main(["train", str(recipe), "--max_length", "64", "--max_steps", "1"]) == 0
    assert sorted(path.name for path in root.iterdir()) == ["1-VT", "2-DPT", "3-SFT", "4-DFT"]
    tower = CLIPVisionModel.from_pretrained(root / "1-VT")
    given = dict(CLIPVisionModel.from_pretrained(keys["student_vision_tower"]).named_parameters())
    assert not torch.equal(tower.embeddings.patch_embedding.weight, given["embeddings.patch_embedding.weight"])
    for stage in ("2-DPT", "4-DFT"):
        model: Any = LlavaForConditionalGeneration.from_pretrained(root / stage)
        for name, tensor in tower.named_parameters():
            assert torch.equal(tensor, dict(model.model.vision_tower.named_parameters())[name]), name
    written = yaml.safe_load((root / "1-VT" / "recipe.yaml").read_text())
    assert "max_length" not in written
    assert yaml.safe_load((root / "2-DPT" / "recipe.yaml").read_text())["max_length"] == 64


def test_towers_are_trained_further_and_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = yaml.safe_load(recipe.read_text())
    shared = {"method": "tower_kd", "teacher": str(recipe.parent / "tower")}
    keys["stages"] |= {"VT": shared, "VT2": {**shared, "frequency_weight": 1.0}}
    recipe.write_text(yaml.safe_dump(keys))
    stages = plan(recipe_of(str(recipe), ["--stages", "VT", "VT2", "DPT", "SFT"]))
    towers = [stage.recipe.keys.get("student_vision_tower") for stage in stages]
    assert towers == [keys["student_vision_tower"], str(stages[0].folder), str(stages[1].folder), None]
    assert stages[3].recipe.keys["student"] == str(stages[2].folder)
    assert main(["train", str(recipe), "--stages", "DPT", "VT"]) == 2
    assert "Move it to the front of the schedule" in capsys.readouterr().err
    keys["stages"]["SFT"] |= {"student_init": "pretrained", "student_vision_tower": None}
    recipe.write_text(yaml.safe_dump(keys))
    assert main(["train", str(recipe), "--stages", "VT", "SFT"]) == 2
    assert "has no use for one" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_hands_a_tower_on(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = yaml.safe_load(recipe.read_text())
    keys["stages"]["VT"] = {"method": "tower_kd", "teacher": keys["student_vision_tower"]}
    recipe.write_text(yaml.safe_dump(keys))
    assert main(["train", str(recipe), "--stages", "VT", "DPT", "--dry_run"]) == 0
    assert "mmkd tower_kd: dry run" in capsys.readouterr().out
    assert not (recipe.parent / "run").exists()
