"""Real vLLM servers on loopback, each started once for all tests that ask for it."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from transformers import AutoTokenizer

from scripts.make_tiny_models import make_model, make_tokenizer, save
from tests.teachers.vlm import make_vlm
from tests.vlms import make_llava

ROOT = Path(__file__).resolve().parents[2]
# Seconds: a start takes 30, the first one of a checkout installs vLLM before that.
PATIENCE = 280


@dataclass(frozen=True)
class Served:
    """A model and the vLLM that serves it; `vocab_size` counts the tokens of its tokenizer."""

    url: str
    folder: Path
    vocab_size: int


@contextmanager
def serve(folder: Path, log: Path, *flags: str) -> Iterator[Served]:
    """A vLLM made and started by scripts/serve_teacher.sh, killed in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(ROOT / "scripts" / "serve_teacher.sh"), str(folder), "--port", str(port), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        await_health(url, server, log)
        yield Served(url, folder, len(AutoTokenizer.from_pretrained(folder)))
    finally:
        # Its own session, so that the engine's processes go with it; it may have ended by itself.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def await_health(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            text = log.read_text(errors="replace")
            if "No matching distribution found" in text or "Failed to establish a new connection" in text:
                pytest.skip("vLLM is not installed (.cache/vllm) and cannot be downloaded here")
            pytest.fail(f"scripts/serve_teacher.sh ended with code {server.returncode}:\n{text[-3000:]}")
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"vLLM was not up after {PATIENCE} s:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="session")
def served_teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A random Llama with the tiny models' tokenizer, fp32, 256 tokens of context, at most 256 log-probs."""
    tokenizer = make_tokenizer()
    folder = tmp_path_factory.mktemp("served_teacher")
    # A width of 64 gives heads of 32, the least that vLLM's attention on a CPU takes.
    save(make_model(width=64, rows=len(tokenizer), seed=3), tokenizer, folder / "model")
    with serve(folder / "model", folder / "server.log") as served:
        yield served


@pytest.fixture(scope="session")
def served_vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A random Idefics3 with its processor (tests/teachers/vlm.py), fp32, 256 tokens of context."""
    folder = tmp_path_factory.mktemp("served_vlm")
    with serve(make_vlm(folder / "model"), folder / "server.log") as served:
        yield served


@pytest.fixture(scope="session")
def served_llava(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A random LLaVA as `assemble_llava` makes and saves students, fp32, 256 tokens of context."""
    folder = tmp_path_factory.mktemp("served_llava")
    with serve(make_llava(folder / "model", seed=2, width=64), folder / "server.log") as served:
        yield served
