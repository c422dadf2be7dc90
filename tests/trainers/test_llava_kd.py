"""LLaVA-KD: its authors' losses, each term against logits in full, and rows with no, one and many images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

from mmkd.losses.divergences import forward_kl
from mmkd.losses.token_matching import matched
from mmkd.losses.visual_relations import relation_distance
from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDConfig, LLaVAKDTrainer, VisualSignal, VisualSupervised
from mmkd.models.heads import LMHead
from mmkd.teachers.batch import Batch
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.signals import DenseSignal
from tests.helpers import Build, losses_of
from tests.vlms import vision_rows

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "LLAVAKD_losses.npz")


@pytest.fixture
def build_vlm(build: Build, vlms: dict[str, Path]) -> Build:
    """The `build` fixture with the LLaVA models."""

    def built(cls: Any, data: Dataset, trainer: dict[str, Any] | None = None, **settings: Any) -> Any:
        models = {"model": str(vlms["student"]), "teacher": str(vlms["teacher"]), **(trainer or {})}
        return build(cls, data, trainer=models, **{"assistant_only_loss": True, "max_length": 128, **settings})

    return built


def one_batch(trainer: Any, count: int = 4) -> Batch:
    return trainer._prepare_inputs(trainer.data_collator([dict(trainer.train_dataset[row]) for row in range(count)]))


def loss_and_gradients(trainer: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    trainer.model.train()
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def dense_terms(trainer: Any, batch: Batch, relation_on: str = "logits", **others: Any) -> dict[str, torch.Tensor]:
    """The four terms from both models' logits in full."""
    inputs = batch.student.inputs
    both = [model(**inputs, output_hidden_states=True) for model in (trainer.model, trainer.teacher.model)]
    student, teacher = both[0].logits, both[1].logits.detach()
    labels = batch["labels"][:, 1:]
    answer, visual = labels != -100, batch.student.visual
    log_probs = student[:, :-1].log_softmax(-1)[answer]
    kl = forward_kl(student.log_softmax(-1), teacher.log_softmax(-1))
    tokens = batch.student.images[:, 1].tolist()
    features = (student, teacher) if relation_on == "logits" else [one.hidden_states[-1] for one in both]
    pairs = zip(*(one[visual].split(tokens) for one in features), strict=True)
    distances = [relation_distance(ours @ ours.T, theirs @ theirs.T) for ours, theirs in pairs]
    return {
        "reg": -log_probs.gather(-1, labels[answer][:, None]).mean(),
        "res": kl[:, :-1][answer].mean(),
        "vis": kl[visual].mean() if tokens else kl.sum() * 0,
        "rel": torch.stack(distances).mean() if tokens else kl.sum() * 0,
    }


