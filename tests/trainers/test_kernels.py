"""Other packages' fused losses: our numbers, refused where they cannot be, checked before the first step."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from mmkd.losses import divergences
from mmkd.losses.fused import FusedLoss, fused_loss
from mmkd.methods.alm import ALMConfig
from mmkd.methods.comd.comd_trainer import CoMDConfig
from mmkd.methods.kd import DIVERGENCES, KDConfig, KDTrainer
from mmkd.methods.llava_kd import LLaVAKDConfig
from mmkd.methods.sft import SFTBaselineConfig
from mmkd.methods.taid import TAIDConfig
from mmkd.models.heads import LMHead
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.signals import DenseSignal
from mmkd.training import kernels
from mmkd.training.kernels import FOREIGN, CheckedKernel, Tokens, check_equal, run
from scripts.make_tiny_models import make_model
from tests.helpers import Build, losses_of

BETAS = {0.0: divergences.forward_kl, 1.0: divergences.reverse_kl, 0.3: partial(divergences.jsd, beta=0.3)}
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)
# Without a GPU, TRL's function folds its tiles in torch, by the same formulas as in its Triton kernel.
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
# Every step but the last is then one of the foreign kernel.
SELDOM: dict[str, Any] = {"logging_steps": 4}


@pytest.fixture(autouse=True)
def liger_is_optional(request: pytest.FixtureRequest) -> None:
    params = getattr(request.node, "callspec", None)
    if "liger" in (params.params.values() if params else ()) and find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not among mmkd's dependencies")


def make_tokens(device: str = "cpu", dtype: torch.dtype = torch.float32, beta: float = 0.0, **changes: Any) -> Tokens:
    """Seventy tokens of a student of 101 rows that shares 97 tokens with its wider teacher."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    head = LMHead(normal(101, 16).requires_grad_()).trimmed(97)
    teacher = DenseSignal(normal(70, 24), LMHead(0.5 * normal(103, 24)).trimmed(97))
    labels = torch.randint(97, (70,), generator=generator).to(device)
    return replace(Tokens(normal(70, 16).requires_grad_(), head, labels, teacher, beta, 1.0, 512), **changes)


def ours(tokens: Tokens) -> torch.Tensor:
    return checked_against(tokens)(tokens.hidden, tokens.head, tokens.labels, tokens.teacher).total


def checked_against(tokens: Tokens) -> Any:
    return partial(fused_loss, objective=BETAS[tokens.beta], temperature=tokens.temperature)


def with_gradients(total: torch.Tensor, tokens: Tokens) -> list[torch.Tensor]:
    return [total, *torch.autograd.grad(total, [tokens.hidden, tokens.head.weight])]


@DEVICES
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", list(BETAS))
@pytest.mark.parametrize("name", list(FOREIGN))
def test_a_kernel_computes_our_sum_and_gradients(name: str, beta: float, temperature: float, device: str) -> None:
    """Padding rows of either vocabulary take no mass and get no gradient."""
    tokens = make_tokens(device, beta=beta, temperature=temperature)
    found = with_gradients(3 * run(name, tokens), tokens)
    torch.testing.assert_close(found, with_gradients(3 * ours(tokens), tokens), rtol=1e-4, atol=1e-4)
    assert not found[2][97:].any()


@DEVICES
def test_the_triton_kernel_knows_scale_and_softcap(device: str) -> None:
    tokens = make_tokens(device)
    teacher = replace(tokens.teacher, head=replace(tokens.teacher.head, scale=0.5, softcap=5.0))
    tokens = replace(tokens, head=replace(tokens.head, scale=0.25, softcap=3.0), teacher=teacher)
    found = with_gradients(run("triton", tokens), tokens)
    torch.testing.assert_close(found, with_gradients(ours(tokens), tokens), rtol=1e-4, atol=1e-4)


@DEVICES
@pytest.mark.parametrize("name", list(FOREIGN))
def test_a_kernel_runs_in_the_type_of_autocast(name: str, device: str) -> None:
    tokens = make_tokens(device)
    with torch.autocast(device, torch.bfloat16):
        found = with_gradients(run(name, tokens), tokens)
        expected = with_gradients(ours(tokens), tokens)
    assert [one.dtype for one in found] == [torch.float32] * 3
    for one, other in zip(found, expected, strict=True):
        assert 0 < (one - other).norm() < 0.02 * other.norm()


@DEVICES
@pytest.mark.parametrize("beta", list(BETAS))
@pytest.mark.parametrize("name", list(FOREIGN))
def test_equal_kernels_pass_the_check(name: str, beta: float, device: str) -> None:
    check_equal(name, tokens := make_tokens(device, beta=beta), checked_against(tokens))


