"""Started by torchrun in conftest.py: trains the tiny models on two gloo ranks and writes what each rank saw."""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from mmkd.errors import UserError
from mmkd.teachers.cached_encoder import CachedEncoder
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.several import SeveralTeachers
from mmkd.training.method import METHODS
from scripts.make_tiny_models import sentences
from tests.classes import dho, pictures, signals_of_terms
from tests.pairs import WordsInCommon, captioned, clip_kd, sums_of
from tests.towers import teachers, tower_kd
from tests.vlms import vision_rows


def zero(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration that runs without a GPU."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    deepspeed.init_distributed("gloo")
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    automatic = dict.fromkeys(sizes, "auto")
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "optimizer": optimizer,
        "zero_force_ds_cpu_optimizer": False,
        **automatic,
    }


# What FSDP2 gathers a group of parameters with, as its groups know it.
_groups: Any = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group")


def wrapping(how: str) -> dict[str, Any]:
    """The settings of a way to spread a training over ranks: ddp, fsdp2, zero2, zero3."""
    if how == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    return {} if how == "ddp" else {"deepspeed": zero(int(how[-1]))}


@contextmanager
def gathers_of(*heads: Any) -> Iterator[list[int]]:
    """Counts how often each of the modules is gathered by FSDP2, and other gathered tensors in a last entry."""
    counts = [0] * (len(heads) + 1)
    collective, full_tensor = _groups.foreach_all_gather, DTensor.full_tensor

    def counted(fsdp_params: list[Any], *args: Any, **kwargs: Any) -> Any:
        modules = [
            module for one in fsdp_params for module in (one._module_info.module, *one._module_info.shared_modules)
        ]
        for number, head in enumerate(heads):
            counts[number] += head in modules
        return collective(fsdp_params, *args, **kwargs)

    def counted_tensor(self: DTensor, **kwargs: Any) -> Any:
        counts[-1] += self.ndim == 2
        return full_tensor(self, **kwargs)

    _groups.foreach_all_gather, DTensor.full_tensor = counted, counted_tensor
    try:
        yield counts
    finally:
        _groups.foreach_all_gather, DTensor.full_tensor = collective, full_tensor