def test_the_authors_losses(build_vlm: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity mode: raw logits, weights 1; hidden states that are the logits themselves make the head an identity."""
    both = [torch.tensor(GOLDEN[name], dtype=torch.float32)[0] for name in ("student_logits", "teacher_logits")]
    student, teacher = both[0].requires_grad_(), both[1]
    start, count = int(GOLDEN["image_start"]), int(GOLDEN["n_visual"])
    labels = torch.tensor(GOLDEN["labels"])[0]
    answer = labels[1:] != -100
    head, images = LMHead(torch.eye(student.shape[1])), torch.tensor([count])
    seen = VisualSupervised(student[:-1][answer], head, labels[1:][answer], student[start : start + count], images)
    said = VisualSignal(
        DenseSignal(teacher[:-1][answer], head), DenseSignal(teacher[start : start + count], head), images
    )
    trainer: Any = build_vlm(LLaVAKDTrainer, vision_rows([1] * 4), gamma=1.0)
    losses = trainer.item_losses(seen, said)
    tokens = int(answer.sum())
    terms = {
        "loss_reg": losses.reports["ce"][0] / tokens,
        "loss_res": losses.reports["divergence"][0] / tokens,
        "loss_vis": losses.totals["visual_token"] / count,
        "loss_rel": losses.totals["image"],
        "loss_total": losses.totals["token"] / tokens + losses.totals["visual_token"] / count + losses.totals["image"],
    }
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {name: float(GOLDEN[name]) for name in terms}, rel=1e-5
    )
    terms["loss_total"].backward()
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(float(GOLDEN["grad_total_norm"]), rel=1e-4)
    first = torch.tensor(GOLDEN["grad_total_img_first8"])[0]
    torch.testing.assert_close(student.grad[start : start + 8], first, rtol=1e-4, atol=1e-6)
    text = torch.tensor(GOLDEN["grad_total_text"])[0]
    torch.testing.assert_close(student.grad[start + count :], text, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("images", [[1, 1, 1, 1], [1, 2, 1, 3], [1, 0, 2, 0]])
def test_loss_and_gradient_are_those_of_logits_in_full(build_vlm: Build, images: list[int]) -> None:
    trainer: Any = build_vlm(LLaVAKDTrainer, vision_rows(images), alpha=0.7, beta=0.9, gamma=0.5)
    batch = one_batch(trainer)
    assert batch.student.images.tolist() == [[row, 4] for row, count in enumerate(images) for _ in range(count)]
    terms = dense_terms(trainer, batch)
    expected = terms["reg"] + 0.7 * terms["res"] + 0.9 * terms["vis"] + 0.5 * terms["rel"]
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    loss, found = loss_and_gradients(trainer, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("images", [[1, 2, 0, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("settings", [{}, {"relation_on": "hidden"}, {"beta": 0.0}])
def test_gradmag_makes_the_weights_shares_of_the_gradient(
    build_vlm: Build, images: list[int], settings: dict[str, Any]
) -> None:
    """Against plain autograd; a term without items leaves the others their shares."""
    keys = {"alpha": 0.7, "beta": 0.9, "gamma": 0.5, **settings}
    trainer: Any = build_vlm(LLaVAKDTrainer, vision_rows(images), combine="gradmag", **keys)
    batch = one_batch(trainer)
    weights = {"reg": 1.0, "res": 0.7, "vis": keys["beta"], "rel": 0.5}
    terms = {name: term for name, term in dense_terms(trainer, batch, **settings).items() if weights[name]}
    layer = list(trainer.model.get_decoder().layers[-1].parameters())
    norms = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, layer, retain_graph=True, materialize_grads=True)
        norms[name] = torch.stack([one.norm() for one in gradients]).norm()
    present = [name for name in terms if norms[name] > 0]
    assert present == [name for name in terms if any(images) or name in ("reg", "res")]
    common = sum(weights[name] for name in present) / sum(weights[name] / norms[name] for name in present)
    expected: Any = sum(weights[name] / norms[name] * common * terms[name] for name in present)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    loss, found = loss_and_gradients(trainer, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_balanced_losses_do_not_depend_on_ranks(build_vlm: Build, ranks: Any) -> None:
    expected = steps(build_vlm(LLaVAKDTrainer, vision_rows([1, 2, 0, 3] * 6), combine="gradmag"))
    found = ranks["llava_kd balanced"]
    for rank in found:
        assert rank["steps"] == [pytest.approx(pair, rel=1e-3) for pair in expected]
    assert found[0]["weights"] == found[1]["weights"]


def test_balance_needs_a_last_layer_that_is_trained(build_vlm: Build) -> None:
    with pytest.raises(ValueError, match="of which nothing is trained"):
        build_vlm(LLaVAKDTrainer, vision_rows([1] * 4), combine="gradmag", trainable=["connector"])


def test_rows_without_images_alone_learn_from_the_answer(build_vlm: Build) -> None:
    trainer: Any = build_vlm(LLaVAKDTrainer, vision_rows([0, 0, 0, 0]))
    batch = one_batch(trainer)
    terms = dense_terms(trainer, batch)
    assert loss_and_gradients(trainer, batch)[0] == pytest.approx((terms["reg"] + terms["res"]).item(), rel=1e-5)


def steps(trainer: Any) -> list[tuple[float, float]]:
    trainer.train()
    return list(zip(losses_of(trainer), losses_of(trainer, "grad_norm"), strict=True))


def test_losses_do_not_depend_on_how_a_batch_is_cut(build_vlm: Build) -> None:
    """Rows with different numbers of images: each term has its own count."""
    data = vision_rows([1, 2, 0, 3] * 4)
    whole = steps(build_vlm(LLaVAKDTrainer, data))
    halves = steps(build_vlm(LLaVAKDTrainer, data, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    single = steps(build_vlm(LLaVAKDTrainer, data, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    assert halves == [pytest.approx(pair, rel=1e-4) for pair in whole]
    assert single == [pytest.approx(pair, rel=1e-4) for pair in whole]


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_losses_do_not_depend_on_ranks(build_vlm: Build, ranks: Any, how: str) -> None:
    """Two gloo ranks of two rows, with different numbers of images, are one rank of four."""
    data = vision_rows([1, 2, 0, 3] * 6)
    alone: Any = build_vlm(LLaVAKDTrainer, data)
    expected = steps(alone)
    evaluated = alone.evaluate(eval_dataset=data.select(range(5)))
    found = ranks[f"llava_kd {how}"]
    for rank in found:
        assert rank["steps"] == [pytest.approx(pair, rel=1e-3) for pair in expected]
        assert rank["evaluated"] == pytest.approx({name: evaluated[name] for name in rank["evaluated"]}, rel=1e-3)
    if how == "ddp":
        assert found[0]["weights"] == found[1]["weights"]


@pytest.mark.parametrize(
    "layout, reason", [({"packing": True}, "Set packing: false"), ({"padding_free": True}, "Set padding_free: false")]
)
def test_rows_with_images_are_not_laid_end_to_end(build_vlm: Build, layout: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_vlm(LLaVAKDTrainer, vision_rows([1] * 4), **layout)


def test_an_image_alone_is_the_same_among_many(build_vlm: Build) -> None:
    trainer: Any = build_vlm(LLaVAKDTrainer, vision_rows([1, 1, 2, 1]), beta=0.0)
    rows = [dict(row) for row in trainer.train_dataset]
    together = trainer.data_collator(rows)
    distances = [relation_of(trainer, trainer.data_collator([row])) for row in rows]
    counts = [1, 1, 2, 1]
    expected = sum(one * count for one, count in zip(distances, counts, strict=True)) / sum(counts)
    assert relation_of(trainer, together) == pytest.approx(expected, rel=1e-4)


def relation_of(trainer: Any, batch: Batch) -> float:
    loss_and_gradients(trainer, trainer._prepare_inputs(batch))
    total, count = trainer._sums["train"].pop("relation_distance")
    return float(total / count)


@pytest.mark.parametrize(
    "settings",
    [{"relation_on": "hidden"}, {"relation_normalized": True}, {"relation_on": "hidden", "relation_normalized": True}],
)
def test_a_student_that_is_the_teacher_has_only_cross_entropy(
    build_vlm: Build, vlms: Any, settings: dict[str, Any]
) -> None:
    trainer = build_vlm(
        LLaVAKDTrainer, vision_rows([1] * 4), trainer={"model": str(vlms["teacher"])}, max_steps=1, **settings
    )
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses_of(trainer, "ce"), rel=1e-4)
    assert losses_of(trainer, "visual_kl")[0] == pytest.approx(0, abs=1e-5)
    assert losses_of(trainer, "relation_distance")[0] == pytest.approx(0, abs=1e-5)


def test_the_student_moves_towards_the_teacher_in_every_term(build_vlm: Build) -> None:
    # A random teacher and the data disagree: with the paper's weights the answers follow the data.
    trainer = build_vlm(LLaVAKDTrainer, vision_rows([1, 2] * 4), max_steps=40, alpha=20.0, beta=20.0, gamma=20.0)
    trainer.train()
    for name in ("kl", "visual_kl", "relation_distance"):
        values = losses_of(trainer, name)
        assert values[-1] < 0.9 * values[0], name
    evaluated = trainer.evaluate(eval_dataset=vision_rows([1, 0, 2]))
    terms = [evaluated[f"eval_{name}"] for name in ("ce", "divergence", "visual_kl", "relation_distance")]
    assert evaluated["eval_loss"] == pytest.approx(sum(w * t for w, t in zip((1, 20, 20, 20), terms, strict=True)))


@pytest.mark.parametrize(
    "key", [{"visual_tokens": "pool"}, {"visual_mismatch": "pool"}, {"visual_tokens": "hungarian"}]
)
def test_other_visual_tokens_are_refused_pooled_or_matched(build_vlm: Build, vlms: Any, key: dict[str, str]) -> None:
    data, fine = vision_rows([1, 2, 0, 1]), {"model": str(vlms["fine"])}
    if "visual_mismatch" in key:
        with pytest.raises(ValueError, match=r"visual_tokens: pool .*visual_tokens: hungarian"):
            build_vlm(LLaVAKDTrainer, data, trainer=fine, max_steps=1).train()
    trainer: Any = build_vlm(LLaVAKDTrainer, data, trainer=fine, max_steps=20, **key)
    batch = one_batch(trainer)
    assert "" in batch.readings
    assert batch.student.images[0].tolist() == [0, 16]
    assert batch.readings[""].view.images[0].tolist() == [0, 4]
    assert batch["pixel_values"].shape[-1] == 16
    assert batch.readings[""].view["pixel_values"].shape[-1] == 8
    assert int(trainer.count_items(batch)["visual_token"]) == 4 * 4
    trainer.train()
    assert losses_of(trainer, "visual_kl")[-1] < losses_of(trainer, "visual_kl")[0]


@pytest.mark.parametrize("cost", ["manhattan", "euclidean"])
def test_matched_tokens_are_compared_by_all_terms(build_vlm: Build, vlms: Any, cost: str) -> None:
    """Against logits in full, with the assignment that scipy finds for them."""
    keys = {"beta": 0.9, "gamma": 0.5, "vsd_weight": 0.3, "vlad_weight": 0.2, "relation_on": "hidden"}
    model = {"model": str(vlms["fine"])}
    matching = {"visual_tokens": "hungarian", "matching_cost": cost}
    trainer: Any = build_vlm(LLaVAKDTrainer, vision_rows([1, 2, 0, 1]), trainer=model, **matching, **keys)
    batch = one_batch(trainer)
    views = batch.student, batch.readings[""].view
    both = [
        side(**view.inputs, output_hidden_states=True)
        for side, view in zip((trainer.model, trainer.teacher.model), views, strict=True)
    ]
    answer = views[0].supervised
    images: Any = zip(
        *(out.logits[view.visual].split(view.images[:, 1].tolist()) for out, view in zip(both, views, strict=True)),
        *(
            out.hidden_states[-1][view.visual].split(view.images[:, 1].tolist())
            for out, view in zip(both, views, strict=True)
        ),
        views[0].images[:, 0].tolist(),
        strict=True,
    )
    names = ("visual_kl", "relation_distance", "visual_mse", "alignment_distance")
    sums, pairs = {name: torch.zeros(()) for name in names}, 0
    for ours, theirs, hidden, their_hidden, row in images:
        costs = torch.cdist(ours, theirs, p=1 if cost == "manhattan" else 2).detach()
        at = matched(ours, theirs, lambda *_, costs=costs: costs)
        ours, theirs, hidden, their_hidden = ours[at[0]], theirs[at[1]], hidden[at[0]], their_hidden[at[1]]
        texts = [out.hidden_states[-1][row, :-1][view.supervised[row]] for out, view in zip(both, views, strict=True)]
        sums["visual_kl"] = sums["visual_kl"] + forward_kl(ours.log_softmax(-1), theirs.log_softmax(-1)).sum()
        sums["relation_distance"] = sums["relation_distance"] + relation_distance(
            hidden @ hidden.T, their_hidden @ their_hidden.T
        )
        sums["visual_mse"] = sums["visual_mse"] + (ours - theirs).square().mean(-1).sum()
        cosines = [
            torch.cosine_similarity(visual[:, None], text[None], dim=-1)
            for visual, text in zip((hidden, their_hidden), texts, strict=True)
        ]
        sums["alignment_distance"] = sums["alignment_distance"] + torch.nn.functional.smooth_l1_loss(
            cosines[0], cosines[1]
        )
        pairs += len(at[0])
    assert pairs == 4 * 4
    log_probs = [out.logits[:, :-1][view.supervised].log_softmax(-1) for out, view in zip(both, views, strict=True)]
    labels = views[0].labels[:, 1:][answer]
    ce = -log_probs[0].gather(-1, labels[:, None]).mean()
    expected: Any = ce + forward_kl(log_probs[0], log_probs[1].detach()).mean()
    expected = expected + (0.9 * sums["visual_kl"] + 0.3 * sums["visual_mse"]) / 16
    expected = expected + (0.5 * sums["relation_distance"] + 0.2 * sums["alignment_distance"]) / 4
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    loss, found = loss_and_gradients(trainer, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_matched_terms_do_not_depend_on_how_a_batch_is_cut(build_vlm: Build, vlms: Any) -> None:
    keys = {"visual_tokens": "hungarian", "vsd_weight": 0.3, "vlad_weight": 2.0, "divergence": "dbild"}
    runs = [
        steps(
            build_vlm(
                LLaVAKDTrainer, vision_rows([1, 2, 0, 3] * 2), trainer={"model": str(vlms["fine"])}, **keys, **cut
            )
        )
        for cut in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    ]
    assert runs[1] == [pytest.approx(pair, rel=1e-4) for pair in runs[0]]


def test_kd_gives_each_model_its_own_pixels(build_vlm: Build, vlms: Any) -> None:
    trainer: Any = build_vlm(KDTrainer, vision_rows([1, 2, 0, 1]), trainer={"model": str(vlms["fine"])}, max_steps=1)
    batch = one_batch(trainer)
    assert isinstance(trainer.teacher, LocalTeacher)
    assert "" in batch.readings
    student = trainer.model(**batch.student.inputs).logits[:, :-1][batch["labels"][:, 1:] != -100]
    view = batch.readings[""].view
    teacher = trainer.teacher.model(**view.inputs).logits[:, :-1][view.supervised]
    expected = forward_kl(student.log_softmax(-1), teacher.log_softmax(-1)).mean()
    assert loss_and_gradients(trainer, batch)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_bad_input(build_vlm: Build, vlms: Any, tiny: Any, tmp_path: Path) -> None:
    data = vision_rows([1] * 4)
    with pytest.raises(ValueError, match="reads text only"):
        build_vlm(LLaVAKDTrainer, data, trainer={"teacher": str(tiny["teacher"])})
    with pytest.raises(ValueError, match="would cut it within its images"):
        build_vlm(LLaVAKDTrainer, data, max_length=8)
    for count, advice in ((2, "remove the surplus images"), (0, "add the missing images")):
        rows = data.map(lambda row, count=count: {"images": row["images"] * count}, features=data.features)
        with pytest.raises(ValueError, match=advice):
            build_vlm(LLaVAKDTrainer, rows)
    video = Dataset.from_list([{"messages": [{"role": "user", "content": [{"type": "video", "text": "x"}]}]}])
    with pytest.raises(ValueError, match="videos"):
        build_vlm(LLaVAKDTrainer, video)


def test_answers_that_differ_are_an_error(build_vlm: Build, vlms: Any, tmp_path: Path) -> None:
    """Never plain SFT behind the user's back, as the authors' code does."""
    other = tmp_path / "other"
    other.mkdir()
    for file in vlms["teacher"].iterdir():
        if file.is_file():
            (other / file.name).write_bytes(file.read_bytes())
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("~ eos_token", "~ ' and' ~ eos_token"))
    with pytest.raises(ValueError, match="is supervised on"):
        build_vlm(LLaVAKDTrainer, vision_rows([1] * 4), trainer={"teacher": str(other)})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"ce_weight": 0.5}, "alpha, beta and gamma"),
        ({"beta": -1.0}, "beta is -1.0; give 0 or more"),
        ({"alpha": 0.0, "beta": 0.0, "gamma": 0.0}, "method sft"),
        ({"relation_on": "pixels"}, "choose one of logits, hidden"),
        ({"visual_mismatch": "ignore"}, "choose one of error, pool"),
        ({"visual_tokens": "ignore"}, "choose one of same, pool, hungarian"),
        ({"visual_tokens": "hungarian", "visual_mismatch": "pool"}, "its old name, says pool"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaVAKDConfig(str(tmp_path), **wrong)


def test_only_the_named_parts_are_trained(build_vlm: Build) -> None:
    trainer: Any = build_vlm(LLaVAKDTrainer, vision_rows([1] * 4), trainable=["connector"], max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}


@pytest.mark.parametrize("parts, message", [(["head"], "name one or more of"), ([], "name one or more of")])
def test_parts_that_are_none(build_vlm: Build, parts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_vlm(LLaVAKDTrainer, vision_rows([1] * 4), trainable=parts)


class VocabularyRows(TorchDispatchMode):
    """Notes how many rows of logits any operation returns: what has the vocabulary as its last dimension."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.most = vocab_size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor) and one.ndim and one.shape[-1] == self.vocab_size:
                self.most = max(self.most, one.numel() // self.vocab_size)
        return result


def test_visual_logits_are_never_held_in_full(build_vlm: Build) -> None:
    """80 visual tokens, 4 rows of logits at a time; a transposed head with its bias has the vocabulary last, too."""
    trainer: Any = build_vlm(LLaVAKDTrainer, vision_rows([5] * 4), chunk_size=4)
    batch = one_batch(trainer)
    width = max(trainer.model.lm_head.in_features, trainer.teacher.model.lm_head.in_features)
    assert int(batch.student.visual.sum()) == 80
    with VocabularyRows(trainer.vocab_size) as seen:
        loss_and_gradients(trainer, batch)
    assert 4 <= seen.most <= width + 1 < 80
