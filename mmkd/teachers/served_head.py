"""The head of a model that is served elsewhere: the one tensor of its checkpoint that turns states into logits."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import UserError
from mmkd.models.backbone import check_head, head_of
from mmkd.models.heads import LMHead
from mmkd.models.load import computed_dtype, dtype_named, empty_model
from mmkd.precision import product_dtype

from .checkpoint_tensors import FLOATS, Checkpoint
from .head_checks import FinalNorm


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
    for parameter, tensor in _head_tensors(model, module, Checkpoint(name, revision)).items():
        chosen = computed_dtype(wanted, model.config, device)
        if isinstance(chosen, str):
            saved = model.config.dtype or tensor.dtype
            chosen = product_dtype(dtype_named(saved, "teacher") if isinstance(saved, str) else saved, device)
        setattr(module, parameter, nn.Parameter(tensor.to(chosen), requires_grad=False))
    check_head(model)
    return head_of(model)


def final_norm_of_checkpoint(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> FinalNorm | None:
    """The last norm of a folder or Hub id, where its last hidden state is what a norm gives; else None.

    Of a Hub id only files that are here already are read.
    """
    model = empty_model(name, "teacher", revision=revision, trust_remote_code=trust_remote_code)
    norms = [part for part in model.get_decoder().children() if "norm" in type(part).__name__.lower()]
    if len(norms) != 1 or not _is_last(model, norms[0]):
        return None
    (module,), checkpoint = norms, Checkpoint(name, revision)
    for parameter, key in checkpoint.keys_of(model, module).items():
        if key is None or not checkpoint.is_here(key):
            return None
        setattr(module, parameter, nn.Parameter(checkpoint.tensor(key).float(), requires_grad=False))
    with torch.no_grad():
        return FinalNorm.of(module, model.config.get_text_config().hidden_size)


def _is_last(model: PreTrainedModel, norm: nn.Module) -> bool:
    """Whether a decoder's last hidden state is the very tensor that the norm gave, run without weights."""
    given, ids = [], torch.zeros(1, 2, dtype=torch.long, device="meta")
    handle = norm.register_forward_hook(lambda module, inputs, output: given.append(output))
    # A mask of four dimensions is taken as it is; others are looked into, and a tensor without values has none.
    mask = torch.zeros(1, 1, 2, 2, device="meta", dtype=model.dtype)
    try:
        out = model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    except (RuntimeError, TypeError, ValueError):
        # Some decoders look into values all the same; then nothing is known of their norm.
        return False
    finally:
        handle.remove()
    return len(given) == 1 and out.last_hidden_state is given[0]


def _head_tensors(model: PreTrainedModel, module: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Weight and, where there is one, bias of the head, as the checkpoint has them."""
    advice = (
        "If it is quantised, set `teacher` to the model with weights in bfloat16 or float32; the server may run the "
        "quantised one under that name (--served-model-name)."
    )
    tensors, keys = {}, checkpoint.keys_of(model, module)
    for parameter, expected in module.named_parameters():
        key = keys[parameter]
        if key is None:
            raise UserError(
                f"The weights of the teacher {checkpoint.name!r} lack the {parameter} of its head. {advice}"
            )
        tensor = tensors[parameter] = checkpoint.tensor(key)
        if tensor.shape != expected.shape or tensor.dtype not in FLOATS:
            raise UserError(
                f"The head of the teacher {checkpoint.name!r}, {key}, is {tensor.dtype} of the shape "
                f"{tuple(tensor.shape)}, and must be float32, bfloat16 or float16 of {tuple(expected.shape)}. {advice}"
            )
    return tensors
