"""The cost of using a model, measured on this machine: parameters, memory, latency, tokens per second."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 32, 3
BATCHES = (1, 8)


@torch.no_grad()
def cost_of(model: Any, batches: tuple[int, ...] = BATCHES) -> dict[str, Any]:
    """Parameters, bytes of the weights, and per batch size the seconds of a prompt and the tokens/s after it.

    Every time is the median of three runs after a warm-up; prompts have 128 random tokens, and 32 are generated.
    `peak_bytes` is the memory for generation beyond the weights: of the device, or on a CPU of the process (Linux).
    """
    embeddings = model.get_input_embeddings()
    rows = model.config.get_text_config().vocab_size
    cost: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "embedding_parameters": sum(weight.numel() for weight in embeddings.parameters()),
        "weight_bytes": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "speed": [],
    }
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        ids = torch.randint(rows, (batch, PROMPT_TOKENS), generator=generator).to(model.device)
        _generate(model, ids, 2)
        memory = _Peak(model.device)
        first = statistics.median(_seconds(model, ids, 1) for _ in range(REPEATS))
        whole = statistics.median(_seconds(model, ids, NEW_TOKENS) for _ in range(REPEATS))
        speed = {
            "batch_size": batch,
            "prompt_tokens": PROMPT_TOKENS,
            "first_token_seconds": first,
            "tokens_per_second": batch * (NEW_TOKENS - 1) / max(whole - first, 1e-9),
            "peak_bytes": memory.bytes(),
        }
        cost["speed"].append(speed)
    return cost


def _generate(model: Any, ids: Any, tokens: int) -> None:
    mask = torch.ones_like(ids)
    # min_new_tokens prevents an early end, so that all runs generate the same number of tokens.
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def _seconds(model: Any, ids: Any, tokens: int) -> float:
    _wait(model.device)
    begun = time.perf_counter()
    _generate(model, ids, tokens)
    _wait(model.device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Peak:
    """The peak memory since this object was made, above the memory in use at that time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif Path("/proc/self/clear_refs").exists():
            # Writing 5 resets the high-water mark (proc(5)).
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")

    def bytes(self) -> int | None:
        """The peak in bytes, or None on a system that does not report it."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, _status("VmHWM") - self.before) if Path("/proc/self/clear_refs").exists() else None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
