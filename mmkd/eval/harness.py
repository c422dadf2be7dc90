"""Tasks of lm-eval, run through its Python API: one model and one task at a time."""

import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from datasets.exceptions import DatasetNotFoundError

from mmkd.errors import UserError, first_line
from mmkd.generation.local_generation import dense_last_states
from mmkd.models.load import tokenizer_of
from mmkd.seams.lm_eval_seam import is_of_a_long_answer, model_class

from .exported_lm import exported_lm
from .model import EvalModel
from .results import key_of
from .suites import SuiteTask
from .tasks import Task

MODEL_TYPES = ("auto", "hf", "hf-multimodal", "vllm", "vllm-vlm", "local-completions")
CHAT = ("auto", "on", "off")


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation."""

    model_type: str = "auto"
    """A model type of lm-eval; auto: hf-multimodal for tasks with images, otherwise hf."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    batch_size: int | str = 8
    device: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    """The number of examples, in place of that of the suite or the task."""
    chat_template: str = "auto"
    seed: int | None = None
    """The seed of few-shot examples and sampling; by default lm-eval's own seeds."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("model_type", self.model_type, MODEL_TYPES),
            ("chat_template", self.chat_template, CHAT),
        ):
            if value not in choices:
                raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
        if self.model_type.startswith("vllm") and importlib.util.find_spec("vllm") is None:
            raise UserError(
                f"model_type {self.model_type} needs vLLM, which is not installed here. Where it pins versions that "
                "mmkd cannot use, serve the model from an environment of its own (scripts/serve_teacher.sh) and use "
                "--model_type local-completions --model_args base_url=URL, or use hf."
            )
        if self.model_type == "local-completions" and "base_url" not in self.model_args:
            raise UserError(
                "model_type local-completions sends requests to a server. Name it with --model_args "
                "base_url=http://HOST:PORT model=NAME, where NAME is the name under which it serves the model."
            )
        if self.limit is not None and self.limit <= 0:
            raise UserError(f"limit is {self.limit}; give a number of items, or a fraction of them below 1.")


class Harness:
    """One model in lm-eval; it is loaded for the first task, and again for a task that needs another model type."""

    def __init__(self, model: EvalModel, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self._loaded: tuple[str, Any] | None = None

    def settings_of(self, suite_task: SuiteTask, task: Task) -> dict[str, Any]:
        """The arguments of `simple_evaluate` that decide the result of a task.

        Raises UserError for a missing chat template, and for a task with images and a model that reads text only.
        """
        settings = self.settings
        if settings.chat_template == "on" and not self.model.has_chat_template:
            raise UserError(
                f"{self.model.name} has no chat template. Evaluate it on plain text with --chat_template off, or save "
                "one with its tokenizer.",
                because="meaning",
            )
        if task.vision and not self.model.vision:
            raise UserError(
                f"Task {task.name} has images, and {self.model.name} is no vision-language model. Leave the task out.",
                because="meaning",
            )
        use_template = settings.chat_template == "on" or (
            settings.chat_template == "auto" and suite_task.chat_template is not False
        )
        fewshot = suite_task.num_fewshot if settings.num_fewshot is None else settings.num_fewshot
        seed = settings.seed
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        model_type, dtype = self._model_type(task), settings.dtype
        if model_type.startswith("hf"):
            # lm-eval loads the model itself and computes in the type of its weights, also on a CPU that emulates it.
            dtype = self.model.computed_dtype(dtype, device_of(settings))
        return {
            "model": model_type,
            "model_args": {"dtype": dtype, **settings.model_args},
            "batch_size": settings.batch_size,
            "num_fewshot": fewshot,
            "limit": settings.limit,
            "apply_chat_template": use_template and self.model.has_chat_template,
            **({} if seed is None else dict.fromkeys(seeds, seed)),
        }

    def key(self, suite_task: SuiteTask, task: Task) -> str:
        """The key of a result: the task with its data, the settings and lm-eval's version."""
        return key_of("lm-eval", version("lm_eval"), task.name, task.fingerprint, self.settings_of(suite_task, task))

    def run(
        self, suite_task: SuiteTask, task: Task, manager: Any
    ) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """The entry of a task and its answers; None on ranks other than the first."""
        import lm_eval

        # positional_deprecated hides its signature.
        simple_evaluate: Any = lm_eval.simple_evaluate
        settings = self.settings_of(suite_task, task)
        arguments = {key: value for key, value in settings.items() if key not in ("model", "model_args")}
        with _quiet(), _explained(task.name):
            lm = self._lm(settings["model"], settings["model_args"])
            with dense_last_states(lm.model) if settings["model"].startswith("hf") else nullcontext():
                answer: Any = simple_evaluate(model=lm, tasks=[task.name], task_manager=manager, **arguments)
        if answer is None:
            return None
        entry = {
            "task": task.name,
            "harness": "lm-eval",
            "harness_version": version("lm_eval"),
            "version": task.version if task.version is not None else answer["versions"].get(task.name),
            "fingerprint": task.fingerprint,
            "settings": settings,
            "metric": suite_task.metric,
            **numbers_of(answer),
        }
        rows = [
            {"task": name, **sample_of(sample)}
            for name, samples in answer.get("samples", {}).items()
            for sample in samples
        ]
        return entry, rows

    def _model_type(self, task: Task) -> str:
        if self.model.exported is not None:
            return "exported"
        if self.settings.model_type != "auto":
            return self.settings.model_type
        return "hf-multimodal" if task.vision else "hf"

    def _lm(self, model_type: str, model_args: Mapping[str, Any]) -> Any:
        if self._loaded is None or self._loaded[0] != model_type:
            # Free the old one first: two models at a time may not fit into memory.
            self._loaded = None
            self._loaded = model_type, self._load(model_type, model_args)
        return self._loaded[1]

    def _load(self, model_type: str, model_args: Mapping[str, Any]) -> Any:
        model, settings = self.model, self.settings
        device = device_of(settings)
        if model.exported is not None:
            return exported_lm(model, device)
        more = {"batch_size": settings.batch_size, "device": device}
        kind = model_class(model_type)
        quantised = bool(model.trained_as) and model_type in ("hf", "hf-multimodal")
        if model.members or quantised or (model.vision and model_type == "hf"):
            # lm-eval cannot load ensembles, what was trained quantised, or a vision-language model as a text model,
            # but accepts loaded models.
            arguments = {key: value for key, value in model_args.items() if key != "dtype"}
            loaded = model.load(model_args["dtype"], device)
            tokenizer = tokenizer_of(model.processing_class)
            return kind(pretrained=loaded, tokenizer=tokenizer, batch_size=settings.batch_size, **arguments)
        if model.trained_as and model_type != "local-completions":
            text = f"{model_type} loads {model.name} itself, in full precision: it was trained as {model.trained_as}."
            print(f"{text} Model type hf measures it as it was trained.", file=sys.stderr)
        named: dict[str, Any] = {"pretrained": model.path, **model_args}
        named |= {"revision": model.revision} if model.revision else {}
        named |= {"trust_remote_code": True} if model.trust_remote_code else {}
        if model_type == "local-completions":
            url = str(named["base_url"]).rstrip("/").removesuffix("/v1/completions").removesuffix("/v1")
            # The server has the weights; only the tokenizer is loaded here.
            named |= {"base_url": f"{url}/v1/completions", "tokenizer": model.path, "tokenizer_backend": "huggingface"}
            named |= {"model": named.get("model", model.path)}
            del named["pretrained"], named["dtype"], more["device"]
        elif model.adapter:
            named |= {"lora_local_path" if model_type.startswith("vllm") else "peft": model.adapter}
        return kind.create_from_arg_obj(named, more)


