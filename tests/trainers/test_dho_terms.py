"""What DHO learns beside labels and one teacher's logits by KL: objectives, stages, embeddings, several teachers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ResNetConfig

from mmkd.errors import UserError
from mmkd.losses import open_vocabulary as words
from mmkd.losses.class_objectives import ofa_loss, ranking_loss
from mmkd.losses.gated_teachers import balance_loss, gated_loss, teacher_losses
from mmkd.methods.dho.dho_config import DHOConfig
from mmkd.methods.dho.dho_trainer import HEADS_FILE
from mmkd.methods.dho.unseen_classes import UnseenClasses, mean_class_accuracy
from mmkd.models.class_heads import EmbedHead
from mmkd.models.dual_head import DualHeadForImageClassification
from mmkd.models.training_heads import stages_of
from mmkd.teachers.class_signals import ClassSignals, Embeddings
from tests.classes import (
    BATCH_TERMS,
    CLASS_TERMS,
    NAMES,
    answers,
    class_signals,
    dho,
    pictures,
    several_logits,
    signals_of_terms,
    vit,
)
from tests.helpers import losses_of

TERMS = ("text_ce", "vl_align", "image_contrast", "caption", "feature_mse")


def resnet() -> Any:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], layer_type="basic")
    return DualHeadForImageClassification.from_backbone(config, NAMES)


def step(trainer: Any) -> tuple[torch.Tensor, Any, dict[str, torch.Tensor]]:
    """The loss of the first batch, what the student said of it, and the batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    return loss, outputs, batch


def halves(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return losses[labels >= 0].mean() + losses[labels < 0].mean()


@pytest.mark.parametrize(("objective", "temperature"), [("ofa", 1.0), ("pld", 1.0), ("dho", 2.0)])
def test_an_objective_names_the_loss_of_the_distillation_head(
    tmp_path: Path, objective: str, temperature: float
) -> None:
    trainer: Any = dho(tmp_path, objective=objective, ofa_epsilon=1.5, ce_weight=0.3)
    assert trainer.args.objective == "dho"
    assert trainer.args.temperature == temperature
    loss, outputs, batch = step(trainer)
    labels, shown = batch["labels"], batch["labels"] >= 0
    ce = torch.nn.functional.cross_entropy(outputs.ce_logits[shown], labels[shown])
    rows = {
        "ofa": ofa_loss(outputs.kd_logits, batch["teacher_logits"], labels, 1.0, 1.5),
        "pld": ranking_loss(outputs.kd_logits, batch["teacher_logits"], labels),
        "dho": trainer.terms.distilled(outputs.kd_logits, batch["teacher_logits"], labels, None),
    }[objective]
    torch.testing.assert_close(loss, 0.3 * ce + 0.7 * halves(rows, labels))


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_inner_stages_learn_and_their_heads_are_thrown_away(tmp_path: Path, backbone: str) -> None:
    model = vit() if backbone == "vit" else resnet()
    count = 2 if backbone == "vit" else 4
    settings: dict[str, Any] = {
        "objective": "ofa",
        "stage_heads": count,
        "stage_weight": 0.5,
        "save_strategy": "steps",
    }
    trainer: Any = dho(tmp_path, {"model": model}, **settings, save_steps=2)
    assert len(trainer.model.training_heads.stages) == count
    loss, outputs, batch = step(trainer)
    labels, teacher = batch["labels"], batch["teacher_logits"]
    core, said = trainer.losses(outputs, labels, teacher), outputs.extra
    stages = torch.stack([ofa_loss(said[f"stage_{number}"], teacher, labels) for number in range(count)]).sum(0)
    outputs.extra = None
    alone = trainer.losses(outputs, labels, teacher)
    torch.testing.assert_close(core[1] - alone[1], 0.5 * halves(stages, labels), rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in trainer.model.training_heads.parameters())
    trainer.train()
    assert trainer.model.training_heads is None
    trainer.save_model()
    assert (tmp_path / "checkpoint-2" / HEADS_FILE).is_file()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert not any("training_heads" in name for name in load_file(folder / "model.safetensors"))


def test_a_run_with_heads_of_the_training_is_resumed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"stage_heads": 1, "mixing": "learned", "gate_top_k": 2, "text_ce_weight": 1.0}
    taught = {"teacher": class_signals(logits=several_logits())}
    whole: Any = dho(tmp_path / "whole", taught, **settings)
    whole.train()
    dho(tmp_path / "cut", taught, **settings, save_strategy="steps", save_steps=2).train()
    resumed: Any = dho(tmp_path / "cut", taught, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert losses_of(resumed)[2:] == pytest.approx(losses_of(whole)[2:], rel=1e-5)
    other: Any = dho(tmp_path / "cut", taught, stage_heads=2, text_ce_weight=1.0)
    with pytest.raises(UserError, match="other heads than stage_heads"):
        other.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))


