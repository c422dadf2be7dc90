"""B14: how near a gradient from few outcomes comes to that of the exact reverse KL, on the student's own answers.

The student is SmolLM2-135M-Instruct with noise in its weights, the teacher the same without. Positions are those of
answers that the student samples. At these, tokens are drawn anew and the gradient of the head's weights is compared,
from one draw per position and from the mean of several, with the exact one; and that of the student's top-k.
"""

from collections.abc import Callable
from typing import Any

import torch
from _measure import arguments, report
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmkd.losses.divergences import reverse_kl
from mmkd.losses.fused import Objective, Targets, fused_loss
from mmkd.losses.narrowed import SampledTargets, StudentTopK
from mmkd.losses.sampled_kl import policy_gradient, sampled_kl
from mmkd.models.heads import LMHead
from mmkd.teachers.signals import DenseSignal

MODEL = ".cache/mmkd/SmolLM2-135M-Instruct"
PROMPTS = (
    "Explain why the sky is blue.",
    "Write a short story about a lighthouse.",
    "What is a hash table?",
    "Give three tips for sleeping better.",
)


def states(noise: float, length: int) -> tuple[Tensor, LMHead, DenseSignal]:
    """The student's states and head at its own answers, and what the teacher says there."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    load: Any = AutoModelForCausalLM.from_pretrained
    teacher, student = (load(MODEL, dtype=torch.float32).eval() for _ in range(2))
    ours, theirs = [], []
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.dim() > 1:
                parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
        for prompt in PROMPTS:
            turns = [{"role": "user", "content": prompt}]
            asked = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            ids = tokenizer.apply_chat_template(turns, **asked)["input_ids"]
            row = student.generate(ids, do_sample=True, top_k=0, max_new_tokens=length)
            for model, parts in ((student, ours), (teacher, theirs)):
                parts.append(model.model(row).last_hidden_state[0, ids.shape[1] - 1 : -1])
    heads = [LMHead(model.lm_head.weight.detach(), None) for model in (student, teacher)]
    return torch.cat(ours), heads[0], DenseSignal(torch.cat(theirs), heads[1])


def gradient(hidden: Tensor, head: LMHead, targets: Targets, objective: Objective) -> tuple[float, Tensor]:
    """The loss per token, and the gradient of the head's weights."""
    weight = head.weight.clone().requires_grad_()
    labels = torch.zeros(len(hidden), dtype=torch.long)
    loss = fused_loss(hidden, LMHead(weight, None), labels, targets, objective).total
    return loss.item() / len(hidden), torch.autograd.grad(loss, weight)[0].flatten()


def rows_of(noise: float, length: int, draws: int) -> tuple[int, list[dict[str, float | str | None]]]:
    """The number of positions, and a row per objective."""
    hidden, head, teacher = states(noise, length)
    kl, exact = gradient(hidden, head, teacher, reverse_kl)
    rows: list[dict[str, float | str | None]] = [{"": "exact", "nats": kl, "cosine": 1.0, f"of {draws} draws": None}]
    for k in (1, 16, 64):
        nats, top = gradient(hidden, head, StudentTopK(teacher, k), reverse_kl)
        cosine = cosine_similarity(top, exact, dim=0).item()
        rows.append({"": f"student_top_k {k}", "nats": nats, "cosine": cosine, f"of {draws} draws": None})
    probabilities = (hidden @ head.weight.T).softmax(-1)
    sampled: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "k1": lambda q, p: policy_gradient(q, p)[0],
        "k1 with baseline": lambda q, p: policy_gradient(q, p, baseline=kl)[0],
        "k3 as a loss": lambda q, p: sampled_kl(q, p, "k3"),
    }
    for name, loss in sampled.items():
        several, single = torch.zeros_like(exact), 0.0
        for draw in range(draws):
            labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(draw))[:, 0]
            targets = SampledTargets(labels, targets=teacher)
            one = gradient(hidden, head, targets, lambda q, p, loss=loss: loss(q[:, 0], p[:, 0]))[1]
            several, single = several + one, single + cosine_similarity(one, exact, dim=0).item() / draws
        of_all = cosine_similarity(several, exact, dim=0).item()
        rows.append({"": name, "nats": None, "cosine": single, f"of {draws} draws": of_all})
    return len(hidden), rows


def main() -> None:
    parser = arguments(__doc__, ["float32"])
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[0.05, 0.15], help="in standard deviations of weights"
    )
    parser.add_argument("--length", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--draws", type=int, default=4, help="tokens that are drawn at each position")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    length, draws = (4, 2) if args.quick else (args.length, args.draws)
    tables = {}
    for noise in args.noise:
        positions, rows = rows_of(noise, length, draws)
        tables[f"{positions} positions, noise {noise}: cosine with the gradient of the exact reverse KL"] = rows
    report("b14_sampled_gradient", "cpu", tables, [], vars(args))


if __name__ == "__main__":
    main()
