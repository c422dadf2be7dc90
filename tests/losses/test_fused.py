"""The fused loss: loss and gradients of dense logits and autograd, in chunks and with nothing larger in memory."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmkd.losses import projection
from mmkd.losses.divergences import entropy, forward_kl, log_one_minus_exp, reverse_kl
from mmkd.losses.fused import FusedLoss, Objective, fused_loss
from mmkd.methods.kd import DIVERGENCES, KDConfig
from mmkd.methods.taid import TAIDTrainer
from mmkd.models.heads import LMHead
from mmkd.teachers.signals import DenseSignal, TopKSignal

TOKENS, VOCAB, WIDTH = 10, 13, 6

SETTINGS = cast(KDConfig, SimpleNamespace(beta=0.3, skew=0.1, mu=0.5, bild_top_k=4, dbild_max_k=8))
TAID = cast(
    Any, SimpleNamespace(schedule=SimpleNamespace(t=0.4), args=SimpleNamespace(progress_measure="cross_entropy"))
)


def taid(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return TAIDTrainer._objective(TAID, student, teacher)


OBJECTIVES: dict[str, Objective] = {name: build(SETTINGS) for name, build in DIVERGENCES.items()}
OBJECTIVES["taid"] = taid
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))


@dataclass
class Case:
    """A batch of one student and one teacher; hidden, weight and bias are the leaves of the gradient."""

    hidden: Tensor
    head: LMHead
    labels: Tensor
    teacher: DenseSignal

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None and x.requires_grad]


def make_case(
    tokens: int = TOKENS,
    vocab: int = VOCAB,
    width: int = WIDTH,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    trimmed_to: int | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    trained_bias = normal(vocab).requires_grad_() if bias else None
    head = LMHead(normal(vocab, width).requires_grad_(), trained_bias, scale, softcap, trimmed_to)
    # The teacher is wider, has rows the student lacks, and a head of another kind.
    teacher_head = LMHead(normal(vocab + 3, width + 2), None, 0.7, 9.0).trimmed(head.vocab_size)
    labels = torch.randint(head.vocab_size, (tokens,), generator=generator)
    return Case(
        normal(tokens, width).requires_grad_(), head, labels, DenseSignal(normal(tokens, width + 2), teacher_head)
    )


def dense_logits(hidden: Tensor, head: LMHead) -> Tensor:
    logits = hidden @ head.weight[: head.vocab_size].T
    if head.bias is not None:
        logits = logits + head.bias[: head.vocab_size]
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def dense_loss(case: Case, objective: Objective | None, temperature: float = 1.0, ce_weight: float = 0.0) -> Tensor:
    student, teacher = dense_logits(case.hidden, case.head), dense_logits(case.teacher.hidden, case.teacher.head)
    cross_entropy = torch.nn.functional.cross_entropy(student, case.labels, reduction="sum")
    if objective is None:
        return cross_entropy
    result = objective((student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1))
    divergence = (result[0] if isinstance(result, tuple) else result).sum()
    return (1 - ce_weight) * temperature**2 * divergence + ce_weight * cross_entropy


def run(case: Case, objective: Objective | None = forward_kl, **settings: Any) -> FusedLoss:
    if objective is None:
        return fused_loss(case.hidden, case.head, case.labels, **settings)
    return fused_loss(case.hidden, case.head, case.labels, case.teacher, objective, **settings)


def assert_same(actual: Tensor, expected: Tensor, leaves: list[Tensor], rtol: float = 1e-10) -> None:
    """Equal values and, at every leaf, equal gradients; both relative to the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-13)
    gradients = torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)
    for leaf, ours, autograd in zip(leaves, *gradients, strict=True):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours, autograd, rtol=rtol, atol=rtol * autograd.abs().max().item())


