"""Tasks of lmms-eval, which has the benchmarks of vision-language models."""

import importlib.util
import sys
from importlib.metadata import version
from typing import Any

from mmkd.errors import UserError

from .harness import Settings, device_of, numbers_of
from .model import EvalModel
from .results import key_of
from .suites import SuiteTask

MODELS = {
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "gemma3": "gemma3",
    "idefics2": "idefics2",
    "internvl": "internvl_hf",
    "mllama": "llama_vision",
}
"""Model type in transformers -> name in lmms-eval."""


def check_lmms() -> None:
    """Raises UserError when lmms-eval is not installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise UserError(
            "These tasks are run by lmms-eval, which is not installed: pip install 'mmkd[lmms]', best in an "
            "environment of its own, since it pins other versions. Without it, you can run lm-eval's own vision tasks "
            "(mmmu_val, chartqa) and easy_vqa."
        )


def lmms_settings(model: EvalModel, settings: Settings) -> dict[str, Any]:
    """The arguments of lmms-eval's `simple_evaluate` that decide a result.

    Raises UserError for a model without a known name in lmms-eval, unless `model_args` gives it as lmms_model.
    """
    from transformers import AutoConfig

    arguments = dict(settings.model_args)
    kind = AutoConfig.from_pretrained(model.path, **model.hub).model_type
    name = arguments.pop("lmms_model", MODELS.get(kind))
    if name is None:
        raise UserError(
            f"{model.name} is a {kind}, for which mmkd knows no model of lmms-eval: name it with "
            "--model_args lmms_model=NAME (`python -m lmms_eval --help` says how to list them).",
            because="not built",
        )
    if model.trained_as:
        text = f"lmms-eval loads {model.name} itself, in full precision: it was trained as {model.trained_as}."
        print(text, file=sys.stderr)
    dtype = model.computed_dtype(settings.dtype, device_of(settings))
    path = {"pretrained": model.path, **({"dtype": dtype} if dtype != "auto" else {})}
    return {
        "model": name,
        "model_args": {**path, **arguments},
        "batch_size": settings.batch_size,
        "limit": settings.limit,
    }


def lmms_key(task: SuiteTask, settings: dict[str, Any]) -> str:
    """The key of a result: the task, the settings and lmms-eval's version."""
    return key_of("lmms-eval", version("lmms_eval"), task.task, task.num_fewshot, settings)


def run_lmms(task: SuiteTask, settings: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The entry of a task and its samples, as `Harness.run` returns them."""
    from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]  # an extra

    arguments = ",".join(f"{key}={value}" for key, value in settings["model_args"].items())
    more = {"batch_size": settings["batch_size"], "limit": settings["limit"], "num_fewshot": task.num_fewshot}
    answer = simple_evaluate(model=settings["model"], model_args=arguments, tasks=[task.task], **more)
    if answer is None:
        return None
    entry = {
        "task": task.task,
        "harness": "lmms-eval",
        "harness_version": version("lmms_eval"),
        "version": answer.get("versions", {}).get(task.task),
        "fingerprint": None,
        "settings": settings,
        "metric": task.metric,
        **numbers_of(answer),
    }
    rows = [
        {
            "task": name,
            "doc_id": sample.get("doc_id"),
            "target": sample.get("target"),
            "response": sample.get("filtered_resps"),
            "metrics": {metric: sample[metric] for metric in (task.metric or "",) if metric in sample},
        }
        for name, samples in (answer.get("samples") or {}).items()
        for sample in samples
    ]
    return entry, rows
