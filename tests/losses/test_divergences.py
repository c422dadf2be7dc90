"""Divergences: the authors' own numbers, the identities that define them, and what happens at probability zero."""

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmkd.losses.divergences import (
    Divergence,
    adaptive_kl,
    entropy,
    forward_kl,
    interpolated_log_probs,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    tvd,
)

GOLDEN = Path(__file__).parents[1] / "golden"

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_0": partial(jsd, beta=0.0),
    "jsd_0.1": partial(jsd, beta=0.1),
    "jsd_0.5": jsd,
    "jsd_1": partial(jsd, beta=1.0),
    "skew_kl_0": partial(skew_kl, skew=0.0),
    "skew_kl_0.1": skew_kl,
    "skew_kl_1": partial(skew_kl, skew=1.0),
    "skew_reverse_kl_0": partial(skew_reverse_kl, skew=0.0),
    "skew_reverse_kl_0.1": skew_reverse_kl,
    "skew_reverse_kl_1": partial(skew_reverse_kl, skew=1.0),
    "tvd": tvd,
    "adaptive_kl_0": partial(adaptive_kl, mu=0.0),
    "adaptive_kl_0.5": adaptive_kl,
    "adaptive_kl_1": partial(adaptive_kl, mu=1.0),
}
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=list(DIVERGENCES))

# Rounding of fp32 sums of a few outcomes, where the value itself should be zero.
ROUNDING = 2e-6

logits = st.floats(-30, 30, width=32)
pairs_of_logits = st.lists(st.tuples(logits, logits), min_size=2, max_size=12).map(lambda pairs: torch.tensor(pairs).T)


def random_log_probs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, *shape, generator=generator, dtype=dtype)).log_softmax(-1)
    return student, teacher


