"""The last hidden state and the head of any causal LM or VLM, for losses that never form all logits."""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmkd.errors import UserError
from mmkd.seams.deepspeed_seam import gathered, is_partitioned
from mmkd.seams.peft_seam import is_adapted
from mmkd.seams.transformers_seam import attention_of, load_balancing_loss, set_attention

from .heads import LMHead

Consumer = Callable[[Tensor, LMHead], Any]
"""(last hidden state [batch, position, width], head) -> the value that the model's forward returns."""


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model under PEFT's wrapper."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def name_of(model: PreTrainedModel | PeftModel) -> str:
    """The Hub id or folder from which the model was loaded; empty if it was built from a config."""
    return base_of(model).config.name_or_path or ""


def allow_consumers(model: PreTrainedModel | PeftModel) -> None:
    """Lets `model(**inputs, consumer=f)` return `f(last_hidden_state, head)`, computed inside the model's forward.

    A loss must run there, because only then the hooks of DDP, FSDP and DeepSpeed apply to it. With `router_loss=True`
    it returns a pair, of which the second is the load-balancing loss of a mixture of experts. Without `consumer` the
    forward is unchanged. Call this before the model is wrapped. Raises UserError for a model whose logits are not its
    head applied to its last hidden state.
    """
    base = base_of(model)
    bound = base.forward
    # Unbound if possible, so that a deep copy of the model runs its own weights; accelerate's hooks bind the model in
    # a forward of their own.
    original = (
        bound.__func__ if isinstance(bound, types.MethodType) else lambda _, *args, **kwargs: bound(*args, **kwargs)
    )

    # torch.compile gets only the backbone: the consumer is a new function in each step, and a loss that reads values
    # and computes its own gradients would be compiled in pieces, again for every number of tokens.
    @torch.compiler.disable(recursive=False)
    @functools.wraps(type(base).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        consumer: Consumer | None = None,
        router_loss: bool = False,
        **kwargs: Any,
    ) -> Any:
        if consumer is None:
            return original(self, *args, **kwargs)
        asked = {"use_cache": False, **({"output_router_logits": True} if router_loss else {})}
        output = self.base_model(*args, **{**kwargs, **asked})
        hidden = output.last_hidden_state
        result = _inside(self.get_output_embeddings(), lambda hidden: consumer(hidden, head_of(self)), hidden)
        if not router_loss:
            return result
        return result, load_balancing_loss(self, output.router_logits, kwargs.get("attention_mask"))

    base.forward = types.MethodType(forward, base)
    _require_plain_head(base)


@torch.no_grad()
def _require_plain_head(model: PreTrainedModel) -> None:
    """Raises UserError if the head gives other log-probs than the model: some families do more after the product."""
    if model.base_model is model:
        raise _without_backbone(model)
    if any(is_partitioned(parameter) or parameter.is_meta for parameter in model.parameters()):
        return
    ids, training = torch.tensor([[0, 1]], device=model.device), model.training
    model.eval()
    # FlashAttention accepts only half precision, which training in mixed precision provides.
    mixed = model.device.type == "cuda" and model.dtype == torch.float32
    with _attention_for(model), torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
        expected = model(input_ids=ids).logits.float()
        ours = model(input_ids=ids, consumer=lambda hidden, head: head.log_probs(hidden))
    model.train(training)
    _compare_heads(model, ours, expected)


def _without_backbone(model: PreTrainedModel) -> UserError:
    return UserError(
        f"{type(model).__name__} has no backbone apart from its head, so its logits cannot be chunked.",
        because="not built",
    )


def _compare_heads(model: PreTrainedModel, ours: Tensor, expected: Tensor) -> None:
    if (ours - expected.log_softmax(-1)).abs().max() > 0.02 * expected.abs().max():
        raise UserError(
            f"The logits of {type(model).__name__} are not its output embeddings applied to its last hidden state "
            "(times a scale, softcapped). The fused loss would train another model than the one you run. Please open "
            "an issue that names the model.",
            because="not built",
        )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """As `allow_consumers`, for a model of which only the head has weights: its backbone is not run.

    Raises UserError for a model whose logits are not its head applied to its last hidden state.
    """
    head = head_of(model)
    generator = torch.Generator().manual_seed(0)
    # As large as states after a norm are, so that a softcap shows.
    hidden = 3 * torch.randn(1, 2, head.weight.shape[1], generator=generator).to(head.weight.dtype)
    backbone = model.base_model
    if backbone is model:
        raise _without_backbone(model)
    backbone.forward = lambda *args, **kwargs: _GivenStates(last_hidden_state=hidden)
    expected = model(input_ids=torch.tensor([[0, 1]])).logits.float()
    del backbone.forward
    _compare_heads(model, head.log_probs(hidden), expected)