def relative_errors(case: Case, actual: Tensor, reference: Case, expected: Tensor) -> list[float]:
    """The error of each leaf's gradient, relative to the norm of the reference's."""
    ours, theirs = torch.autograd.grad(actual, case.leaves), torch.autograd.grad(expected, reference.leaves)
    return [((a.to(b.dtype) - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]


# Chunked is dense


@each_objective
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("tile_rows", [None, 2])
def test_loss_and_gradients_are_those_of_dense_logits(objective, chunk_size, tile_rows, monkeypatch):
    if tile_rows:
        monkeypatch.setattr(projection, "CPU_TILE_ELEMENTS", tile_rows * VOCAB)
    case = make_case(bias=True)
    loss = run(case, objective, chunk_size=chunk_size)
    assert_same(loss.total, dense_loss(case, objective), case.leaves)
    torch.testing.assert_close(loss.sums["divergence"], loss.total.detach())


def test_tiles_of_less_than_one_row_are_one_row(monkeypatch):
    monkeypatch.setattr(projection, "CPU_TILE_ELEMENTS", 1)
    case = make_case()
    assert_same(run(case).total, dense_loss(case, forward_kl), case.leaves)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 5.0},
    "trimmed": {"trimmed_to": VOCAB - 4},
    "all": {"bias": True, "scale": 0.3, "softcap": 5.0, "trimmed_to": VOCAB - 4},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("objective", [forward_kl, taid, None], ids=["forward_kl", "taid", "cross_entropy"])
def test_every_kind_of_head_gives_the_loss_of_dense_logits(kind, objective):
    case = make_case(**HEADS[kind])
    assert_same(run(case, objective, chunk_size=3).total, dense_loss(case, objective), case.leaves)


@each_objective
@pytest.mark.parametrize("temperature, ce_weight", [(2.0, 0.0), (0.5, 0.3), (1.0, 0.3), (1.0, 1.0), (2.0, 1.0)])
def test_temperature_and_cross_entropy_mix_as_documented(objective, temperature, ce_weight):
    case = make_case(bias=True, softcap=5.0)
    loss = run(case, objective, temperature=temperature, ce_weight=ce_weight, chunk_size=4)
    assert_same(loss.total, dense_loss(case, objective, temperature, ce_weight), case.leaves)
    divergence = dense_loss(case, objective, temperature).detach()
    cross_entropy = dense_loss(case, None).detach()
    torch.testing.assert_close(loss.sums.get("ce", cross_entropy), cross_entropy)
    torch.testing.assert_close(loss.sums.get("divergence", divergence), divergence)


@each_objective
def test_weights_multiply_the_loss_of_each_token_and_no_report(objective):
    case = make_case(bias=True)
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    settings: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.3, "chunk_size": 4, "diagnostics": True}
    loss = run(case, objective, weights=weights, **settings)
    each_token = [
        replace(
            case,
            hidden=case.hidden[row : row + 1],
            labels=case.labels[row : row + 1],
            teacher=replace(case.teacher, hidden=case.teacher.hidden[row : row + 1]),
        )
        for row in range(TOKENS)
    ]
    expected = torch.stack([dense_loss(token, objective, 2.0, 0.3) for token in each_token])
    assert_same(loss.total, (weights * expected).sum(), case.leaves)
    torch.testing.assert_close(loss.sums, run(case, objective, **settings).sums)


def test_without_targets_the_loss_is_the_cross_entropy_whatever_its_weight():
    case = make_case()
    for ce_weight in (0.0, 0.4):
        loss = run(case, None, ce_weight=ce_weight, temperature=3.0, chunk_size=3)
        assert_same(loss.total, dense_loss(case, None), case.leaves)


