"""The head of a model that is served elsewhere: the one tensor of its checkpoint that turns states into logits."""

import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mmkd.errors import UserError
from mmkd.models.backbone import check_head, head_of
from mmkd.models.heads import LMHead
from mmkd.models.load import computed_dtype, dtype_named, empty_model
from mmkd.precision import product_dtype
from mmkd.seams.transformers_seam import parameter_names, tied_parameters


def head_of_checkpoint(
    name: str,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
) -> LMHead:
    """The head of a folder or Hub id, without gradient, on the CPU, in a type that `device` multiplies.

    `dtype` is as for a teacher that is loaded here. Only the files that hold the head's tensors are downloaded, and
    only these tensors are read; a tied head is the embeddings. Raises UserError where there is no such tensor, or
    where the model's logits are not its head applied to its last hidden state.
    """
    model = empty_model(name, "teacher", revision=revision, trust_remote_code=trust_remote_code)
    module = model.get_output_embeddings()
    if module is None:
        raise UserError(
            f"{type(model).__name__} has no output embeddings; distillation needs a teacher with an lm_head.",
            because="meaning",
        )
    wanted = dtype_named(dtype, "teacher") if isinstance(dtype, str) and dtype != "auto" else dtype
    for parameter, tensor in _head_tensors(model, module, name, revision).items():
        chosen = computed_dtype(wanted, model.config, device)
        if isinstance(chosen, str):
            saved = model.config.dtype or tensor.dtype
            chosen = product_dtype(dtype_named(saved, "teacher") if isinstance(saved, str) else saved, device)
        setattr(module, parameter, torch.nn.Parameter(tensor.to(chosen), requires_grad=False))
    check_head(model)
    return head_of(model)


def _head_tensors(
    model: PreTrainedModel, module: torch.nn.Module, name: str, revision: str | None
) -> dict[str, Tensor]:
    """Weight and, where there is one, bias of the head, as the checkpoint has them."""
    files = _files_by_tensor(name, revision)
    key_of = {parameter: key for key, parameter in parameter_names(model, files).items()}
    prefix = next(path for path, part in model.named_modules() if part is module)
    sources, tensors = tied_parameters(model), {}
    for parameter, expected in module.named_parameters():
        full = f"{prefix}.{parameter}"
        key = key_of.get(full, key_of.get(sources.get(full, "")))
        if key is None:
            raise UserError(
                f"The weights of the teacher {name!r} have no tensor for {full}, its head. If they are quantised, "
                "name the model with weights in bfloat16 or float32 as `teacher`; the server may run the other one."
            )
        with safe_open(_file(name, revision, files[key]), framework="pt") as file:
            tensor = file.get_tensor(key)
        if tensor.shape != expected.shape or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(
                f"The head of the teacher {name!r}, {key}, is {tensor.dtype} of the shape {tuple(tensor.shape)}, and "
                f"must be float32, bfloat16 or float16 of {tuple(expected.shape)}. If it is quantised, name the model "
                "with weights in bfloat16 or float32 as `teacher`; the server may run the quantised one."
            )
        tensors[parameter] = tensor
    return tensors


def _files_by_tensor(name: str, revision: str | None) -> dict[str, str]:
    """The file of each tensor of a checkpoint."""
    try:
        index = _file(name, revision, SAFE_WEIGHTS_INDEX_NAME)
    except (EntryNotFoundError, FileNotFoundError):
        try:
            single = _file(name, revision, SAFE_WEIGHTS_NAME)
        except (EntryNotFoundError, FileNotFoundError) as error:
            offline = isinstance(error, LocalEntryNotFoundError)
            raise UserError(
                f"The teacher {name!r} has no {SAFE_WEIGHTS_NAME} "
                + ("in the Hub's cache, and the Hub cannot be reached." if offline else "to read its head from.")
                + " Name a folder or Hub id with its weights as `teacher`."
            ) from error
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    return json.loads(index.read_text())["weight_map"]


def _file(name: str, revision: str | None, file: str) -> Path:
    if not Path(name).is_dir():
        return Path(hf_hub_download(name, file, revision=revision))
    path = Path(name) / file
    if not path.is_file():
        raise FileNotFoundError(path)
    return path
