"""Token log-probs in chunks: values and gradients of dense log-probs, with nothing larger in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmkd.losses import projection
from mmkd.losses.likelihood import token_log_probs
from mmkd.models.heads import LMHead

TOKENS, VOCAB, WIDTH = 10, 13, 6

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 5.0},
    "trimmed": {"trimmed_to": VOCAB - 4},
    "all": {"bias": True, "scale": 0.3, "softcap": 5.0, "trimmed_to": VOCAB - 4},
}
each_head = pytest.mark.parametrize("kind", HEADS)
each_set = pytest.mark.parametrize("with_set", [False, True], ids=["labels", "labels and set"])


def make_case(
    tokens: int = TOKENS, vocab: int = VOCAB, *, bias: bool = False, dtype: torch.dtype = torch.float64, **head: Any
) -> tuple[Tensor, LMHead, Tensor, Tensor]:
    """Hidden states, head, labels, and a set of tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    hidden, weight, trained_bias = normal(tokens, WIDTH), normal(vocab, WIDTH), normal(vocab) if bias else None
    made = LMHead(weight, trained_bias, **head)
    labels = torch.randint(made.vocab_size, (tokens,), generator=generator)
    return hidden, made, labels, torch.arange(vocab) % 3 == 0


def dense(hidden: Tensor, head: LMHead, labels: Tensor, outcomes: Tensor | None) -> list[Tensor]:
    log_probs = head.log_probs(hidden)
    values = [log_probs.gather(-1, labels[:, None])[:, 0]]
    return values if outcomes is None else [*values, log_probs[:, outcomes[: head.vocab_size]].logsumexp(-1)]


def leaves_of(hidden: Tensor, head: LMHead) -> list[Tensor]:
    return [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]


def mixed(values: list[Tensor | None] | list[Tensor]) -> Tensor:
    """A loss in which every token counts differently, and the label's log-prob not as the set's."""
    total = torch.zeros(())
    for offset, value in enumerate(value for value in values if value is not None):
        total = total + (value * torch.linspace(-1 + offset, 2, len(value), dtype=value.dtype)).sum()
    return total


@each_head
@each_set
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("tile_rows", [None, 2])
def test_values_and_gradients_are_those_of_dense_log_probs(kind, with_set, chunk_size, tile_rows, monkeypatch):
    if tile_rows:
        monkeypatch.setattr(projection, "CPU_TILE_ELEMENTS", tile_rows * VOCAB)
    hidden, head, labels, outcomes = make_case(**HEADS[kind])
    outcomes = outcomes if with_set else None
    actual = [*token_log_probs(hidden, head, labels, outcomes, chunk_size=chunk_size)]
    expected = dense(hidden, head, labels, outcomes)
    assert (actual[1] is None) == (not with_set)
    for ours, theirs in zip(actual, expected, strict=False):
        torch.testing.assert_close(ours, theirs)
    leaves = leaves_of(hidden, head)
    torch.testing.assert_close(
        torch.autograd.grad(mixed(actual), leaves), torch.autograd.grad(mixed(expected), leaves)
    )


@each_set
def test_gradient_is_that_of_finite_differences(with_set):
    hidden, head, labels, outcomes = make_case(4, 5, bias=True, softcap=4.0, scale=0.7)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        changed = LMHead(weight, bias, head.scale, head.softcap)
        values = token_log_probs(hidden, changed, labels, outcomes if with_set else None, chunk_size=3)
        return tuple(value for value in values if value is not None)

    assert torch.autograd.gradcheck(function, tuple(leaves_of(hidden, head)))


def test_only_the_set_can_be_differentiated():
    hidden, head, labels, outcomes = make_case()
    (ours,) = torch.autograd.grad(token_log_probs(hidden, head, labels, outcomes)[1].sum(), hidden)
    (autograd,) = torch.autograd.grad(dense(hidden, head, labels, outcomes)[1].sum(), hidden)
    torch.testing.assert_close(ours, autograd)


@each_set
def test_no_tokens_have_no_values_and_zero_gradients(with_set):
    hidden, head, labels, outcomes = make_case(0, bias=True)
    values = token_log_probs(hidden, head, labels, outcomes if with_set else None)
    assert all(value is None or len(value) == 0 for value in values)
    mixed([*values]).backward()
    for leaf in leaves_of(hidden, head):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_a_head_that_is_used_twice_and_tied_gets_both_gradients_and_the_embeddings():
    _, head, labels, outcomes = make_case()
    embedding, ids = head.weight, torch.arange(TOKENS)

    def total(log_probs: Any) -> Tensor:
        hidden = embedding[ids].tanh()
        return mixed([*log_probs(hidden, head, labels, outcomes)]) + mixed(
            [*log_probs(2 * hidden, head, labels, None)]
        )

    (ours,), (autograd,) = (
        torch.autograd.grad(total(token_log_probs), embedding),
        torch.autograd.grad(total(dense), embedding),
    )
    torch.testing.assert_close(ours, autograd)