def check_golden(file: str, name: str, loss: Tensor, student_logits: Tensor) -> None:
    golden = np.load(GOLDEN / file)
    (gradient,) = torch.autograd.grad(loss, student_logits)
    np.testing.assert_allclose(loss.item(), golden[f"{name}__loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient.numpy(), golden[f"{name}__grad"], rtol=1e-4, atol=1e-6)


# The authors' numbers


def cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    return forward_kl(student, target) + entropy(target)


def taid(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    return cross_entropy(student, interpolated_log_probs(student, teacher, t))


TAID_REPOSITORY: dict[str, Divergence] = {
    "fkl_ce": cross_entropy,
    "rkl": reverse_kl,
    "tvd": tvd,
    "js_0.1": partial(jsd, beta=0.1),
    "js_0.5": jsd,
    "adaptive_kl_0.5": partial(adaptive_kl, taid_parity=True),
    "sfkl_0.1": lambda student, teacher: skew_kl(student, teacher, 0.1) + entropy(teacher),
    "srkl_0.1": partial(skew_reverse_kl, skew=0.1),
    "taid_t0.0": partial(taid, t=0.0),
    "taid_t0.2": partial(taid, t=0.2),
    "taid_t0.4": partial(taid, t=0.4),
    "taid_t0.75": partial(taid, t=0.75),
    "taid_t1.0": partial(taid, t=1.0),
}


@pytest.mark.parametrize("name", TAID_REPOSITORY)
def test_loss_and_gradient_are_those_of_the_taid_repository(name):
    golden = np.load(GOLDEN / "TAID_losses.npz")
    student = torch.tensor(golden["student_logits"], requires_grad=True)
    teacher, mask = torch.tensor(golden["teacher_logits"]), torch.tensor(golden["mask"])
    values = TAID_REPOSITORY[name](student.log_softmax(-1), teacher.log_softmax(-1))
    check_golden("TAID_losses.npz", name, (values * mask).sum() / mask.sum(), student)


def peer_values(divergence: Divergence, temperature: float) -> tuple[Tensor, Tensor]:
    """The divergence at the supervised tokens of the peers' batch, and the student's logits."""
    golden = np.load(GOLDEN / "peer_divergences.npz")
    student = torch.tensor(golden["student_logits"], requires_grad=True)
    teacher = torch.tensor(golden["teacher_logits_same_vocab"])
    values = divergence((student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1))
    return values[torch.tensor(golden["student_labels"]) != -100], student


DSKD: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "adaptive_kl": adaptive_kl,
    "skewed_forward_kl": skew_kl,
    "skewed_reverse_kl": skew_reverse_kl,
    "js_divergence": jsd,
}


@pytest.mark.parametrize("name", DSKD)
def test_loss_and_gradient_are_those_of_dskd(name):
    # DSKD adds 1e-9 inside the logarithms of its JSD: below rounding, since no probability here is below 1e-3.
    values, student = peer_values(DSKD[name], 2.0)
    check_golden("peer_divergences.npz", f"dskd_{name}_T2", values.sum(), student)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_jsd_and_gradient_are_those_of_gkd(beta):
    values, student = peer_values(partial(jsd, beta=beta), 0.9)
    check_golden("peer_divergences.npz", f"gkd_jsd_b{beta}_T0.9", values.mean(), student)


# Identities


@each_divergence
def test_divergence_of_equal_distributions_is_zero_and_so_is_its_gradient(divergence):
    _, teacher = random_log_probs(5, 11, dtype=torch.float32)
    student_logits = teacher.clone().requires_grad_()
    values = divergence(student_logits.log_softmax(-1), teacher)
    (gradient,) = torch.autograd.grad(values.sum(), student_logits)
    torch.testing.assert_close(values, torch.zeros(5), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(gradient, torch.zeros(5, 11), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_interpolation_of_equal_distributions_is_that_distribution(t):
    _, teacher = random_log_probs(5, 11)
    torch.testing.assert_close(interpolated_log_probs(teacher, teacher, t), teacher)


@each_divergence
@settings(deadline=None, max_examples=40)
@given(pair=pairs_of_logits)
def test_divergence_is_finite_and_never_negative(divergence, pair):
    value = divergence(*pair.log_softmax(-1))
    assert value.isfinite()
    assert value >= -ROUNDING


@settings(deadline=None, max_examples=100)
@given(pair=pairs_of_logits, beta=st.floats(0.01, 0.99))
def test_jsd_is_symmetric_and_bounded(pair, beta):
    student, teacher = pair.double().log_softmax(-1)
    torch.testing.assert_close(jsd(student, teacher), jsd(teacher, student))
    assert jsd(student, teacher) <= math.log(2) + 1e-12
    torch.testing.assert_close(jsd(student, teacher, beta), jsd(teacher, student, 1 - beta), rtol=1e-7, atol=1e-12)
    # The mixture cannot say more than which of the two distributions an outcome came from.
    assert jsd(student, teacher, beta) <= entropy(torch.tensor([beta, 1 - beta], dtype=torch.float64).log()) + 1e-12


def test_jsd_is_its_definition():
    student, teacher = random_log_probs(6, 9)
    mixture = (0.3 * teacher.exp() + 0.7 * student.exp()).log()
    expected = 0.3 * forward_kl(mixture, teacher) + 0.7 * forward_kl(mixture, student)
    torch.testing.assert_close(jsd(student, teacher, 0.3), expected)


def test_jsd_at_both_ends_is_forward_and_reverse_kl():
    student, teacher = random_log_probs(6, 9)
    assert torch.equal(jsd(student, teacher, 0.0), forward_kl(student, teacher))
    assert torch.equal(jsd(student, teacher, 1.0), reverse_kl(student, teacher))


def test_reverse_kl_is_forward_kl_of_exchanged_arguments():
    student, teacher = random_log_probs(6, 9)
    assert torch.equal(reverse_kl(student, teacher), forward_kl(teacher, student))
    assert torch.equal(skew_reverse_kl(student, teacher, 0.2), skew_kl(teacher, student, 0.2))
    assert not torch.allclose(reverse_kl(student, teacher), forward_kl(student, teacher))


def test_forward_kl_is_that_of_torch():
    student, teacher = random_log_probs(6, 9)
    expected = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), expected)


@pytest.mark.parametrize("log_prob", [-20.0, -120.0, -2000.0])
def test_skew_zero_is_plain_kl_also_where_a_probability_underflows(log_prob):
    rare = torch.tensor([[0.0, log_prob, -1.0]]).log_softmax(-1)
    plain = torch.tensor([[0.5, 1.0, -1.0]]).log_softmax(-1)
    torch.testing.assert_close(skew_kl(rare, plain, 0.0), forward_kl(rare, plain))
    torch.testing.assert_close(skew_reverse_kl(plain, rare, 0.0), reverse_kl(plain, rare))


def test_skew_one_is_zero():
    student, teacher = random_log_probs(6, 9)
    zero = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(skew_kl(student, teacher, 1.0), zero)
    torch.testing.assert_close(skew_reverse_kl(student, teacher, 1.0), zero)


@settings(deadline=None, max_examples=50)
@given(pair=pairs_of_logits)
def test_tvd_is_a_distance_of_at_most_one(pair):
    student, teacher = pair.log_softmax(-1)
    assert 0 <= tvd(student, teacher) <= 1 + ROUNDING
    torch.testing.assert_close(tvd(student, teacher), tvd(teacher, student))


def test_tvd_of_disjoint_distributions_is_one():
    student, teacher = torch.tensor([0.5, 0.5, 0.0, 0.0]).log(), torch.tensor([0.0, 0.0, 0.25, 0.75]).log()
    assert tvd(student, teacher) == 1


def test_entropy_of_the_uniform_distribution_is_the_logarithm_of_its_size():
    torch.testing.assert_close(entropy(torch.zeros(3, 8).log_softmax(-1)), torch.full((3,), math.log(8)))


# Adaptive KL


def adaptive_kl_by_hand(student: Tensor, teacher: Tensor, mu: float) -> Tensor:
    """The definition, outcome by outcome: the shares are numbers, so nothing flows through them."""
    values = []
    for log_q, log_p in zip(student, teacher, strict=True):
        p, q = log_p.exp().tolist(), log_q.exp().tolist()
        gaps, mass, head_gap = [abs(a - b) for a, b in zip(p, q, strict=True)], 0.0, 0.0
        for index in sorted(range(len(p)), key=lambda i: -p[i]):
            if mass >= mu:
                break
            mass, head_gap = mass + p[index], head_gap + gaps[index]
        share = head_gap / sum(gaps)
        values.append(share * forward_kl(log_q, log_p) + (1 - share) * reverse_kl(log_q, log_p))
    return torch.stack(values)


@pytest.mark.parametrize("mu", [0.1, 0.5, 0.9])
def test_adaptive_kl_and_its_gradient_are_those_of_frozen_shares(mu):
    student, teacher = random_log_probs(8, 10)
    student.requires_grad_()
    value, expected = adaptive_kl(student, teacher, mu), adaptive_kl_by_hand(student, teacher, mu)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0])


