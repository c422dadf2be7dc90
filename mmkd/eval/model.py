"""The model that is evaluated: where it lies, what it can do, and what makes a result its own."""

import difflib
import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from mmkd.cache.identity import saved_dtype, weights_sha256
from mmkd.errors import UserError
from mmkd.export.exported import Exported
from mmkd.models.adapters import with_adapter
from mmkd.models.ensemble import Ensemble, shared_vocabulary
from mmkd.models.load import computed_dtype, load_model, load_processing_class, tokenizer_of
from mmkd.models.quantised_students import (
    StudentQuantisation,
    quantise_weights,
    record_in_config,
    recorded_beside,
    recorded_in_config,
    say_as_trained,
)
from mmkd.precision import name_of_dtype, native_dtype
from mmkd.recipe.run import last_checkpoint
from mmkd.results.adapter_base import ADAPTER_CONFIG, adapter_base
from mmkd.results.places import results_before, results_folder
from mmkd.results.trained_as import BASE, described_base, trained_as


@dataclass(frozen=True)
class EvalModel:
    """One model, or several of one vocabulary whose log-probs are averaged."""

    name: str
    """As the user named it."""
    path: str
    """What `from_pretrained` takes."""
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    """Folder of a PEFT adapter on top of it."""
    members: tuple["EvalModel", ...] = field(default=())
    exported: Exported | None = None
    """A file that another runtime than transformers reads; `path` then has the tokenizer."""

    @cached_property
    def processing_class(self) -> Any:
        try:
            return load_processing_class(self.path, **self.hub)
        except UserError as error:
            raise UserError(f"{error}{_nearest(self.name)}") from error

    @property
    def hub(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def vision(self) -> bool:
        return not self.members and hasattr(self.processing_class, "tokenizer")

    @property
    def has_chat_template(self) -> bool:
        tokenizer: Any = tokenizer_of(self.processing_class)
        return bool(getattr(self.processing_class, "chat_template", None) or tokenizer.chat_template)

    @cached_property
    def weights(self) -> str:
        """sha256 of its weights, vocabulary and chat template: the parts of it that decide a result."""
        if self.members:
            parts = [member.weights for member in self.members]
        elif self.exported is not None:
            parts = [self.exported.weights]
        else:
            # First, since it is small and what is missing is said in one line.
            tokenizer: Any = tokenizer_of(self.processing_class)
            parts = [weights_sha256(self.path, self.revision)]
            parts += [weights_sha256(self.adapter)] if self.adapter else []
            template = getattr(self.processing_class, "chat_template", None) or tokenizer.chat_template
            words = json.dumps([template, tokenizer.get_vocab()], sort_keys=True)
            parts.append(hashlib.sha256(words.encode()).hexdigest())
            # The same weights are another model on a quantised base, or rounded.
            rounded = self.base_quantisation or (self.quantisation and self.quantisation.as_dict())
            parts += [json.dumps(rounded, sort_keys=True)] if rounded else []
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def computed_dtype(self, dtype: str, device: str) -> str:
        """`dtype`, or float32 where it stands for a half type that the CPU only emulates: results are kept by it."""
        emulated = [member.emulates(dtype, device) for member in self.members or (self,)]
        return "float32" if any(emulated) else dtype

    def emulates(self, dtype: str, device: str) -> bool:
        """Whether the device's CPU only emulates the type that `dtype` stands for, auto being that of the weights."""
        config = AutoConfig.from_pretrained(self.path, **self.hub)
        if dtype == "auto" and config.dtype is None and torch.device(device).type == "cpu":
            # Of a config that names no type, transformers, and so lm-eval, takes that of the weights.
            dtype = saved_dtype(self.path, self.revision)
        return name_of_dtype(computed_dtype(dtype, config, device)) != dtype

    def load(self, dtype: str = "auto", device: str = "cpu") -> Any:
        """The model itself, ready to be asked, in a type that the device multiplies."""
        if self.members:
            size = shared_vocabulary({member.name: member.processing_class for member in self.members})
            return Ensemble([member.load(dtype, device) for member in self.members], size)
        if self.trained_as:
            say_as_trained(self.name, self.trained_as)
        if self.base_quantisation:
            return self._on_quantised_base(dtype, device)
        loaded: Any = load_model(self.path, dtype=dtype, device=device, **self.hub)
        if self.adapter:
            loaded = with_adapter(loaded, self.adapter).merge_and_unload()
        loaded = loaded.to(device).eval()
        if self.quantisation is not None:
            quantise_weights(loaded, self.quantisation)
        return loaded

    def merged(self) -> Any:
        """The model of an adapter as a whole one in float32, whose config says how it is rounded.

        Where the base was quantised in training, its weights are the values that it had there.
        """
        assert self.adapter is not None
        if self.base_quantisation:
            base: Any = self._quantised_base("auto", "cpu").dequantize().float()
        else:
            base = load_model(self.path, dtype="float32", **self.hub)
        whole: Any = with_adapter(base, self.adapter).merge_and_unload()
        record_in_config(whole, self.quantisation)
        return whole

    def _on_quantised_base(self, dtype: str, device: str) -> Any:
        """An adapter on its base as that was quantised in training; merging would round once more."""
        assert self.adapter is not None
        return with_adapter(self._quantised_base(dtype, device), self.adapter).eval()

    def _quantised_base(self, dtype: str, device: str) -> Any:
        quantised = BitsAndBytesConfig(**self.base_quantisation, bnb_4bit_compute_dtype=native_dtype(device))
        where = {"quantization_config": quantised, "device_map": {"": device}}
        return load_model(self.path, dtype=None if dtype == "auto" else dtype, **where, **self.hub)

    @cached_property
    def quantisation(self) -> StudentQuantisation | None:
        """As what it was trained with student_quantization; None: as it is."""
        if self.members:
            return None
        if self.adapter:
            return recorded_beside(self.adapter)
        return recorded_in_config(AutoConfig.from_pretrained(self.path, **self.hub))

    @cached_property
    def base_quantisation(self) -> dict[str, Any]:
        """How the base of an adapter was quantised when it was loaded to be trained; empty: not."""
        return trained_as(self.adapter).get(BASE, {}) if self.adapter else {}

    @property
    def trained_as(self) -> str:
        """As what it was trained, for a reader; empty: in the precision of its weights."""
        if self.base_quantisation:
            return described_base(self.base_quantisation)
        return "" if self.quantisation is None else self.quantisation.described()

    @property
    def results_folder(self) -> Path:
        """Where its results are kept: under the run, or under runs/eval for what mmkd did not make."""
        own = self.adapter or self.path
        if self.exported is not None:
            own = str(self.exported.folder)
        return results_folder(own if Path(own).is_dir() and not self.members else self.name)

    @property
    def results_before(self) -> Path | None:
        """Where earlier versions of mmkd kept them, if that was elsewhere and they are still there."""
        return None if self.members or self.exported else results_before(self.adapter or self.path)


def find_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> EvalModel:
    """The model of a run's folder, of any other folder, or of a Hub id.

    A run that was trained in stages stands for its last stage, one that was cut off for its newest checkpoint. Raises
    ValueError for a folder without a model, and for a path that leads nowhere.
    """
    folder = Path(name)
    if folder.is_file():
        raise UserError(f"{name} is a file, and a model is a folder. Name the folder: {folder.parent}.")
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(
                f"There is no folder {name}, and it cannot be a Hub id (user/name).{_nearest(name)} Name the "
                "output_dir of a training, the folder of a model, or a Hub id."
            )
        return EvalModel(name, name, revision, trust_remote_code)
    model_folder = _model_in(folder)
    if model_folder is None:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"{name} holds no model: there is neither config.json nor a checkpoint or stage, but {held}.")
    if (model_folder / "config.json").is_file():
        return EvalModel(name, str(model_folder), None, trust_remote_code)
    return EvalModel(name, *adapter_base(model_folder), trust_remote_code, adapter=str(model_folder))


