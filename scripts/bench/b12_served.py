"""B12: what the client spends per token on hidden states and on top-k log-probs, without a model.

A server in a process of its own answers with canned bytes, in the form of vLLM 0.32: hidden states as bytes in chunks,
log-probs as JSON. So the client is the limit: its CPU time is what a training process pays per token, and says how
many tokens per second it can take from fast servers at most. Both teachers are asked about the same batches.
"""

import argparse
import asyncio
import json
import multiprocessing
import time
from functools import cache
from typing import Any

import numpy as np
import torch
from _measure import arguments, report, verdict

from mmkd.models.heads import LMHead
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.server import ServerTeacher

CHUNK = 65_536


def served_forever(port: Any, width: int, k: int) -> None:
    """Serves canned answers in this process, and puts its port into `port`."""

    @cache
    def states(tokens: int, name: str) -> tuple[bytes, list[bytes]]:
        table = torch.randn(tokens, width).to(getattr(torch, name))
        content = table.view(torch.uint8).numpy().tobytes()
        where = {"index": 0, "embed_dtype": name, "endianness": "little", "start": 0, "end": len(content)}
        metadata = {"id": "pooling-0", "data": [{**where, "shape": [tokens, width]}]}
        return f"metadata: {json.dumps(metadata)}\r\n".encode(), [content]

    @cache
    def log_probs(tokens: int) -> tuple[bytes, list[bytes]]:
        generator = np.random.default_rng(0)
        entries: list[Any] = [None]
        for _ in range(tokens - 1):
            ids = generator.choice(49_152, k, replace=False).tolist()
            values = np.sort(-12 * generator.random(k))[::-1].tolist()
            ranked = enumerate(zip(ids, values, strict=True), start=1)
            entry = {str(i): {"logprob": v, "rank": rank, "decoded_token": " word"} for rank, (i, v) in ranked}
            entries.append({**entry, "7": {"logprob": -13.5, "rank": k + 9, "decoded_token": " of"}})
        choice = {"index": 0, "text": " x", "finish_reason": "length", "prompt_logprobs": entries}
        return b"", [json.dumps({"choices": [choice]}).encode()]

    def answer(path: str, body: Any) -> tuple[bytes, list[bytes]]:
        if path == "/v1/models":
            entry = {"id": "teacher", "root": "teacher", "parent": None, "max_model_len": 1 << 20}
            return b"", [json.dumps({"data": [entry]}).encode()]
        if path == "/version":
            return b"", [b'{"version": "canned"}']
        if path == "/pooling":
            return states(len(body["input"]), body["embed_dtype"])
        return log_probs(len(body["prompt"]))

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode().split("\r\n")
            length = next((int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")), 0)
            body = json.loads(await reader.readexactly(length)) if length else None
            headers, parts = answer(lines[0].split()[1], body)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + headers + b"\r\n")
            for part in parts:
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await connection(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(main())


def measured(teacher: Any, batch: tuple[dict[str, Any], torch.Tensor], repeats: int) -> tuple[float, float]:
    """The least CPU and wall seconds of asking about a batch."""
    clocks = []
    teacher.ask(*batch)
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        teacher.ask(*batch)
        clocks.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(cpu for cpu, _ in clocks), min(wall for _, wall in clocks)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=576, help="of the hidden states")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="sequences of a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.set_defaults(repeats=5)
    args: argparse.Namespace = parser.parse_args()
    if args.quick:
        args.rows, args.length, args.repeats = 2, 32, 1
    torch.set_num_threads(args.threads)
    context = multiprocessing.get_context("spawn")
    port = context.Value("i", 0)
    server = context.Process(target=served_forever, args=(port, args.width, args.k), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.1)
    url = f"http://127.0.0.1:{port.value}"
    inputs = {"input_ids": torch.randint(8, 9_000, (args.rows, args.length)), "attention_mask": None}
    # The canned log-probs list this token, as vLLM does the row's own.
    inputs["input_ids"][:] = 7
    batch = inputs, torch.ones(args.rows, args.length - 1, dtype=torch.bool)
    tokens, rows, spent = int(batch[1].sum()), [], {}
    for name, teacher in {
        f"top-{args.k}, JSON": ServerTeacher(url, args.k),
        "hidden, float32": HiddenServerTeacher(url, head_of(args.width, torch.float32)),
        "hidden, bfloat16": HiddenServerTeacher(url, head_of(args.width, torch.bfloat16), dtype=torch.bfloat16),
    }.items():
        with teacher.client:
            cpu, wall = measured(teacher, batch, args.repeats)
        spent[name] = cpu
        most = {"client at most, tokens/s": tokens / cpu, "with the server beside it, tokens/s": tokens / wall}
        rows.append({"": name, "client, us of CPU/token": 1e6 * cpu / tokens, **most})
    server.terminate()
    title = f"Canned answers over the loopback interface: {args.rows} rows of {args.length}, width {args.width}"
    top_k = spent[f"top-{args.k}, JSON"]
    verdicts = [
        verdict("hidden, float32: CPU per token over that of top-k", spent["hidden, float32"] / top_k, 0.2),
        verdict("hidden, float32: CPU seconds per 100,000 tokens", 1e5 * spent["hidden, float32"] / tokens, 1.0),
    ]
    report("b12_served", "cpu", {title: rows}, [] if args.quick else verdicts, vars(args))


def head_of(width: int, dtype: torch.dtype) -> LMHead:
    """A head of the width of the canned states, which nobody multiplies with here."""
    return LMHead(torch.zeros(8, width, dtype=dtype))


if __name__ == "__main__":
    main()