@pytest.mark.parametrize(
    "objective, temperature, ce_weight", [(forward_kl, 1.0, 0.0), (reverse_kl, 2.0, 0.3), (None, 1.0, 0.0)]
)
def test_gradient_is_that_of_finite_differences(objective, temperature, ce_weight):
    case = make_case(4, 5, 3, bias=True, softcap=4.0)

    def surrogate(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The loss and its gradient as a function that can be differentiated twice, as gradcheck does."""
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        head = replace(case.head, weight=leaves[1], bias=leaves[2])
        changed = Case(leaves[0], head, case.labels, case.teacher)
        loss = run(changed, objective, temperature=temperature, ce_weight=ce_weight, chunk_size=3).total
        gradients = torch.autograd.grad(loss, leaves)
        linear = [((x - x.detach()) * g).sum() for x, g in zip((hidden, weight, bias), gradients, strict=True)]
        return loss.detach() + sum(linear)

    assert torch.autograd.gradcheck(surrogate, tuple(case.leaves))


def test_extra_values_of_an_objective_are_summed_over_the_tokens():
    def with_extra(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return forward_kl(student, teacher), {"cross_entropy": forward_kl(student, teacher) + entropy(teacher)}

    case = make_case()
    student, teacher = dense_logits(case.hidden, case.head), dense_logits(case.teacher.hidden, case.teacher.head)
    loss = run(case, with_extra, chunk_size=3)
    expected = -(teacher.softmax(-1) * student.log_softmax(-1)).sum()
    torch.testing.assert_close(loss.sums["cross_entropy"], expected.detach())
    assert not loss.sums["cross_entropy"].requires_grad
    assert_same(loss.total, dense_loss(case, forward_kl), case.leaves)


def test_student_equal_to_teacher_has_no_loss_and_no_gradient():
    case = make_case()
    case.teacher = DenseSignal(case.hidden.detach().clone(), case.head)
    loss = run(case).total
    assert loss.abs() < 1e-12
    for gradient in torch.autograd.grad(loss, case.leaves):
        assert gradient.abs().max() < 1e-12


# Order and size


def test_chunk_size_changes_nothing_but_rounding():
    case = make_case(bias=True)
    expected = run(case, chunk_size=TOKENS, diagnostics=True)
    for chunk_size in (1, 4, 9, 1000):
        loss = run(case, chunk_size=chunk_size, diagnostics=True)
        torch.testing.assert_close(loss.sums, expected.sums)
        torch.testing.assert_close(loss.total, expected.total)


def test_order_of_tokens_changes_nothing():
    case = make_case()
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    shuffled_hidden = case.hidden.detach()[order].requires_grad_()
    teacher = DenseSignal(case.teacher.hidden[order], case.teacher.head)
    shuffled = run(Case(shuffled_hidden, case.head, case.labels[order], teacher), ce_weight=0.2, chunk_size=3).total
    straight = run(case, ce_weight=0.2, chunk_size=3).total
    torch.testing.assert_close(shuffled, straight)
    by_hidden, by_weight = torch.autograd.grad(straight, [case.hidden, case.head.weight])
    shuffled_by_hidden, shuffled_by_weight = torch.autograd.grad(shuffled, [shuffled_hidden, case.head.weight])
    torch.testing.assert_close(shuffled_by_hidden, by_hidden[order])
    torch.testing.assert_close(shuffled_by_weight, by_weight)


@pytest.mark.parametrize("objective", [forward_kl, None], ids=["forward_kl", "cross_entropy"])
def test_no_tokens_are_a_loss_of_zero_with_zero_gradients(objective):
    case = make_case(0, bias=True)
    loss = run(case, objective, diagnostics=True)
    assert loss.total == 0
    loss.total.backward()
    for leaf in case.leaves:
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("objective", [forward_kl, None], ids=["forward_kl", "cross_entropy"])
@pytest.mark.parametrize("bias", [False, True])
def test_no_tensor_is_larger_than_one_chunk_of_logits_or_the_head(objective, bias):
    tokens, vocab, width, chunk_size = 100, 200, 8, 5
    case = make_case(tokens, vocab, width, dtype=torch.float32, bias=bias)
    bound = max(chunk_size * vocab, case.head.weight.numel(), case.teacher.head.weight.numel())
    with SizeRecorder() as fused_sizes:
        run(case, objective, chunk_size=chunk_size, diagnostics=True).total.backward()
    assert max(fused_sizes.elements) <= bound
    with SizeRecorder() as dense_sizes:
        dense_loss(case, objective).backward()
    assert max(dense_sizes.elements) >= tokens * vocab > bound


class SizeRecorder(TorchDispatchMode):
    """Notes how many elements the tensors have that come out of any operation while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.elements |= {x.numel() for x in results if isinstance(x, Tensor)}
        return result


# What gets a gradient


def test_frozen_head_gets_no_gradient_and_hidden_still_does():
    case = make_case(bias=True)
    frozen = replace(case.head, weight=case.head.weight.detach(), bias=cast(Tensor, case.head.bias).detach())
    loss = run(replace(case, head=frozen)).total
    assert_same(loss, dense_loss(case, forward_kl), [case.hidden])
    assert frozen.weight.grad is None


def test_frozen_hidden_states_get_no_gradient_and_the_head_still_does():
    case = make_case(bias=True)
    frozen = replace(case, hidden=case.hidden.detach())
    assert_same(run(frozen).total, dense_loss(case, forward_kl), frozen.leaves)


def test_bias_alone_can_be_trained():
    case = make_case(bias=True)
    head = replace(case.head, weight=case.head.weight.detach())
    case = replace(case, hidden=case.hidden.detach(), head=head)
    assert_same(run(case).total, dense_loss(case, forward_kl), case.leaves)
    assert len(case.leaves) == 1


def test_tied_head_adds_its_gradient_to_that_of_the_embedding():
    case = make_case()
    embedding, ids = case.head.weight, torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(2))

    def tied() -> Case:
        return replace(case, hidden=embedding[ids].tanh() * 2)

    assert_same(run(tied(), chunk_size=3).total, dense_loss(tied(), forward_kl), [embedding])


