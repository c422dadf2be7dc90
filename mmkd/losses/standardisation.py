"""Features of teachers on one scale: per channel, or as RADIO's PHI-S (2410.01680), which keeps their geometry.

Teachers differ by orders of magnitude in how far their features spread. Without this the loudest of several teachers
has all of the loss.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

# torch gives these functions no types.
linalg: Any = torch.linalg

SCALINGS = ("phi_s", "channel", "none")


class Moments:
    """Mean and covariance of features that come in pieces, in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Float[Tensor, "item width"]) -> None:
        """Counts more items."""
        features = features.double().cpu()
        self.count += len(features)
        self.total += features.sum(0)
        self.products += features.T @ features

    @property
    def mean(self) -> Float[Tensor, "width"]:
        """The mean of each channel."""
        return self.total / self.count

    @property
    def covariance(self) -> Float[Tensor, "width width"]:
        """Divided by the number of items less one, as `torch.cov` does."""
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / max(1, self.count - 1)


def scaling(moments: Moments, kind: str) -> tuple[Float[Tensor, "width"], Float[Tensor, "width width"]]:
    """(mean, matrix): `(features - mean) @ matrix.T` is standardised.

    channel gives every channel a variance of 1. phi_s rotates features so that all channels have the same variance and
    divides by one number, so that distances keep their proportions. none leaves features as they are.
    """
    width = len(moments.total)
    if kind == "none":
        return torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    covariance = moments.covariance
    if kind == "channel":
        variance = covariance.diagonal()
        # A channel that never changes has no scale to speak of.
        steady = variance <= 1e-12 * variance.max().clamp(min=1e-30)
        return moments.mean, torch.diag(torch.where(steady, 0.0, variance.clamp(min=1e-30).rsqrt()))
    values, vectors = cast(tuple[Tensor, Tensor], linalg.eigh(covariance))
    spread = values.clamp(min=0).mean().sqrt().clamp(min=1e-15)
    return moments.mean, equal_parts(width) @ vectors.T / spread


def equal_parts(width: int) -> Float[Tensor, "width width"]:
    """An orthogonal matrix whose entries are all 1 / sqrt(width) in size (Hadamard), where there is a simple one.

    Sylvester's construction for powers of 2, with Paley's for widths such as 384, 768 and 1152. For other widths an
    orthogonal matrix of random signs comes near; it is the same one every time.
    """
    for doublings in range(width.bit_length()):
        rest, remainder = divmod(width, 2**doublings)
        if remainder:
            break
        core = _core(rest)
        if core is not None:
            for _ in range(doublings):
                core = torch.cat([torch.cat([core, core], 1), torch.cat([core, -core], 1)])
            return core / width**0.5
    signs = torch.randint(2, (width, width), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    return cast(Tensor, linalg.qr(signs).Q)


def _core(size: int) -> Float[Tensor, "size size"] | None:
    """A Hadamard matrix of Paley's constructions, or of size 1; None where there is none."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(size - 1) and size % 4 == 0:
        residues = _residues(size - 1)
        matrix = torch.eye(size, dtype=torch.float64)
        matrix[0, 1:], matrix[1:, 0] = 1, -1
        matrix[1:, 1:] += residues
        return matrix
    half = size // 2
    if size % 4 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        conference = torch.zeros(half, half, dtype=torch.float64)
        conference[0, 1:] = conference[1:, 0] = 1
        conference[1:, 1:] = _residues(half - 1)
        whole = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, whole) + torch.kron(torch.eye(half, dtype=torch.float64), diagonal)
    return None


def _residues(prime: int) -> Float[Tensor, "prime prime"]:
    """The quadratic character of i - j: 1 for a square, -1 for another number, 0 on the diagonal."""
    squares = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)]).double()
    places = torch.arange(prime)
    return character[(places[:, None] - places) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
