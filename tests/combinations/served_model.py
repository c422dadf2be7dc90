"""Loopback servers that answer like vLLM, with what a model of a folder says."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin

from mmkd.models.load import load_model, load_processing_class, tokenizer_of
from tests.teachers.fake_vllm import FakeVLLM, ServedStates, fake_vllm
from tests.teachers.fake_vlm import ServedVLM
from tests.trainers.served_student import ServedStudent


@dataclass
class TopKServer(FakeVLLM):
    """A fake with the log-probs of a model."""

    served: Any = None
    tokenizer: Any = None

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        return super().respond(path, body)

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids, k = list(body["prompt"]), body.get("prompt_logprobs")
        if k is None:
            return super().complete(body)
        # Requests arrive in several threads, and threads of torch would wait for one another.
        with self.lock:
            log_probs = self.served(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        entries = [_entry(row, token, k) for row, token in zip(log_probs, ids[1:], strict=False)]
        choice = {"text": "x", "index": 0, "token_ids": [ids[-1]], "finish_reason": "length"}
        return 200, {"choices": [{**choice, "prompt_logprobs": [None, *entries]}]}


def _entry(log_probs: torch.Tensor, token: int, k: int) -> dict[str, Any]:
    """As vLLM's: the token itself first, then the k most likely."""
    values, order = log_probs.sort(descending=True, stable=True)
    ranks = {int(index): rank for rank, index in enumerate(order, start=1)}
    listed = [token, *order[:k].tolist()]
    return {str(index): {"logprob": float(values[ranks[index] - 1]), "rank": ranks[index]} for index in listed}


@contextmanager
def serve(folder: Path, signal: str) -> Iterator[str]:
    """The address of a server of the model in a folder, with all log-probs (top_k) or hidden states (hidden)."""
    reads: Any = load_processing_class(str(folder), "teacher")
    model = load_model(str(folder), "teacher", dtype="float32").eval()
    rows = model.config.get_text_config().vocab_size
    settings: dict[str, Any] = {"root": str(folder), "served": model, "vocab_size": rows, "max_model_len": 256}
    if isinstance(reads, ProcessorMixin):
        kind: Any = ServedVLM
        settings |= {"processor": reads, "runs": "generate" if signal == "top_k" else "pooling"}
    else:
        kind = TopKServer if signal == "top_k" else ServedStates
        settings |= {"tokenizer": reads, "cap": rows}
    with fake_vllm(kind, **settings) as fake:
        yield fake.url


@contextmanager
def serve_student(folder: Path) -> Iterator[str]:
    """The address of a server that takes the weights, or adapters, of the student in a folder."""
    reads: Any = load_processing_class(str(folder), "student")
    processor = reads if isinstance(reads, ProcessorMixin) else None
    settings = {"processor": processor, "tokenizer": tokenizer_of(reads), "folder": str(folder)}
    with fake_vllm(ServedStudent, max_model_len=256, **settings) as fake:
        yield fake.url
