"""Recipes of DHO with captions, classes never seen, several teachers and aspects, through the command line."""

import json
import math
import re
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForImageTextToText

from mmkd.commands.main import main
from mmkd.data.class_rows import ClassRows
from mmkd.errors import UserError
from mmkd.methods.dho.dho_trainer import DHOTrainer
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from mmkd.teachers.aspects import LocalAspects, build_aspects, probability_of_yes, read_aspects
from tests.classes import class_recipe, make_clip, pictures
from tests.loopback import answering
from tests.teachers.vlm import make_processor, make_vlm

FIVE = ["red", "green", "blue", "maroon", "olive"]
QUESTIONS = ["Is it dark?", "Is it red?", "Is it noisy?"]
TERMS = ("text_ce", "vl_align", "image_contrast", "caption", "feature_mse")


def test_terms_and_unseen_classes_come_from_one_recipe(tmp_path: Path, capsys: Any, caplog: Any) -> None:
    weights = {f"{name}_weight": 0.5 for name in TERMS}
    recipe = class_recipe(tmp_path, FIVE, caption=True, **weights, unseen_classes=["olive", "blue"])
    assert main(["doctor", str(recipe)]) == 0
    assert "3 classes, 12 labelled rows of each; 36 train, 12 validation, 12 test" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["train", str(recipe), "--output_dir", str(tmp_path / "run")]) == 0
    assert "24 training rows of blue, olive are left out" in caplog.text
    unseen = json.loads((tmp_path / "run" / "unseen_results.json").read_text())
    test = json.loads((tmp_path / "run" / "test_results.json").read_text())
    assert 0 <= unseen["unseen_class_accuracy"] <= 1
    assert 0 <= test["test_seen_class_accuracy"] <= 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert list(model.config.id2label.values()) == ["red", "green", "maroon"]
    assert model.config.embed_width == 12
    # The teacher's features are on disk, and are read instead of asked for; without them the run is refused.
    cached = tmp_path / "run" / "teacher_logits"
    assert load_file(cached / "class_embeddings.safetensors")["captions"].shape == (36, 12)
    # The saved student is measured alike, by another command.
    assert main(["eval", str(tmp_path / "run"), "--measures"]) == 0
    (entry,) = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())["tasks"].values()
    numbers = entry["results"]["data classes"]
    assert numbers["acc,none"] == pytest.approx(test["test_accuracy"])
    assert numbers["seen_classes_acc,none"] == pytest.approx(test["test_seen_class_accuracy"])
    assert numbers["unseen_classes_acc,none"] == pytest.approx(unseen["unseen_class_accuracy"])
    assert main(["eval", str(tmp_path / "run"), "--measures", "classes", "cost"]) == 2
    assert "has the measure classes only" in capsys.readouterr().err
    capsys.readouterr()
    again = ["train", str(recipe), "--teacher_cache", str(cached), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    assert "Asking the teacher" not in capsys.readouterr().err


def test_a_split_of_other_classes_is_measured_only(tmp_path: Path, caplog: Any, capsys: Any) -> None:
    recipe = class_recipe(tmp_path, FIVE[:3], vl_align_weight=1.0, output_dir=str(tmp_path / "run"))
    make_clip(tmp_path / "clip", FIVE)
    others = pictures(3, 5, 5).select(range(9, 15))
    named = others.remove_columns("label").add_column("label", [FIVE[row // 3 + 3] for row in range(6)])  # pyright: ignore
    named.to_parquet(str(tmp_path / "unseen.parquet"))
    for split in ("train", "validation", "test"):
        rows = Dataset.from_parquet(str(tmp_path / f"{split}.parquet"))
        named = rows.remove_columns("label").add_column("label", [FIVE[label] for label in rows["label"]])  # pyright: ignore
        named.to_parquet(str(tmp_path / f"{split}.parquet"))
    data = yaml.safe_load((tmp_path / "data.yaml").read_text())
    data["data_files"]["unseen"] = str(tmp_path / "unseen.parquet")
    data["splits"]["unseen"] = "unseen"
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    assert main(["train", str(recipe)]) == 0
    unseen = json.loads((tmp_path / "run" / "unseen_results.json").read_text())
    assert main(["eval", str(tmp_path / "run"), "--measures", "classes"]) == 0
    (entry,) = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())["tasks"].values()
    assert entry["results"]["data classes"]["unseen_classes_acc,none"] == pytest.approx(
        unseen["unseen_class_accuracy"]
    )
    assert main(["train", str(recipe), "--unseen_classes", "red"]) == 2
    assert "has an unseen split of its own" in " ".join(capsys.readouterr().err.split())
    build_trainer(recipe_of(str(recipe), ["--vl_align_weight", "0"]).parse())
    assert "The unseen split is not measured" in caplog.text


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"unseen_classes": ["oliv", "blue"]}, "did you mean 'olive'?"),
        ({"unseen_classes": ["olive"]}, "leaves 4 classes to train on and 1 to recognise"),
        ({"unseen_classes": FIVE[:4]}, "leaves 1 classes to train on and 4"),
        ({"caption_weight": 1.0}, "compares images with captions, and the rows have none"),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path: Path, capsys: Any, keys: dict[str, Any], says: str) -> None:
    recipe = class_recipe(tmp_path, FIVE, vl_align_weight=1.0, **keys)
    assert main(["train", str(recipe), "--output_dir", str(tmp_path / "run")]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_class_prompts_that_a_teacher_cannot_tell_apart_are_refused(tmp_path: Path, capsys: Any) -> None:
    recipe = class_recipe(tmp_path, FIVE, vl_align_weight=1.0)
    make_clip(tmp_path / "clip", FIVE[:3])
    assert main(["train", str(recipe), "--output_dir", str(tmp_path / "run")]) == 2
    assert "'maroon' and 'olive' have the same features" in capsys.readouterr().err


def test_several_teachers_come_from_one_recipe(tmp_path: Path) -> None:
    recipe = class_recipe(tmp_path, mixing="learned", gate_top_k=1, output_dir=str(tmp_path / "run"))
    second = make_clip(tmp_path / "second", seed=4)
    keys = yaml.safe_load(recipe.read_text())
    first = keys.pop("teacher")
    keys["teachers"] = {
        "clip": {"teacher": first, "weight": 2},
        "tip": {"teacher": str(second), "teacher_kind": "tip_adapter", "teacher_cache": str(tmp_path / "tip")},
    }
    recipe.write_text(yaml.safe_dump(keys))
    assert main(["doctor", str(recipe)]) == 0
    strange = {**keys["teachers"], "tip": {**keys["teachers"]["tip"], "teacher_server": "http://localhost:1"}}
    with pytest.raises(UserError, match="sets teacher_server, which is about tokens"):
        build_trainer(recipe_of(str(recipe), ["--teachers", json.dumps(strange)]).parse())
    trainer = build_trainer(recipe_of(str(recipe), []).parse())
    assert isinstance(trainer, DHOTrainer)
    assert trainer.signals.weights == (2.0, 1.0)
    logits = [
        load_file(tmp_path / part / "class_logits.safetensors")["logits"]
        for part in ("run/teacher_logits/clip", "tip")
    ]
    assert trainer.signals.logits is not None
    assert torch.equal(trainer.signals.logits, torch.stack(logits, 1))
    assert not torch.equal(*logits)
    trainer.train()
    assert "gate_balance" in trainer.state.log_history[0]


def test_a_student_with_an_adapter_keeps_its_tower(tmp_path: Path) -> None:
    sgva = {"kd_head": "adapter", "kd_loss": "ofa", "temperature": 5.0, "learning_rate": 1e-2, "max_steps": 6}
    recipe = class_recipe(tmp_path, student_init="pretrained", output_dir=str(tmp_path / "run"), **sgva)
    with pytest.raises(UserError, match="no loadable"):
        build_trainer(recipe_of(str(recipe), ["--student", str(tmp_path / "nobody")]).parse())
    trainer: Any = build_trainer(recipe_of(str(recipe), ["--student", str(tmp_path / "clip")]).parse())
    model = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        embeds = model.backbone(batch["pixel_values"]).image_embeds
        weight = model.backbone.visual_projection.weight
        before = embeds @ torch.linalg.pinv(weight).T
        adapted = 0.5 * model.adapter.up(model.adapter.down(before).relu()) + 0.5 * before
        adapted = torch.nn.functional.normalize(adapted.relu(), dim=-1)
        said = model(batch["pixel_values"])
        torch.testing.assert_close(said.features, adapted)
        torch.testing.assert_close(said.kd_logits, 100 * adapted @ weight.T @ model.kd_head.weight.T)
        # A prototype begins as the mean of its class's labelled rows.
        rows = [row for row, label in enumerate(trainer.train_dataset.labels) if label == 1]
        pixels = torch.stack([trainer.train_dataset[row]["pixel_values"] for row in rows])
        torch.testing.assert_close(model.ce_head.weight[1], model(pixels).features.mean(0))
    frozen = {
        name: value.clone() for name, value in model.state_dict().items() if not name.startswith(("ce", "adapter"))
    }
    trainer.train()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    assert model.adapter.share.item() != 0.5
    trainer.save_model()
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(again(batch["pixel_values"]).logits, model.eval()(batch["pixel_values"]).logits)
    with pytest.raises(UserError, match="An adapter stands between"):
        again.plain_model()


class YesOrNo:
    """A chat server whose p(yes) is a function of question and image, and that dies after some answers."""

    def __init__(self, dies_after: int | None = None, log_probs: bool = True):
        self.asked: list[dict[str, Any]] = []
        self.dies_after, self.log_probs = dies_after, log_probs

    def respond(self, path: str, headers: Message, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "vlm"}]}
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            return 401, {"error": {"message": "gone"}}
        self.asked.append(body)
        content = body["messages"][0]["content"]
        message = {"role": "assistant", "content": "Yes"}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "length"}
        if isinstance(content, str):
            message["content"] = "1. Is it dark?\n2. Is it red?\n- Is it noisy?\nThat is all."
        elif self.log_probs:
            yes = self.of(content[0]["image_url"]["url"], content[1]["text"])
            listed = [("Yes", 0.5 * yes), (" yes", 0.3 * yes), ("no", 0.8 * (1 - yes)), ("Maybe", 0.2)]
            top = [{"token": token, "logprob": math.log(max(mass, 1e-9))} for token, mass in listed]
            choice["logprobs"] = {"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": top}]}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 1}}

    @staticmethod
    def of(image: str, question: str) -> float:
        return (sum(map(ord, image)) + len(question)) % 97 / 97


