"""How far an exported student is from the student itself, on the same held-out tokens."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset

from mmkd.export.llama_runtime import LlamaRuntime
from mmkd.export.runtimes import Runtime, Scored
from mmkd.teachers.batch import View

from .tokens import batches, beliefs_of


def student_views(
    model: Any, processing_class: Any, rows: Dataset, max_length: int, served: bool = False
) -> Iterator[View]:
    """The rows as the student is evaluated on them, one by one; with `served` also as a server is asked about them."""
    return (batch.ours for batch in batches(model, processing_class, rows, max_length, served=served))


@torch.no_grad()
def difference(
    student: Any, views: Sequence[View], runtimes: Sequence[Runtime], tokenizer: Any = None
) -> list[dict[str, Any]]:
    """For each runtime, what it makes of the supervised tokens beside what the student makes of them.

    KL is the student's from the exported one's, in nats per token; `same_tokens` the share of rows that the file's own
    tokenizer, where it has one, reads as the student's does.
    """
    sums = [dict.fromkeys(("kl", "agreement", "nll", "student_nll", "same"), 0.0) for _ in runtimes]
    counted, listed = 0, [0] * len(runtimes)
    for view in views:
        beliefs = beliefs_of(student, view)
        log_probs = beliefs.log_probs.cpu()
        own = Scored.of(log_probs, beliefs.labels.cpu())
        ids = view.inputs["input_ids"][0].tolist()
        for number, (runtime, total) in enumerate(zip(runtimes, sums, strict=True)):
            theirs = runtime.read(view)
            total["kl"] += theirs.kl_from(log_probs).double().sum().item()
            total["agreement"] += (theirs.top == own.top).sum().item()
            total["nll"] -= theirs.of_labels.double().sum().item()
            total["student_nll"] -= own.of_labels.double().sum().item()
            if isinstance(runtime, LlamaRuntime) and tokenizer is not None:
                # Of a row that was cut, not even the student's tokenizer gives these tokens again.
                text = tokenizer.decode(ids)
                total["same"] += runtime.same_tokens(text, tokenizer(text, add_special_tokens=False)["input_ids"])
            listed[number] = 0 if theirs.listed is None else theirs.listed.shape[-1]
        counted += len(own.labels)
    return [
        {
            "kl": total["kl"] / max(1, counted),
            "top1_agreement": total["agreement"] / max(1, counted),
            "perplexity": math.exp(total["nll"] / max(1, counted)),
            "student_perplexity": math.exp(total["student_nll"] / max(1, counted)),
            "tokens": counted,
            "rows": len(views),
            **({"of_likeliest": most} if most else {}),
            **({"same_tokens": total["same"] / len(views)} if isinstance(runtime, LlamaRuntime) and tokenizer else {}),
        }
        for total, runtime, most in zip(sums, runtimes, listed, strict=True)
    ]