@pytest.mark.parametrize("name", list(FOREIGN))
def test_a_student_that_is_its_own_teacher_passes_the_check(name: str) -> None:
    """Loss and gradients are then nothing but rounding errors, whose ratio means nothing."""
    tokens = make_tokens()
    tokens = replace(tokens, teacher=DenseSignal(tokens.hidden.detach(), tokens.head))
    check_equal(name, tokens, checked_against(tokens))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda total, tokens: 1.003 * total, "loss differs .* by 0.30%"),
        (
            lambda total, tokens: total + (tokens.hidden - tokens.hidden.detach()).sum(),
            "gradient of the hidden states",
        ),
        (
            lambda total, tokens: total + (tokens.head.weight - tokens.head.weight.detach()).sum(),
            "gradient of the head",
        ),
        (lambda total, tokens: total * torch.nan, "loss differs .* by nan%"),
    ],
)
def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: Any, what: str) -> None:
    tokens = make_tokens()
    monkeypatch.setitem(FOREIGN, "liger", lambda tokens: wrong(ours(tokens), tokens))
    with pytest.raises(ValueError, match=f"(?s)kernel liger.*{what}.*kernel: torch"):
        check_equal("liger", tokens, checked_against(tokens))


def test_ligers_jsd_in_bf16_is_refused_and_trls_is_not() -> None:
    """Off a GPU Liger takes the softmax in bf16."""
    pytest.importorskip("liger_kernel")
    tokens = make_tokens(dtype=torch.bfloat16, beta=0.3)
    check_equal("triton", tokens, checked_against(tokens))
    with pytest.raises(ValueError, match="kernel liger does not agree"):
        check_equal("liger", tokens, checked_against(tokens))


def test_a_frozen_head_is_compared_without_its_gradient() -> None:
    tokens = make_tokens()
    tokens = replace(tokens, head=replace(tokens.head, weight=tokens.head.weight.detach()))
    check_equal("triton", tokens, checked_against(tokens))


