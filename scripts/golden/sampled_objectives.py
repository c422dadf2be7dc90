"""Records what reference implementations of on-policy objectives compute: tests/golden/OPD_losses.npz.

Their code is read from clones and run here; none of it is kept:

    git clone --bare https://github.com/verl-project/verl verl.git
    git clone --bare https://github.com/siyan-zhao/OPSD opsd.git
    git clone --bare https://github.com/jongwooko/distillm-2 distillm2.git
    python -m scripts.golden.sampled_objectives verl.git opsd.git distillm2.git

TRL's is the one that is installed. The revisions are REVISIONS.
"""

import argparse
import ast
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.sdpo import loss_utils

REVISIONS = {
    "verl": "1dda039b9c6311889a9c9a26040677e1254814f9",
    "opsd": "590ec26c59e689a29840a501f65335578251b68c",
    "distillm2": "fe4cf9bfbb4f83219dd1d69219800164b59685fa",
}
TARGET = Path(__file__).parents[2] / "tests" / "golden" / "OPD_losses.npz"
ROWS, LENGTH, VOCAB = 3, 9, 13
ANSWERS = (9, 5, 7)
"""The length of the answer of each row."""


def functions(clone: Path, revision: str, file: str, names: set[str], given: dict[str, Any]) -> SimpleNamespace:
    """Functions of a file of a clone, without decorators and annotations, in a namespace of what they use."""
    command = ["git", "--git-dir", str(clone), "show", f"{revision}:{file}"]
    tree = ast.parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    namespace = {"torch": torch, "F": torch.nn.functional, "math": math, **given}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list, node.returns = [], None
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                argument.annotation = None
            exec(compile(ast.Module([node], []), file, "exec"), namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})


class Recorder:
    """The inputs, and values with their gradients by the student's logits."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(19)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.student, self.teacher = 2 * normal(ROWS, LENGTH, VOCAB), 2 * normal(ROWS, LENGTH, VOCAB)
        self.tokens = torch.multinomial(self.student.softmax(-1).flatten(0, 1), 1, generator=generator)
        self.tokens = self.tokens.view(ROWS, LENGTH)
        self.mask = torch.arange(LENGTH)[None] < torch.tensor(ANSWERS)[:, None]
        # A student that has moved a little since it sampled.
        self.old = self.log_probs(self.student + 0.3 * normal(ROWS, LENGTH, VOCAB))
        self.arrays = {
            "student": self.student.numpy(),
            "teacher": self.teacher.numpy(),
            "tokens": self.tokens.numpy(),
            "mask": self.mask.numpy(),
            "old_log_probs": self.old.numpy(),
        }

    def log_probs(self, logits: Tensor) -> Tensor:
        """Those of the sampled tokens."""
        return logits.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]

    @property
    def labels(self) -> Tensor:
        return self.tokens.masked_fill(~self.mask, -100)

    def add(self, name: str, loss: Callable[[Tensor], Tensor]) -> None:
        """The loss, a number or one per token, and the gradient of its sum over the answers' tokens."""
        student = self.student.clone().requires_grad_()
        value = loss(student)
        total = (value * self.mask).sum() if value.shape == self.mask.shape else value.sum()
        self.arrays[name] = value.detach().numpy()
        self.arrays[f"{name}__grad"] = torch.autograd.grad(total, student)[0].numpy()


def record_trl(recorder: Recorder) -> None:
    """SDFT and SDPO (their loss_utils are the same), and IW-OPD."""
    teacher, tokens = recorder.teacher, recorder.tokens
    whole = loss_utils.compute_full_logit_self_distillation_loss
    top_k = loss_utils.compute_topk_self_distillation_loss
    for alpha in (0.0, 0.5, 1.0):
        recorder.add(f"trl_full_{alpha}", lambda s, a=alpha: whole(s, teacher, distillation_alpha=a))
        for tail in (True, False):
            settings = {"distillation_topk": 5, "distillation_alpha": alpha, "distillation_add_tail": tail}
            name = f"trl_topk_{'tail' if tail else 'renormalised'}_{alpha}"
            recorder.add(name, lambda s, settings=settings: top_k(s, teacher, **settings))
    sampled = loss_utils.compute_sampled_token_self_distillation_loss
    recorder.add("trl_sampled", lambda s: sampled(s, teacher, tokens, distillation_alpha=1.0))
    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=0.5,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": {f"iw_opd/{name}": [] for name in _IW_METRICS}},
    )
    told = recorder.log_probs(teacher)
    for name, old in {"trl_iw_opd": None, "trl_iw_opd_old": recorder.old}.items():
        recorder.add(
            name,
            lambda s, old=old: IWOPDTrainer._compute_iw_opd_loss(
                trainer,  # pyright: ignore[reportArgumentType]
                s,
                tokens,
                recorder.labels,
                told,
                old,
                num_items_in_batch=torch.tensor(1.0),
            ),
        )


