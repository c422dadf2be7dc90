"""Single tensors of a checkpoint, of which only the files that hold them are downloaded."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mmkd.errors import UserError
from mmkd.seams.transformers_seam import parameter_names, tied_parameters

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Checkpoint:
    """The safetensors of a folder or Hub id. Raises UserError where there are none."""

    def __init__(self, name: str, revision: str | None = None):
        self.name, self.revision = name, revision
        self.files = self._files_by_tensor()

    def keys_of(self, model: PreTrainedModel, module: nn.Module) -> Mapping[str, str | None]:
        """The tensor that fills each parameter of a part of the model; None where the checkpoint has none of it."""
        key_of = {parameter: key for key, parameter in parameter_names(model, self.files).items()}
        prefix = next(path for path, part in model.named_modules() if part is module)
        tied = tied_parameters(model)
        full = {parameter: f"{prefix}.{parameter}" for parameter, _ in module.named_parameters()}
        return {parameter: key_of.get(path, key_of.get(tied.get(path, ""))) for parameter, path in full.items()}

    def is_here(self, key: str) -> bool:
        """Whether a tensor can be read without a download."""
        if Path(self.name).is_dir():
            return True
        cached = try_to_load_from_cache(self.name, self.files[key], revision=self.revision)
        return isinstance(cached, str)

    def tensor(self, key: str) -> Tensor:
        """One tensor, as it is stored."""
        with safe_open(self._file(self.files[key]), framework="pt") as file:
            return file.get_tensor(key)

    def _files_by_tensor(self) -> dict[str, str]:
        try:
            index = self._file(SAFE_WEIGHTS_INDEX_NAME)
        except (EntryNotFoundError, FileNotFoundError):
            with safe_open(self._single(), framework="pt") as file:
                return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        return json.loads(index.read_text())["weight_map"]

    def _single(self) -> Path:
        try:
            return self._file(SAFE_WEIGHTS_NAME)
        except (EntryNotFoundError, FileNotFoundError) as error:
            offline = isinstance(error, LocalEntryNotFoundError)
            raise UserError(
                f"The teacher {self.name!r} has no {SAFE_WEIGHTS_NAME} "
                + ("in the Hub's cache, and the Hub cannot be reached." if offline else "to read its head from.")
                + " Set `teacher` to a folder or Hub id with its weights as safetensors."
            ) from error

    def _file(self, file: str) -> Path:
        if not Path(self.name).is_dir():
            return Path(hf_hub_download(self.name, file, revision=self.revision))
        path = Path(self.name) / file
        if not path.is_file():
            raise FileNotFoundError(path)
        return path