def test_terms_of_embeddings_add_their_weighted_means(tmp_path: Path) -> None:
    weights = {f"{name}_weight": number + 1.0 for number, name in enumerate(TERMS)}
    known = class_signals()
    trainer: Any = dho(tmp_path, {"teacher": known}, **weights, vl_align_top_k=2)
    loss, outputs, batch = step(trainer)
    plain, _, _ = trainer.losses(outputs, batch["labels"], batch["teacher_logits"])
    base = 0.5 * sum(trainer.losses(outputs, batch["labels"], batch["teacher_logits"])[:2])
    embeds, images, labels = outputs.embeds, batch["teacher_images"], batch["labels"]
    assert known.embeddings is not None
    text, shown = known.embeddings.text, labels >= 0
    expected = [
        torch.nn.functional.cross_entropy(words.text_logits(embeds[shown], text), labels[shown]),
        words.alignment_loss(embeds, images, text, 2).mean(),
        words.image_contrast(embeds, images).mean(),
        words.caption_loss(embeds, batch["teacher_captions"], labels).mean(),
        words.feature_distance(embeds, images).mean(),
    ]
    torch.testing.assert_close(loss, base + sum((n + 1) * term for n, term in enumerate(expected)))
    assert plain.requires_grad
    trainer.train()
    assert set(TERMS) <= trainer.state.log_history[0].keys()
    trainer.save_model()
    again = DualHeadForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(batch["pixel_values"]).embeds, trainer.model(batch["pixel_values"]).embeds)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("terms", [CLASS_TERMS, BATCH_TERMS, {**BATCH_TERMS, "mixing": "blended"}])
def test_accumulation_changes_nothing_of_terms(terms: dict[str, Any], parts: int, tmp_path: Path) -> None:
    taught, runs = {"teacher": signals_of_terms()}, []
    for count in (1, parts):
        sizes = {"per_device_train_batch_size": 4 // count, "unlabeled_batch_size": 8 // count}
        # By SGD weights move as their gradients say, which AdamW divides by their size.
        trainer: Any = dho(tmp_path, taught, gradient_accumulation_steps=count, optim="sgd", **sizes, **terms)
        trainer.train()
        runs.append(trainer)
    keys = ["loss", "grad_norm", "vl_align", "aspects", "kd_stages", "feature_mse"]
    if terms is not CLASS_TERMS:
        keys += ["image_contrast", "caption", "gate_balance"]
    for key in keys:
        whole, accumulated = (losses_of(trainer, key) for trainer in runs)
        assert accumulated == pytest.approx(whole, rel=1e-4), key
    for name, weight in runs[0].model.named_parameters():
        torch.testing.assert_close(weight, runs[1].model.get_parameter(name), rtol=1e-4, atol=1e-5, msg=name)


def test_parts_that_are_read_twice_count_once_and_drop_the_same_out(tmp_path: Path) -> None:
    model = resnet()
    model.embed_head, model.config.embed_width = torch.nn.Sequential(torch.nn.Dropout(0.5), EmbedHead(16, 12)), 12
    sizes = {"per_device_train_batch_size": 2, "unlabeled_batch_size": 2, "gradient_accumulation_steps": 2}
    settings: dict[str, Any] = {**sizes, "image_contrast_weight": 1.0, "max_steps": 1, "conflict_steps": 2}
    trainer: Any = dho(tmp_path, {"model": model, "teacher": class_signals()}, **settings)
    seen: list[torch.Tensor] = []
    model.embed_head.register_forward_hook(lambda _module, _inputs, out: seen.append(out.detach()))
    trainer.train()
    tracked = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert tracked
    assert {int(buffer) for buffer in tracked} == {2}
    # Two parts without a graph, then the same two with one; later ones are of the evaluation.
    assert torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:4]))