class _GivenStates(BaseModelOutputWithPast):
    """What any backbone returns, of which only the last hidden state is there."""

    def __getattr__(self, name: str) -> None:
        return None


def attention_now(model: PreTrainedModel) -> set[str | None]:
    """The implementations of attention that are set in a model and its parts."""
    return {attention_of(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}


@contextmanager
def _attention_for(model: PreTrainedModel) -> Iterator[None]:
    """Sets an attention that runs on the model's device: a model still on the CPU may be set to FlashAttention."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    chosen = [attention_of(config) for config in configs]
    if model.device.type == "cpu" and not attention_now(model) <= {"eager", "sdpa"}:
        set_attention(model.config, "eager")
    try:
        yield
    finally:
        # In the order of modules(), whole models first: setting one also sets its parts, which are then restored.
        for config, attention in zip(configs, chosen, strict=True):
            set_attention(config, attention)


@torch.compiler.disable()
def _inside(module: torch.nn.Module | None, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Calls a function as the forward of the head's module, whose hooks gather sharded weights and gradients."""
    if module is None:
        return function(hidden)
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        return module(hidden)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def head_of(model: PreTrainedModel | PeftModel) -> LMHead:
    """The current head; its weights are read on each call, since FSDP and PEFT replace them.

    Raises UserError for a head that is not a plain matrix (with an adapter, or quantised), and for a tied head whose
    embeddings have an adapter.
    """
    base = base_of(model)
    module = base.get_output_embeddings()
    if module is None:
        raise UserError(
            f"{type(base).__name__} has no output embeddings; distillation needs a model with an lm_head.",
            because="meaning",
        )
    if is_adapted(module):
        raise UserError(
            "The lm_head carries a PEFT adapter. The fused loss multiplies with lm_head.weight itself, so the adapter "
            "would never be trained. Remove 'lm_head' from target_modules; train it whole with modules_to_save.",
            because="not built",
        )
    embeddings: Any = base.get_input_embeddings()
    if is_adapted(embeddings) and embeddings.get_base_layer().weight is module.weight:
        raise UserError(
            "The embeddings carry a PEFT adapter and share their weights with the lm_head. Merging would change both, "
            "so that the merged model would differ from the trained one. Remove 'embed_tokens' from target_modules; "
            "train it whole with modules_to_save.",
            because="upstream",
        )
    weight, bias = module.weight, getattr(module, "bias", None)
    if not weight.is_floating_point():
        raise UserError(
            f"The lm_head of {type(base).__name__} is quantised to {weight.dtype}. Keep it out of quantisation: "
            "llm_int8_skip_modules=['lm_head'] in the BitsAndBytesConfig.",
            because="not built",
        )
    if isinstance(weight, DTensor):
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    config = base.config.get_text_config()
    return LMHead(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None))


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    # logits_scaling is a divisor in Granite and MiniCPM3, and a factor in HyperCLOVA X.
    return divisor if config.model_type == "hyperclovax" else 1 / divisor


def full_head(model: PreTrainedModel | PeftModel) -> LMHead:
    """The whole head on every rank, outside of the model's forward; a copy if ZeRO-3 partitions it."""
    with _gathered(base_of(model).get_output_embeddings()):
        head = head_of(model)
        if not is_partitioned(head.weight):
            return head
        bias = None if head.bias is None else head.bias.detach().clone()
        return replace(head, weight=head.weight.detach().clone(), bias=bias)


def last_layer(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """The last block of the text decoder. Raises UserError for a decoder without a list of blocks."""
    decoder = base_of(model).get_decoder()
    blocks = [module for module in decoder.children() if isinstance(module, torch.nn.ModuleList)]
    if len(blocks) != 1:
        raise UserError(
            f"{type(decoder).__name__} has no single list of blocks, so none of them is the last.", because="not built"
        )
    return blocks[0][-1]


def devices_of(model: PreTrainedModel | PeftModel) -> set[torch.device]:
    """The devices that hold the model's parameters."""
    return {parameter.device for parameter in model.parameters()}


def _gathered(module: torch.nn.Module | None) -> AbstractContextManager:
    """ZeRO-3 gathers a parameter in its module's own forward, which reading `lm_head.weight` never runs."""
    parameters = [] if module is None else [p for p in module.parameters(recurse=False) if is_partitioned(p)]
    return gathered(parameters)
