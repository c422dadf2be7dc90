"""Records what reference implementations of losses in VLM distillation compute: tests/golden/VISUAL_losses.npz.

Their code is read from clones and run here; none of it is kept:

    git clone --bare https://github.com/fpcsong/BiLD bild.git
    git clone --bare https://github.com/theanh-ktmt/VLM_Embed vlm_embed.git
    python -m scripts.golden.visual_losses bild.git vlm_embed.git

VLM_Embed holds an implementation of EM-KD (2511.21106). The revisions are REVISIONS.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor, nn

from scripts.golden.sampled_objectives import functions

REVISIONS = {
    "bild": "c8d40a8faf1fb8282f933071d98bfd46763d891b",
    "vlm_embed": "57200c87abcfe611e178e082f4d34a64d2975325",
}
TARGET = Path(__file__).parents[2] / "tests" / "golden" / "VISUAL_losses.npz"
# Numbers of tokens: EM-KD's file looks for text by its ids, of which those of images are not.
STUDENT_VISUAL, TEACHER_VISUAL, TEXT, VOCAB, STUDENT_WIDTH, TEACHER_WIDTH = 5, 8, 4, 17, 6, 7
IMAGE_TOKEN = 151655


def normal(*shape: int, seed: int) -> Tensor:
    """The same numbers at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def record_bild(clone: Path, arrays: dict[str, Any]) -> None:
    """Both directions and their sum at each token, with the gradient of the sum over all tokens."""
    file = functions(clone, REVISIONS["bild"], "distil_losses/BILD.py", {"bild_loss"}, {})
    student, teacher = 2 * normal(2, 6, 40, seed=1), 2 * normal(2, 6, 40, seed=2)
    arrays |= {"bild_student": student.numpy(), "bild_teacher": teacher.numpy()}
    for top_k, temperature in ((8, 3.0), (2, 1.0), (40, 0.5)):
        leaf = student.clone().requires_grad_()
        settings = {"top_k": top_k, "temperature": temperature}
        led = [file.bild_loss(leaf, teacher, **settings, student_led=side)[..., 0] for side in (False, True)]
        name = f"bild_{top_k}_{temperature}"
        arrays[f"{name}_teacher_led"], arrays[f"{name}_student_led"] = (part.detach().numpy() for part in led)
        arrays[f"{name}__grad"] = torch.autograd.grad(torch.stack(led).sum(), leaf)[0].numpy()


def record_em_kd(clone: Path, arrays: dict[str, Any]) -> None:
    """VSD and VLAD of a row with one image, with their gradients by the student's hidden states and head."""
    given = {"nn": nn, "linear_sum_assignment": linear_sum_assignment}
    given |= {"BOS_TOKEN_ID": 151643, "VISION_END_TOKEN_ID": 151656}
    name = "_compute_emkd_for_side"
    file = functions(clone, REVISIONS["vlm_embed"], "src/criterions/em_kd.py", {name}, given)
    sides = {
        "student": (STUDENT_VISUAL, STUDENT_WIDTH, 3),
        "teacher": (TEACHER_VISUAL, TEACHER_WIDTH, 5),
    }
    models, hidden = {}, {}
    for side, (visual, width, seed) in sides.items():
        head = nn.Linear(width, VOCAB, bias=False, dtype=torch.float64)
        head.weight.data = normal(VOCAB, width, seed=seed)
        hidden[side] = normal(visual + TEXT, width, seed=seed + 1).requires_grad_()
        models[side] = SimpleNamespace(encoder=SimpleNamespace(lm_head=head))
        arrays[f"em_{side}_hidden"] = hidden[side].detach().numpy()
        arrays[f"em_{side}_head"] = head.weight.detach().numpy()
    ids = torch.tensor([IMAGE_TOKEN] * TEACHER_VISUAL + list(range(10, 10 + TEXT)))
    features = [torch.empty(visual, 1) for visual in (STUDENT_VISUAL, TEACHER_VISUAL)]
    losses = getattr(file, name)(
        None, models["student"], models["teacher"], *features, hidden["student"], hidden["teacher"], ids
    )
    leaves = (hidden["student"], models["student"].encoder.lm_head.weight)
    for loss_name, loss in zip(("vsd", "vlad"), losses, strict=True):
        arrays[f"em_{loss_name}"] = loss.detach().numpy()
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        for leaf, gradient in zip(("hidden", "head"), gradients, strict=True):
            if gradient is not None:
                arrays[f"em_{loss_name}__grad_{leaf}"] = gradient.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bild", type=Path)
    parser.add_argument("vlm_embed", type=Path)
    clones = parser.parse_args()
    arrays: dict[str, Any] = {}
    record_bild(clones.bild, arrays)
    record_em_kd(clones.vlm_embed, arrays)
    np.savez_compressed(TARGET, **arrays)
    print(f"{TARGET}: {len(arrays)} arrays")


if __name__ == "__main__":
    main()