def ensemble_of(models: list[EvalModel]) -> EvalModel:
    """The models as one, with the first one's tokenizer. Raises UserError for fewer than two."""
    if len(models) < 2:
        raise UserError("--ensemble averages several models: name two or more.")
    return EvalModel("+".join(Path(model.name).name for model in models), models[0].path, members=tuple(models))


def _nearest(name: str) -> str:
    """The folder here that a name which leads nowhere was meant for, as a question; nothing where none is alike."""
    if Path(name).is_dir():
        return ""
    places = {Path(name).parent, Path("runs"), Path()}
    folders = [path for place in places if place.is_dir() for path in place.iterdir() if path.is_dir()]
    names = {**{path.name: str(path) for path in folders}, **{str(path): str(path) for path in folders}}
    close = difflib.get_close_matches(name, names, n=1) or difflib.get_close_matches(Path(name).name, names, n=1)
    return f" Did you mean the folder {names[close[0]]}?" if close else ""


def _model_in(folder: Path) -> Path | None:
    if (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file():
        return folder
    stages = [path for path in folder.iterdir() if re.fullmatch(r"\d+-\w+", path.name) and path.is_dir()]
    for stage in sorted(stages, key=lambda path: int(path.name.partition("-")[0]), reverse=True):
        model_folder = _model_in(stage)
        if model_folder is not None:
            return model_folder
    return last_checkpoint(folder)
