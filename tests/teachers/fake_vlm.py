"""A loopback server that runs a vision-language model of this machine as vLLM would, with either runner."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkd.data.images import read_image
from tests.teachers.fake_vllm import ServedStates

TOKENS_IN = "/inference/v1/generate"


@dataclass
class ServedVLM(ServedStates):
    """`served` reads what `processor` makes of messages and images, or of tokens with placeholders."""

    processor: Any = None
    runs: str = "generate"
    """The runner, generate or pooling."""
    takes_tokens: bool = True
    """Whether it was started with --enable-scale-out."""
    max_model_len: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer, self.cap = self.processor.tokenizer, self.vocab_size

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/openapi.json":
            paths = {TOKENS_IN: "content_parts"} if self.takes_tokens and self.runs == "generate" else {}
            return 200, {"paths": paths}
        if path == "/tokenize" and "messages" in body:
            return 200, {"tokens": self.read(body)["input_ids"][0].tolist()}
        if path in ("/v1/models", "/version", "/tokenize"):
            return super().respond(path, body)
        answers: dict[str, Any] = {"/pooling": self.pool}
        if self.runs == "generate":
            answers = {"/v1/completions": self.score, "/v1/chat/completions": self.score}
            answers |= {TOKENS_IN: self.score} if self.takes_tokens else {}
        self.requests.append(body)
        return answers[path](body) if path in answers else (404, {"detail": "Not Found"})

    def read(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the model is given of a request."""
        if "messages" not in body:
            (ids,) = [body[name] for name in ("prompt", "token_ids", "input") if name in body]
            urls = [part["url"] for part in body.get("content_parts", [])]
            return self.filled(ids, [read_image(url) for url in urls])
        images: list[Image.Image] = []
        messages: list[dict[str, Any]] = []
        for message in body["messages"]:
            content = message["content"]
            parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
            images += [read_image(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
            parts = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            messages.append({"role": message["role"], "content": parts})
        text = self.processor.apply_chat_template(messages, tokenize=False)
        shown = [images] if images else None
        return dict(self.processor(text=[text], images=shown, return_tensors="pt", add_special_tokens=False))

    def filled(self, ids: list[int], images: Sequence[Image.Image]) -> dict[str, Any]:
        """Tokens with their placeholders replaced, and the images that these stand for."""
        if not images:
            return {"input_ids": torch.tensor([ids])}
        mark = getattr(self.processor, "boi_token", None) or self.processor.image_token
        place = self.tokenizer.convert_tokens_to_ids(mark)
        alone = [self.processor(text=[mark], images=[[image]], add_special_tokens=False) for image in images]
        left = [list(inputs["input_ids"][0]) for inputs in alone]
        whole = [token for i in ids for token in (left.pop(0) if i == place else [i])]
        together = self.processor(
            text=[mark * len(images)], images=[list(images)], return_tensors="pt", add_special_tokens=False
        )
        pixels = {name: value for name, value in together.items() if "pixel" in name or "grid" in name}
        return {**pixels, "input_ids": torch.tensor([whole])}

    @torch.no_grad()
    def pool(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert (body["task"], body["use_activation"], body["encoding_format"]) == ("token_embed", False, "bytes")
        states = self.served.base_model(**self.read(body), use_cache=False).last_hidden_state[0]
        return 200, self.packed([states], body["embed_dtype"])

    @torch.no_grad()
    def score(self, body: dict[str, Any]) -> tuple[int, Any]:
        k = body.get("sampling_params", body).get("prompt_logprobs")
        if k is None:
            # Who only asks whether there is such a route.
            return 400, {"error": {"message": "max_tokens must be at least 1", "param": "max_tokens"}}
        inputs = self.read(body)
        ids = inputs["input_ids"][0].tolist()
        log_probs = self.served(**inputs).logits[0].float().log_softmax(-1)
        entries = [None, *(self.listed(row, token, k) for row, token in zip(log_probs, ids[1:], strict=False))]
        choice = {"index": 0, "token_ids": [1], "finish_reason": "length"}
        apart = {"prompt_logprobs": entries, "prompt_token_ids": ids, "choices": [choice]}
        return 200, {"choices": [{**choice, "prompt_logprobs": entries}]} if "prompt" in body else apart

    def listed(self, log_probs: Tensor, token: int, k: int) -> dict[str, Any]:
        values, order = log_probs.topk(min(k, len(log_probs)))
        rank = int((log_probs > log_probs[token]).sum()) + 1
        entry = {str(token): {"logprob": float(log_probs[token]), "rank": rank}}
        for place, (value, index) in enumerate(zip(values.tolist(), order.tolist(), strict=True)):
            entry[str(index)] = {"logprob": value, "rank": place + 1}
        return entry
