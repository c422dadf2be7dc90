"""Fused losses of other packages behind `kernel`: what they can compute, and that they compute what ours does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.utils.import_utils import is_triton_available

from mmkd.errors import UserError
from mmkd.losses.divergences import forward_kl
from mmkd.losses.fused import FusedLoss, Objective, Projection, fused_loss
from mmkd.models.backbone import full_head
from mmkd.models.heads import LMHead
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.signals import DenseSignal

if TYPE_CHECKING:
    from .config import DistillationConfig

KERNELS = ("auto", "torch", "triton", "liger")

# Tokens of the first batch, in two chunks, that are enough to tell a wrong formula from rounding.
CHECKED_TOKENS = 64
# Beside it, up to twice what our own loss loses to bf16 or fp16 is allowed; in fp32 it loses nothing.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Tokens:
    """What a kernel compares: student and teacher at some tokens, by the divergence that TRL and Liger call `beta`."""

    hidden: Float[Tensor, "token width"]
    head: LMHead
    labels: Int[Tensor, "token"]
    teacher: DenseSignal
    beta: float
    temperature: float
    chunk_size: int

    @property
    def weight(self) -> Float[Tensor, "vocab width"]:
        """The rows of the student's head that are compared, with gradient: padding rows take no mass."""
        head = self.head
        # A slice of everything would cost a copy of the gradient.
        return head.weight if head.vocab_size == len(head.weight) else head.weight[: head.vocab_size]


def liger(tokens: Tokens) -> Float[Tensor, ""]:
    """Sum of the divergences at the temperature by Liger: its Triton kernel on CUDA, its chunks of torch elsewhere.

    The first forms logits in fp32, the second the softmax in the type of the head.
    """
    teacher = tokens.teacher.head.frozen()
    student = tokens.hidden, tokens.weight.to(tokens.hidden.dtype)
    states = tokens.teacher.hidden.to(teacher.weight.dtype)
    if tokens.hidden.device.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

        mean = LigerFusedLinearJSD(tokens.beta, temperature=tokens.temperature)
        return mean(*student, states, teacher.weight, None) * len(tokens.labels)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    settings = {"beta": tokens.beta, "temperature": tokens.temperature, "chunk_size": tokens.chunk_size}
    mean = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, **settings)
    return mean(*student, states, teacher.weight, tokens.labels) * len(tokens.labels)


