"""Terms of `features`: against hidden states in full, and what their losses must and must not depend on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmkd.errors import UserError
from mmkd.losses.feature_losses import attention, attention_mse, cosine, mse, relation
from mmkd.methods.kd import KDTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.teachers.batch import Batch
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.served_head import head_of_checkpoint
from mmkd.teachers.several import SeveralTeachers
from mmkd.training.feature_projectors import FILE
from mmkd.training.feature_terms import FeatureTerm, terms_of
from tests.helpers import LORA, Build, losses_of, near, steps
from tests.teachers.fake_vllm import ServedStates, fake_vllm
from tests.trainers.conftest import FEATURES
from tests.trainers.test_llava_kd import loss_and_gradients, one_batch
from tests.trainers.two_ranks import projectors_of

MIDDLE = FEATURES[0]


def states(model: Any, batch: Batch, layer: int) -> Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return model(**inputs, output_hidden_states=True).hidden_states[layer]


def naive(trainer: Any, batch: Batch, kind: str, tokens: str) -> Tensor:
    """The mean distance of the states after the student's first block and the teacher's second."""
    ours, theirs = states(trainer.model, batch, 1), states(trainer.teacher.model, batch, 2).detach()
    chosen = torch.zeros_like(batch["labels"], dtype=torch.bool)
    chosen[:, :-1] = batch["labels"][:, 1:] != -100
    if tokens == "all":
        chosen = batch["attention_mask"] == 1
    if kind == "relation":
        return torch.cat(
            [relation(a[m], b[m], [int(m.sum())]) for a, b, m in zip(ours, theirs, chosen, strict=True)]
        ).mean()
    weight = trainer._projectors._weights["middle"]
    ours, theirs = torch.nn.functional.linear(ours[chosen], weight), theirs[chosen]
    return (mse if kind == "mse" else cosine)(ours, theirs).mean()


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("kind", ["mse", "cosine", "relation"])
def test_loss_and_gradient_are_those_of_hidden_states_in_full(
    build: Build, completions: Dataset, kind: str, tokens: str
) -> None:
    plain: Any = build(KDTrainer, completions)
    batch = one_batch(plain)
    divergence, gradients = loss_and_gradients(plain, batch)
    trainer: Any = build(KDTrainer, completions, features=[{**MIDDLE, "kind": kind, "tokens": tokens}])
    term = naive(trainer, batch, kind, tokens)
    (0.5 * term).backward()
    own = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    loss, found = loss_and_gradients(trainer, batch)
    assert loss == pytest.approx(divergence + 0.5 * term.item(), rel=1e-5)
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient + own.get(name, 0), rtol=1e-3, atol=1e-6, msg=name)
    total, count = trainer._sums["train"]["feature_middle"]
    assert (total / count).item() == pytest.approx(term.item(), rel=1e-5)


def test_attention_maps_are_compared_where_they_are_computed(build: Build, completions: Dataset, tiny: Any) -> None:
    term = {"student": "layers.1.self_attn", "teacher": "layers.2.self_attn", "kind": "attention", "name": "maps"}
    with pytest.raises(
        UserError, match=r"computes attention by sdpa, without maps.*teacher_attn_implementation: eager"
    ):
        build(KDTrainer, completions, features=term)
    models: dict[str, Any] = {
        role if role == "teacher" else "model": AutoModelForCausalLM.from_pretrained(
            tiny[role], attn_implementation="eager", dtype=torch.float32
        )
        for role in ("student", "teacher")
    }
    trainer: Any = build(KDTrainer, completions, trainer=models, features=term)
    batch = one_batch(trainer)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    maps = [
        model(**inputs, output_attentions=True).attentions[layer].transpose(1, 2)
        for model, layer in ((trainer.model, 1), (trainer.teacher.model, 2))
    ]
    items = torch.zeros_like(batch["labels"], dtype=torch.bool)
    items[:, :-1] = batch["labels"][:, 1:] != -100
    expected = attention(maps[0][items], maps[1][items]).mean().item()
    loss_and_gradients(trainer, batch)
    total, count = trainer._sums["train"]["feature_maps"]
    assert (total / count).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match=r"layers.0 is no module of attention"):
        build(KDTrainer, completions, trainer=models, features={"student": "layers.0", "kind": "attention"})


@pytest.mark.parametrize("cls", [KDTrainer, TAIDTrainer])
def test_losses_do_not_depend_on_how_a_batch_is_cut(build: Build, completions: Dataset, cls: Any) -> None:
    whole = build(cls, completions, features=FEATURES)
    expected, names = steps(whole), ("feature_middle", "feature_last_hidden", "feature_every_2nd")
    logged = {name: losses_of(whole, name) for name in names}
    assert all(len(values) == 4 for values in logged.values())
    for size in (1, 2):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        parts = build(cls, completions, features=FEATURES, **cut)
        assert steps(parts) == near(expected)
        assert {name: losses_of(parts, name) for name in names} == {name: near(own) for name, own in logged.items()}


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_losses_do_not_depend_on_ranks(build: Build, completions: Dataset, ranks: Any, how: str) -> None:
    alone = build(KDTrainer, completions, features=FEATURES, max_length=128)
    expected = steps(alone)
    for rank in ranks[f"kd features {how}"]:
        found = [pair[0] for pair in rank["steps"]] + [pair[1] for pair in rank["steps"]]
        assert found == pytest.approx(expected, rel=1e-3)
    projectors = [rank["projectors"] for rank in ranks[f"kd features {how}"]]
    assert projectors[0] == projectors[1] == pytest.approx(projectors_of(alone), rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": True},
        {"packing": True, "max_length": 512, "per_device_train_batch_size": 1, "attn": True},
    ],
    ids=["checkpointing", "packing"],
)
def test_how_activations_are_kept_and_rows_are_laid_changes_nothing(
    build: Build, completions: Dataset, settings: dict[str, Any], tiny: Any
) -> None:
    rows, layout = completions.select(range(4)), {key: value for key, value in settings.items() if key != "attn"}
    models = {}
    if "attn" in settings:
        models = {
            role if role == "teacher" else "model": AutoModelForCausalLM.from_pretrained(
                tiny[role], attn_implementation="eager", dtype=torch.float32
            )
            for role in ("student", "teacher")
        }
    plain = {"activation_checkpointing": False, "max_steps": 2, "max_length": 512}
    expected = steps(build(KDTrainer, rows, features=FEATURES, **plain))
    assert steps(build(KDTrainer, rows, features=FEATURES, trainer=models, **{**plain, **layout})) == near(expected)


def test_a_student_that_is_the_teacher_has_no_distance(build: Build, texts: Dataset, tiny: Any) -> None:
    terms = ["every_nth", {"student": "last_hidden", "kind": "mse", "projector": "linear"}]
    trainer = build(KDTrainer, texts, trainer={"model": str(tiny["teacher"])}, features=terms)
    trainer.train()
    names = [name for name in trainer.state.log_history[0] if name.startswith("feature_")]
    assert names == ["feature_every_nth_0", "feature_every_nth_1", "feature_every_nth_2", "feature_last_hidden"]
    assert [losses_of(trainer, name)[0] for name in names] == pytest.approx([0] * 4, abs=1e-6)


def test_projectors_are_learnt_and_resumed_and_no_part_of_the_student(
    build: Build, texts: Dataset, tmp_path: Path
) -> None:
    settings = {"features": FEATURES, "save_strategy": "steps", "save_steps": 2}
    whole: Any = build(KDTrainer, texts, **settings)
    first = {name: weight.detach().clone() for name, weight in whole._projectors._weights.items()}
    assert list(first) == ["middle", "every_2nd"]
    expected = steps(whole)
    assert all(not torch.equal(first[name], weight) for name, weight in whole._projectors._weights.items())
    saved = load_file(tmp_path / "run" / "checkpoint-2" / FILE)
    assert {name.split("/")[0] for name in saved} == {*first}
    whole.save_model()
    plain: Any = build(KDTrainer, texts)
    assert set(load_file(tmp_path / "run" / "model.safetensors")) <= set(plain.model.state_dict())
    assert not (tmp_path / "run" / FILE).exists()
    resumed: Any = build(KDTrainer, texts, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [*losses_of(resumed), *losses_of(resumed, "grad_norm")] == near(expected)
    for name, weight in resumed._projectors._weights.items():
        torch.testing.assert_close(weight, whole._projectors._weights[name])
    other = build(KDTrainer, texts, **{**settings, "features": ["every_1"]})
    with pytest.raises(UserError, match=r"no projector for feature_every_1_0.*other features"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_student_moves_towards_the_teacher(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, features=[{**MIDDLE, "weight": 5.0}], max_steps=15)
    trainer.train()
    values = losses_of(trainer, "feature_middle")
    assert values[-1] < 0.8 * values[0]
    evaluated = trainer.evaluate(eval_dataset=texts.select(range(4)))
    parts = evaluated["eval_divergence"] + 5 * evaluated["eval_feature_middle"]
    assert evaluated["eval_loss"] == pytest.approx(parts, rel=1e-5)


def test_adapters_learn_from_features_of_modules_under_them(build: Build, texts: Dataset) -> None:
    adapter = LoraConfig(**{**LORA, "init_lora_weights": False})
    torch.manual_seed(0)
    trainer: Any = build(KDTrainer, texts, trainer={"peft_config": adapter}, features=[MIDDLE])
    loss, found = loss_and_gradients(trainer, one_batch(trainer))
    plain: Any = build(KDTrainer, texts, trainer={"peft_config": adapter})
    plain.model.load_state_dict(trainer.model.state_dict())
    alone, gradients = loss_and_gradients(plain, one_batch(plain))
    assert loss > alone
    changed = {name.split("layers.")[1][0] for name in found if not torch.equal(found[name], gradients[name])}
    assert changed == {"0"}


@pytest.mark.parametrize("column", [None, "domain"])
def test_each_of_several_teachers_is_compared_with_its_own_modules(
    build: Build, routed: Dataset, tiny: Any, untied: Any, column: str | None
) -> None:
    teachers = {"a": str(tiny["teacher"]), "b": str(untied["teacher"])}
    features = [MIDDLE, {"student": "norm", "teacher": {"b": "layers.2"}, "name": "of_b"}]
    models = {"teacher": SeveralTeachers(teachers, column=column)}
    whole = build(KDTrainer, routed, trainer=models, features=features)
    expected = steps(whole)
    entry = whole.state.log_history[0]
    assert {name for name in entry if name.startswith("feature_")} == {
        "feature_middle",
        "feature_middle_a",
        "feature_middle_b",
        "feature_of_b",
        "feature_of_b_b",
    }
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert steps(build(KDTrainer, routed, trainer=models, features=features, **cut)) == near(expected)
    weights: Any = whole
    assert set(weights._projectors._weights) == {"middle/a", "middle/b", "of_b/b"}


def test_the_student_as_its_own_teacher_is_compared_with_its_modules_of_then(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, trainer={"teacher": "self"}, features=[{"student": "layers.0"}], ce_weight=0.5)
    trainer.train()
    values = losses_of(trainer, "feature_layers_0")
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[-1] > 1e-5


def test_rollouts_are_compared_at_the_answers_that_the_student_gave(build: Build, completions: Dataset) -> None:
    settings = {"on_policy_fraction": 1.0, "rollout_max_tokens": 8, "seed": 3}
    trainer = build(KDTrainer, completions, features=[MIDDLE], **settings)
    alone = build(KDTrainer, completions, **settings)
    losses = [losses_of(one) for one in (trainer, alone) if one.train()]
    features = losses_of(trainer, "feature_middle")
    assert losses[0][0] == pytest.approx(losses[1][0] + 0.5 * features[0], rel=1e-4)


@pytest.mark.parametrize("cls", [KDTrainer, TAIDTrainer])
def test_gradmag_makes_the_weights_shares_of_the_gradient(build: Build, completions: Dataset, cls: Any) -> None:
    """Each gradient is taken in the module that computes the feature, and the divergence's in the last layer."""
    features = [{**MIDDLE, "projector": "linear"}, {"student": "layers.1", "teacher": "layers.2", "kind": "relation"}]
    trainer: Any = build(cls, completions, features=features, combine="gradmag")
    batch = one_batch(trainer)
    weights, layers = {"divergence": 1.0, "feature_middle": 0.5, "feature_layers_1": 1.0}, {}
    for name, number in (("divergence", 1), ("feature_middle", 0), ("feature_layers_1", 1)):
        layers[name] = list(trainer.model.model.layers[number].parameters())
    terms = terms_apart(trainer, batch)
    norms = {
        name: torch.cat([part.flatten() for part in torch.autograd.grad(term, layers[name], retain_graph=True)]).norm()
        for name, term in terms.items()
    }
    common = sum(weights.values()) / sum(weights[name] / norms[name] for name in weights)
    loss, _ = loss_and_gradients(trainer, batch)
    factors = {
        name: float(total / count) for name, (total, count) in trainer._sums["train"].items() if "balance" in name
    }
    assert factors == pytest.approx(
        {f"balance/{name}": float(weights[name] / norms[name] * common) for name in weights}, rel=1e-3
    )
    expected = sum(factors[f"balance/{name}"] * terms[name].item() for name in weights)
    assert loss == pytest.approx(expected, rel=1e-4)