def train(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains what a job describes; what this rank saw of it."""
    cls = METHODS[job["method"]].trainer
    data = Dataset.from_dict({"prompt": sentences(24, seed=3), "completion": [f" {s}" for s in sentences(24, seed=4)]})
    if job["method"] == "llava_kd":
        data = vision_rows([1, 2, 0, 3] * 6)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 128,
        "assistant_only_loss": job["method"] == "llava_kd",
        **wrapping(job["how"]),
        **job.get("settings", {}),
    }
    teacher = job["teacher"] if cls.needs_teacher else None
    if isinstance(teacher, dict):
        data = data.add_column("domain", ["a" if row % 5 in (0, 1, 4) else "b" for row in range(len(data))])
        teacher = SeveralTeachers(teacher, column=job["column"])
    config = cls.config_class(**settings)
    # An adapter starts with random weights.
    torch.manual_seed(0)
    adapter = LoraConfig(**job["lora"]) if "lora" in job else None
    trainer = cls(model=job["student"], teacher=teacher, args=config, train_dataset=data, peft_config=adapter)
    heads = (
        []
        if teacher is None or isinstance(teacher, SeveralTeachers)
        else [trainer.model.get_output_embeddings(), trainer.teacher.model.get_output_embeddings()]
    )
    before = trainer.evaluate(eval_dataset=data.select(range(5))) if job.get("evaluate_first") else {}
    with gathers_of(*heads) as counts:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    held = share(trainer.model)
    evaluated = trainer.evaluate(eval_dataset=data.select(range(5)))
    if job.get("save"):
        trainer.save_model()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    parameters = list(trainer.model.parameters())
    return {
        "steps": [[entry["loss"], entry["grad_norm"]] for entry in history],
        "kl": [entry.get("kl") for entry in history],
        "t": [entry.get("taid_t") for entry in history],
        "aux_loss": [entry.get("aux_loss") for entry in history],
        "balance": [entry.get("balance/ce") for entry in history],
        "before": before.get("eval_loss"),
        "evaluated": {name: evaluated[name] for name in ("eval_loss", "eval_kl", "eval_ce") if name in evaluated},
        "weights": sum(float(local(one).double().sum()) for one in parameters),
        "share": held,
        "teacher_share": share(trainer.teacher.model) if isinstance(trainer.teacher, LocalTeacher) else None,
        "gathers": counts,
        "projectors": projectors_of(trainer),
    }


def projectors_of(trainer: Any) -> dict[str, float]:
    """The sum of each projector of `features`."""
    projectors = getattr(trainer, "_projectors", None)
    weights = {} if projectors is None else projectors._weights
    return {name: float(weight.double().sum()) for name, weight in weights.items()}


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def share(model: Any) -> float:
    """How much of a model's weights this rank holds."""
    parameters = list(model.parameters())
    return sum(local(one).numel() for one in parameters) / sum(one.numel() for one in parameters)


def train_classes(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same for a dual-head student."""
    tested: dict[str, Any] = {"test_dataset": pictures(3, seed=2)}
    if "settings" in job:
        tested["teacher"] = signals_of_terms()
    settings = {**job.get("settings", {}), **wrapping(job["how"])}
    trainer = dho(folder, tested, per_device_eval_batch_size=2, **settings)
    trainer.train()
    log = trainer.state.log_history
    return {
        "steps": [[entry["loss"], entry["grad_norm"], entry["ce"]] for entry in log if "loss" in entry],
        "test": [entry["test_accuracy"] for entry in log if "test_accuracy" in entry],
        "choice": [trainer.model.config.alpha, trainer.model.config.beta],
        "weights": sum(float(local(one).double().sum()) for one in trainer.model.parameters()),
        "share": share(trainer.model),
    }


def train_towers(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What this rank saw of a training of vision towers."""
    tested = {"teachers": teachers(), "eval_dataset": pictures(3, seed=1)}
    batches = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    trainer = tower_kd(folder, tested, **batches, **job["settings"], **wrapping(job["how"]))
    trainer.train()
    evaluated = trainer.evaluate()
    return {
        "steps": [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "grad_norm" in entry],
        "evaluated": evaluated,
        "weights": sum(float(local(one).double().sum()) for one in trainer.model.parameters()),
    }


def train_pairs(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What this rank saw of a training of a dual encoder, and of what it left."""
    wrapped = wrapping(job["how"])
    if "deepspeed" in wrapped:
        # The optimizer of the settings, as one process has it.
        wrapped["deepspeed"] |= {"zero_allow_untested_optimizer": True}
        del wrapped["deepspeed"]["optimizer"]
    tested: dict[str, Any] = {"eval_dataset": captioned(11)}
    if "lora" in job:
        tested["peft_config"] = LoraConfig(**job["lora"])
    if "cache" in job:
        tested["teachers"] = CachedEncoder(job["cache"])
    if job["settings"].get("ranking_teacher"):
        tested["pair_scorer"] = WordsInCommon()
    # An adapter starts with random weights.
    torch.manual_seed(0)
    trainer: Any = clip_kd(folder, tested, per_device_eval_batch_size=2, **job["settings"], **wrapped)
    trainer.train(resume_from_checkpoint=job.get("resume"))
    held, evaluated = share(trainer.model), trainer.evaluate()
    trainer.save_model()
    torch.distributed.barrier()
    return {
        "steps": [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "grad_norm" in entry],
        "evaluated": evaluated,
        "weights": sums_of(folder / "out"),
        "share": held,
        "scale": trainer.state.log_history[0]["logit_scale"],
    }


def refuse(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Why a method's settings are refused on ranks."""
    try:
        METHODS[job["method"]].trainer.config_class(output_dir=str(folder), report_to="none")
    except UserError as error:
        return {"refused": str(error)}
    return {}


def main(jobs: str, output: str) -> None:
    """Trains the jobs of a JSON file (name -> job) one after the other."""
    rank, results = 0, {}
    for name, job in json.loads(Path(jobs).read_text()).items():
        # accelerate says this to the processes that come after, and the next job would shard too.
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        others = {"dho": train_classes, "tower_kd": train_towers, "clip_kd": train_pairs, "trans_encoder": refuse}
        run = others.get(job["method"], train)
        results[name] = run(job, Path(output, "runs", name.replace(" ", "-")))
        rank = torch.distributed.get_rank()
    Path(output, f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