def test_a_served_model_answers_aspects_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("mmkd.teachers.aspects.SHARD_ROWS", 16)
    cache = tmp_path / "aspects"
    recipe = class_recipe(tmp_path, aspects=QUESTIONS, aspects_cache=str(cache), output_dir=str(tmp_path / "run"))
    build = ["cache", "build", str(recipe), "--job", "aspects"]
    assert main(build) == 2
    assert "Nobody answers aspects" in capsys.readouterr().err
    dying = YesOrNo(dies_after=60)
    with answering(dying.respond) as url:
        assert main([*build, "--aspects_server", url]) == 2
    assert sorted(path.name for path in cache.glob("*.json")) == ["aspects_00000.json"]
    assert main(["train", str(recipe)]) == 2
    assert "lacks answers to aspects (aspects_00001)" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["doctor", str(recipe)]) == 1
    assert re.search(r"problem\s+aspects", capsys.readouterr().out)
    whole = YesOrNo()
    with answering(whole.respond) as url:
        assert main([*build, "--aspects_server", url]) == 0
    # What the first server had answered is not asked again.
    assert len(whole.asked) == 20 * len(QUESTIONS)
    trainer: Any = build_trainer(recipe_of(str(recipe), []).parse())
    answers = trainer.signals.aspects
    assert answers.shape == (36, 3)
    asked = {
        (part["messages"][0]["content"][0]["image_url"]["url"], part["messages"][0]["content"][1]["text"])
        for part in dying.asked + whole.asked
    }
    expected = sorted(0.8 * yes / (0.8 * yes + 0.8 * (1 - yes)) for yes in (YesOrNo.of(*pair) for pair in asked))
    found = sorted({round(value, 4) for value in answers.flatten().tolist()})
    assert found == sorted({round(value, 4) for value in expected})
    trainer.train()
    assert 0 < trainer.state.log_history[0]["aspects"] < 2
    trainer.save_model()
    assert not any("training_heads" in name for name in load_file(tmp_path / "run" / "model.safetensors"))
    with pytest.raises(UserError, match="made with another questions"):
        build_trainer(recipe_of(str(recipe), ["--aspects", "Is it old?", "Is it new?"]).parse())


