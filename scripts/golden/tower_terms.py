"""Records what reference implementations of tower distillation compute: tests/golden/TOWER_terms.npz.

Their code is read from where it was put and run here; none of it is kept:

    git clone --bare https://github.com/NVlabs/RADIO radio.git
    python -m scripts.golden.tower_terms radio.git scalekd.py

`scalekd.py` is a file with the class `ScaleKD` of the authors (2411.06786, github.com/deep-optimization/ScaleKD). The
revision of RADIO is REVISION.
"""

import argparse
import ast
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

REVISION = "2fe5f722c39b7f6a4f342eec4716241a41c2dd6b"
TARGET = Path(__file__).parents[2] / "tests" / "golden" / "TOWER_terms.npz"
IMAGES, SIDE, CHANNELS = 3, 4, 6


class WithoutAssertions(ast.NodeTransformer):
    """Takes assertions out of a source."""

    def visit_Assert(self, node: ast.Assert) -> None:
        return None


def namespace_of(source: str, names: set[str], given: dict[str, Any]) -> dict[str, Any]:
    """The classes and functions of a file, without its imports and assertions, of which one is too strict for fp32."""
    tree = WithoutAssertions().visit(ast.parse(source))
    body: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names
    ]
    namespace = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "math": math, "np": np, **given}
    exec(compile(ast.Module(body, []), "reference", "exec"), namespace)
    return namespace


def record(radio: Path, scalekd: Path) -> dict[str, Any]:
    """All arrays: inputs, values, and gradients by the student's features."""
    generator = torch.Generator().manual_seed(20)
    arrays: dict[str, Any] = {}
    shape = (IMAGES, CHANNELS, SIDE, SIDE)
    student, teacher = (torch.randn(shape, generator=generator) + 0.5 for _ in range(2))
    student.requires_grad_()
    theirs = namespace_of(scalekd.read_text(), {"ScaleKD", "DCT"}, {})
    itself = SimpleNamespace(alpha=[1.0, 1.0])
    loss = theirs["ScaleKD"].get_freq_loss(itself, student.flatten(2).permute(0, 2, 1), teacher)
    arrays |= {"student": student.detach(), "teacher": teacher, "frequency": loss.detach()}
    arrays["frequency__grad"] = torch.autograd.grad(loss, student)[0]
    files = {}
    for name in ("hadamard", "phi_s"):
        command = ["git", "--git-dir", str(radio), "show", f"{REVISION}:examples/common/{name}.py"]
        files[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {node.name for node in ast.parse(files["hadamard"]).body if isinstance(node, ast.FunctionDef)}
    hadamard = namespace_of(files["hadamard"], names, {})
    phi_s = namespace_of(files["phi_s"], {"get_phi_s_matrix"}, hadamard)["get_phi_s_matrix"]
    for width in (8, 12, 36):
        mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
        features = torch.randn(80, width, generator=generator, dtype=torch.float64) @ mix + 3
        mean, matrix = phi_s(features)
        arrays |= {f"phi_s_{width}": features, f"phi_s_{width}__mean": mean, f"phi_s_{width}__matrix": matrix}
        arrays[f"hadamard_{width}"] = hadamard["get_hadamard_matrix"](width)
    return {name: tensor.numpy() for name, tensor in arrays.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("radio", type=Path, help="bare clone")
    parser.add_argument("scalekd", type=Path, help="file with the class ScaleKD")
    arguments = parser.parse_args()
    np.savez_compressed(TARGET, **record(arguments.radio, arguments.scalekd))


if __name__ == "__main__":
    main()
