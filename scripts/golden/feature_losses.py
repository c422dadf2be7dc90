"""Records what DistillKit's loss of hidden states computes: tests/golden/FEATURE_losses.npz.

Its code is read from a clone and run here; none of it is kept:

    git clone --bare https://github.com/arcee-ai/DistillKit distillkit.git
    python -m scripts.golden.feature_losses distillkit.git
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from scripts.golden.sampled_objectives import functions

REVISION = "a61c2e7d25c2e990d45832e12bd8542bdee9c810"
FILE = "distillkit/lossfuncs/hidden_state.py"
TARGET = Path(__file__).parents[2] / "tests" / "golden" / "FEATURE_losses.npz"
LAYERS = ((1, 2), (3, 5))
"""(student's, teacher's) of each pair."""


def main() -> None:
    """Records the arrays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("distillkit", type=Path, help="a bare clone")
    clone = parser.parse_args().distillkit
    loss = functions(clone, REVISION, FILE, {"compute_hs_loss"}, {}).compute_hs_loss
    generator = torch.Generator().manual_seed(23)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = normal(4, 2, 6, 5), normal(6, 2, 6, 7)
    projections = 0.4 * normal(len(LAYERS), 7, 5)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    arrays: dict[str, Any] = {"student": student, "teacher": teacher, "projections": projections, "mask": mask}
    arrays["layers"] = torch.tensor(LAYERS)
    for kind in ("mse", "cosine"):
        ours, weights = student.clone().requires_grad_(), projections.clone().requires_grad_()
        mapping = SimpleNamespace(layer_mapping=LAYERS, projections=[_linear(weight) for weight in weights])
        outputs, signal = SimpleNamespace(hidden_states=ours), SimpleNamespace(hidden_states=teacher)
        value = loss(kind, outputs, signal, mask, mapping)
        value.backward()
        arrays |= {kind: value.detach(), f"{kind}__grad_student": ours.grad, f"{kind}__grad_projections": weights.grad}
    np.savez_compressed(TARGET, **{name: array.numpy() for name, array in arrays.items()})


def _linear(weight: torch.Tensor) -> Any:
    return lambda states: torch.nn.functional.linear(states, weight)


if __name__ == "__main__":
    main()
