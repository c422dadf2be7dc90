"""Terms of `features` of towers, connectors and visual tokens, for kd and llava_kd."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from mmkd.errors import UserError
from mmkd.losses.feature_losses import cosine
from mmkd.losses.token_matching import matched
from mmkd.losses.visual_relations import pooled
from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.models.captured_features import capturing, feature_of
from mmkd.teachers.batch import View
from mmkd.training.feature_items import image_items
from tests.helpers import Build, losses_of, near, steps
from tests.trainers.test_llava_kd import loss_and_gradients, one_batch
from tests.vlms import vision_rows

SETTINGS: dict[str, Any] = {"assistant_only_loss": True, "max_length": 128}
IMAGES = [1, 2, 0, 3]


def built(
    build: Build, vlms: dict[str, Path], cls: Any, data: Dataset, model: str = "student", **settings: Any
) -> Any:
    models = {"model": str(vlms[model]), "teacher": str(vlms["teacher"])}
    return build(cls, data, trainer=models, **{**SETTINGS, **settings})


def feature(model: Any, name: str, inputs: Any) -> Tensor:
    with capturing(model, [name]) as captured, torch.no_grad():
        model(**inputs)
        found = feature_of(captured[name])
    assert found is not None
    return found


@pytest.mark.parametrize("cls", [KDTrainer, LLaVAKDTrainer])
def test_terms_of_tower_connector_and_visual_tokens(build: Build, vlms: Any, cls: Any) -> None:
    features = ["tower", "projector", {"student": "last_hidden", "tokens": "visual", "kind": "relation"}]
    trainer: Any = built(build, vlms, cls, vision_rows(IMAGES), features=features)
    batch = one_batch(trainer)
    loss_and_gradients(trainer, batch)
    sums = trainer._sums["train"]
    assert {
        name: float(sums[f"feature_{name}"][1]) for name in ("tower", "projector", "last_hidden")
    } == dict.fromkeys(("tower", "projector", "last_hidden"), 6.0)
    for name, module in (("tower", "model.vision_tower"), ("projector", "model.multi_modal_projector")):
        ours, theirs = (feature(side, module, batch.student.inputs) for side in (trainer.model, trainer.teacher.model))
        if name == "tower":
            # The state that the connector is given: without the class token, before the last norm.
            ours, theirs = (
                feature(side, "model.multi_modal_projector:input", batch.student.inputs)
                for side in (trainer.model, trainer.teacher.model)
            )
        weight = trainer._projectors._weights.get(name)
        ours = ours if weight is None else torch.nn.functional.linear(ours, weight)
        expected = cosine(ours.flatten(0, -2), theirs.flatten(0, -2)).mean().item()
        assert float(sums[f"feature_{name}"][0] / 6) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_losses_do_not_depend_on_how_a_batch_is_cut(build: Build, vlms: Any) -> None:
    data = vision_rows(IMAGES * 4)
    features = ["projector", {"student": "language_model.layers.1", "tokens": "visual", "kind": "mse"}]
    expected = steps(built(build, vlms, LLaVAKDTrainer, data, features=features))
    single: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert steps(built(build, vlms, LLaVAKDTrainer, data, features=features, **single)) == near(expected)


@pytest.mark.parametrize("how", ["pool", "hungarian"])
def test_other_numbers_of_visual_tokens_are_pooled_or_matched(build: Build, vlms: Any, how: str) -> None:
    data, term = vision_rows([1, 2]), {"student": "projector"}
    with pytest.raises(UserError, match=r"different numbers of pieces \(\[16.*visual_tokens: pool"):
        built(build, vlms, KDTrainer, data, "fine", features=term)
    trainer: Any = built(build, vlms, KDTrainer, data, "fine", features={**term, "visual_tokens": how})
    batch = one_batch(trainer, 2)
    module = "model.multi_modal_projector"
    ours = feature(trainer.model, module, batch.student.inputs)
    theirs = feature(trainer.teacher.model, module, batch.readings[""].view.inputs)
    weight, distances = trainer._projectors._weights["projector"], []
    for fine, coarse in zip(ours.reshape(3, 16, -1), theirs.reshape(3, 4, -1), strict=True):
        fine = pooled(fine, [16], [4]) if how == "pool" else fine
        fine = torch.nn.functional.linear(fine, weight)
        pair = matched(fine, coarse, "cosine") if how == "hungarian" else (slice(None), slice(None))
        distances.append(cosine(fine[pair[0]], coarse[pair[1]]).mean())
    loss_and_gradients(trainer, batch)
    total, count = trainer._sums["train"]["feature_projector"]
    assert count == 3
    assert (total / count).item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)


def test_gradients_reach_the_tower_and_rows_without_images_leave_it_alone(build: Build, vlms: Any) -> None:
    trainer: Any = built(build, vlms, KDTrainer, vision_rows([1, 0]), features=[{"student": "projector", "weight": 9}])
    plain: Any = built(build, vlms, KDTrainer, vision_rows([1, 0]))
    found, alone = (loss_and_gradients(one, one_batch(one, 2))[1] for one in (trainer, plain))
    changed = {name for name in found if not torch.allclose(found[name], alone[name])}
    assert any("vision_tower" in name for name in changed)
    assert not any("language_model" in name for name in changed)
    batch = trainer._prepare_inputs(trainer.data_collator([dict(trainer.train_dataset[1])]))
    loss, _ = loss_and_gradients(trainer, batch)
    assert loss == pytest.approx(loss_and_gradients(plain, batch)[0], rel=1e-5)


def test_a_frozen_tower_and_text_alone_teach_nothing(build: Build, vlms: Any) -> None:
    data = vision_rows([1] * 4)
    with pytest.raises(UserError, match="nothing up to there is trained"):
        built(build, vlms, KDTrainer, data, features="tower", trainable=["language_model"])
    with pytest.raises(UserError, match=r"computes features of images\. Set tokens: visual"):
        built(build, vlms, KDTrainer, data, features={"student": "projector", "tokens": "answer"})
    with pytest.raises(UserError, match="only one of them computes features of images"):
        built(build, vlms, KDTrainer, data, features={"student": "projector", "teacher": "language_model.layers.0"})


def test_gradmag_balances_a_tower_by_its_own_gradient(build: Build, vlms: Any) -> None:
    settings = {"features": ["projector"], "combine": "gradmag"}
    trainer: Any = built(build, vlms, LLaVAKDTrainer, vision_rows(IMAGES), **settings)
    loss_and_gradients(trainer, one_batch(trainer))
    factors = {name for name in trainer._sums["train"] if name.startswith("balance/")}
    assert factors == {f"balance/{name}" for name in ("ce", "divergence", "visual_kl", "relation_distance")} | {
        "balance/feature_projector"
    }
    assert float(trainer._sums["train"]["balance/feature_projector"][0]) > 0
    trainer.train()
    assert len(losses_of(trainer, "balance/feature_projector")) == 4


def test_images_in_tiles_are_told_apart_by_their_tokens() -> None:
    labels = torch.tensor([[-100, 1], [-100, -100]])
    view = View({}, labels, image_tokens=torch.tensor([[0, 4], [0, 8], [1, 4]]))
    tiles = torch.arange(4.0).repeat_interleave(5)[:, None].view(4, 5, 1)
    items = image_items(tiles, view, "tower")
    assert items.sizes == [5, 10]
    assert items.features.flatten().tolist() == [0.0] * 5 + [1.0] * 5 + [2.0] * 5
    with pytest.raises(UserError, match="which of the 25 features of tower belong to which of 3 images"):
        image_items(torch.zeros(5, 5, 1), view, "tower")
