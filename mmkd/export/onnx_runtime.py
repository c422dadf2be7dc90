"""Exported ONNX files as ONNX Runtime reads them."""

import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkd.errors import UserError
from mmkd.generation.generator import Sampling

from .runtimes import Runtime, Scored, sampled

# What the graph calls a cache that it is given, and the same one longer.
_BEFORE, _AFTER = "input.", "output."


class OnnxRuntime(Runtime):
    """A graph from tokens, positions and a cache to logits and the longer cache."""

    def __init__(self, path: Path):
        check_onnx_runtime()
        import onnxruntime

        self.name = f"ONNX Runtime {onnxruntime.__version__}"
        begun = time.perf_counter()
        options = onnxruntime.SessionOptions()
        # Without it, as many threads as the machine has cores, whatever else runs there.
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=onnxruntime.get_available_providers()
        )
        self.load_seconds = time.perf_counter() - begun
        self.outputs = [output.name for output in self.session.get_outputs()]
        given = {spec.name: spec for spec in self.session.get_inputs()}
        self.reads_positions, self.reads_mask = "position_ids" in given, "attention_mask" in given
        self.empty = {name: _empty(spec) for name, spec in given.items() if name.startswith(_BEFORE)}

    def scored(self, ids: Sequence[int]) -> Scored:
        logits, _ = self._run(ids, 0, self.empty)
        return Scored.of(logits[:-1].float().log_softmax(-1), torch.tensor(list(ids[1:])))

    def tokens(self, ids: Sequence[int], sampling: Sampling, stops: Sequence[int]) -> Iterator[int]:
        generator = torch.Generator().manual_seed(sampling.seed)
        cache, position, given = self.empty, 0, list(ids)
        for _ in range(sampling.max_new_tokens):
            logits, cache = self._run(given, position, cache)
            token = sampled(logits[-1], sampling, generator)
            yield token
            if token in stops:
                return
            position += len(given)
            given = [token]

    def _run(self, ids: Sequence[int], position: int, cache: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        feed = {"input_ids": np.array([list(ids)], dtype=np.int64), **cache}
        if self.reads_positions:
            feed["position_ids"] = np.arange(position, position + len(ids), dtype=np.int64)[None]
        if self.reads_mask:
            feed["attention_mask"] = np.ones((1, position + len(ids)), dtype=np.int64)
        outputs: Any = self.session.run(None, feed)
        answer = dict(zip(self.outputs, outputs, strict=True))
        longer = {name: answer[f"{_AFTER}{name.removeprefix(_BEFORE)}"] for name in cache}
        return torch.from_numpy(answer["logits"][0]), longer


def check_onnx_runtime() -> None:
    """Raises UserError where ONNX Runtime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("ONNX files are read by ONNX Runtime, which is not installed: pip install 'mmkd[export]'.")


def _empty(spec: Any) -> Any:
    """A cache of no tokens for one sequence: the third side is the number of tokens."""
    _, heads, _, size = spec.shape
    kind = np.float16 if "float16" in spec.type else np.float32
    # The exporter writes sides that are fixed as names of digits.
    return np.zeros((1, int(heads), 0, int(size)), dtype=kind)
