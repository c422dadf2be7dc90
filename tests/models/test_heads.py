"""LMHead: what it does to a hidden state, in which type and with whose gradient."""

import pytest
import torch
from torch import Tensor

from mmkd.models.heads import LMHead

ROWS, WIDTH, ITEMS = 11, 5, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_head(**changes) -> LMHead:
    fields = {"weight": normal(ROWS, WIDTH), "bias": normal(ROWS, seed=1), "scale": 0.3, "softcap": 2.0}
    return LMHead(**fields | changes)


def test_log_probs_are_those_of_the_documented_logits():
    head, hidden = make_head(), normal(ITEMS, WIDTH, seed=2)
    assert head.bias is not None
    logits = 2.0 * torch.tanh(0.3 * (hidden @ head.weight.T + head.bias) / 2.0)
    torch.testing.assert_close(head.log_probs(hidden), logits.log_softmax(-1))


@pytest.mark.parametrize("changes", [{}, {"bias": None}, {"scale": 1.0}, {"softcap": None}, {"trimmed_to": 7}])
def test_projecting_and_finishing_gives_the_log_probs(changes):
    head, hidden = make_head(**changes), normal(ITEMS, WIDTH, seed=2)
    out = torch.full((ITEMS, head.vocab_size), torch.nan, dtype=torch.float64)
    logits = head.finish(head.frozen().project(hidden, out))
    torch.testing.assert_close(logits.log_softmax(-1), head.log_probs(hidden))


def test_plain_head_is_a_linear_layer():
    linear = torch.nn.Linear(WIDTH, ROWS).double()
    head, hidden = LMHead(linear.weight, linear.bias), normal(2, ITEMS, WIDTH)
    torch.testing.assert_close(head.log_probs(hidden), linear(hidden).log_softmax(-1))
    assert head.log_probs(hidden).shape == (2, ITEMS, ROWS)


def test_trimmed_head_knows_only_its_first_tokens():
    head, hidden = make_head(), normal(ITEMS, WIDTH, seed=2)
    trimmed = head.trimmed(7)
    assert (head.vocab_size, trimmed.vocab_size) == (ROWS, 7)
    torch.testing.assert_close(trimmed.log_probs(hidden), head.log_probs(hidden)[:, :7].log_softmax(-1))


def test_trimmed_head_still_holds_the_whole_parameter():
    head = make_head()
    assert head.trimmed(7).weight is head.weight
    assert head.trimmed(7).bias is head.bias


def test_trimming_to_more_tokens_than_rows_is_an_error():
    with pytest.raises(AssertionError, match=r"12 tokens but only 11 rows"):
        make_head().trimmed(ROWS + 1)


def test_frozen_head_has_no_gradient_and_only_its_vocabulary():
    head = make_head(weight=normal(ROWS, WIDTH).requires_grad_(), trimmed_to=7)
    frozen = head.frozen(torch.bfloat16)
    assert not frozen.weight.requires_grad
    assert frozen.weight.dtype == torch.bfloat16
    assert frozen.weight.shape == (7, WIDTH)
    assert frozen.bias is not None
    assert frozen.bias.shape == (7,)
    assert frozen.vocab_size == 7
    assert (frozen.scale, frozen.softcap) == (head.scale, head.softcap)


def test_freezing_in_the_type_of_the_weight_copies_nothing():
    head = make_head()
    assert head.frozen().weight.data_ptr() == head.weight.data_ptr()
    assert head.frozen(torch.float64).weight.data_ptr() == head.weight.data_ptr()


def test_wider_output_of_a_projection_is_computed_in_that_type():
    head, hidden = make_head(softcap=None).frozen(torch.bfloat16), normal(ITEMS, WIDTH, seed=2).bfloat16()
    wide = head.project(hidden, torch.empty(ITEMS, ROWS))
    assert head.bias is not None
    torch.testing.assert_close(wide, hidden.float() @ head.weight.float().T + head.bias.float())
    assert not torch.equal(wide, wide.bfloat16().float())


def test_projection_writes_to_the_given_memory():
    head = make_head().frozen()
    out = torch.empty(ITEMS, ROWS, dtype=torch.float64)
    assert head.project(normal(ITEMS, WIDTH), out).data_ptr() == out.data_ptr()


@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_log_probs_are_in_fp32_or_better(dtype, expected):
    head = make_head(weight=normal(ROWS, WIDTH).to(dtype), bias=None)
    log_probs = head.log_probs(normal(ITEMS, WIDTH).to(dtype))
    assert log_probs.dtype == expected
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(ITEMS, dtype=expected))


def test_log_probs_carry_gradient_to_hidden_states_weight_and_bias():
    hidden = normal(ITEMS, WIDTH, seed=2).requires_grad_()
    leaves = (hidden, normal(ROWS, WIDTH).requires_grad_(), normal(ROWS, seed=1).requires_grad_())

    def log_probs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return LMHead(weight, bias, 0.3, 2.0).trimmed(7).log_probs(hidden)

    assert torch.autograd.gradcheck(log_probs, leaves)