def test_adaptive_kl_sorts_as_much_of_a_wide_vocabulary_as_each_item_needs():
    """Half the mass is on less than 64, less than 4096 and more outcomes, in turns."""
    student, teacher = random_log_probs(6, 9000)
    sharpness = torch.tensor([2.0, 0.5, 0.01, 0.01, 0.5, 2.0])[:, None]
    teacher = (sharpness * teacher).log_softmax(-1)
    counts = (teacher.exp().sort(-1, descending=True).values.cumsum(-1) < 0.5).sum(-1)
    assert [int(torch.bucketize(count, torch.tensor([64, 4096]))) for count in counts] == [0, 1, 2, 2, 1, 0]
    shape = (2, 3, 9000)
    found = adaptive_kl(student.reshape(shape), teacher.reshape(shape))
    torch.testing.assert_close(found.flatten(), adaptive_kl_by_hand(student, teacher, 0.5))


def test_adaptive_kl_takes_as_few_outcomes_as_reach_mu():
    teacher, student = torch.tensor([[0.5, 0.3, 0.2]]).double().log(), torch.tensor([[0.2, 0.2, 0.6]]).double().log()
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    # Half of the teacher's mass is exactly its first outcome, whose gap is 0.3 of a total of 0.8.
    torch.testing.assert_close(adaptive_kl(student, teacher, 0.5), 0.375 * forward + 0.625 * reverse)
    torch.testing.assert_close(adaptive_kl(student, teacher, 0.51), 0.5 * forward + 0.5 * reverse)