def triton(tokens: Tokens) -> Float[Tensor, ""]:
    """Sum of the divergences at the temperature by TRL's kernel, which forms logits in fp32."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = tokens.head, tokens.teacher.head.frozen()
    per_token: Any = ChunkedDivergenceFunction.apply(
        tokens.hidden,
        tokens.weight,
        None,
        tokens.teacher.hidden.to(teacher.weight.dtype),
        teacher.weight,
        None,
        tokens.beta,
        tokens.temperature,
        student.scale,
        student.softcap,
        teacher.scale,
        teacher.softcap,
    )
    return per_token[0].sum()


FOREIGN: dict[str, Callable[[Tokens], Tensor]] = {"liger": liger, "triton": triton}


@dataclass
class CheckedKernel:
    """`fused_loss` by a foreign kernel, compared with ours on the first tokens that it is asked to train on.

    Diagnostics and evaluation stay ours. Raises UserError when loss or gradients differ by more than rounding does.
    """

    name: str
    beta: float
    checked: bool = False

    def __call__(
        self,
        hidden: Float[Tensor, "token width"],
        head: LMHead,
        labels: Int[Tensor, "token"],
        targets: DenseSignal,
        objective: Objective = forward_kl,
        *,
        temperature: float = 1.0,
        diagnostics: bool = False,
        **settings: Any,
    ) -> FusedLoss:
        ours = partial(fused_loss, objective=objective, temperature=temperature, **settings)
        if not torch.is_grad_enabled() or not len(labels):
            return ours(hidden, head, labels, targets, diagnostics=diagnostics)
        tokens = Tokens(hidden, head, labels, targets, self.beta, temperature, settings["chunk_size"])
        if not self.checked:
            check_equal(self.name, tokens, ours)
            self.checked = True
        if diagnostics:
            return ours(hidden, head, labels, targets, diagnostics=True)
        total = run(self.name, tokens)
        return FusedLoss(total, {"divergence": total.detach()})


def run(name: str, tokens: Tokens) -> Float[Tensor, ""]:
    """Sum of `temperature**2 * divergence` in nats by a foreign kernel, in the type that our loss would take here."""
    dtype = Projection.here(tokens.hidden, tokens.head, tokens.chunk_size, False).dtype
    with torch.autocast(tokens.hidden.device.type, enabled=False):
        return tokens.temperature**2 * FOREIGN[name](replace(tokens, hidden=tokens.hidden.to(dtype)))


def check_equal(name: str, tokens: Tokens, ours: Callable[..., FusedLoss]) -> None:
    """Compares loss and gradients of the first tokens with those of our loss in fp32.

    Raises UserError where they differ by more than `TOLERANCE` and twice the rounding error of our own loss. A
    difference is relative to the value, or to a hundredth of that of a wholly wrong student, where it is less.
    """
    first = slice(CHECKED_TOKENS)
    signal = replace(tokens.teacher, hidden=tokens.teacher.hidden[first])
    few = replace(tokens, hidden=tokens.hidden[first], labels=tokens.labels[first], teacher=signal)
    few = replace(few, chunk_size=min(few.chunk_size, CHECKED_TOKENS // 2))

    def own(tokens: Tokens) -> Tensor:
        return ours(tokens.hidden, tokens.head, tokens.labels, tokens.teacher).total

    with torch.autocast(few.hidden.device.type, enabled=False):
        exact = _with_gradients(own, _widened(few))
    floors = _floors(few)
    found = {
        who: [_norm(one - other.to(one)) for one, other in zip(exact, values, strict=True)]
        for who, values in ((name, _with_gradients(partial(run, name), few)), ("torch", _with_gradients(own, few)))
    }
    rows = zip(("loss", "gradient of the hidden states", "gradient of the head"), exact, floors, strict=False)
    for place, (what, values, floor) in enumerate(rows):
        scale = max(_norm(values), floor)
        theirs, rounding = found[name][place] / scale, found["torch"][place] / scale
        # The other way round, a NaN would pass.
        if not theirs <= TOLERANCE + 2 * rounding:
            raise UserError(
                f"kernel {name} does not agree with mmkd's own loss: on the first {len(few.labels)} tokens of this "
                f"run the {what} differs from that in fp32 by {theirs:.2%} (mmkd's own: {rounding:.2%}; allowed: "
                f"{TOLERANCE + 2 * rounding:.2%}). Set kernel: torch."
            )


def _with_gradients(loss: Callable[[Tokens], Tensor], tokens: Tokens) -> list[Tensor]:
    """The loss and its gradients by hidden states and, where it is trained, head."""
    weight = tokens.head.weight.detach().requires_grad_(tokens.head.weight.requires_grad)
    hidden = tokens.hidden.detach().requires_grad_()
    total = loss(replace(tokens, hidden=hidden, head=replace(tokens.head, weight=weight)))
    return [total.detach(), *torch.autograd.grad(total, [one for one in (hidden, weight) if one.requires_grad])]


def _widened(tokens: Tokens) -> Tokens:
    """The same in fp32 or better."""

    def wide(values: Tensor) -> Tensor:
        return values.to(torch.promote_types(values.dtype, torch.float32))

    head, signal = tokens.head, tokens.teacher
    weight = wide(head.weight.detach()).requires_grad_(head.weight.requires_grad)
    teacher = replace(signal, hidden=wide(signal.hidden), head=replace(signal.head, weight=wide(signal.head.weight)))
    return replace(tokens, hidden=wide(tokens.hidden), head=replace(head, weight=weight), teacher=teacher)


def _floors(tokens: Tokens) -> tuple[float, float, float]:
    """Sizes below which loss and gradients are as good as zero: a student may start as its own teacher."""
    count, vocab = len(tokens.labels), tokens.head.vocab_size
    row = _norm(tokens.head.weight) / vocab**0.5
    return 0.01 * count, 0.01 * row * count**0.5, 0.01 * _norm(tokens.hidden)


def _norm(values: Tensor) -> float:
    return torch.linalg.vector_norm(values.detach(), dtype=torch.promote_types(values.dtype, torch.float32)).item()


def token_loss(args: "DistillationConfig", model: Any, teacher: Any, sharded: bool) -> Callable[..., FusedLoss]:
    """`fused_loss` by the kernel of a recipe; raises UserError when it cannot run here or on these models."""
    name = args.kernel
    if name not in FOREIGN:
        return fused_loss
    assert args.kernel_beta is not None
    if name == "triton" and (args.device.type != "cuda" or not is_triton_available()):
        raise UserError(
            f"kernel triton runs on CUDA with Triton installed, and this is {args.device.type}. Set kernel: auto."
        )
    if name == "triton" and sharded:
        raise UserError(
            "kernel triton reads the head again in its backward pass, when FSDP or ZeRO-3 may have released it. Set "
            "kernel: torch or liger, which compute gradients where the head is whole, or shard with zero2."
        )
    if name == "liger" and find_spec("liger_kernel") is None:
        raise UserError("kernel liger is not installed: pip install liger-kernel, or set kernel: auto.")
    if not isinstance(teacher, LocalTeacher):
        raise UserError(
            f"kernel {name} multiplies the teacher's hidden states with its head, which a {type(teacher).__name__} "
            "does not tell. Set kernel: torch, or give the teacher as a model."
        )
    for who, head in {"student": full_head(model), "teacher": full_head(teacher.model)}.items():
        has = {"a bias": head.bias is not None}
        if name == "liger":
            has |= {"a logit scale": head.scale != 1, "a logit softcap": head.softcap is not None}
        if any(has.values()):
            parts = " and ".join(part for part, there in has.items() if there)
            raise UserError(f"The {who}'s head has {parts}, without which kernel {name} computes. Set kernel: torch.")
    return CheckedKernel(name, args.kernel_beta)


def check_recipe(args: "DistillationConfig") -> None:
    """Raises UserError when a recipe asks a kernel for what it cannot compute."""
    name = args.kernel
    if name not in KERNELS:
        raise UserError(f"kernel is {name!r}; choose one of {', '.join(KERNELS)}.")
    if name not in FOREIGN:
        return
    if args.kernel_beta is None:
        raise UserError(
            f"kernel {name} computes the forward_kl, reverse_kl and jsd of method kd and nothing else. Choose one of "
            "these, or set kernel: torch."
        )
    if args.ce_weight:
        raise UserError(f"kernel {name} has no cross-entropy in its pass. Set ce_weight: 0, or kernel: torch.")
    if name == "liger" and args.precise_logits:
        raise UserError("kernel liger sums the gradient of the head in the head's type. Set kernel: torch or triton.")
    if name == "liger" and args.fp16:
        raise UserError(
            "kernel liger divides by the number of tokens before it rounds to fp16, in which small gradients then "
            "vanish. Set bf16: true, or kernel: torch."
        )
    if args.logging_strategy != "steps" or args.logging_steps == 1:
        raise UserError(
            f"kernel {name} computes no diagnostics, so that logged steps run in torch: here that is every step. Set "
            "logging_strategy: steps and logging_steps: 10."
        )
