"""Exported folders as transformers reads them, on a CPU or a GPU."""

import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch

from mmkd.generation.generator import Sampling
from mmkd.models.load import load_model
from mmkd.seams.compressed_tensors_seam import unpack_weights
from mmkd.teachers.batch import View

from .runtimes import Runtime, Scored, sampled


class TransformersRuntime(Runtime):
    """A model of transformers. Whoever has one loaded already passes it."""

    reads_images = True

    def __init__(self, path: str, device: str = "cpu", model: Any = None):
        self.name = f"transformers {version('transformers')}"
        begun = time.perf_counter()
        self.model: Any = model
        if model is None:
            # On a CPU, bfloat16 would blur what the format itself changes; a GPU may not hold more.
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            self.model = load_model(path, "exported student", dtype=dtype)
            unpack_weights(self.model, dtype)
            self.model.to(device)
        self.model.eval()
        self.load_seconds = time.perf_counter() - begun

    @torch.no_grad()
    def scored(self, ids: Sequence[int]) -> Scored:
        given = torch.tensor([list(ids)], device=self.model.device)
        logits = self.model(input_ids=given, use_cache=False).logits[0, :-1]
        return Scored.of(logits.float().log_softmax(-1).cpu(), given[0, 1:].cpu())

    @torch.no_grad()
    def read(self, view: View) -> Scored:
        inputs = {name: value.to(self.model.device) for name, value in view.inputs.items() if hasattr(value, "to")}
        logits = self.model(**{**inputs, "use_cache": False}).logits[:, :-1][view.supervised]
        labels = view.labels[:, 1:][view.supervised].cpu()
        return Scored.of(logits.float().log_softmax(-1).cpu(), labels)

    @torch.no_grad()
    def tokens(self, ids: Sequence[int], sampling: Sampling, stops: Sequence[int]) -> Iterator[int]:
        generator = torch.Generator().manual_seed(sampling.seed)
        given, cache = torch.tensor([list(ids)], device=self.model.device), None
        for _ in range(sampling.max_new_tokens):
            answer = self.model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = answer.past_key_values
            token = sampled(answer.logits[0, -1].cpu(), sampling, generator)
            yield token
            if token in stops:
                return
            given = torch.tensor([[token]], device=self.model.device)