def test_rows_that_pad_the_vocabulary_get_no_gradient():
    case = make_case(bias=True, trimmed_to=VOCAB - 4)
    run(case).total.backward()
    weight_grad, bias_grad = (cast(Tensor, leaf.grad) for leaf in case.leaves[1:])
    assert (weight_grad[VOCAB - 4 :] == 0).all()
    assert (bias_grad[VOCAB - 4 :] == 0).all()
    assert (weight_grad[: VOCAB - 4] != 0).all()


def test_gradients_accumulate_over_two_calls():
    case = make_case(bias=True)
    for _ in range(2):
        run(case, chunk_size=3).total.backward()
    expected = torch.autograd.grad(2 * dense_loss(case, forward_kl), case.leaves)
    for leaf, gradient in zip(case.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_upstream_gradient_scales_all_gradients():
    case = make_case(bias=True)
    assert_same(run(case).total * 3, dense_loss(case, forward_kl) * 3, case.leaves)


def test_second_backward_is_refused():
    loss = run(make_case()).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"only once"):
        loss.backward()


def test_a_repeatable_loss_is_backpropagated_as_often_as_its_graph_is_kept():
    case = make_case(bias=True)
    loss = run(case, repeatable=True).total
    expected = torch.autograd.grad(dense_loss(case, forward_kl), case.leaves)
    for factor in (3, 2):
        found = torch.autograd.grad(factor * loss, case.leaves, retain_graph=True)
        for one, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(one, factor * gradient)