def test_adaptive_kl_without_head_is_reverse_and_without_tail_forward_kl():
    student, teacher = random_log_probs(6, 9)
    torch.testing.assert_close(adaptive_kl(student, teacher, 0.0), reverse_kl(student, teacher))
    torch.testing.assert_close(adaptive_kl(student, teacher, 1.0), forward_kl(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptive_kl_without_tail_is_forward_kl_however_probabilities_are_rounded(dtype):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(8, 5000, generator=generator).log_softmax(-1).to(dtype) for _ in range(2))
    torch.testing.assert_close(adaptive_kl(student, teacher, 1.0), forward_kl(student, teacher), rtol=1e-6, atol=0)


def test_adaptive_kl_finds_a_head_of_many_outcomes_in_half_precision():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(8, 5000, generator=generator).log_softmax(-1) for _ in range(2))
    found = adaptive_kl(student.bfloat16(), teacher.bfloat16(), 0.5).float()
    torch.testing.assert_close(found, adaptive_kl(student, teacher, 0.5), rtol=0.03, atol=0)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), mu=st.floats(0, 1))
def test_adaptive_kl_lies_between_forward_and_reverse_kl(seed, mu):
    student, teacher = random_log_probs(4, 9, seed=seed)
    value = adaptive_kl(student, teacher, mu)
    both = torch.stack([forward_kl(student, teacher), reverse_kl(student, teacher)])
    assert (value >= both.amin(0) - 1e-12).all()
    assert (value <= both.amax(0) + 1e-12).all()


def test_adaptive_kl_knows_no_order_of_the_vocabulary_and_the_taid_repository_does():
    student, teacher = random_log_probs(6, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    permuted = student[:, order], teacher[:, order]
    torch.testing.assert_close(adaptive_kl(*permuted), adaptive_kl(student, teacher))
    parity = partial(adaptive_kl, taid_parity=True)
    assert not torch.allclose(parity(*permuted), parity(student, teacher), rtol=1e-2)


# Interpolation


def test_interpolation_is_the_softmax_of_interpolated_logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    expected = (0.7 * student + 0.3 * teacher).log_softmax(-1)
    actual = interpolated_log_probs(student.log_softmax(-1), teacher.log_softmax(-1), 0.3)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_interpolation_moves_from_student_to_teacher_without_gradient(t):
    student, teacher = random_log_probs(6, 9)
    target = interpolated_log_probs(student.requires_grad_(), teacher, t)
    assert not target.requires_grad
    distances = [forward_kl(interpolated_log_probs(student, teacher, x), teacher).sum() for x in (0.0, 0.4, 1.0)]
    assert all(further > nearer for further, nearer in pairwise(distances))
    assert distances[-1] == 0
    assert torch.equal(interpolated_log_probs(student, teacher, 0.0), student)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_gradient_of_an_interpolated_target_is_student_minus_target(t):
    student, teacher = random_log_probs(6, 9)
    student_logits = student.clone().requires_grad_()
    log_probs = student_logits.log_softmax(-1)
    target = interpolated_log_probs(log_probs, teacher, t)
    (gradient,) = torch.autograd.grad(forward_kl(log_probs, target).sum(), student_logits)
    torch.testing.assert_close(gradient, student.exp() - target.exp())


# Probability zero


def taid_divergence(t: float) -> Divergence:
    return lambda student, teacher: forward_kl(student, interpolated_log_probs(student, teacher, t))


WITH_TAID = DIVERGENCES | {f"taid_{t}": taid_divergence(t) for t in (0.0, 0.4, 1.0)}


@pytest.mark.parametrize("divergence", WITH_TAID.values(), ids=list(WITH_TAID))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outcomes_impossible_for_both_are_as_if_they_were_not_there(divergence, dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 6, 9, generator=generator, dtype=dtype)
    possible = torch.tensor([True, False, True, True, True, False, True, True, False])
    whole = student.masked_fill(~possible, -torch.inf).requires_grad_()
    rest = student[:, possible].requires_grad_()
    values = divergence(whole.log_softmax(-1), teacher.masked_fill(~possible, -torch.inf).log_softmax(-1))
    expected = divergence(rest.log_softmax(-1), teacher[:, possible].log_softmax(-1))
    torch.testing.assert_close(values, expected)
    (gradient,) = torch.autograd.grad(values.sum(), whole)
    torch.testing.assert_close(gradient[:, possible], torch.autograd.grad(expected.sum(), rest)[0])
    assert (gradient[:, ~possible] == 0).all()


def test_entropy_counts_impossible_outcomes_as_nothing():
    assert entropy(torch.tensor([0.5, 0.0, 0.5]).log()) == pytest.approx(math.log(2))


def one_sided(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of a student that excludes what the teacher finds most likely, and the teacher's."""
    student, teacher = torch.tensor([-torch.inf, 1.0, 0.0], dtype=dtype), torch.tensor([2.0, 1.0, 0.0], dtype=dtype)
    return student.requires_grad_(), teacher


@each_divergence
def test_outcomes_impossible_for_one_side_give_finite_values_and_gradients(divergence):
    for exchanged in (False, True):
        student, teacher = one_sided()
        pair = student.log_softmax(-1), teacher.log_softmax(-1)
        value = divergence(*(reversed(pair) if exchanged else pair))
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_excluding_what_the_other_finds_likely_is_a_large_divergence():
    student, teacher = (logits.detach().log_softmax(-1) for logits in one_sided())
    assert forward_kl(student, teacher) > 1000
    assert reverse_kl(student, teacher) < 10
    assert reverse_kl(teacher, student) > 1000
    assert jsd(student, teacher) <= math.log(2)
    assert adaptive_kl(student, teacher) > 1000


# Gradients and shapes


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if not name.startswith("adaptive")])
def test_gradient_is_that_of_finite_differences(name):
    student, teacher = random_log_probs(3, 5)

    def of_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return DIVERGENCES[name](student_logits.log_softmax(-1), teacher_logits.log_softmax(-1))

    assert torch.autograd.gradcheck(of_logits, (student.requires_grad_(), teacher.requires_grad_()))


