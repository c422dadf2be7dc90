"""A loopback server that takes a student's weights, or its adapter, and speaks with them."""

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.teachers.fake_vllm import FakeVLLM


@dataclass
class ServedStudent(FakeVLLM):
    """A fake that speaks with the weights of the folder it was last given, or with an adapter beside those."""

    folder: str = ""
    loads: int = 0
    stuck_after: int = 1_000
    """How many times it takes weights before it only says so."""
    tokenizer: Any = None
    processor: Any = None
    """Of a served model that reads images."""
    stuck_folder: str = ""
    """The adapter that it takes instead of what it is given once it is stuck."""
    adapters: dict[str, Any] = field(default_factory=dict)
    """Name -> the model with this adapter, of those that are loaded."""

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/collective_rpc":
            self.loads += 1
            if self.loads <= self.stuck_after:
                self.folder = body["kwargs"]["weights_path"]
                self.weights: Any = self._base()
            return 200, {"results": [None]}
        if path == "/v1/load_lora_adapter":
            self.loads += 1
            assert body["lora_name"] not in self.adapters, "a name that the server has a memory of"
            folder = self.stuck_folder if self.loads > self.stuck_after else body["lora_path"]
            self.adapters[body["lora_name"]] = PeftModel.from_pretrained(self._base(), folder)
            return 200, {}
        if path == "/v1/unload_lora_adapter":
            return (200, {}) if self.adapters.pop(body["lora_name"], None) else (404, {"error": {"message": "none"}})
        if path.startswith("/reset_"):
            return 200, {"success": True}
        return super().respond(path, body)

    def _base(self) -> Any:
        auto = AutoModelForCausalLM if self.processor is None else AutoModelForImageTextToText
        return auto.from_pretrained(self.folder, dtype=torch.float32)

    def _read(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the model reads of a request."""
        if "prompt" in body:
            return {"input_ids": torch.tensor([body["prompt"]])}
        images, messages = [], []
        for message in body["messages"]:
            parts = message["content"]
            if isinstance(parts, list):
                urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
                images += [Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))) for url in urls]
                parts = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            messages.append({**message, "content": parts})
        text = self.processor.apply_chat_template(
            messages, add_generation_prompt=body["add_generation_prompt"], tokenize=False
        )
        return dict(self.processor(images=images or None, text=[text], add_special_tokens=False, return_tensors="pt"))

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        choice = {"text": "x", "index": 0, "finish_reason": "length"}
        model = self.adapters.get(body["model"]) or self.weights
        inputs = self._read(body)
        ids: list[int] = inputs["input_ids"][0].tolist()
        whole = {"prompt_token_ids": ids}
        if "prompt_logprobs" in body:
            log_probs = model(**inputs).logits[0].log_softmax(-1)
            told = zip(ids[1:], log_probs, strict=False)
            entries = [{str(token): {"logprob": float(row[token]), "rank": 1}} for token, row in told]
            return 200, {"choices": [{**choice, "token_ids": [0], "prompt_logprobs": [None, *entries]}], **whole}
        said: list[int] = []
        likely: list[float] = []
        barred = [int(token) for token in body.get("logit_bias") or {}]
        while len(said) < body["max_tokens"] and said[-1:] != [1]:
            tokens = torch.tensor([ids + said])
            logits = model(**{**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).logits[0, -1]
            raw = logits.log_softmax(-1)
            logits[barred] = -torch.inf
            said.append(int(logits.argmax()))
            likely.append(float(raw[said[-1]]))
        # As vLLM does: plain completions and chat completions each in their own way, and only where asked.
        log_probs: dict[str, Any] = {"token_logprobs": likely}
        if "messages" in body:
            log_probs = {"content": [{"token": "x", "logprob": value} for value in likely]}
        listed = {"logprobs": log_probs} if body.get("logprobs") in (0, True) else {}
        return 200, {"choices": [{**choice, "token_ids": said, **listed}], **whole}
