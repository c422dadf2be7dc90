"""What mmkd borrows of transformers' models and texts beyond its documentation."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.chat_template_utils import render_jinja_template


def attention_of(config: Any) -> str | None:
    """The implementation of attention that a model with this config runs; `set_attn_implementation` has no getter."""
    return config._attn_implementation


def set_attention(config: Any, implementation: str | None) -> None:
    """Sets it without the checks of `set_attn_implementation`, which loads what is not installed."""
    config._attn_implementation = implementation


def empty_like(model: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A model of a class, made of a config in a type; the auto classes' `from_config` picks the class itself."""
    return model._from_config(config, dtype=dtype)


def checkpoint_frozen_layers(model: PreTrainedModel) -> None:
    """Lets a frozen model compute its layers again in a backward pass through it, while it stays in evaluation mode.

    transformers checkpoints layers in training mode only. What the layers hold, dropout among it, keeps its mode;
    layers that drop out themselves are not checkpointed.
    """
    # At the top it would load the auto classes, which import this module again (mmkd/models/registration.py).
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and not isinstance(getattr(module, "dropout", None), float):
            module.training = True


def balances_experts(model: PreTrainedModel) -> bool:
    """Whether `load_balancing_loss` knows the loss of a mixture of experts."""
    return _balancing(model) is not None


def load_balancing_loss(model: PreTrainedModel, router_logits: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """The loss that a mixture of experts adds to its own, before its coefficient, over the tokens that are no padding.

    A model computes it together with its logits, which are not to be formed here.
    """
    function, config = _balancing(model), model.config.get_text_config()
    assert function is not None, "it is checked before training"
    experts, chosen = (
        getattr(model, own, None) or getattr(config, own) for own in ("num_experts", "num_experts_per_tok")
    )
    return function(router_logits, experts, chosen, mask)


def _balancing(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    # FSDP2 makes a class of its own of that of the model.
    modules = (sys.modules[cls.__module__] for cls in type(model).__mro__)
    return next(filter(None, (getattr(module, "load_balancing_loss_func", None) for module in modules)), None)


def save_under_published_names(model: PreTrainedModel) -> None:
    """Has `save_pretrained` give weights the names of the published models of this architecture.

    transformers does so by itself for a model that it has loaded under such names.
    """
    conversions: Any = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = conversions


def leave_out_of_saves(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Has `save_pretrained` leave out weights that stand in the model for a training only.

    The Trainer then does not miss them in the checkpoint that it resumes either.
    """
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *names}


def has_class_for(auto_class: Any, config: type[PreTrainedConfig]) -> bool:
    """Whether an auto class has a model for this class of configs; `from_config` tells by an error of many causes."""
    return config in auto_class._model_mapping


def generates_text(config: PreTrainedConfig) -> bool:
    """Whether transformers generates text with models of this kind."""
    # Imported here: with the auto classes come ours (`models/registration.py`), which import this module.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def model_class(config: PreTrainedConfig) -> type | None:
    """The class that `AutoModel` makes of a config; None for a config that it does not know."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    mapping: Any = MODEL_MAPPING
    return mapping.get(type(config), None)


def marked_spans(messages: list[Any], template: str, settings: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as a chat template writes it, and the characters between its {% generation %} marks.

    `apply_chat_template` gives the places of tokens only.
    """
    texts, spans = render_jinja_template(
        conversations=[messages],
        return_assistant_tokens_mask=True,
        continue_final_message=False,
        add_generation_prompt=False,
        **{"chat_template": template, **settings},
    )
    return texts[0], [(int(start), int(end)) for start, end in spans[0]]


def byte_letters() -> dict[int, str]:
    """The letter by which a byte-level BPE writes each byte."""
    return bytes_to_unicode()


def tracker_classes() -> dict[str, type]:
    """The values of `report_to` that transformers knows, with the callback of each."""
    # Imports the Trainer and PEFT, and this module is imported while PEFT may be half imported itself.
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return dict(INTEGRATION_TO_CALLBACK)


def installed_trackers() -> Iterable[str]:
    """Those whose packages are installed."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    return get_available_reporting_integrations()


def parameter_names(model: PreTrainedModel, saved: Iterable[str]) -> dict[str, str]:
    """The parameter of a model that each tensor of a checkpoint fills whole, by the tensor's name there.

    `from_pretrained` finds them on its way only. Tensors that are joined or cut while they are loaded are left out.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    names = {}
    for key in sorted(saved, key=dot_natural_key):
        name, converted = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, converted = rename_source_key(key, [], [], prefix, own)
        if converted is None:
            names[key] = name
    return names


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """The parameter whose weights each tied parameter has, which is what a checkpoint holds."""
    return model.all_tied_weights_keys


def is_fused_experts(module: Any) -> bool:
    """Whether a module is the experts of a layer, in the layout that transformers' own implementations read.

    Its decorator of experts says the layout in attributes, and gives them the product with the gate.
    """
    known = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    return known and not getattr(module, "has_post_expert_norm", False)


def gated(experts: Any, projected: Tensor) -> Tensor:
    """What experts make of the product with their gates and ups."""
    return experts._apply_gate(projected)