@pytest.mark.parametrize("why", ["no_grad", "inference_mode", "nothing to train"])
def test_no_gradient_is_computed_when_nobody_asks(why, monkeypatch):
    case = make_case(bias=True)
    expected = dense_loss(case, forward_kl, ce_weight=0.2).detach()
    if why == "nothing to train":
        for leaf in case.leaves:
            leaf.requires_grad_(False)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a gradient was computed"))
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with modes.get(why, torch.enable_grad)():
        loss = run(case, ce_weight=0.2, chunk_size=3).total
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_inputs_and_labels_are_left_as_they_were():
    case = make_case(bias=True)
    before = [x.detach().clone() for x in (*case.leaves, case.labels, case.teacher.hidden, case.teacher.head.weight)]
    run(case, ce_weight=0.5, diagnostics=True).total.backward()
    after = [*case.leaves, case.labels, case.teacher.hidden, case.teacher.head.weight]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


# Types


def rounded_case(dtype: torch.dtype) -> tuple[Case, Case]:
    """A case in `dtype` and the same numbers in fp32, with logits of the size that language models have."""
    case = make_case(96, 500, 64, dtype=torch.bfloat16, bias=True)
    hidden, weight, bias = (x.detach() * 0.5 for x in case.leaves)

    def cast_to(dtype: torch.dtype) -> Case:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        teacher_head = replace(case.teacher.head, weight=case.teacher.head.weight.to(dtype))
        teacher = DenseSignal(case.teacher.hidden.to(dtype), teacher_head)
        return Case(leaves[0], LMHead(leaves[1], leaves[2]), case.labels, teacher)

    return cast_to(dtype), cast_to(torch.float32)


@pytest.mark.parametrize("objective", [forward_kl, reverse_kl, taid], ids=["forward_kl", "reverse_kl", "taid"])
@pytest.mark.parametrize("precise, limit", [(False, 0.05), (True, 0.01)])
def test_bf16_gradient_is_near_that_of_fp32(objective, precise, limit):
    case, reference = rounded_case(torch.bfloat16)
    loss, expected = run(case, objective, chunk_size=16, precise=precise).total, dense_loss(reference, objective)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=limit, atol=0)
    assert max(relative_errors(case, loss, reference, expected)) < limit


@pytest.mark.parametrize("chunk_size", [16, 1])
def test_precise_halves_the_error_of_bf16_however_many_chunks_are_summed(chunk_size):
    case, reference = rounded_case(torch.bfloat16)

    def errors(precise: bool) -> list[float]:
        loss = run(case, chunk_size=chunk_size, precise=precise).total
        return relative_errors(case, loss, reference, dense_loss(reference, forward_kl))

    assert max(errors(precise=True)) < 0.005
    assert max(errors(precise=True)) < max(errors(precise=False)) / 2


@pytest.mark.parametrize("precise, limit", [(False, 0.05), (True, 0.01)])
def test_fp32_parameters_under_bf16_autocast_get_fp32_gradients(precise, limit):
    case, reference = rounded_case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(case, chunk_size=16, precise=precise).total
    expected = dense_loss(reference, forward_kl)
    torch.testing.assert_close(loss, expected, rtol=limit, atol=0)
    assert max(relative_errors(case, loss, reference, expected)) < limit
    case.hidden.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        run(case, precise=precise).total.backward()
    assert {leaf.grad.dtype for leaf in case.leaves if leaf.grad is not None} == {torch.float32}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_gradients_of_a_wide_vocabulary_survive_fp16(divergence):
    """They are formed before the loss is scaled, per token and not yet divided by the number of tokens."""
    case = make_case(16, 20_000, 32, dtype=torch.float32)
    objective = OBJECTIVES[divergence]
    exact = torch.autograd.grad(run(case, objective).total, case.leaves)
    with torch.autocast("cpu", torch.float16):
        total = run(case, objective).total * 2**16
    scaled = torch.autograd.grad(total, case.leaves)
    for gradient, expected in zip(scaled, exact, strict=True):
        assert gradient.isfinite().all()
        assert (gradient / 2**16 - expected).norm() < 0.01 * expected.norm()


def test_autocast_is_what_it_was_after_the_call():
    case, _ = rounded_case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        run(case)
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_precise_changes_nothing_in_fp64():
    case = make_case(bias=True)
    assert_same(run(case, chunk_size=3, precise=True).total, dense_loss(case, forward_kl), case.leaves)