def test_ranks_change_nothing_of_terms(tmp_path: Path, ranks: Any) -> None:
    taught = {"teacher": signals_of_terms(), "test_dataset": pictures(3, seed=2)}
    batches = {"per_device_train_batch_size": 4, "unlabeled_batch_size": 8}
    alone: Any = dho(tmp_path, taught, **batches, **BATCH_TERMS)
    alone.train()
    expected = [
        [entry["loss"], entry["grad_norm"], entry["ce"]] for entry in alone.state.log_history if "loss" in entry
    ]
    for rank in (*ranks["dho terms ddp"], *ranks["dho terms parts ddp"]):
        assert rank["steps"] == [pytest.approx(step, rel=1e-3) for step in expected]


def test_a_filter_without_survivors_is_a_zero(tmp_path: Path) -> None:
    known = class_signals()
    assert known.embeddings is not None
    # The teacher sees in every image the class that comes after its label.
    wrong = Embeddings(known.embeddings.text[(torch.arange(36) // 12 + 1) % 3], known.embeddings.text)
    weights = {"vl_align_weight": 1.0, "vl_align_filter": True}
    trainer: Any = dho(tmp_path, {"teacher": class_signals(embeddings=wrong)}, **weights)
    loss, outputs, batch = step(trainer)
    assert trainer._counts.aligned == 0
    torch.testing.assert_close(loss, 0.5 * sum(trainer.losses(outputs, batch["labels"], batch["teacher_logits"])[:2]))
    loss.backward()
    assert trainer.model.embed_head.weight.grad.abs().sum() == 0
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses_of(trainer))))


def test_labels_alone_may_be_learnt_through_texts(tmp_path: Path) -> None:
    trainer: Any = dho(tmp_path, {"teacher": class_signals(logits=None)}, objective="ce", text_ce_weight=1.0)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert "text_ce" in entry
    assert "kd_labeled" not in entry
    assert "seen_class_accuracy" in str(trainer.evaluate())


def test_several_teachers_teach_by_weight_or_through_a_gate(tmp_path: Path) -> None:
    logits = several_logits()
    plain: Any = dho(tmp_path, {"teacher": ClassSignals(logits, weights=(1.0, 2.0, 1.0))}, temperature=4.0)
    _, outputs, batch = step(plain)
    losses = teacher_losses(outputs.kd_logits, batch["teacher_logits"])
    mean = losses @ torch.tensor([0.25, 0.5, 0.25])
    torch.testing.assert_close(
        plain.losses(outputs, batch["labels"], batch["teacher_logits"])[1], halves(mean, batch["labels"])
    )

    gated: Any = dho(tmp_path, {"teacher": ClassSignals(logits)}, temperature=4.0, mixing="learned")
    loss, outputs, batch = step(gated)
    gate = outputs.extra["gate"]
    losses = teacher_losses(outputs.kd_logits, batch["teacher_logits"])
    supervised, distilled, _ = gated.losses(outputs, batch["labels"], batch["teacher_logits"])
    torch.testing.assert_close(distilled, halves(gated_loss(losses, gate, 1), batch["labels"]))
    torch.testing.assert_close(loss, 0.5 * (supervised + distilled) + balance_loss(gate.softmax(-1).mean(0)))
    blended: Any = dho(tmp_path, {"teacher": ClassSignals(logits)}, objective="ofa", mixing="blended")
    _, outputs, batch = step(blended)
    distilled_blend = blended.losses(outputs, batch["labels"], batch["teacher_logits"])[1]
    mean = (outputs.extra["gate"].softmax(-1)[..., None] * batch["teacher_logits"]).sum(1)
    rows = ofa_loss(outputs.kd_logits, mean, batch["labels"])
    torch.testing.assert_close(distilled_blend, halves(rows, batch["labels"]))
    weights = list(blended.model.training_heads.gate.parameters())
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(distilled_blend, weights))
    weights = list(gated.model.training_heads.gate.parameters())
    gradients = torch.autograd.grad(distilled, weights)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_the_gate_comes_to_prefer_the_teacher_that_can_be_followed(tmp_path: Path) -> None:
    # One teacher knows the pictures, the other contradicts itself in every row.
    random = 8 * torch.randn(36, 3, generator=torch.Generator().manual_seed(3))
    taught = {"teacher": ClassSignals(torch.stack([random, answers(36)], 1))}
    settings: dict[str, Any] = {"mixing": "learned", "gate_balance": "none", "keep_rows": True, "learning_rate": 3e-3}
    trainer: Any = dho(tmp_path, taught, max_steps=30, save_strategy="steps", save_steps=29, **settings)
    gate = trainer.model.training_heads.gate
    trainer.train()
    with torch.no_grad():
        inputs = torch.stack([trainer.train_dataset[row]["pixel_values"] for row in range(36)])
        chosen = gate(trainer.model(inputs).kd_logits).argmax(-1)
    assert (chosen == 1).float().mean() > 0.8