def weights_after(trainer: Any) -> list[torch.Tensor]:
    trainer.train()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call of Liger, those of the check among them."""
    pytest.importorskip("liger_kernel")
    seen: list[int] = []
    monkeypatch.setitem(FOREIGN, "liger", lambda tokens: (seen.append(len(tokens.labels)), kernels.liger(tokens))[1])
    return seen


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_training_with_liger_is_training_with_ours(
    build: Build, completions: Dataset, untied: dict[str, Path], calls: list[int], tied: bool, lora: bool
) -> None:
    """Tied heads, heads of their own and frozen ones; the fourth step is logged, and so is ours."""
    models = {} if tied else {name: str(path) for name, path in untied.items()}
    models = {"model": models["student"], "teacher": models["teacher"]} if models else {}

    def trained(kernel: str) -> Any:
        config = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")} if lora else {}
        settings = {"divergence": "jsd", "temperature": 2.0, "gradient_accumulation_steps": 2, **SELDOM}
        trainer = build(KDTrainer, completions, trainer={**models, **config}, kernel=kernel, **settings)
        torch.manual_seed(0)
        return weights_after(trainer), losses_of(trainer), losses_of(trainer, "divergence"), losses_of(trainer, "kl")

    found = trained("liger")
    # One of the check, then two micro-batches of the three steps that are not logged.
    assert len(calls) == 7
    expected = trained("torch")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
    assert found[1:] == tuple(pytest.approx(values, rel=1e-4) for values in expected[1:])


def test_a_kernel_is_checked_before_the_first_step(
    build: Build, completions: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("liger_kernel")
    monkeypatch.setitem(FOREIGN, "liger", lambda tokens: 1.1 * kernels.liger(tokens))
    trainer = build(KDTrainer, completions, kernel="liger", logging_first_step=True, **SELDOM)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(ValueError, match=r"differs from that in fp32 by 10\.00%.*kernel: torch"):
        trainer.train()
    assert all(torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))


def test_a_batch_without_tokens_is_ours(calls: list[int]) -> None:
    """It has the same names in its reports, and the check waits for tokens."""
    kernel, tokens = CheckedKernel("liger", 0.0), make_tokens()
    for count in (0, 5):
        rows = slice(count)
        teacher = replace(tokens.teacher, hidden=tokens.teacher.hidden[rows])
        loss: FusedLoss = kernel(tokens.hidden[rows], tokens.head, tokens.labels[rows], teacher, chunk_size=8)
        assert list(loss.sums) == ["divergence"]
        assert kernel.checked == (count > 0)
    assert calls == [5, 5]


def test_evaluation_is_ours(build: Build, completions: Dataset, calls: list[int]) -> None:
    trainer = build(KDTrainer, completions, kernel="liger", **SELDOM)
    assert trainer.evaluate(completions.select(range(4)))["eval_kl"] > 0
    assert not calls


# What is refused


@pytest.mark.parametrize("name", list(FOREIGN))
@pytest.mark.parametrize("divergence", sorted({*DIVERGENCES} - {"forward_kl", "reverse_kl", "jsd"}))
def test_divergences_that_a_kernel_has_not(tmp_path: Path, name: str, divergence: str) -> None:
    with pytest.raises(ValueError, match=f"kernel {name} computes .* nothing else.*kernel: torch"):
        KDConfig(str(tmp_path), kernel=name, divergence=divergence)


@pytest.mark.parametrize("config", [TAIDConfig, SFTBaselineConfig, CoMDConfig, LLaVAKDConfig, ALMConfig])
def test_methods_that_a_kernel_does_not_know(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ValueError, match="of method kd and nothing else"):
        config(str(tmp_path), kernel="liger")
    assert config(str(tmp_path)).kernel == "auto"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "cuda"}, "kernel is 'cuda'; choose one of auto, torch, triton, liger"),
        ({"ce_weight": 0.1}, "no cross-entropy"),
        ({"precise_logits": True}, "kernel: torch or triton"),
        ({"fp16": True}, "bf16: true"),
        ({"logging_steps": 1}, "every step.*logging_steps: 10"),
        ({"logging_strategy": "epoch"}, "every step"),
    ],
)
def test_settings_that_a_kernel_cannot_serve(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KDConfig(str(tmp_path), **{"kernel": "liger", "bf16": False, "logging_steps": 10, **settings})


def test_triton_needs_cuda(build: Build, completions: Dataset) -> None:
    with pytest.raises(ValueError, match=r"CUDA .* this is cpu\. Set kernel: auto"):
        build(KDTrainer, completions, kernel="triton", use_cpu=True, **SELDOM)


def test_liger_is_named_where_it_is_missing(
    build: Build, completions: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        build(KDTrainer, completions, kernel="liger", **SELDOM)


def settings_of(kernel: str, device: str) -> Any:
    """What `token_loss` reads, also of a device that is not here."""
    return SimpleNamespace(kernel=kernel, kernel_beta=0.0, device=torch.device(device))


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        ("liger", "logit_scale", "student's head has a logit scale, without which kernel liger"),
        ("liger", "final_logit_softcapping", "student's head has a logit softcap"),
        ("liger", "bias", "student's head has a bias"),
        ("triton", "bias", "student's head has a bias"),
    ],
)
def test_heads_that_a_kernel_does_not_know(
    monkeypatch: pytest.MonkeyPatch, name: str, field: str, message: str
) -> None:
    monkeypatch.setattr(kernels, "is_triton_available", lambda: True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: True)
    student, teacher = make_model(), LocalTeacher(make_model(seed=1))
    args = settings_of(name, "cuda")
    assert isinstance(kernels.token_loss(args, student, teacher, sharded=False), CheckedKernel)
    if field == "bias":
        student.lm_head.bias = torch.nn.Parameter(torch.zeros(300))
    else:
        setattr(student.config, field, 0.5)
    with pytest.raises(ValueError, match=f"{message}.*kernel: torch"):
        kernels.token_loss(args, student, teacher, sharded=False)


@pytest.mark.parametrize("name", list(FOREIGN))
def test_only_a_teacher_model_tells_its_hidden_states(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(kernels, "is_triton_available", lambda: True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="which a Cached does not tell"):
        kernels.token_loss(settings_of(name, "cuda"), make_model(), type("Cached", (), {})(), sharded=False)


def test_triton_does_not_read_a_sharded_head_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_triton_available", lambda: True)
    with pytest.raises(ValueError, match=r"backward pass.*torch or liger"):
        kernels.token_loss(settings_of("triton", "cuda"), make_model(), None, sharded=True)


def test_liger_under_fsdp2_is_ours_alone(build: Build, completions: Dataset, untied: Any, ranks: Any) -> None:
    """The head is whole where Liger computes its gradients."""
    pytest.importorskip("liger_kernel")
    models = {name: str(path) for name, path in untied.items()}
    settings = {"per_device_train_batch_size": 4, "logging_steps": 2}
    alone = build(
        KDTrainer, completions, trainer={"model": models["student"], "teacher": models["teacher"]}, **settings
    )
    alone.train()
    expected = list(zip(losses_of(alone), losses_of(alone, "grad_norm"), strict=True))
    for rank in ranks["kd fsdp2 by liger"]:
        assert rank["steps"] == [pytest.approx(pair, rel=1e-4) for pair in expected]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton needs a GPU")
@pytest.mark.parametrize("name", list(FOREIGN))
def test_training_on_a_gpu_in_bf16(build: Build, completions: Dataset, name: str) -> None:
    def trained(kernel: str) -> list[float]:
        trainer = build(KDTrainer, completions, kernel=kernel, bf16=True, **SELDOM)
        trainer.train()
        return losses_of(trainer)

    assert trained(name) == pytest.approx(trained("torch"), rel=0.02)
