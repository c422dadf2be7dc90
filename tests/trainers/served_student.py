"""A loopback server that takes a student's weights and speaks with them."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.teachers.fake_vllm import FakeVLLM


@dataclass
class ServedStudent(FakeVLLM):
    """A fake that speaks with the weights of the folder it was last given."""

    folder: str = ""
    loads: int = 0
    stuck_after: int = 1_000
    """How many times it takes weights before it only says so."""
    tokenizer: Any = None

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/collective_rpc":
            self.loads += 1
            if self.loads <= self.stuck_after:
                self.folder = body["kwargs"]["weights_path"]
                self.weights: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
            return 200, {"results": [None]}
        return (200, {"success": True}) if path == "/reset_prefix_cache" else super().respond(path, body)

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids, choice = list(body["prompt"]), {"text": "x", "index": 0, "finish_reason": "length"}
        log_probs = self.weights(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        if "prompt_logprobs" in body:
            told = zip(ids[1:], log_probs, strict=False)
            entries = [{str(token): {"logprob": float(row[token]), "rank": 1}} for token, row in told]
            return 200, {"choices": [{**choice, "token_ids": [0], "prompt_logprobs": [None, *entries]}]}
        said: list[int] = []
        while len(said) < body["max_tokens"] and said[-1:] != [1]:
            said.append(int(self.weights(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
        return 200, {"choices": [{**choice, "token_ids": said}]}
