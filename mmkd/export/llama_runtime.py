"""Exported GGUF files as llama.cpp reads them, or transformers where llama.cpp is not installed."""

import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmkd.generation.generator import Sampling

from .runtimes import Runtime, Scored
from .transformers_runtime import TransformersRuntime

CONTEXT = 4096
"""Tokens of a conversation, where the model does not have fewer."""


class LlamaRuntime(Runtime):
    """llama.cpp's Python package; `context` is the longest sequence that is scored."""

    def __init__(self, path: Path, context: int = 512):
        self.name = f"llama.cpp (llama-cpp-python {version('llama_cpp_python')})"
        self.path, self.context = path, context
        begun = time.perf_counter()
        self._writer: Any = self._load(n_ctx=CONTEXT)
        self.load_seconds = time.perf_counter() - begun
        self._scorer: Any = None

    def scored(self, ids: Sequence[int]) -> Scored:
        if self._scorer is None or self._scorer.n_ctx() < len(ids):
            self._scorer = self._load(n_ctx=max(self.context, len(ids)), logits_all=True)
        self._scorer.reset()
        self._scorer.eval(list(ids))
        logits = torch.from_numpy(self._scorer.scores[: len(ids) - 1].copy())
        return Scored.of(logits.log_softmax(-1), torch.tensor(list(ids[1:])))

    def tokens(self, ids: Sequence[int], sampling: Sampling, stops: Sequence[int]) -> Iterator[int]:
        writer = self._writer
        # What it read before is kept, and would make a prompt look faster than it is.
        writer.reset()
        writer.set_seed(sampling.seed)
        drawn = {"temp": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": 0.0}
        answer = writer.generate(list(ids), repeat_penalty=1.0, reset=True, **drawn)
        for number, token in enumerate(answer, start=1):
            yield token
            if token in stops or number == sampling.max_new_tokens:
                return

    def same_tokens(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the file's own tokenizer reads a text as these tokens."""
        return self._writer.tokenize(text.encode(), add_bos=False, special=True) == list(ids)

    def close(self) -> None:
        for each in (self._writer, self._scorer):
            if each is not None:
                each.close()

    def _load(self, **settings: Any) -> Any:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or None
        return llama_cpp.Llama(
            str(self.path), verbose=False, n_threads=threads, n_threads_batch=threads, n_gpu_layers=-1, **settings
        )


class GgufInTransformers(TransformersRuntime):
    """The weights of a GGUF file, made whole by transformers: how well they are, and not how llama.cpp computes."""

    reads_images = False

    def __init__(self, path: Path):
        from transformers import AutoModelForCausalLM, GgufConfig

        begun = time.perf_counter()
        whole: Any = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, quantization_config=whole, dtype=torch.float32
        )
        super().__init__("", model=model)
        self.load_seconds = time.perf_counter() - begun
        self.name = f"{self.name}, which makes the weights of GGUF whole"


def has_llama_cpp() -> bool:
    """Whether llama.cpp's Python package is installed."""
    return importlib.util.find_spec("llama_cpp") is not None