def test_result_can_be_backpropagated_as_often_as_its_graph_is_kept():
    hidden, head, labels, outcomes = make_case()
    loss = mixed([*token_log_probs(hidden, head, labels, outcomes)])
    once = torch.autograd.grad(loss, leaves_of(hidden, head), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves_of(hidden, head)), once)


def test_what_is_frozen_gets_no_gradient():
    hidden, head, labels, outcomes = make_case()
    frozen = LMHead(head.weight.detach())
    expected = torch.autograd.grad(mixed(dense(hidden, head, labels, outcomes)), [hidden, head.weight])
    (by_hidden,) = torch.autograd.grad(mixed([*token_log_probs(hidden, frozen, labels, outcomes)]), hidden)
    detached = token_log_probs(hidden.detach(), head, labels, outcomes)
    (by_weight,) = torch.autograd.grad(mixed([*detached]), head.weight)
    torch.testing.assert_close([by_hidden, by_weight], list(expected))
    with torch.no_grad():
        values = token_log_probs(hidden, head, labels, outcomes)
    assert not values[0].requires_grad
    assert not values[1].requires_grad


@pytest.mark.parametrize("precise", [False, True])
def test_autocast_is_that_of_the_forward_and_values_are_fp32(precise):
    hidden, head, labels, outcomes = make_case(dtype=torch.float32, bias=True, softcap=5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = token_log_probs(hidden, head, labels, outcomes, precise=precise)
        assert all(value.dtype == torch.float32 for value in values)
    gradients = torch.autograd.grad(mixed([*values]), leaves_of(hidden, head))
    expected = dense(hidden, head, labels, outcomes)
    for ours, theirs in zip(values, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.1)
        assert not torch.equal(ours, theirs)
    autograd = torch.autograd.grad(mixed(expected), leaves_of(hidden, head))
    for leaf, ours, theirs in zip(leaves_of(hidden, head), gradients, autograd, strict=True):
        assert ours.dtype == leaf.dtype
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("outcomes", [[True, False, False, False], [False, False, True, True], [True] * 4])
# fp32 logits of 1e4 are known to 1e-3.
@pytest.mark.parametrize("gap, tolerance", [(30.0, 1e-5), (1e4, 1e-3)])
def test_certain_and_impossible_tokens_and_sets_have_the_gradients_of_dense_log_probs(outcomes, gap, tolerance):
    head = LMHead(torch.eye(4).requires_grad_())
    hidden = torch.tensor([[gap, 0, 0, 0], [0, gap, 0, 0]], requires_grad=True)
    case = (hidden, head, torch.tensor([0, 0]), torch.tensor(outcomes))
    ours, theirs = [*token_log_probs(*case)], dense(*case)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(mixed(values), hidden)[0] for values in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@each_set
def test_no_tensor_is_larger_than_one_chunk_of_logits_or_the_head(with_set):
    tokens, vocab, chunk_size = 100, 200, 9
    hidden, head, labels, outcomes = make_case(tokens, vocab, bias=True, softcap=5.0, dtype=torch.float32)
    with SizeRecorder() as sizes:
        values = token_log_probs(hidden, head, labels, outcomes if with_set else None, chunk_size=chunk_size)
        mixed([*values]).backward()
    assert max(sizes.elements) <= max(chunk_size * vocab, head.weight.numel()) < tokens * vocab


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


def test_a_changed_weight_is_noticed_before_it_spoils_the_gradient():
    hidden, head, labels, _ = make_case()
    loss = token_log_probs(hidden, head, labels)[0].sum()
    with torch.no_grad():
        head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_wrong_labels_and_sets_are_refused():
    hidden, head, labels, outcomes = make_case()
    with pytest.raises(ValueError, match="another vocabulary"):
        token_log_probs(hidden, head, labels + VOCAB)
    with pytest.raises(ValueError, match=f"covers {VOCAB - 1} tokens but the head has {VOCAB}"):
        token_log_probs(hidden, head, labels, outcomes[1:])
    with pytest.raises(ValueError, match="holds no token"):
        token_log_probs(hidden, head, labels, outcomes & False)
    # Padding of the vocabulary in the set is cut off.
    longer = torch.cat([outcomes, torch.ones(3, dtype=torch.bool)])
    padded, plain = (token_log_probs(hidden, head, labels, wanted)[1] for wanted in (longer, outcomes))
    assert torch.equal(padded, plain)
