"""LMHead: everything between the last hidden state and the logits of a causal language model, as one value."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LMHead:
    """`logits = softcap * tanh(scale * (weight @ hidden + bias) / softcap)`, for the first `vocab_size` tokens.

    Model families name these differently (`logit_scale`, `logits_scaling`, `final_logit_softcapping`, ...):
    `mmkd.models.backbone.head_of` reads them from a model.
    """

    weight: Float[Tensor, "row width"]
    bias: Float[Tensor, "row"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    trimmed_to: int | None = None

    @property
    def vocab_size(self) -> int:
        return len(self.weight) if self.trimmed_to is None else self.trimmed_to

    def trimmed(self, vocab_size: int) -> "LMHead":
        """The head of the first `vocab_size` tokens, without the rows that pad a vocabulary to a round number."""
        assert vocab_size <= len(self.weight), f"{vocab_size} tokens but only {len(self.weight)} rows"
        return replace(self, trimmed_to=vocab_size)

    def detached(self) -> "LMHead":
        """The head of the weights of now: parameters that are given other data later do not change it."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def frozen(self, dtype: torch.dtype | None = None) -> "LMHead":
        """The head for `project`: without gradient, trimmed to its vocabulary and in the given type."""
        bias = None if self.bias is None else self.bias.detach()[: self.vocab_size]
        return replace(self, weight=self.weight.detach()[: self.vocab_size].to(dtype), bias=bias, trimmed_to=None)

    def project(self, hidden: Float[Tensor, "token width"], out: Tensor) -> Float[Tensor, "token vocab"]:
        """`weight @ hidden + bias` of a frozen head, written to `out` in the type of `out`."""
        # A GPU sums bf16 products in fp32 anyway and can return that sum; a CPU needs fp32 operands for it. A product
        # that is rounded to half precision first would lose what `out` is wide for. Only CUDA has `out_dtype`;
        # elsewhere both factors are converted.
        if out.dtype == hidden.dtype:
            torch.mm(hidden, self.weight.T, out=out)
        elif hidden.device.type == "cuda":
            torch.mm(hidden, self.weight.T, out_dtype=out.dtype, out=out)
        else:
            torch.mm(hidden.to(out.dtype), self.weight.T.to(out.dtype), out=out)
        return out if self.bias is None else out.add_(self.bias)

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and softcap of a product with the weight."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def log_probs(self, hidden: Float[Tensor, "*item width"]) -> Float[Tensor, "*item vocab"]:
        """log softmax of all logits at once, in fp32 or better, differentiable; for small inputs and tests."""
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        logits = torch.nn.functional.linear(hidden, self.weight[: self.vocab_size], bias)
        return self.finish(logits.to(torch.promote_types(logits.dtype, torch.float32))).log_softmax(-1)
