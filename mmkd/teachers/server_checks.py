"""What runs behind the URLs of vLLM servers, and whether it is what a run wants of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from transformers import PreTrainedTokenizerBase

from mmkd.errors import UserError

from . import vllm_wire as wire
from .endpoints import Endpoints, Refusal
from .vllm_rows import SAMPLING

Kind = TypeVar("Kind")

COMPLETIONS, POOLING = "/v1/completions", "/pooling"
WIRE_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Text of several scripts and kinds, on which different tokenizers hardly ever agree.
PROBE = "The naïve fox — 12345 × 0.5 — says: 你好, привет 🙂\n\tdef f(x):\n        return x['y']  # ok"


@dataclass(frozen=True)
class ServerFacts:
    """What runs behind the URLs: `root` is the folder or Hub name that was loaded, `max_model_len` in tokens."""

    urls: tuple[str, ...]
    model: str
    root: str
    max_model_len: int
    vllm_version: str


def states_request(model: str, dtype: torch.dtype) -> dict[str, Any]:
    """What makes a request one for the last hidden states of every token, as plain bytes."""
    return {
        "model": model,
        "task": "token_embed",
        "use_activation": False,
        "encoding_format": "bytes",
        "embed_dtype": WIRE_TYPES[dtype],
        "endianness": "little",
    }


class ServerChecks:
    """Questions about the servers themselves, each asked once and without retries."""

    def __init__(self, endpoints: Endpoints, model: str | None):
        self._endpoints, self.model = endpoints, model

    def facts_of(self, url: str) -> ServerFacts:
        models = self.get(url, "/v1/models", wire.Models).data
        version = self.get(url, "/version", wire.Version).version
        # An adapter has the model it belongs to as its parent.
        name = self.model
        matches = [m for m in models if m.id == name] if name else [m for m in models if m.parent is None]
        if len(matches) != 1:
            names = ", ".join(repr(model.id) for model in models)
            raise UserError(
                f"{url} serves {names}" + (f", not {name!r}." if name else ".") + " Name one of them as the model."
            )
        (model,) = matches
        if model.max_model_len is None:
            raise UserError(f"{url} does not state max_model_len for {model.id!r}: this is no vLLM server.")
        return ServerFacts((url,), model.id, model.root or model.id, model.max_model_len, version)

    def check_one(
        self,
        facts: ServerFacts,
        teacher: str | None,
        max_length: int | None,
        tokenizer: PreTrainedTokenizerBase | None,
        generates: bool,
    ) -> None:
        """Raises UserError where the server has another model, too little room or another tokenizer."""
        (url,) = facts.urls
        if teacher is not None and not _serves(facts, teacher):
            raise UserError(
                f"The teacher is {teacher!r}, but {url} serves {named(facts)}. Start it with that model, or with "
                f"--served-model-name {teacher} if the same model lies under another path there."
            )
        # A request for log-probs generates one token, which vLLM wants room for.
        needed = None if max_length is None else max_length + generates
        if needed is not None and facts.max_model_len < needed:
            raise UserError(
                f"{url} has room for {facts.max_model_len} tokens, but scoring texts of up to {max_length} takes "
                f"{needed}. Start it with --max-model-len {needed}, or lower max_length."
            )
        if tokenizer is not None:
            text = PROBE + "".join(tokenizer.all_special_tokens)
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
            body = {"model": facts.model, "prompt": text, "add_special_tokens": False}
            theirs = wire.decoded(
                self._endpoints.run(self.post("/tokenize", body, url)), wire.TokenizeReply, url
            ).tokens
            if list(ours) != theirs:
                raise UserError(
                    f"{url} tokenises unlike the tokenizer that the teacher should have: "
                    f"{wire.difference(ours, theirs)}. Serve the model with that tokenizer (--tokenizer)."
                )

    def check_top_k(self, facts: ServerFacts, k: int) -> None:
        """Raises UserError where the server does not give k log-probs."""
        (url,) = facts.urls
        body = {"model": facts.model, "prompt": [0, 0], **wire.scoring(k)}
        try:
            content = self._endpoints.run(self._endpoints.request(COMPLETIONS, msgspec.json.encode(body), url, False))
        except Refusal as refusal:
            if refusal.status != 404:
                raise UserError(f"{url} refused a request of two tokens: {row_refusal(refusal, body)}") from refusal
            raise UserError(
                f"{url} gives no log-probs: it does not generate. If it runs the pooling runner, set "
                f"teacher_server_signal: hidden. Otherwise start it with:\n{serve_line(facts, 'top_k', k)}"
            ) from refusal
        answer = wire.decoded(content, wire.Answers, url)
        wire.top_k(wire.positions(answer.choices[0].prompt_logprobs, 2)[1:], k)

    def check_states(self, facts: ServerFacts, dtype: torch.dtype) -> None:
        """Raises UserError where the server does not give the last hidden states of single tokens in this type."""
        refusal = self._states_refusal(facts, dtype)
        if refusal is not None:
            raise UserError(
                f"{facts.urls[0]} gives no hidden states of single tokens ({refusal.message}). Start it with:\n"
                f"{serve_line(facts, 'hidden')}"
            ) from refusal

    def signal_of(self, facts: ServerFacts) -> str:
        """What a server answers with: "hidden" of the pooling runner, "top_k" of the one that generates.

        Raises UserError where it pools, but gives no states of single tokens.
        """
        refusal = self._states_refusal(facts, torch.float32)
        if refusal is None:
            return "hidden"
        if not self._generates(facts):
            raise UserError(
                f"{facts.urls[0]} gives neither log-probs nor hidden states of single tokens ({refusal.message}). "
                f"Start it with:\n{serve_line(facts, 'hidden')}"
            ) from refusal
        return "top_k"

    def _states_refusal(self, facts: ServerFacts, dtype: torch.dtype) -> Refusal | None:
        """Why a server gives no hidden state of a token; None where it does. Raises UserError without permission."""
        (url,) = facts.urls
        body = {**states_request(facts.model, dtype), "input": [0]}
        try:
            self._endpoints.run(self._endpoints.request(POOLING, msgspec.json.encode(body), url, retry=False))
        except Refusal as refusal:
            if refusal.status in (401, 403):
                row_refusal(refusal, body)
            return refusal
        return None

    def _generates(self, facts: ServerFacts) -> bool:
        """Whether the server has the route of completions; it is asked for nothing that it would compute."""
        (url,) = facts.urls
        body = msgspec.json.encode({"model": facts.model, "prompt": [0], "max_tokens": -1})
        try:
            self._endpoints.run(self._endpoints.request(COMPLETIONS, body, url, retry=False))
        except Refusal as refusal:
            return refusal.status not in (404, 405)
        return True

    async def post(self, path: str, body: dict[str, Any], url: str) -> bytes:
        """A request of `check`, of which any refusal concerns the server."""
        try:
            return await self._endpoints.request(path, msgspec.json.encode(body), url, retry=False)
        except Refusal as refusal:
            raise UserError(f"{url} refused a request of two tokens: {row_refusal(refusal, body)}") from refusal

    def get(self, url: str, path: str, kind: type[Kind]) -> Kind:
        try:
            return wire.decoded(self._endpoints.run(self._endpoints.request(path, None, url, retry=False)), kind, url)
        except Refusal as refusal:
            raise UserError(f"{url}{path} is not a vLLM server's: {row_refusal(refusal, {})}") from refusal


def serve_line(facts: ServerFacts, signal: str, k: int = 64) -> str:
    """The command that starts a server of the same model which answers with a signal, the top k say."""
    flags = [
        f"vllm serve {facts.root}",
        f"--served-model-name {facts.model}",
        f"--max-model-len {facts.max_model_len}",
    ]
    if signal == "hidden":
        flags.append("--runner pooling --convert embed --pooler-config.task token_embed")
    else:
        flags.append(f"--max-logprobs {k}")
    return " ".join(flags)


def row_refusal(refusal: Refusal, body: Mapping[str, Any]) -> str:
    """Why the server refused this row, where that concerns the row alone; raises UserError for all else."""
    if refusal.parameter == "prompt_logprobs" or "prompt logprobs" in refusal.message:
        k = body.get("prompt_logprobs")
        raise UserError(
            f"{refusal.url} does not give the top {k} log-probs of a token: {refusal.message}. Start it with "
            f"--max-logprobs {k} or more, or choose a smaller k."
        ) from refusal
    if refusal.status in (401, 403):
        raise UserError(f"{refusal}. Give the server's key as api_key, or in VLLM_API_KEY.") from refusal
    # max_tokens is what vLLM blames for a prompt that leaves no room.
    if refusal.parameter in SAMPLING - {"max_tokens"}:
        raise UserError(f"The server refuses the sampling parameters: {refusal.message}") from refusal
    if refusal.status in (400, 413, 422):
        return refusal.message
    raise UserError(f"{refusal}. See that the URL is a vLLM server's and the model the one it serves.") from refusal


def _serves(facts: ServerFacts, teacher: str) -> bool:
    """Whether a folder or Hub name is what a server loaded, under its own name, by path or from the Hub's cache."""
    if teacher in (facts.model, facts.root):
        return True
    ours, theirs = Path(teacher), Path(facts.root)
    if ours.is_dir():
        return ours.resolve() == theirs.resolve()
    return f"models--{teacher.replace('/', '--')}" in theirs.parts


def named(facts: ServerFacts) -> str:
    return repr(facts.model) if facts.model == facts.root else f"{facts.model!r} (loaded from {facts.root!r})"
