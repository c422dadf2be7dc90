"""B13: a served teacher against the same teacher in this process: its distribution, and the student's gradient.

The teacher answers with its last hidden states (scripts/serve_teacher.sh MODEL --signal hidden), which travel as fp32,
fp16 or bf16, and in another run with its top-k as JSON. Both servers are real vLLMs on the loopback interface that run
the real teacher in fp32. The student is the teacher without its last third of layers, so that it has something to
learn; the error of a gradient is that of all its parameters together. Bytes are those of the servers' answers.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from _caching import TEACHER, parsed, plan_of, sequences_of, text_arguments
from _measure import arguments, report, verdict
from b5_capture import served
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mmkd.capture.sequences import TokenSequence
from mmkd.losses.divergences import forward_kl, reverse_kl
from mmkd.losses.fused import Targets, fused_loss
from mmkd.models.backbone import full_head
from mmkd.teachers.served_head import head_of_checkpoint
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.signals import DenseSignal
from mmkd.teachers.vllm_client import ScoreRequest, VLLMClient

CHUNK = 256
DIVERGENCES = {"forward KL": forward_kl, "reverse KL": reverse_kl}
WIRE = ("float32", "float16", "bfloat16")
LIMITS = {"float32": 1e-6, "bfloat16": 1e-4}
"""Type on the wire -> the most nats per token that it may cost."""


class Text:
    """Sequences of the real text, each predicted from its second token on."""

    def __init__(self, sequences: list[TokenSequence]):
        self.ids = [torch.from_numpy(sequence.ids).long() for sequence in sequences]

    def questions(self) -> list[ScoreRequest]:
        """What a server is asked."""
        return [ScoreRequest(ids.numpy(), np.arange(len(ids)) > 0) for ids in self.ids]

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return sum(len(ids) - 1 for ids in self.ids)


def load(layers: float = 1.0) -> PreTrainedModel:
    """The teacher in fp32, or the first share of its layers."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    blocks = model.model.layers
    del blocks[round(layers * len(blocks)) :]
    return model


@torch.no_grad()
def local_signals(text: Text) -> list[Targets]:
    """What transformers computes."""
    model = load()
    head = full_head(model)
    return [DenseSignal(model.base_model(ids[None]).last_hidden_state[0, :-1], head) for ids in text.ids]


def hidden_signals(url: str, text: Text, dtype: torch.dtype) -> list[Targets]:
    """What is made of a server's hidden states and the head of the checkpoint."""
    head = head_of_checkpoint(str(TEACHER), dtype=torch.float32)
    with VLLMClient(url) as client:
        answers = list(client.states(text.questions(), dtype))
    states = [answer.float() for answer in answers if isinstance(answer, Tensor)]
    assert len(states) == len(answers), answers
    return [DenseSignal(table, head) for table in states]


def top_k_signals(url: str, text: Text, k: int) -> list[Targets]:
    """The top-k of a server and the tail as one outcome."""
    teacher = ServerTeacher(url, k=k)
    teacher.client.check()
    return [teacher.ask({"input_ids": ids[None]}, torch.ones(1, len(ids) - 1, dtype=torch.bool)) for ids in text.ids]


def bytes_per_token(url: str, path: str, body: Mapping[str, object], text: Text) -> float:
    """Bytes of the answer to a request about the first sequence, per predicted token."""
    ids = text.ids[0].tolist()
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    field = "input" if path == "/pooling" else "prompt"
    response = httpx.post(url + path, json={"model": model, field: ids, **body}, timeout=600).raise_for_status()
    return len(response.content) / (len(ids) - 1)


@torch.no_grad()
def distances(signals: list[Targets], local: list[Targets]) -> tuple[float, float]:
    """KL(served || local) per token in nats: the mean and the largest."""
    values = []
    for ours, theirs in zip(signals, local, strict=True):
        assert isinstance(ours, DenseSignal)
        assert isinstance(theirs, DenseSignal)
        served, here = (signal.head.log_probs(signal.hidden).double() for signal in (ours, theirs))
        # Log-probs of fp32 do not sum to 1 closely enough for a KL of 1e-8.
        served, here = served.log_softmax(-1), here.log_softmax(-1)
        values.append((served.exp() * (served - here)).sum(-1))
    together = torch.cat(values)
    return float(together.mean()), float(together.max())