def device_of(settings: Settings) -> str:
    """The device that models are loaded to."""
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")


def numbers_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a harness's answer that are kept."""
    names = {"results", "groups", "higher_is_better", "n-shot", "n-samples"}
    return {name.replace("-", "_"): answer.get(name) or {} for name in sorted(names)}


def sample_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a sample that are kept: prompt, target, response and the value of each metric."""
    prompts = [argument[0] for argument in sample["arguments"]]
    images = sample["doc"].get("images") if isinstance(sample["doc"], dict) else None
    paths = images if isinstance(images, list) and all(isinstance(image, str) for image in images) else []
    return {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "filter": sample["filter"],
        "prompt": prompts[0],
        "choices": [argument[1] for argument in sample["arguments"]] if len(prompts) > 1 else [],
        "images": paths,
        "target": sample["target"],
        "response": sample["filtered_resps"],
        "metrics": {name: sample[name] for name in sample["metrics"]},
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings of lm-eval about settings that mmkd chooses on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _explained(task: str) -> Iterator[None]:
    """Turns errors of a task's data into UserError."""
    try:
        yield
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        first = first_line(error)
        raise UserError(
            f"The data of task {task} cannot be loaded: {first} Run it once with a network, which keeps the data in "
            "HF_HOME, and log in if its data set requires it. --suite offline needs no network."
        ) from error
    except AssertionError as error:
        if not is_of_a_long_answer(error):
            raise
        raise UserError(
            f"Task {task} has an answer that is longer than the model's context, so that the model cannot score it. "
            "Leave the task out: --tasks names those to run."
        ) from error
