"""GradMag: gradients of a common norm in the last layer, of which the weights are shares; against plain autograd."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig

from mmkd.commands.main import main
from mmkd.losses.divergences import forward_kl, interpolated_log_probs
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import DIVERGENCES, KDTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.teachers.batch import Batch
from mmkd.training.method import METHODS
from scripts.make_tiny_models import sentences
from tests.forked import on_two_ranks
from tests.helpers import Build, losses_of
from tests.trainers.test_llava_kd import loss_and_gradients, one_batch


def naive_terms(trainer: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Divergence and cross-entropy of KD and TAID from both models' logits in full."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    supervised = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][supervised]
    student = trainer.model(**inputs).logits[:, :-1][supervised]
    teacher = trainer.teacher.model(**inputs).logits[:, :-1][supervised].detach()
    temperature = getattr(trainer.args, "temperature", 1.0)
    ours, theirs = (logits[:, : trainer.vocab_size] / temperature for logits in (student, teacher))
    log_probs, target = ours.log_softmax(-1), theirs.log_softmax(-1)
    if isinstance(trainer, TAIDTrainer):
        target = interpolated_log_probs(log_probs, target, trainer.schedule.t)
    plain = student[:, : trainer.vocab_size].log_softmax(-1)
    return {
        "divergence": temperature**2 * forward_kl(log_probs, target).mean(),
        "ce": -plain.gather(-1, labels[:, None]).mean(),
    }


def naive_norms(trainer: Any, batch: Batch) -> dict[str, float]:
    layer = list(trainer.model.model.layers[-1].parameters())
    norms = {}
    for name, term in naive_terms(trainer, batch).items():
        gradients = torch.autograd.grad(term, layer, retain_graph=True)
        norms[name] = float(sum(one.square().sum() for one in gradients)) ** 0.5
    return norms


def factors_of(trainer: Any) -> dict[str, float]:
    """What each term of the last micro-batches was multiplied by, as it will be logged."""
    sums = trainer._sums["train"]
    found = {name.removeprefix("balance/"): sums.pop(name) for name in list(sums) if name.startswith("balance/")}
    return {name: float(total / count) for name, (total, count) in found.items()}


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


balanced = {"ce_weight": 0.3, "combine": "gradmag"}


@pytest.mark.parametrize(
    ("cls", "settings"), [(KDTrainer, {}), (KDTrainer, {"temperature": 3.0, "chunk_size": 5}), (TAIDTrainer, {})]
)
def test_loss_and_gradient_are_those_of_plain_autograd(
    build: Build, texts: Dataset, cls: Any, settings: dict[str, Any]
) -> None:
    trainer: Any = build(cls, texts, **balanced, **settings)
    batch = one_batch(trainer)
    weights, norms = {"divergence": 0.7, "ce": 0.3}, naive_norms(trainer, batch)
    common = 1 / sum(weights[name] / norms[name] for name in weights)
    factors = {name: weights[name] * common / norms[name] for name in weights}
    expected = sum(factors[name] * term for name, term in naive_terms(trainer, batch).items())
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    loss, found = loss_and_gradients(trainer, batch)
    assert factors_of(trainer) == pytest.approx(factors, rel=1e-4)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_shares_of_the_gradient_are_the_weights_at_any_temperature(
    build: Build, texts: Dataset, temperature: float
) -> None:
    trainer: Any = build(KDTrainer, texts, temperature=temperature, **balanced)
    batch = one_batch(trainer)
    norms = naive_norms(trainer, batch)
    loss_and_gradients(trainer, batch)
    lengths = {name: factor * norms[name] for name, factor in factors_of(trainer).items()}
    assert lengths["divergence"] / lengths["ce"] == pytest.approx(0.7 / 0.3, rel=1e-4)


def test_the_scale_of_a_term_moves_the_gradients_length_and_not_its_direction(
    build: Build, texts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = build(KDTrainer, texts, **balanced)
    batch = one_batch(trainer)
    _, plain = loss_and_gradients(trainer, batch)
    monkeypatch.setitem(DIVERGENCES, "forward_kl", lambda config: lambda *both: 100 * forward_kl(*both))
    _, scaled = loss_and_gradients(trainer, batch)
    before, after = flat(plain), flat(scaled)
    torch.testing.assert_close(after / after.norm(), before / before.norm(), rtol=1e-3, atol=1e-6)
    assert after.norm() > 1.5 * before.norm()


def test_terms_of_equal_gradients_are_mixed_by_their_weights(
    build: Build, texts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = build(KDTrainer, texts, **balanced)
    batch = one_batch(trainer)
    norms = naive_norms(trainer, batch)
    ratio = norms["ce"] / norms["divergence"]
    monkeypatch.setitem(DIVERGENCES, "forward_kl", lambda config: lambda *both: ratio * forward_kl(*both))
    _, found = loss_and_gradients(trainer, batch)
    trainer.args.combine = "weights"
    _, mixed = loss_and_gradients(trainer, batch)
    torch.testing.assert_close(flat(found), flat(mixed), rtol=1e-3, atol=1e-6)


# How a batch is cut


def steps(trainer: Any) -> list[list[float]]:
    trainer.train()
    return [list(pair) for pair in zip(losses_of(trainer), losses_of(trainer, "grad_norm"), strict=True)]


def test_losses_do_not_depend_on_ranks(build: Build, completions: Dataset, ranks: Any) -> None:
    alone = build(KDTrainer, completions, per_device_train_batch_size=4, max_length=128, **balanced)
    expected = steps(alone)
    factors = losses_of(alone, "balance/ce")
    for rank in [*ranks["kd balanced"], *ranks["kd fsdp2 balanced"]]:
        assert rank["steps"] == [pytest.approx(pair, rel=1e-4) for pair in expected]
        assert rank["balance"] == pytest.approx(factors, rel=1e-4)


@pytest.mark.slow
def test_losses_do_not_depend_on_ranks_of_zero3(
    build: Build, completions: Dataset, tiny: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not among mmkd's dependencies")
    alone = build(KDTrainer, completions, per_device_train_batch_size=4, max_length=128, **balanced)
    expected = steps(alone)
    models = {name: str(folder) for name, folder in tiny.items()}
    job = {"method": "kd", "how": "zero3", **models, "settings": {**balanced, "gradient_checkpointing": True}}
    (seen,) = on_two_ranks({"job": job}, tmp_path, DS_ACCELERATOR="cpu").values()
    for rank in seen:
        assert rank["steps"][0] == pytest.approx(expected[0], rel=1e-5)
        # The optimizer is DeepSpeed's own, so that later weights differ a little.
        assert rank["steps"] == [pytest.approx(pair, rel=2e-3) for pair in expected]
        assert rank["balance"] == pytest.approx(losses_of(alone, "balance/ce"), rel=2e-3)


def test_an_accumulated_batch_is_balanced_part_by_part(build: Build, texts: Dataset) -> None:
    trainer: Any = build(KDTrainer, texts, **balanced)
    parts = [trainer._prepare_inputs(trainer.data_collator([dict(trainer.train_dataset[row])])) for row in (0, 0, 1)]

    def accumulated(*batches: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        trainer.model.zero_grad()
        trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
        for batch in batches:
            trainer.compute_loss(trainer.model, batch).backward()
        return flat({name: p.grad for name, p in trainer.model.named_parameters()}), factors_of(trainer)

    trainer.model.train()
    alone, first = accumulated(parts[0])
    twice, same = accumulated(parts[0], parts[1])
    torch.testing.assert_close(twice, alone, rtol=1e-4, atol=1e-7)
    assert same == pytest.approx(first, rel=1e-4)
    _, second = accumulated(parts[2])
    _, both = accumulated(parts[0], parts[2])
    assert both == pytest.approx({name: (first[name] + second[name]) / 2 for name in first}, rel=1e-4)


# Students and settings


def test_evaluations_are_mixed_by_the_weights(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, **balanced)
    found = trainer.evaluate(texts)
    assert found["eval_loss"] == pytest.approx(0.7 * found["eval_divergence"] + 0.3 * found["eval_ce"], rel=1e-4)
    assert not any("balance" in name for name in found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_students(build: Build, texts: Dataset, checkpointing: bool) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    settings = {**balanced, "max_steps": 20, "gradient_checkpointing": checkpointing}
    trainer = build(KDTrainer, texts, trainer={"peft_config": adapter}, **settings)
    trainer.train()
    kl, ce = losses_of(trainer, "kl"), losses_of(trainer, "ce")
    assert kl[-1] < kl[0]
    assert ce[-1] < ce[0]


def test_the_baselines_of_alm_too(build: Build, texts: Dataset, foreign: Path) -> None:
    settings = {"objective": "uld", "ce_weight": 0.5, "combine": "gradmag", "max_steps": 1}
    trainer = build(ALMTrainer, texts, trainer={"teacher": str(foreign)}, **settings)
    trainer.train()
    factors = [losses_of(trainer, f"balance/{name}")[0] for name in ("divergence", "ce")]
    assert sum(factors) == pytest.approx(1)
    assert min(factors) > 0


def test_from_the_command_line(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sentences(32)))
    data = {"name": "words", "license": "CC0-1.0", "source": "json", "data_files": {"train": "rows.jsonl"}}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump({**data, "columns": {"text": "text"}}))
    keys = {"method": "kd", "student": str(tiny["student"]), "teacher": str(tiny["teacher"]), "data": "words.yaml"}
    keys |= {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2, "bf16": False, "report_to": "none"}
    keys |= {"output_dir": "run", "save_strategy": "no", "ce_weight": 0.5, "combine": "gradmag", "temperature": 2.0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    assert main(["train", "recipe.yaml"]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 2
    assert all(entry["balance/ce"] + entry["balance/divergence"] == pytest.approx(1, rel=1e-4) for entry in logged)
    assert main(["train", "recipe.yaml", "--output_dir", "other", "--ce_weight", "0"]) == 2
    assert "divergence is the only term whose weight is not 0" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("method", "settings", "reason"),
    [
        ("kd", {"ce_weight": 0.0}, "divergence is the only term"),
        ("kd", {"ce_weight": 1.0}, "ce is the only term"),
        ("taid", {}, "divergence is the only term"),
        ("alm", {}, "divergence is the only term"),
        ("sft", {}, "has no terms to balance"),
        ("comd", {}, "in round_settings"),
        ("kd", {"ce_weight": 0.5, "combine": "sum"}, "'sum'; choose one of weights, gradmag"),
        ("kd", {"ce_weight": 0.5, "combine": "mean"}, "'mean'; choose one of weights, gradmag"),
    ],
)
def test_settings_that_cannot_be(method: str, settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        METHODS[method].config(str(tmp_path), bf16=False, **{"combine": "gradmag", **settings})


def test_last_layers_without_gradients_are_refused(build: Build, texts: Dataset) -> None:
    built = partial(build, KDTrainer, texts, **balanced)
    first = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0])
    with pytest.raises(ValueError, match="of which nothing is trained"):
        built(trainer={"peft_config": first})
    with pytest.raises(ValueError, match="use_reentrant: false"):
        built(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
