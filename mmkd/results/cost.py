"""What a training cost: time by the clock, hours of processors, memory."""

import time
from typing import Any

import torch


class Stopwatch:
    """Measures what happens from now on."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._begun, self._spent = time.monotonic(), time.process_time()

    def cost(self, processes: int = 1) -> dict[str, Any]:
        """So far: seconds by the clock, and hours of all GPUs of these processes, or of all cores of this one."""
        seconds = time.monotonic() - self._begun
        hours = (seconds * processes if self._cuda else time.process_time() - self._spent) / 3600
        memory = torch.cuda.max_memory_allocated() if self._cuda else None
        unit = "GPU-hours" if self._cuda else "CPU-hours"
        return {"unit": unit, "hours": hours, "seconds": seconds, "peak_memory_bytes": memory}