def test_head_gradient_of_many_rows_is_summed_in_blocks_without_a_gap():
    case = make_case(6, 4100, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(run(case, chunk_size=2).total, [case.head.weight])
    (expected,) = torch.autograd.grad(dense_loss(case, forward_kl), [case.head.weight])
    assert (gradient[4090:] - expected[4090:]).norm() < 0.1 * expected[4090:].norm()


# Labels


@pytest.mark.parametrize("label", [-100, -1, VOCAB - 4, VOCAB])
def test_label_outside_the_vocabulary_is_refused(label):
    case = make_case(trimmed_to=VOCAB - 4)
    case.labels[3] = label
    with pytest.raises(ValueError, match=rf"{label}\b.*head has {VOCAB - 4} tokens"):
        run(case)


# Diagnostics


def expected_diagnostics(case: Case) -> dict[str, Tensor]:
    student = dense_logits(case.hidden, case.head).detach().log_softmax(-1)
    teacher = dense_logits(case.teacher.hidden, case.teacher.head).log_softmax(-1)
    return {
        "ce": -student[range(TOKENS), case.labels].sum(),
        "token_accuracy": (student.argmax(-1) == case.labels).sum(),
        "student_entropy": -(student.exp() * student).sum(),
        "kl": (teacher.exp() * (teacher - student)).sum(),
        "teacher_entropy": -(teacher.exp() * teacher).sum(),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).sum(),
    }


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
def test_diagnostics_are_sums_at_temperature_one(temperature, ce_weight, monkeypatch):
    monkeypatch.setattr(projection, "CPU_TILE_ELEMENTS", 2 * VOCAB)
    case = make_case(bias=True, softcap=5.0)
    case.labels[:4] = dense_logits(case.hidden, case.head).argmax(-1)[:4]
    case.teacher.hidden[0] = 0.0
    loss = run(case, reverse_kl, temperature=temperature, ce_weight=ce_weight, chunk_size=3, diagnostics=True)
    for name, value in expected_diagnostics(case).items():
        torch.testing.assert_close(loss.sums[name], value)
    assert 4 <= loss.sums["token_accuracy"] <= TOKENS
    assert_same(loss.total, dense_loss(case, reverse_kl, temperature, ce_weight), case.leaves)


def test_agreement_counts_every_token_when_student_is_teacher(monkeypatch):
    monkeypatch.setattr(projection, "CPU_TILE_ELEMENTS", 2 * VOCAB)
    case = make_case()
    case.teacher = DenseSignal(case.hidden.detach().clone(), case.head)
    assert run(case, diagnostics=True).sums["top1_agreement"] == TOKENS


def test_diagnostics_without_targets_speak_of_the_student_only():
    case = make_case()
    sums = run(case, None, diagnostics=True).sums
    assert set(sums) == {"ce", "token_accuracy", "student_entropy"}
    expected = expected_diagnostics(case)
    torch.testing.assert_close(sums, {name: expected[name] for name in sums})


def test_without_diagnostics_only_the_terms_of_the_loss_are_summed():
    assert set(run(make_case()).sums) == {"divergence"}
    assert set(run(make_case(), ce_weight=0.5).sums) == {"divergence", "ce"}


# Top-k


def top_k(case: Case, k: int) -> TopKSignal:
    log_probs = dense_logits(case.teacher.hidden, case.teacher.head).log_softmax(-1)
    inside, ids = log_probs.topk(k)
    return TopKSignal(ids, inside, log_one_minus_exp(inside.logsumexp(-1)))


def bucketed(log_probs: Tensor, ids: Tensor) -> Tensor:
    """The log-probs of `ids` and of all other outcomes together."""
    others = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, ids), others], dim=-1)


