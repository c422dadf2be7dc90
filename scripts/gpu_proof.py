"""What mmkd does on the GPU of this machine, in eight minutes at most: gpu_proof.md and gpu_proof.json.

Runs the tests that need a GPU, the benchmarks on it and a step of LLaVA-KD at the sizes of a published pair, each in a
process of its own with a limit. What fails or takes too long is reported as such, and the rest goes on. `--device cpu`
tries the script itself, with tiny sizes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 480.0
LAST_LINES = 15


@dataclass
class Proof:
    """A command, and what became of it."""

    name: str
    command: list[str]
    limit: float
    outcome: str = "not run: no time was left"
    seconds: float = 0.0
    output: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_proof"), help="folder of both files")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="*", default=None, metavar="NAME", help="some of the proofs")
    options = parser.parse_args()
    seen = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if options.device == "cuda" and subprocess.run(seen, check=False).returncode != 0:
        parser.error(f"the torch of {sys.executable} sees no GPU, so that every test would be skipped")
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = [proof for proof in proofs(options.device) if options.only is None or proof.name in options.only]
    if not chosen:
        parser.error(f"known proofs: {', '.join(proof.name for proof in proofs(options.device))}")
    end = time.monotonic() + BUDGET
    for proof in chosen:
        left = end - time.monotonic()
        if left > 5:
            print(f"{proof.name} ...", flush=True)
            take(proof, min(proof.limit, left))
            print(f"    {proof.outcome}, {proof.seconds:.0f} s", flush=True)
        # After each, so that an interruption loses nothing.
        write(chosen, options.output)
    print(f"{options.output / 'gpu_proof.md'}\n{options.output / 'gpu_proof.json'}")
    return 0 if all(proof.outcome == "passed" for proof in chosen) else 1


def proofs(device: str) -> list[Proof]:
    """What is run, the most telling first."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    size = ["--device", device] if device == "cuda" else ["--quick", "--no_memory"]

    def bench(name: str, *flags: str) -> list[str]:
        return [python, f"scripts/bench/{name}.py", *size, *flags]

    return [
        Proof("machine", ["nvidia-smi"], 20),
        Proof(
            "tests on the GPU",
            [*tests, "-m", "gpu", "tests/trainers/test_on_gpu.py", "tests/trainers/test_base.py"],
            120,
        ),
        Proof("real shapes", bench("b16_real_shapes"), 150),
        Proof("fused loss beside Liger and TRL", bench("b1_fused_loss"), 90),
        Proof("cached step", bench("b2_cached_step"), 60),
        Proof("online step", bench("b3_online_step"), 60),
        Proof("LLaVA-KD by term", bench("b9_llava_kd"), 90),
        Proof("plan", bench("b10_plan"), 60),
        Proof("tests under a pretended GPU", [*tests, "tests/test_on_cuda.py"], 90),
    ]


def take(proof: Proof, limit: float) -> None:
    """Runs a proof in a process group of its own, which ends with it."""
    environment = {"OMP_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            proof.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        proof.outcome = f"did not start: {error}"
        return
    try:
        proof.output, _ = process.communicate(timeout=limit)
        proof.outcome = "passed" if process.returncode == 0 else f"failed with status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        proof.output, _ = process.communicate()
        proof.outcome = f"ended after its limit of {limit:.0f} s"
    proof.seconds = time.monotonic() - start
    last = proof.output.strip().rpartition("\n")[2]
    if last.startswith("{"):
        proof.numbers = json.loads(last)
        proof.output = proof.output.replace(last, "")


def write(taken: list[Proof], folder: Path) -> None:
    """Both files, whole or not at all."""
    parts = ["# mmkd on a GPU\n", time.strftime("%Y-%m-%d, by scripts/gpu_proof.sh\n")]
    parts.append("| proof | outcome | s |\n|---|---|---|")
    parts += [f"| {proof.name} | {proof.outcome} | {proof.seconds:.0f} |" for proof in taken]
    for proof in taken:
        lines = proof.output.strip().splitlines()
        shown = lines if proof.outcome == "passed" and proof.numbers else lines[-LAST_LINES:]
        parts.append(f"\n## {proof.name}\n\n```\n" + "\n".join(shown) + "\n```")
    texts = {"gpu_proof.md": "\n".join(parts) + "\n", "gpu_proof.json": json.dumps([asdict(proof) for proof in taken])}
    for name, text in texts.items():
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


if __name__ == "__main__":
    sys.exit(main())
