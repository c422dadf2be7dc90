"""B5: what `mmkd cache build` spends outside of the teacher, with a local teacher and through a vLLM server.

Local: one shard from the data to the disk against a bare loop over the same batches that does what no capture avoids:
forward, head and log-softmax, in buffers that are reused. The stages of the shard are also measured one by one, each
on ready inputs. Loading the teacher and preparing the text happen once per build and are shown apart.

Served: scripts/serve_teacher.sh starts a real vLLM with the same model on the loopback interface, in processes of its
own. The share is the CPU time of the client's process over the wall time. It grows with the speed of the server: the
table also says how many tokens per second one client process could take in at most.
"""

import argparse
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from _caching import TEACHER, parsed, plan_of, sequences_of, text_arguments
from _measure import Step, arguments, interleaved, report, timed, verdict
from torch import Tensor

from mmkd.cache.codec import Codec, TokenScores
from mmkd.cache.side_files import TOKEN_ORDER
from mmkd.cache.store import CacheWriter
from mmkd.capture.build_plan import ScorePlan, ShardResult
from mmkd.capture.scorers import LocalScorer, batches
from mmkd.capture.scoring import score_tokens
from mmkd.capture.sequences import usable
from mmkd.losses.projection import starts
from mmkd.models.backbone import full_head
from mmkd.teachers.signals import DenseSignal

LIMIT = 0.05
SERVE = Path(__file__).resolve().parents[1] / "serve_teacher.sh"
# Seconds: a start takes 30, the first one of a checkout installs vLLM before that.
PATIENCE = 600


def build_shard(plan: ScorePlan, scratch: Path) -> float:
    """One shard, from the data to the disk, as `mmkd cache build` makes it; returns its supervised tokens."""
    result = plan.shard("train", 0, lambda tokens: None)
    commit(plan, result, scratch)
    return sum(row["tokens"] for row in result.rows)


def commit(plan: ScorePlan, result: ShardResult, scratch: Path) -> float:
    """Writes a finished shard to a new folder."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, CacheWriter(folder, plan.manifest) as writer:
        (Path(folder) / TOKEN_ORDER).write_bytes(plan.files()[TOKEN_ORDER])
        writer.write(result.split, result.number, result.rows, result.skipped, result.cost)
        # The manifest is the plan's own, and the next folder is empty again.
        writer.manifest.shards[result.split].clear()
    return len(result.rows)


# Local


class BareTeacher:
    """A model's forward, head and log-softmax, whose largest tensors exist once."""

    def __init__(self, engine: LocalScorer, chunk: int):
        self.model = engine.teacher.model
        self.head = full_head(self.model).trimmed(engine.teacher.vocab_size).frozen()
        self.logits = torch.empty(chunk, self.head.vocab_size, dtype=self.head.weight.dtype)
        self.log_probs = torch.empty(chunk, self.head.vocab_size)

    @torch.no_grad()
    def hidden(self, inputs: dict[str, Any], supervised: Tensor) -> Tensor:
        """The last hidden states at the supervised positions."""
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1][supervised]

    @torch.no_grad()
    def distributions(self, hidden: Tensor) -> int:
        """Forms the log-probs of every token, each chunk over the one before."""
        for start in starts(len(hidden), len(self.logits)):
            states = hidden[start : start + len(self.logits)]
            logits = self.head.finish(self.head.project(states, self.logits[: len(states)]))
            torch.log_softmax(logits, -1, torch.float32, out=self.log_probs[: len(states)])
        return len(hidden)


def local_steps(plan: ScorePlan, args: argparse.Namespace, scratch: Path) -> dict[str, Step]:
    """The whole shard, the teacher alone, and every stage of the shard by itself."""
    engine, codec = plan.scorer, plan.codec
    assert isinstance(engine, LocalScorer)
    assert isinstance(codec, Codec)
    bare, sequences = BareTeacher(engine, args.chunk), sequences_of(plan, args.sequences)
    places = batches([len(one.ids) for one in sequences], plan.arguments.cache_batch_tokens)
    groups = [[sequences[place] for place in batch] for batch in places]
    inputs = [plan.prepared.batch(group) for group in groups]
    signals = [engine.teacher.ask(*batch) for batch in inputs]
    scores = [one for one in engine.score(sequences, lambda tokens: None) if isinstance(one, TokenScores)]
    result = plan.shard("train", 0, lambda tokens: None)
    offsets = [np.zeros(len(one.hidden)) for one in signals]
    everything = range(len(sequences))

    def top_k(signal: DenseSignal, offsets: np.ndarray) -> int:
        return len(score_tokens(signal, codec.k, codec.m, offsets))

    return {
        "shard": lambda: build_shard(plan, scratch),
        "bare teacher": lambda: sum(bare.distributions(bare.hidden(*batch)) for batch in inputs),
        "read the sequences": lambda: len(list(usable(plan.prepared.splits["train"], everything))),
        "batches": lambda: sum(len(plan.prepared.batch(group)) for group in groups),
        "hidden states": lambda: sum(len(engine.teacher.ask(*batch).hidden) for batch in inputs),
        "bare hidden states": lambda: sum(len(bare.hidden(*batch)) for batch in inputs),
        "scores: head, log-softmax, top-k, tail": lambda: sum(map(top_k, signals, offsets)),
        "bare head and log-softmax": lambda: sum(bare.distributions(one.hidden) for one in signals),
        "keys": lambda: sum(len(one.key) for one in sequences),
        "encode": lambda: sum(len(codec.encode(one)) for one in scores),
        "commit": lambda: commit(plan, result, scratch),
    }