def dense_top_k_loss(case: Case, signal: TopKSignal, objective: Objective, ce_weight: float = 0.0) -> Tensor:
    teacher = dense_logits(case.teacher.hidden, case.teacher.head).log_softmax(-1)
    log_probs = dense_logits(case.hidden, case.head).log_softmax(-1)
    result = objective(bucketed(log_probs, signal.ids), bucketed(teacher, signal.ids))
    divergence = (result[0] if isinstance(result, tuple) else result).sum()
    return (1 - ce_weight) * divergence - ce_weight * log_probs[range(len(case.labels)), case.labels].sum()


def run_top_k(case: Case, signal: TopKSignal, objective: Objective, **settings: Any) -> FusedLoss:
    return fused_loss(case.hidden, case.head, case.labels, signal, objective, **settings)


@each_objective
@pytest.mark.parametrize("k", [1, 4, VOCAB - 2, VOCAB - 1])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_top_k_loss_and_gradient_are_those_of_the_bucketed_distributions(objective, k, ce_weight):
    case = make_case(bias=True)
    signal = top_k(case, k)
    loss = run_top_k(case, signal, objective, ce_weight=ce_weight, chunk_size=3).total
    assert_same(loss, dense_top_k_loss(case, signal, objective, ce_weight), case.leaves, rtol=1e-8)


@each_objective
@pytest.mark.parametrize("nothing", [-1e4, -torch.inf])
def test_top_k_of_the_whole_vocabulary_is_dense(objective, nothing):
    case = make_case()
    signal = replace(top_k(case, VOCAB), tail_log_probs=torch.full((TOKENS,), nothing))
    loss = run_top_k(case, signal, objective, chunk_size=3).total
    assert_same(loss, dense_loss(case, objective), case.leaves, rtol=1e-7)


@pytest.mark.parametrize("k", [1, 4, VOCAB - 1])
def test_top_k_diagnostics_are_those_of_the_bucketed_distributions(k, monkeypatch):
    monkeypatch.setattr(projection, "CPU_TILE_ELEMENTS", 2 * VOCAB)
    case = make_case()
    case.labels[:4] = dense_logits(case.hidden, case.head).argmax(-1)[:4]
    signal = top_k(case, k)
    sums = run_top_k(case, signal, reverse_kl, chunk_size=3, diagnostics=True).sums
    teacher = bucketed(dense_logits(case.teacher.hidden, case.teacher.head).log_softmax(-1), signal.ids)
    expected = expected_diagnostics(case) | {
        "kl": dense_top_k_loss(case, signal, forward_kl).detach(),
        "teacher_entropy": entropy(teacher).sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(sums[name], value, msg=lambda message, name=name: f"{name}: {message}")


def test_top_k_cannot_be_tempered():
    case = make_case()
    with pytest.raises(ValueError, match=r"temperature 1 only, not at 2.0; set temperature: 1"):
        run_top_k(case, top_k(case, 4), forward_kl, temperature=2.0)


def test_top_k_kl_is_at_most_that_of_the_whole_vocabulary():
    case = make_case()
    whole = dense_loss(case, forward_kl)
    losses = [run_top_k(case, top_k(case, k), forward_kl).total for k in (1, 4, VOCAB - 2)]
    assert losses[0] < losses[1] < losses[2] < whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_remainder_of_a_probability_is_finite_up_to_one(dtype):
    probabilities = torch.tensor([0.0, 0.25, 0.999, 1.0], dtype=dtype)
    remainder = log_one_minus_exp(probabilities.log())
    torch.testing.assert_close(remainder[:3], (1 - probabilities[:3]).log(), rtol=1e-4, atol=1e-7)
    assert remainder[3] == pytest.approx(float(torch.tensor(torch.finfo(dtype).eps).log()), rel=1e-3)
    # Rounding may put the sum of the inside above one.
    assert log_one_minus_exp(torch.tensor(1e-6, dtype=dtype)).isfinite()