def test_a_server_writes_the_questions(tmp_path: Path) -> None:
    server, file = YesOrNo(), tmp_path / "questions.txt"
    recipe = class_recipe(tmp_path, aspects=str(file), aspects_count=2, aspects_cache=str(tmp_path / "aspects"))
    with answering(server.respond) as url:
        assert main(["cache", "build", str(recipe), "--job", "aspects", "--aspects_server", url]) == 0
    assert file.read_text().splitlines() == QUESTIONS[:2]
    assert "red, green, blue" in server.asked[0]["messages"][0]["content"]
    assert len(server.asked) == 1 + 36 * 2


def test_a_server_without_log_probs_is_refused(tmp_path: Path, capsys: Any) -> None:
    recipe = class_recipe(tmp_path, aspects=QUESTIONS, aspects_cache=str(tmp_path / "aspects"))
    with answering(YesOrNo(log_probs=False).respond) as url:
        assert main(["cache", "build", str(recipe), "--job", "aspects", "--aspects_server", url]) == 2
    assert "tells no log-probs" in capsys.readouterr().err


def test_a_model_of_this_machine_answers_aspects(tmp_path: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(make_vlm(tmp_path / "vlm"), dtype=torch.float32)
    teacher = LocalAspects(model, make_processor(), "sha", batch_size=4)
    rows = ClassRows(pictures(2), None)
    build_aspects(tmp_path / "aspects", teacher, rows.raw, 6, QUESTIONS, "digest")
    answers = read_aspects(tmp_path / "aspects", 6, QUESTIONS, "digest")
    alone = teacher.answers([rows.raw(4)], QUESTIONS[1:2])
    torch.testing.assert_close(answers[4, 1], alone[0, 0], rtol=1e-4, atol=1e-5)
    assert ((answers > 0) & (answers < 1)).all()


def test_an_answer_is_yes_over_yes_and_no() -> None:
    tokens = [("Yes", math.log(0.2)), (" YES", math.log(0.1)), ("No", math.log(0.3)), ("yesterday", math.log(0.4))]
    assert probability_of_yes(tokens) == pytest.approx(0.5)
    assert math.isnan(probability_of_yes([("maybe", -0.1)]))