def local_tables(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a shard costs over the teacher alone, and where."""
    plans: list[ScorePlan] = []
    flags = ("--teacher_dtype", args.dtype, "--teacher_top_k", str(args.k), "--cache_tail_draws", str(args.draws))
    prepare = timed(lambda: plans.append(plan_of(scratch / "local", args, *flags)) or 0.0, "cpu").seconds
    (plan,) = plans
    load = timed(lambda: plan.scorer.teacher_seconds, "cpu").seconds
    steps = local_steps(plan, args, scratch)
    runs = interleaved(steps, dict.fromkeys(steps, int(args.repeats)), "cpu")
    shard, bare = runs["shard"].seconds, runs["bare teacher"].seconds
    tokens = runs["shard"].value
    rows = [
        {"": name, "s": run.seconds, "us/token": 1e6 * run.seconds / tokens, "share of the shard": run.seconds / shard}
        for name, run in runs.items()
    ]
    everything = sum(getattr(split, "tokens", 0) for split in plan.prepared.splits.values())
    once = [
        {"": "tokenise, pack, keys, counts, manifest", "s": prepare, "us/token": 1e6 * prepare / everything},
        {"": "load the teacher", "s": load, "us/token": None},
    ]
    title = f"One local shard: {len(plan.manifest.span('train', 0))} sequences, {tokens:,.0f} supervised tokens"
    what = f"{args.dtype}, top-{args.k}, {args.draws} draws"
    tables = {f"{title}, {what}": rows, f"Once per build, here of {everything:,} tokens": once}
    return tables, [verdict("local: share outside of the teacher", (shard - bare) / shard, LIMIT)]


# Through a server


@contextmanager
def served(args: argparse.Namespace, log: Path, *flags: str) -> Iterator[str]:
    """The URL of a vLLM with the teacher, started by scripts/serve_teacher.sh and ended with the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(SERVE), str(TEACHER), "--port", str(port), "--max-model-len", str(args.length + 1), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(1)
        yield url
    finally:
        # Its own session, so that the engine's processes go with it.
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def answers(url: str) -> bool:
    """Whether somebody answers there."""
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


def served_tables(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """CPU time of the client and wall time of a shard that a server scores."""
    with served(args, scratch / "server.log") as url:
        flags = ("--teacher_server", url, "--teacher_top_k", str(args.k))
        plan = plan_of(scratch / "served", args, *flags)
        # vLLM compiles and allocates with its first requests.
        list(plan.scorer.score(sequences_of(plan, 2), lambda tokens: None))
        runs = [on_both_clocks(lambda: build_shard(plan, scratch)) for _ in range(args.served_repeats)]
        tokens, wall, cpu = min(runs, key=lambda run: run[2])
    row = {
        "": f"top-{args.k}",
        "tokens": tokens,
        "wall, s": wall,
        "client's CPU, s": cpu,
        "share": cpu / wall,
        "server, tokens/s": tokens / wall,
        "client, us/token": 1e6 * cpu / tokens,
        "client at most, tokens/s": tokens / cpu,
    }
    title = f"One shard through vLLM on the loopback interface, fp32, {args.sequences} sequences of {args.length}"
    return {title: [row]}, [verdict("served: client's CPU over wall time", cpu / wall, LIMIT)]


def on_both_clocks(work: Callable[[], float]) -> tuple[float, float, float]:
    """What the work returns, and its wall and CPU seconds, over all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return value, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = text_arguments(arguments(__doc__), sequences=32, length=256)
    parser.add_argument("--k", type=int, default=64, help="exact entries per token")
    parser.add_argument("--draws", type=int, default=0, help="draws from the tail per token, of the local teacher")
    parser.set_defaults(dtype="float32")
    parser.add_argument("--chunk", type=int, default=256, help="tokens whose logits the bare loop forms at a time")
    parser.add_argument("--served_repeats", type=int, default=2, help="shards through the server")
    parser.add_argument("--no_local", action="store_true")
    parser.add_argument("--no_server", action="store_true", help="leave out vLLM, which needs 3.5 GB when first used")
    args = parsed(parser)
    torch.set_num_threads(args.threads)
    tables, verdicts = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for wanted, measure in ((not args.no_local, local_tables), (not args.no_server, served_tables)):
            if wanted:
                found, judged = measure(args, Path(folder))
                tables |= found
                verdicts += judged
    report("b5_capture", "cpu", tables, [] if args.quick else verdicts, vars(args))


if __name__ == "__main__":
    main()
