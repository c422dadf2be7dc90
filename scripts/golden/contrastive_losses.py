"""Records what open_clip and the authors of CLIP-KD compute: tests/golden/CONTRASTIVE_losses.npz.

Their code is read from where it was put and run here; none of it is kept. open_clip and what it imports stand in a
folder of their own, since the CPU build of torch does not go with torchvision:

    pip install --no-deps --target SITE open_clip_torch==3.3.0 timm torchvision ftfy
    git clone --bare https://github.com/winycg/CLIP-KD clip_kd.git
    python -m scripts.golden.contrastive_losses SITE clip_kd.git

The revision of CLIP-KD is REVISION.
"""

import argparse
import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

REVISION = "f3ae18b9da8ac8570796c4e113cb8a9006dab18a"
TARGET = Path(__file__).parents[2] / "tests" / "golden" / "CONTRASTIVE_losses.npz"
PAIRS, WIDTH, TEACHER_WIDTH = 6, 8, 12
SCALE, TEACHER_SCALE, BIAS = 14.0, 20.0, -3.0
NETWORK: dict[str, Any] = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": 8, "layers": 2, "width": 8, "patch_size": 4, "head_width": 4},
    "text_cfg": {"context_length": 7, "vocab_size": 20, "width": 8, "heads": 2, "layers": 2},
}


def open_clip_of(site: Path) -> Any:
    """The package open_clip in a folder of its own."""
    sys.path.append(str(site))
    # torchvision's build for CUDA declares these itself.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip  # pyright: ignore[reportMissingImports]

    return open_clip


def clip_kd_loss(repository: Path) -> Any:
    """The class KDClipLoss of the authors, in which other ranks say nothing."""
    command = ["git", "--git-dir", str(repository), "show", f"{REVISION}:src/open_clip/loss.py"]
    source = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wanted = {"DistillKL", "KDClipLoss"}
    body: list[ast.stmt] = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name in wanted
    ]
    given = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "np": np}
    namespace: dict[str, Any] = {**given, "gather_features": lambda images, texts, *_: (images, texts)}
    exec(compile(ast.Module(body, []), "reference", "exec"), namespace)
    return namespace["KDClipLoss"]


def record(open_clip: Any, repository: Path) -> dict[str, Any]:
    """All arrays: inputs, values, and gradients by the student's features."""
    generator = torch.Generator().manual_seed(21)
    unit = torch.nn.functional.normalize
    raw = {
        name: torch.randn(PAIRS, width, generator=generator)
        for name, width in (("si", WIDTH), ("st", WIDTH), ("ti", TEACHER_WIDTH), ("tt", TEACHER_WIDTH))
    }
    arrays: dict[str, Any] = dict(raw)
    student = [raw[name].clone().requires_grad_() for name in ("si", "st")]
    teacher = [unit(raw[name], dim=-1) for name in ("ti", "tt")]

    def keep(name: str, loss: torch.Tensor) -> None:
        arrays[name] = loss.detach()
        for side, gradient in zip(("si", "st"), torch.autograd.grad(loss, student, retain_graph=True), strict=True):
            arrays[f"{name}__grad_{side}"] = gradient

    ours = [unit(features, dim=-1) for features in student]
    keep("clip", open_clip.loss.ClipLoss()(*ours, SCALE))
    keep("siglip", open_clip.loss.SigLipLoss()(*ours, torch.tensor(SCALE), torch.tensor(BIAS)))
    keep("distill", open_clip.loss.DistillClipLoss()(*ours, SCALE, *teacher, TEACHER_SCALE)[1])

    torch.manual_seed(22)
    alphas = dict.fromkeys(("ckd", "icl", "cross_kd", "fd"), 1.0) | dict.fromkeys(("gd", "afd"), 0.0)
    settings = {f"alpha_{name}_loss": value for name, value in alphas.items()}
    args = SimpleNamespace(t_embed_dim=TEACHER_WIDTH, s_embed_dim=WIDTH, **settings)
    torch.Tensor.cuda = lambda self, *_: self  # pyright: ignore[reportAttributeAccessIssue]
    theirs = clip_kd_loss(repository)(args, local_loss=False, world_size=2)
    values = theirs(*student, SCALE, *teacher, TEACHER_SCALE)
    for name, loss in zip(("clip_kd_task", "clip_kd_ckd", "clip_kd_icl"), values, strict=False):
        keep(name, loss)
    keep("clip_kd_fd", values[4])
    for side, layer in (("image", theirs.visual_proj), ("text", theirs.text_proj)):
        arrays |= {f"proj_{side}_weight": layer.weight.detach(), f"proj_{side}_bias": layer.bias.detach()}
    arrays["clip_kd_cross_scale"] = theirs.cross_logit_scale.detach()
    return {**arrays, **network(open_clip)}


def network(open_clip: Any) -> dict[str, Any]:
    """A tiny CLIP of open_clip: its weights, and what it says of noise and of tokens."""
    torch.manual_seed(23)
    model = open_clip.model.CLIP(quick_gelu=True, **NETWORK).eval()
    pixels = torch.randn(3, 3, 8, 8)
    tokens = torch.tensor([[18, 5, 6, 19, 0, 0, 0], [18, 7, 19, 0, 0, 0, 0], [18, 1, 2, 3, 4, 5, 19]])
    with torch.no_grad():
        said = {"oc_images": model.encode_image(pixels), "oc_texts": model.encode_text(tokens)}
    weights = {f"oc__{name}": tensor for name, tensor in model.state_dict().items()}
    return {"oc_pixels": pixels, "oc_tokens": tokens, **said, **weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("clip_kd", type=Path)
    args = parser.parse_args()
    arrays = record(open_clip_of(args.site), args.clip_kd)
    saved: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez_compressed(TARGET, **saved)


if __name__ == "__main__":
    main()