def gradient(student: PreTrainedModel, text: Text, signals: list[Targets], divergence: str) -> Tensor:
    """The gradient of the mean divergence over the text in all parameters, in one vector."""
    student.zero_grad()
    for ids, signal in zip(text.ids, signals, strict=True):
        hidden = student.base_model(ids[None]).last_hidden_state[0, :-1]
        loss = fused_loss(
            hidden, full_head(student), ids[1:], signal, DIVERGENCES[divergence], chunk_size=CHUNK, precise=True
        )
        (loss.total / text.tokens).backward()
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters() if parameter.grad is not None])


def compared(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Cosine of two vectors, and the length of their difference relative to the second."""
    ours, theirs = ours.double(), theirs.double()
    return float(torch.cosine_similarity(ours, theirs, dim=0)), float((ours - theirs).norm() / theirs.norm())


@contextmanager
def server(args: argparse.Namespace, folder: Path, given: str | None, *flags: str) -> Iterator[str]:
    """The server that was given, or one that lives as long as the context."""
    if given is not None:
        yield given
        return
    with served(args, folder / "server.log", *flags) as url:
        yield url


def main() -> None:
    parser = text_arguments(arguments(__doc__, ["float32"]), sequences=8, length=256)
    parser.add_argument("--k", type=int, nargs="+", default=[64], help="tokens per position of the top-k server")
    parser.add_argument("--hidden_server", metavar="URL", help="a server of hidden states (default: starts one)")
    parser.add_argument("--top_k_server", metavar="URL", help="a server of log-probs (default: starts one)")
    args = parsed(parser)
    torch.set_num_threads(args.threads)
    signals: dict[str, list[Targets]] = {}
    size: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = Text(sequences_of(plan_of(folder / "plan", args), args.sequences))
        with server(args, folder, args.hidden_server, "--signal", "hidden") as url:
            for kind in WIRE:
                signals[f"hidden, {kind}"] = hidden_signals(url, text, getattr(torch, kind))
                asked = {"task": "token_embed", "use_activation": False}
                wire = {"encoding_format": "bytes", "embed_dtype": kind}
                size[f"hidden, {kind}"] = bytes_per_token(url, "/pooling", asked | wire, text)
        with server(args, folder, args.top_k_server) as url:
            for k in args.k:
                signals[f"top-{k}"] = top_k_signals(url, text, k)
                asked = {"prompt_logprobs": k, "max_tokens": 1}
                size[f"top-{k}"] = bytes_per_token(url, "/v1/completions", asked, text)
    rows = compared_rows(text, signals, size)
    title = f"{text.tokens:,} tokens of real text; gradient of a student of 20 of the teacher's 30 layers"
    report("b13_served_teacher", "cpu", {title: list(rows.values())}, [] if args.quick else verdicts(rows), vars(args))


def compared_rows(
    text: Text, signals: Mapping[str, list[Targets]], size: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """How far each signal is from the teacher in this process, by its name."""
    local, student = local_signals(text), load(layers=2 / 3)
    rows: dict[str, dict[str, Any]] = {name: {"": name, "bytes/token": size[name]} for name in signals}
    for name, row in rows.items():
        # A top-k does not tell the whole distribution.
        whole = isinstance(signals[name][0], DenseSignal)
        mean, largest = distances(signals[name], local) if whole else (None, None)
        row |= {"KL, nats": mean, "largest KL": largest}
    for divergence in DIVERGENCES:
        exact = gradient(student, text, local, divergence)
        for name, row in rows.items():
            cosine, error = compared(gradient(student, text, signals[name], divergence), exact)
            row |= {f"{divergence}: 1 - cosine": 1 - cosine, f"{divergence}: error": error}
    return rows


def verdicts(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What became of the targets."""
    targets = []
    for kind, limit in LIMITS.items():
        row = rows[f"hidden, {kind}"]
        targets.append(verdict(f"KL of {kind} on the wire, nats", row["KL, nats"], limit))
        for divergence in DIVERGENCES:
            cosine = row[f"{divergence}: 1 - cosine"]
            targets.append(verdict(f"{kind}: 1 - cosine of the gradient of the {divergence}", cosine, 1e-4))
    return targets


if __name__ == "__main__":
    main()