def terms_apart(trainer: Any, batch: Batch) -> dict[str, Tensor]:
    """The terms of a loss, each with a graph of its own."""
    found: dict[str, Tensor] = {}
    trainer.model.train()
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    balanced = trainer.balanced

    def caught(terms: Any, weights: Any = None) -> Any:
        for name, term in {**terms, **trainer._apart[0]}.items():
            found[name] = torch.stack([total / trainer._counts[kind] for kind, total in term.items()]).sum()
        return balanced(terms, weights)

    trainer.balanced = caught
    trainer.compute_loss(trainer.model, batch)
    del trainer.balanced
    trainer._sums["train"].clear()
    return {name: term for name, term in found.items() if name != "ce"}


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ([{"student": "layers.7"}], r"no module 'layers.7'.*model.layers.1"),
        ([{"student": "layers.0", "teacher": "layers.9"}], r"no module 'layers.9'"),
        ({**MIDDLE, "projector": "none"}, r"32 numbers and the teacher's 48, and projector is none"),
        ("tower", "between a vision tower and a language model"),
        ({**MIDDLE, "tokens": "visual"}, "is about images, and the rows are text"),
        ({"student": "every_nth", "teacher": "layers.0"}, "stands for 2 modules of the student and layers.0 for 1"),
        ({"student": "layers.0", "teacher": {"a": "layers.0"}}, "names the teacher 'a', and the run has one teacher"),
        ({"student": "embed_tokens:input"}, "features .* are not one of each|no tensor to compare"),
    ],
)
def test_terms_that_cannot_be_are_refused_before_training(
    build: Build, texts: Dataset, features: Any, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        build(KDTrainer, texts, features=features)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([{"teacher": "a"}], "names no module of the student"),
        ([{"student": "a", "kinds": "mse"}], "sets 'kinds', which it does not know; did you mean 'kind'"),
        ([{"student": "a", "kind": "l2"}], r"features.kind is 'l2'; choose one of mse, cosine, relation, attention"),
        (["a", {"student": "a", "weight": 0}], r"features\[1\].weight is 0.*above 0"),
        (["a", {"student": "a", "weight": "much"}], r"features\[1\].weight is 'much'"),
        ([3], r"features is 3; write a mapping"),
        ("[{", "features is no JSON"),
        ([{"student": "a", "kind": "relation", "projector": "linear"}], "Remove projector"),
        ([{"student": "tower", "kind": "attention"}], "tower computes none"),
        ([{"student": "a", "name": "x y"}], "letters, digits"),
        ([{"student": "a", "name": "x"}, {"student": "b", "name": "x"}], "two terms with the name 'x'"),
        ([{"student": "a", "teacher": {"t": 1}}], r"features.teacher.t is 1"),
    ],
)
def test_values_that_are_no_terms(value: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        terms_of(value)


def test_terms_are_read_from_text_mappings_and_lists() -> None:
    alone = FeatureTerm("tower")
    for value in ("tower", {"student": "tower"}, ["tower"], '[{"student": "tower"}]', '{"student": "tower"}', alone):
        assert terms_of(value) == (alone,)
    assert terms_of(None) == ()
    (term,) = terms_of([{"student": "model.layers.3:input", "weight": "0.5"}])
    assert (term.weight, term.label) == (0.5, "layers_3_input")


def test_torch_compile_and_reentrant_checkpointing_are_refused(build: Build, texts: Dataset) -> None:
    with pytest.raises(UserError, match="torch_compile: false"):
        build(KDTrainer, texts, features="last_hidden", torch_compile=True)
    reentrant = {"use_reentrant": True}
    with pytest.raises(UserError, match="use_reentrant: false"):
        build(KDTrainer, texts, features="last_hidden", activation_checkpointing_kwargs=reentrant)


def test_a_served_teacher_of_hidden_states_is_compared_at_the_answer(
    build: Build, completions: Dataset, tiny: Any
) -> None:
    term, losses = {"student": "last_hidden", "kind": "cosine"}, []
    served = AutoModelForCausalLM.from_pretrained(tiny["teacher"]).eval()
    with fake_vllm(ServedStates, served=served, max_model_len=512) as fake:
        teacher = HiddenServerTeacher(fake.url, head_of_checkpoint(str(tiny["teacher"])))
        with teacher.client:
            for one in (str(tiny["teacher"]), teacher):
                trained = build(KDTrainer, completions, {"teacher": one}, max_steps=2, features=[term])
                losses.append([*steps(trained), *losses_of(trained, "feature_last_hidden")])
            with pytest.raises(UserError, match="a module of the teacher, and this teacher is a server"):
                build(KDTrainer, completions, {"teacher": teacher}, features=[MIDDLE])
            with pytest.raises(UserError, match="compares more than the answer"):
                build(KDTrainer, completions, {"teacher": teacher}, features=[{**term, "tokens": "all"}])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_all_hidden_states_and_maps_add_up_to_bistils_loss(build: Build, completions: Dataset, tiny: Any) -> None:
    """Student layer i against teacher layer r(i+1)-1, here 2 of 2 against 3 of 3; the divergence is left out."""
    shared = {"tokens": "all", "weight": 1.0}
    terms = [
        {"student": "attentions", "kind": "attention_mse", **shared},
        {"student": "hidden_states", "kind": "mse", **shared},
    ]
    models: dict[str, Any] = {
        role if role == "teacher" else "model": AutoModelForCausalLM.from_pretrained(
            tiny[role], attn_implementation="eager", dtype=torch.float32
        )
        for role in ("student", "teacher")
    }
    trainer: Any = build(KDTrainer, completions, trainer=models, features=terms, divergence_weight=0)
    batch = one_batch(trainer)
    loss, _ = loss_and_gradients(trainer, batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ours, theirs = (
        model(**inputs, output_attentions=True, output_hidden_states=True)
        for model in (trainer.model, trainer.teacher.model)
    )
    chosen = batch["attention_mask"] == 1
    maps = []
    for layer, of_teacher in ((0, 1), (1, 2)):
        a, b = (out.attentions[at].transpose(1, 2)[chosen] for out, at in ((ours, layer), (theirs, of_teacher)))
        total, entries = attention_mse(a, b)
        maps.append((total / entries).mean())
    expected = torch.stack(maps).mean()
    sums = trainer._sums["train"]
    names = ("embeddings", 0, 1)
    logged = [sums[f"feature_hidden_states_{name}"][0] / sums[f"feature_hidden_states_{name}"][1] for name in names]
    weight = trainer._projectors._weights["hidden_states_embeddings"]
    embedded = torch.nn.functional.linear(ours.hidden_states[0][chosen], weight)
    assert logged[0].item() == pytest.approx(mse(embedded, theirs.hidden_states[0][chosen]).mean().item(), rel=1e-4)
    assert loss == pytest.approx((expected + torch.stack(logged).mean()).item(), rel=1e-4)


def test_the_divergence_has_a_weight_of_its_own(build: Build, texts: Dataset) -> None:
    """0.25 at temperature 2 undoes the square of it; the divergence that is logged has the square in any case."""
    one: Any = build(KDTrainer, texts, temperature=2.0, ce_weight=0.5)
    other: Any = build(KDTrainer, texts, temperature=2.0, ce_weight=0.5, divergence_weight=0.25)
    losses = [loss_and_gradients(trainer, one_batch(trainer))[0] for trainer in (one, other)]
    sums = [trainer._sums["train"] for trainer in (one, other)]
    divergence, ce = ((sums[0][name][0] / sums[0][name][1]).item() for name in ("divergence", "ce"))
    assert (sums[1]["divergence"][0] / sums[1]["divergence"][1]).item() == pytest.approx(divergence)
    assert losses == pytest.approx([0.5 * divergence + 0.5 * ce, 0.125 * divergence + 0.5 * ce], rel=1e-5)
    with pytest.raises(UserError, match="divergence_weight is 0, and the loss has no other term"):
        build(KDTrainer, texts, divergence_weight=0)
