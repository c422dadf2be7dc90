"""Python processes that start at once, since a server that has imported transformers, TRL and mmkd forks them.

Importing takes longer than most of what tests run. For what reads its environment on import, such as where the Hub is,
start a process with `subprocess`.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from tests.helpers import environment

ROOT = Path(__file__).parents[1]


class ForkServer:
    """A process that forks others; `variables` are those that packages read when they are imported."""

    def __init__(self, variables: Mapping[str, str] | None = None):
        self.variables = dict(variables or {})
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
                cwd=ROOT,
                env={**environment(), **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def fork(self, request: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Starts a process with two streams and one to report to: its id, and in the end its status."""
        socket.send_fds(self._connection, [json.dumps(request).encode()], descriptors)

    def close(self) -> None:
        self._connection.close()
        self._process.wait()


@cache
def _shared_server() -> ForkServer:
    server = ForkServer()
    atexit.register(server.close)
    return server


class Forked:
    """`python -m MODULE ...` or `python -c CODE ...`, with what `subprocess.Popen` offers of it."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        variables: Mapping[str, str] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        server: ForkServer | None = None,
    ):
        server = server or _shared_server()
        self.arguments = [str(word) for word in arguments]
        self.returncode: int | None = None
        known = {**environment(), **server.variables, **(variables or {})}
        request = {"arguments": self.arguments, "folder": str(folder), "environment": known}
        reading, writing = os.pipe()
        with open(os.devnull, "wb") as nowhere:
            streams = [(stream or nowhere).fileno() for stream in (stdout, stderr)]
            server.fork(request, [*streams, writing])
        os.close(writing)
        self.report = os.fdopen(reading)
        self.pid = int(self.report.readline())

    def poll(self) -> int | None:
        """The exit status of a process that has ended."""
        if self.returncode is None and select.select([self.report], [], [], 0)[0]:
            self.returncode = int(self.report.readline())
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        """The exit status, negative after a signal. What takes longer is ended, and TimeoutExpired raised."""
        if self.returncode is None:
            if not select.select([self.report], [], [], timeout)[0]:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            self.returncode = int(self.report.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it and waits for its end."""
        self.send_signal(signal.SIGKILL)
        self.wait()


def run_forked(
    arguments: Sequence[str],
    folder: Path,
    variables: Mapping[str, str] | None = None,
    server: ForkServer | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a process to its end."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = Forked(arguments, folder, variables, output, errors, server)
        status = process.wait()
        return subprocess.CompletedProcess(process.arguments, status, _text(output), _text(errors))


def run_ranks(
    count: int, arguments: Sequence[str], variables: Mapping[str, str] | None = None, timeout: float = 280
) -> None:
    """Runs a process per rank as torchrun does. Fails with the errors of the first rank that fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    with tempfile.TemporaryDirectory() as folder:
        ranks, errors = [], [Path(folder, f"rank{rank}") for rank in range(count)]
        for rank, path in enumerate(errors):
            own = {**(variables or {}), **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with path.open("wb") as stderr:
                ranks.append(Forked(arguments, ROOT, own, stderr=stderr))
        deadline = time.monotonic() + timeout
        try:
            while None in (states := [rank.poll() for rank in ranks]) and not any(states):
                assert time.monotonic() < deadline, f"ranks still run after {timeout:.0f} s"
                select.select([rank.report for rank in ranks if rank.returncode is None], [], [], 1)
            failed = next((number for number, rank in enumerate(ranks) if rank.returncode), None)
            assert failed is None, f"rank {failed}: {errors[failed].read_text()[-3000:]}"
        finally:
            # Those that wait for one that failed.
            for rank in ranks:
                rank.kill()


def on_two_ranks(
    jobs: dict[str, dict[str, Any]], folder: Path, ranks: int = 2, **variables: str
) -> dict[str, list[dict[str, Any]]]:
    """What each of two gloo ranks, or more, saw of the jobs that `tests/trainers/two_ranks.py` trains in turn."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(ranks, ["-m", "tests.trainers.two_ranks", str(folder / "jobs.json"), str(folder)], variables)
    saw = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [rank[name] for rank in saw] for name in jobs}


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()