def test_classes_that_were_never_seen_are_measured_by_their_texts(tmp_path: Path) -> None:
    known = class_signals()
    unseen = UnseenClasses(pictures(4, seed=2), torch.randn(3, 12, generator=torch.Generator().manual_seed(7)))
    trainer: Any = dho(tmp_path, {"teacher": known, "unseen": unseen}, text_ce_weight=1.0)
    trainer.train()
    written = json.loads((tmp_path / "unseen_results.json").read_text())
    rows = trainer.unseen.rows
    with torch.no_grad():
        embeds = trainer.model(torch.stack([rows[row]["pixel_values"] for row in range(12)])).embeds
    expected = mean_class_accuracy(words.text_logits(embeds, unseen.text), torch.tensor(rows.labels))
    assert written["unseen_class_accuracy"] == pytest.approx(expected)


def test_the_accuracy_is_a_mean_over_classes() -> None:
    logits = torch.eye(3)[[0, 0, 0, 1, 0]]
    assert mean_class_accuracy(logits, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx(0.75)


def test_stages_are_spread_over_the_depth() -> None:
    assert stages_of(resnet().backbone, 2) == ["encoder.stages.1", "encoder.stages.3"]
    with pytest.raises(UserError, match="has 4 blocks or stages: choose 1 to 4"):
        stages_of(resnet().backbone, 5)


# Bad input


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": "ofa", "kd_loss": "pld"}, "name two losses"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"ofa_epsilon": 0.0}, "ofa_epsilon is 0.0"),
        ({"stage_heads": 0}, "stage_heads is 0"),
        ({"vl_align_weight": -1.0}, "vl_align_weight is -1.0"),
        ({"unseen_classes": ["red", "blue"]}, "recognised through texts"),
        ({"aspects": ["", " "]}, "holds no question"),
        ({"aspects": ["Red?", "Red?"]}, "asks 'Red.' twice"),
        ({"aspects": "nowhere.txt"}, "nowhere.txt, which is not there"),
        ({"mixing": "blended", "objective": "pld"}, "takes the order of a teacher's classes"),
        ({"aspects_model": "x"}, "aspects_model answers `aspects`"),
        (
            {"objective": "ce", "unlabeled_batch_size": 0, "per_device_train_batch_size": 1, "caption_weight": 1.0},
            "a step has one",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        DHOConfig(str(tmp_path), report_to="none", **settings)


def test_teachers_that_lack_what_is_compared_are_refused(tmp_path: Path) -> None:
    known = class_signals()
    assert known.embeddings is not None
    images, text = known.embeddings.images, known.embeddings.text
    for embeddings, weight, says in [
        (None, "vl_align", "there are none: take teacher_kind zero_shot"),
        (Embeddings(images, text[:2]), "vl_align", "texts of 2 classes, the student 3"),
        (Embeddings(images, text[[0, 0, 1]]), "vl_align", "'red' and 'green' have the same features"),
        (Embeddings(images[1:], text), "vl_align", "image features of 35 rows, and 36"),
        (Embeddings(images * torch.nan, text), "feature_mse", "NaN or infinity"),
        (Embeddings(images, text), "caption", "the rows have none"),
        (Embeddings(images, text, images[[0] * 36]), "caption", "All rows have the same caption"),
    ]:
        with pytest.raises(UserError, match=says):
            dho(tmp_path, {"teacher": class_signals(embeddings=embeddings)}, **{f"{weight}_weight": 1.0})
    with pytest.raises(UserError, match="chooses among several teachers"):
        dho(tmp_path, mixing="learned")
    with pytest.raises(UserError, match="gate_top_k is 4, and there are 3"):
        dho(tmp_path, {"teacher": ClassSignals(several_logits())}, mixing="learned", gate_top_k=4)
    with pytest.raises(UserError, match="aspects are learnt from answers"):
        dho(tmp_path, aspects=["Is it red?"])