_IW_METRICS = ("mean_advantage", "mean_abs_advantage", "mean_weight", "min_weight", "max_weight")


def record_verl(recorder: Recorder, clone: Path) -> None:
    """Estimators differentiated directly, as a policy gradient, and the forward KL on the teacher's top-k."""
    masked = SimpleNamespace(
        masked_mean=lambda values, mask: (values * mask).sum() / mask.sum(),
        masked_sum=lambda values, mask: (values * mask).sum(),
    )
    given = {"verl_F": masked, "AlgoConfig": type(None)}
    names = {"kl_penalty", "kl_penalty_forward", "compute_policy_loss_vanilla", "agg_loss"}
    core = functions(clone, REVISIONS["verl"], "verl/trainer/ppo/core_algos.py", names, given)
    told = recorder.log_probs(recorder.teacher)
    for kind in ("k1", "k2", "k3", "k1+", "k3+"):
        recorder.add(f"verl_{kind}", lambda s, kind=kind: core.kl_penalty(recorder.log_probs(s), told, kind))
    config = SimpleNamespace(
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        global_batch_info={},
        get=lambda name, default: default,
    )

    def policy(student: Tensor, kind: str, old: Tensor | None) -> Tensor:
        ours = recorder.log_probs(student)
        advantages = -core.kl_penalty(ours, told, kind).detach()
        before = ours.detach() if old is None else old
        return core.compute_policy_loss_vanilla(before, ours, advantages, recorder.mask, "token-mean", config)[0]

    for kind in ("k1", "k3"):
        recorder.add(f"verl_policy_{kind}", lambda s, kind=kind: policy(s, kind, None))
        recorder.add(f"verl_policy_{kind}_old", lambda s, kind=kind: policy(s, kind, recorder.old))
    given = {"get_ulysses_sequence_parallel_world_size": lambda: 1}
    names = {"compute_forward_kl_topk", "kl_divergence"}
    fsdp = functions(clone, REVISIONS["verl"], "verl/trainer/distillation/fsdp/losses.py", names, given)
    top = recorder.teacher.log_softmax(-1).topk(5)
    settings = SimpleNamespace(use_chunked_topk=False, log_prob_min_clamp=None)

    def top_k(student: Tensor) -> Tensor:
        flat = student.view(1, -1, VOCAB)
        nested = [SimpleNamespace(is_nested=True, values=lambda x=x: x.view(-1, 5)) for x in top]
        result = fsdp.compute_forward_kl_topk(flat, *nested, SimpleNamespace(distillation_loss=settings), "thd")
        return result["distillation_losses"].view(ROWS, LENGTH)

    recorder.add("verl_forward_topk", top_k)


def record_opsd(recorder: Recorder, clone: Path) -> None:
    """The generalised JSD, over all tokens and over the teacher's top-k."""
    opsd = functions(clone, REVISIONS["opsd"], "opsd_trainer.py", {"generalized_jsd_loss"}, {})
    for beta in (0, 0.3, 1):
        for top_k in (None, 5):
            recorder.add(
                f"opsd_jsd_{beta}_{top_k}",
                lambda s, beta=beta, top_k=top_k: opsd.generalized_jsd_loss(
                    s, recorder.teacher, recorder.labels, beta, 0.9, top_k=top_k
                ),
            )


def record_distillm2(recorder: Recorder, clone: Path) -> None:
    """The skew losses of both answers of a pair, sums over each row's tokens, with a fixed and an adaptive skew."""
    trainer = functions(clone, REVISIONS["distillm2"], "src/distillm_trainer.py", {"get_batch_logps"}, {})
    # They shift: position i of the logits predicts token i + 1 of the labels.
    labels = torch.cat([recorder.labels.new_full((ROWS, 1), -100), recorder.labels], 1)

    def one_more(logits: Tensor) -> Tensor:
        return torch.cat([logits, logits[:, -1:]], 1)

    for name, anchors in {"": {}, "_adaptive": {"logp_logq": -0.02, "logq_logp": 0.3}}.items():
        for number, side in ((2, "teacher"), (3, "student")):
            recorder.add(
                f"distillm2_{side}{name}",
                lambda s, number=number, anchors=anchors: trainer.get_batch_logps(
                    one_more(s), one_more(recorder.teacher), labels, loss_type="distillm_v2", **anchors
                )[number],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in REVISIONS:
        parser.add_argument(name, type=Path, help=f"a bare clone of {name}")
    clones = vars(parser.parse_args())
    recorder = Recorder()
    record_trl(recorder)
    record_verl(recorder, clones["verl"])
    record_opsd(recorder, clones["opsd"])
    record_distillm2(recorder, clones["distillm2"])
    arrays: dict[str, Any] = recorder.arrays
    np.savez_compressed(TARGET, **arrays)
    print(f"{TARGET}: {len(recorder.arrays)} arrays")


if __name__ == "__main__":
    main()
