"""A loopback server that answers like vLLM and can be told to misbehave."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch

from tests.loopback import Binary, answering


@dataclass
class FakeVLLM:
    """Settings, and in `requests` the bodies of what was asked to complete."""

    model: str = "teacher"
    root: str = "/models/teacher"
    max_model_len: int = 128
    vocab_size: int = 50
    cap: int = 32
    key: str | None = None
    failures: list[int] = field(default_factory=list)
    """HTTP statuses of the next answers."""
    delay: float = 0.0
    held_back: int = 0
    """How many log-probs fewer than asked are given."""
    shift: float = 0.0
    """Added to every log-prob."""
    tokens: list[int] = field(default_factory=list)
    """What /tokenize answers."""
    pools: ClassVar[bool] = False
    """Whether it runs the pooling runner."""
    page: str | None = None
    """Answered instead of JSON."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def log_probs(self, token: int) -> np.ndarray:
        """The distribution after a token: the same order for all, turned by the token."""
        raw = -0.3 * np.roll(np.arange(self.vocab_size), 7 * token)
        return raw - np.log(np.exp(raw).sum())

    def answer(self, path: str, headers: Message, body: dict[str, Any]) -> tuple[int, Any]:
        """What `respond` says, to those who have the key."""
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        status, answer = self.respond(path, body)
        with self.lock:
            self.at_once -= 1
        if self.key is not None and headers["Authorization"] != f"Bearer {self.key}":
            return 401, self.page or {"error": "Unauthorized"}
        return status, self.page or answer

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            entry = {"id": self.model, "root": self.root, "parent": None, "max_model_len": self.max_model_len}
            adapter = {"id": "adapter", "root": "/models/adapter", "parent": self.model}
            return 200, {"object": "list", "data": [entry, adapter]}
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/tokenize":
            return 200, {"tokens": self.tokens}
        if path == "/pooling" and not self.pools:
            return 404, {"detail": "Not Found"}
        self.requests.append(body)
        time.sleep(self.delay)
        if self.failures:
            return self.failures.pop(0), {"error": {"message": "told to fail", "param": None}}
        return self.complete(body)

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, k = body["prompt"], body.get("prompt_logprobs")
        if k is not None and k > self.cap:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.cap}"
            return 400, {"error": {"message": message, "param": "prompt_logprobs"}}
        if max(ids) >= self.vocab_size:
            return 400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary", "param": None}}
        choice = {"text": "x", "token_ids": [ids[-1]], "finish_reason": "length"}
        choices: list[dict[str, Any]] = [{**choice, "index": i} for i in reversed(range(body.get("n", 1)))]
        if k is not None:
            entries = [self.entry(before, token, k) for before, token in pairwise(ids)]
            choices[0]["prompt_logprobs"] = [None, *entries]
        return 200, {"choices": choices}

    def entry(self, before: int, token: int, k: int) -> dict[str, Any]:
        """As vLLM's: the actual token first, then the k most likely, in a dict."""
        values = self.log_probs(before) + self.shift
        order = np.argsort(-values, kind="stable")
        listed = [token, *order[: k - self.held_back].tolist()]
        ranks = {int(t): rank + 1 for rank, t in enumerate(order)}
        return {str(t): {"logprob": values[t], "rank": ranks[t], "decoded_token": '"}{'} for t in listed}


@dataclass
class ServedModel(FakeVLLM):
    """Tokenises as a model of this machine does, and answers any prompt with its text after a mark."""

    tokenizer: Any = None

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        return super().respond(path, body)

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        text = f"served: {self.tokenizer.decode(body['prompt'], skip_special_tokens=True)}"
        return 200, {"choices": [{"index": 0, "text": text, "token_ids": [1], "finish_reason": "stop"}]}


@dataclass
class ServedLogProbs(FakeVLLM):
    """Runs a model of this machine with the generate runner: its true log-probs of a prompt."""

    served: Any = None
    """A transformers model."""
    tokenizer: Any = None

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/tokenize" and self.tokenizer is not None:
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        return super().respond(path, body)

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids, k = body["prompt"], body.get("prompt_logprobs")
        if k is None:
            return super().complete(body)
        entries: list[Any] = [None]
        for token, row in zip(
            ids[1:], self.served(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1), strict=False
        ):
            order = row.argsort(descending=True).tolist()
            entries.append(
                {str(i): {"logprob": float(row[i]), "rank": order.index(i) + 1} for i in [token, *order[:k]]}
            )
        choice = {"text": "x", "token_ids": [ids[-1]], "finish_reason": "length", "index": 0}
        return 200, {"choices": [{**choice, "prompt_logprobs": entries}]}


@dataclass
class ServedStates(FakeVLLM):
    """Runs a model of this machine with the pooling runner: its true last hidden states, and no text."""

    pools = True
    served: Any = None
    """A transformers model."""
    tokenizer: Any = None
    computes: Any = None
    """In the place of `states`: ids -> states."""
    cut: int = 0
    """How many of the last bytes are missing."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What is said of the states besides the truth."""

    def __post_init__(self) -> None:
        self.vocab_size = self.served.get_input_embeddings().num_embeddings

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/tokenize" and self.tokenizer is not None:
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path not in ("/v1/models", "/version", "/tokenize", "/pooling"):
            return 404, {"detail": "Not Found"}
        return super().respond(path, body)

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert (body["task"], body["use_activation"], body["encoding_format"]) == ("token_embed", False, "bytes")
        prompts = body["input"] if isinstance(body["input"][0], list) else [body["input"]]
        for ids in prompts:
            if max(ids) >= self.vocab_size:
                return 400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary", "param": None}}
            if len(ids) > self.max_model_len:
                return 400, {"error": {"message": f"maximum context length is {self.max_model_len}", "param": None}}
        return 200, self.packed([(self.computes or self.states)(ids) for ids in prompts], body["embed_dtype"])

    @torch.no_grad()
    def states(self, ids: list[int]) -> torch.Tensor:
        # Requests arrive in several threads, and threads of torch would wait for one another.
        with self.lock:
            return self.served.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]

    def packed(self, tables: list[torch.Tensor], name: str) -> Binary:
        """As vLLM's encoding_format bytes."""
        content, entries = b"", []
        for index, table in enumerate(tables):
            own = table.to(getattr(torch, name)).contiguous().view(torch.uint8).numpy().tobytes()
            where = {"index": index, "start": len(content), "end": len(content) + len(own)}
            entries.append({**where, "embed_dtype": name, "shape": list(table.shape), **self.metadata})
            content += own
        headers = {"metadata": json.dumps({"data": entries}), "Content-Type": "application/octet-stream"}
        return Binary(content[: len(content) - self.cut], headers)


@contextmanager
def fake_vllm(kind: type[FakeVLLM] = FakeVLLM, **settings: Any) -> Iterator[Any]:
    """A fake that runs on a free port of the loopback interface."""
    fake = kind(**settings)
    with answering(fake.answer) as fake.url:
        yield fake
