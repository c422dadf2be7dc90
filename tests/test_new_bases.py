"""Adapters on new weights: a student of `student_init` is saved beside its adapter, found, judged and published."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mmkd.commands.main import main
from mmkd.eval.model import find_model
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from mmkd.results.parameters import parameters_of
from scripts.make_tiny_models import sentences

IDS = torch.arange(8)[None]


@pytest.fixture
def recipe(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A LoRA student on one of the teacher's layers."""
    monkeypatch.chdir(tmp_path)
    Path("words.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sentences(16)))
    data = {"name": "words", "license": "CC0-1.0", "source": "json", "data_files": {"train": "words.jsonl"}}
    Path("words.yaml").write_text(yaml.safe_dump({**data, "columns": {"text": "text"}}))
    keys: dict[str, Any] = {"method": "kd", "teacher": str(tiny["teacher"]), "data": "words.yaml", "output_dir": "run"}
    keys |= {"student_init": "prune", "student_layers": [0, 2], "use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
    keys |= {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "report_to": "none"}
    keys |= {"save_strategy": "steps", "save_steps": 1, "lora_target_modules": ["q_proj"]}
    Path("recipe.yaml").write_text(yaml.safe_dump(keys))
    return "recipe.yaml"


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def test_base_and_adapter_are_the_student(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", recipe]) == 0
    config = json.loads(Path("run/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(Path("run", "base")), None)
    base = AutoModelForCausalLM.from_pretrained("run/base")
    assert len(base.model.layers) == 2
    trained = logits_of(PeftModel.from_pretrained(base, "run"))
    for name in ("run", "run/checkpoint-2"):
        torch.testing.assert_close(logits_of(find_model(name).load()), trained, rtol=1e-4, atol=1e-5)
    # Published, it is a student that anyone can load.
    assert main(["push", "run", "--repo", "user/student", "--dry_run", "--output", "published"]) == 0
    published = AutoModelForCausalLM.from_pretrained("published")
    torch.testing.assert_close(logits_of(published), trained, rtol=1e-4, atol=1e-5)
    card = Path("published/README.md").read_text()
    assert "library_name: transformers" in card
    # Wherever the run is moved to.
    size = parameters_of("run")
    shutil.move("run", "elsewhere")
    torch.testing.assert_close(logits_of(find_model("elsewhere").load()), trained, rtol=1e-4, atol=1e-5)
    assert parameters_of("elsewhere") == size is not None
    capsys.readouterr()


def test_a_run_goes_on_with_the_weights_it_began_with(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", recipe, "--max_steps", "1"]) == 0
    file = Path("run/base/model.safetensors")
    before = (file.read_bytes(), file.stat().st_mtime_ns)
    assert main(["train", recipe, "--resume_from_checkpoint", "true"]) == 0
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    other = ["--student_layers", "1", "--resume_from_checkpoint", "true"]
    assert main(["train", recipe, *other]) == 2
    assert "holds an adapter of other new weights" in capsys.readouterr().err


def test_new_weights_of_a_run_without_an_adapter_are_made_again(recipe: str) -> None:
    for layers in ("1", "2"):
        trainer: Any = build_trainer(recipe_of(recipe, ["--student_layers", layers]).parse())
        assert len(trainer.model.get_base_model().model.layers) == int(layers)


def test_new_weights_follow_a_teacher_that_has_changed(
    recipe: str, tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it is in the same folder; an adapter is not trained further on them."""
    shutil.copytree(tiny["teacher"], "teacher")
    teacher = AutoModelForCausalLM.from_pretrained("teacher")
    for scale in (1, 2):
        teacher.model.norm.weight.data.fill_(scale)
        teacher.save_pretrained("teacher")
        made: Any = build_trainer(recipe_of(recipe, ["--teacher", "teacher"]).parse()).model
        assert set(made.get_base_model().model.norm.weight.tolist()) == {scale}
    made.save_pretrained("run/checkpoint-1")
    teacher.model.norm.weight.data.fill_(3)
    teacher.save_pretrained("teacher")
    assert main(["train", recipe, "--teacher", "teacher", "--resume_from_checkpoint", "true"]) == 2
    assert "models that it names, have changed" in capsys.readouterr().err


def test_new_weights_are_quantised(recipe: str) -> None:
    trainer: Any = build_trainer(recipe_of(recipe, ["--load_in_4bit", "true"]).parse())
    layer = trainer.model.base_model.model.model.layers[1].self_attn.q_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    saved = AutoModelForCausalLM.from_pretrained("run/base")
    expected = saved.model.layers[1].self_attn.q_proj.weight.detach()
    rows = torch.eye(expected.shape[1])
    weight = layer.base_layer(rows.to(layer.base_layer.compute_dtype)).float().T
    assert torch.nn.functional.cosine_similarity(weight.flatten(), expected.flatten(), dim=0) > 0.98
    trainer.train()


def test_adapters_on_new_weights_are_not_pushed_while_they_train(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe, "--push_to_hub", "true"]) == 2
    assert "publish the merged student with `mmkd push`" in capsys.readouterr().err
