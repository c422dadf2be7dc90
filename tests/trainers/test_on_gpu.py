"""On a GPU: losses, gradients, steps and quantised weights are those of the CPU. Skipped where there is none.

scripts/gpu_proof.sh runs this with the benchmarks; tests/test_on_cuda.py pretends a GPU and runs everywhere.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from mmkd.losses.fused import fused_loss
from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.models.heads import LMHead
from mmkd.models.quantisation_grids import FORMATS, Grid
from mmkd.teachers.signals import DenseSignal
from tests.helpers import Build, losses_of
from tests.losses.test_fused import OBJECTIVES, Case, make_case
from tests.vlms import vision_rows

DEVICE = torch.device("cuda")

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


def moved(case: Case, device: torch.device, dtype: torch.dtype) -> Case:
    """The same batch on a device, its tensors rounded to a type: leaves of a gradient of their own."""

    def there(values: torch.Tensor) -> torch.Tensor:
        return values.detach().to(device, dtype)

    head = replace(case.head, weight=there(case.head.weight).requires_grad_())
    teacher_head = replace(case.teacher.head, weight=there(case.teacher.head.weight))
    assert isinstance(head, LMHead)
    teacher = DenseSignal(there(case.teacher.hidden), teacher_head)
    return Case(there(case.hidden).requires_grad_(), head, case.labels.to(device), teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_fused_loss_and_its_gradients_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    if "bild" in name and dtype != torch.float32:
        pytest.skip("which logits are the likeliest, and so compared, depends on their rounding")
    objective = OBJECTIVES[name]
    rounded = moved(make_case(96, 300, 32, dtype=torch.float32, scale=0.2), torch.device("cpu"), dtype)
    # The CPU computes the rounded inputs in float32.
    cases = [moved(rounded, torch.device("cpu"), torch.float32), moved(rounded, DEVICE, dtype)]
    totals, gradients = [], []
    for case in cases:
        loss = fused_loss(case.hidden, case.head, case.labels, case.teacher, objective, chunk_size=40, ce_weight=0.3)
        loss.total.backward()
        totals.append(loss.total.item())
        gradients.append([leaf.grad.cpu().float() for leaf in case.leaves if leaf.grad is not None])
    far = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    assert totals[1] == pytest.approx(totals[0], rel=far)
    for here, there in zip(*gradients, strict=True):
        assert torch.linalg.vector_norm(there - here) <= far * torch.linalg.vector_norm(here)


@pytest.mark.parametrize("cls", [SFTBaselineTrainer, KDTrainer, TAIDTrainer])
def test_steps_are_those_of_the_cpu(cls: Any, build: Build, texts: Dataset) -> None:
    trained = []
    for use_cpu in (True, False):
        models = {} if cls.needs_teacher else {"teacher": None}
        trainer = build(cls, texts, trainer=models, use_cpu=use_cpu)
        assert trainer.args.device.type == ("cpu" if use_cpu else DEVICE.type)
        trainer.train()
        trained.append([*losses_of(trainer), *losses_of(trainer, "grad_norm")])
    assert trained[1] == pytest.approx(trained[0], rel=2e-3)


def test_steps_of_a_vlm_are_those_of_the_cpu(build: Build, vlms: dict[str, Path]) -> None:
    trained = []
    for use_cpu in (True, False):
        models = {"model": str(vlms["student"]), "teacher": str(vlms["teacher"])}
        settings: dict[str, Any] = {"assistant_only_loss": True, "max_length": 128, "use_cpu": use_cpu}
        trainer = build(LLaVAKDTrainer, vision_rows([1, 2, 0, 3] * 4), trainer=models, **settings)
        trainer.train()
        trained.append([*losses_of(trainer), *losses_of(trainer, "visual_kl")])
    assert trained[1] == pytest.approx(trained[0], rel=2e-3)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"fp16": True}], ids=lambda keys: next(iter(keys)))
def test_half_precision_trains(settings: dict[str, Any], build: Build, texts: Dataset) -> None:
    whole, half = (build(KDTrainer, texts, **keys) for keys in ({}, settings))
    for trainer in (whole, half):
        trainer.train()
    assert losses_of(half) == pytest.approx(losses_of(whole), rel=0.05)


@pytest.mark.parametrize("format", FORMATS)
def test_quantised_weights_are_those_of_the_cpu(format: str) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    grid = Grid.of(format)
    here, there = grid.fake_quantised(weight), grid.fake_quantised(weight.to(DEVICE)).cpu()
    # A division may round to the neighbour where a weight lies between two codes.
    assert (here != there).float().mean() < 0.01
    torch.testing.assert_close(there, here, rtol=0.2, atol=0.2)