def test_entropy_gradient_is_that_of_finite_differences():
    student, _ = random_log_probs(3, 5)
    assert torch.autograd.gradcheck(lambda logits: entropy(logits.log_softmax(-1)), student.requires_grad_())


@each_divergence
@pytest.mark.parametrize("items", [(), (4,), (2, 3), (0,), (2, 0, 3)])
def test_any_number_of_item_axes_gives_one_value_per_item(divergence, items):
    student, teacher = random_log_probs(*items, 7)
    values = divergence(student.requires_grad_(), teacher)
    assert values.shape == items
    flat = divergence(student.reshape(-1, 7), teacher.reshape(-1, 7))
    torch.testing.assert_close(values.reshape(-1), flat)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.shape == student.shape


@each_divergence
def test_items_are_compared_one_by_one(divergence):
    student, teacher = random_log_probs(5, 7)
    expected = torch.stack([divergence(q, p) for q, p in zip(student, teacher, strict=True)])
    torch.testing.assert_close(divergence(student, teacher), expected)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize(
    "divergence, name", [(jsd, "beta"), (skew_kl, "skew"), (skew_reverse_kl, "skew"), (adaptive_kl, "mu")]
)
def test_weight_outside_zero_and_one_is_refused_by_name(divergence, name, weight):
    student, teacher = random_log_probs(2, 3)
    with pytest.raises(ValueError, match=rf"{name} is {weight}.*between 0 and 1"):
        divergence(student, teacher, **{name: weight})


@pytest.mark.parametrize(
    "sharpness", [6.0, 0.1], ids=["the head is among the likeliest", "the whole vocabulary is sorted"]
)
def test_adaptive_kl_of_a_large_vocabulary_is_that_of_a_full_sort(sharpness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (sharpness * torch.randn(3, 9000, generator=generator)).log_softmax(-1), torch.zeros(3, 9000)
    student = student.log_softmax(-1)
    p, q = teacher.exp(), student.exp()
    sorted_p, order = p.sort(-1, descending=True)
    gap = (p - q).abs().gather(-1, order)
    head = (gap * (sorted_p.cumsum(-1) - sorted_p < 0.5)).sum(-1) / gap.sum(-1)
    expected = head * forward_kl(student, teacher) + (1 - head) * reverse_kl(student, teacher)
    torch.testing.assert_close(adaptive_kl(student, teacher), expected)
