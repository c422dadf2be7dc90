"""Pruning: a student made of parts of a teacher, so that distillation starts from trained weights."""

import copy
from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mmkd.errors import UserError
from mmkd.seams.transformers_seam import empty_like

Cuts = dict[str, tuple[int, Int[Tensor, "kept"]]]
"""The parameters of one layer that are pruned: name -> the dimension to cut and the indices to keep, ascending."""


@torch.no_grad()
def prune(
    teacher: PreTrainedModel,
    *,
    layers: int | Sequence[int] | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
) -> PreTrainedModel:
    """A new model of the teacher's class with copies of the most important weights; the teacher is not changed.

    `layers` is a count, spread evenly as `round(linspace(0, depth - 1, layers))` so that the first and the last layer
    stay, or ascending 0-based indices. `intermediate_size` is the new FFN width. `num_attention_heads` is the new
    number of query heads: key/value heads are removed with their queries, in whole GQA groups, and `head_dim` and
    `hidden_size` stay (Llama and Gemma configs require `hidden_size` to be a multiple of the number of heads). In a
    vision-language model only the language model is pruned.

    Units are chosen in each layer by weight magnitude, without data (Minitron, arXiv 2407.14679, ranks the same
    units by activations; the weight-only criterion is ours). FFN neuron i scores ||gate row i|| * ||up row i|| *
    ||down column i||; an attention group scores ||its columns of W_o|| * ||its rows of W_v||. Norms are in fp32.

    Raises UserError where no size is passed or one cannot be, for a quantised teacher, and for an architecture that
    does not allow the cut.
    """
    if layers is None and intermediate_size is None and num_attention_heads is None:
        raise UserError(
            "prune() got no size, so the student would equal the teacher: pass layers, intermediate_size or "
            "num_attention_heads."
        )
    _require_prunable(teacher)
    stack = _decoder_layers(teacher)
    kept = kept_layers(layers, depth=len(stack))

    config = copy.deepcopy(teacher.config)
    text_config = config.get_text_config()
    _keep_layers_in_config(text_config, kept, depth=len(stack))
    cuts: list[Cuts] = [{} for _ in kept]
    if intermediate_size is not None:
        for cut, index in zip(cuts, kept, strict=True):
            cut.update(_ffn_cuts(stack[index], intermediate_size))
        text_config.intermediate_size = intermediate_size
    if num_attention_heads is not None:
        heads = text_config.num_attention_heads
        groups = getattr(text_config, "num_key_value_heads", heads)
        kept_groups = _kept_groups(num_attention_heads, heads, groups)
        for cut, index in zip(cuts, kept, strict=True):
            cut.update(_attention_cuts(stack[index], groups, kept_groups))
        # Without head_dim, a config implies hidden_size / heads, which no longer holds after pruning heads.
        text_config.head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        text_config.num_attention_heads, text_config.num_key_value_heads = num_attention_heads, kept_groups
    text_config.validate_architecture()

    # A model is built from the new config, so that layers are numbered anew (layer_idx of the KV cache) and masks fit.
    student = _empty_model(teacher, config)
    _require_same_behaviour(_decoder_layers(_empty_model(teacher, teacher.config)), _decoder_layers(student), kept)
    _load(student, _kept_weights(teacher, stack, kept, cuts))
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device).train(teacher.training)  # pyright: ignore[reportArgumentType]


def _require_prunable(teacher: PreTrainedModel) -> None:
    packed = any(not parameter.is_floating_point() for parameter in teacher.parameters())
    if packed or getattr(teacher, "is_quantized", False) or getattr(teacher, "quantization_method", None):
        raise UserError(
            "The teacher is quantised, so its rows and columns are packed and cannot be copied one by one: load it "
            "unquantised to prune it; the student can be quantised afterwards.",
            because="not built",
        )
    config = teacher.config.get_text_config()
    if getattr(config, "is_heterogeneous", False) or isinstance(getattr(config, "intermediate_size", None), list):
        raise UserError(
            f"{type(config).__name__} sizes its layers one by one, so one number cannot say how wide the student is: "
            "use a teacher whose layers are all alike (not Gemma 3n or Gemma 4).",
            because="not built",
        )


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    depth = model.config.get_text_config().num_hidden_layers
    stacks = [
        module
        for name, module in model.get_decoder().named_modules()
        # A list within a numbered module belongs to one layer (for example its experts), whatever its length.
        if isinstance(module, nn.ModuleList) and len(module) == depth and not any(map(str.isdigit, name.split(".")))
    ]
    if len(stacks) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(stacks)} lists of {depth} decoder layers, so which to prune is unclear: "
            "use a model whose decoder layers are one ModuleList.",
            because="not built",
        )
    return stacks[0]


def kept_layers(layers: int | Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        return list(range(depth))
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise UserError(f"layers={layers}, but the teacher has {depth}: pass a count from 1 to {depth}.")
        return [round(i * (depth - 1) / max(layers - 1, 1)) for i in range(layers)]
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= depth:
        raise UserError(
            f"layers={kept} does not name layers of a teacher that has {depth}: pass at least one index from 0 to "
            f"{depth - 1}, ascending, none of them twice."
        )
    return kept


def _keep_layers_in_config(config: PreTrainedConfig, kept: list[int], depth: int) -> None:
    for name, value in vars(config).items():
        # Lists per layer (layer_types). eos_token_id and architectures are lists too, of this length only by accident.
        if isinstance(value, list) and len(value) == depth and not name.endswith(("token_id", "architectures")):
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _ffn_cuts(layer: nn.Module, width: int) -> Cuts:
    gate, up, down = _projections(layer, "mlp", "gate_proj", "up_proj", "down_proj")
    if not 1 <= width <= len(gate):
        raise UserError(f"intermediate_size={width}, but the teacher's is {len(gate)}: pass 1 to {len(gate)}.")
    kept = _largest(gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0), width)
    rows = [f"mlp.{name}.{kind}" for name in ("gate_proj", "up_proj") for kind in ("weight", "bias")]
    return {name: (0, kept) for name in rows} | {"mlp.down_proj.weight": (1, kept)}


def _kept_groups(num_attention_heads: int, heads: int, groups: int) -> int:
    queries = heads // groups
    if not 1 <= num_attention_heads <= heads or num_attention_heads % queries:
        raise UserError(
            f"num_attention_heads={num_attention_heads}, but the teacher has {heads} query heads, of which each "
            f"{queries} share a key/value head and stay together: pass a multiple of {queries} up to {heads}."
        )
    return num_attention_heads // queries


def _attention_cuts(layer: nn.Module, groups: int, kept_groups: int) -> Cuts:
    query, key, value, output = _projections(layer, "self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
    of_output = output.T.unflatten(0, (groups, -1)).flatten(1).norm(dim=1)
    of_value = value.unflatten(0, (groups, -1)).flatten(1).norm(dim=1)
    kept = _largest(of_output * of_value, kept_groups)

    def members(total: int) -> Int[Tensor, "kept"]:
        return torch.arange(total, device=kept.device).unflatten(0, (groups, -1))[kept].flatten()

    cuts: Cuts = {"self_attn.o_proj.weight": (1, members(output.shape[1]))}
    for name, weight in (("q_proj", query), ("k_proj", key), ("v_proj", value)):
        cuts |= {f"self_attn.{name}.{kind}": (0, members(len(weight))) for kind in ("weight", "bias")}
    return cuts


def _projections(layer: nn.Module, block: str, *names: str) -> list[Float[Tensor, "row column"]]:
    modules = [getattr(getattr(layer, block, None), name, None) for name in names]
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    if len(linears) < len(names):
        raise UserError(
            f"{type(layer).__name__} has no linear {', '.join(names)} in {block}, so this width cannot be pruned: "
            "prune layers only, or use a teacher built like Llama, Qwen, Mistral or Gemma.",
            because="not built",
        )
    return [linear.weight.float() for linear in linears]


def _largest(importance: Float[Tensor, "unit"], count: int) -> Int[Tensor, "kept"]:
    # The order of ties in topk is undefined; a stable sort makes the result deterministic.
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def _empty_model(teacher: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    # Only weights stay empty. Buffers that no checkpoint holds (rotary frequencies, Gemma's embedding scale) are
    # computed here, in the type that from_pretrained would give them.
    with init_empty_weights(include_buffers=False):
        return empty_like(type(teacher), copy.deepcopy(config), teacher.dtype)


def _require_same_behaviour(before: nn.ModuleList, after: nn.ModuleList, kept: list[int]) -> None:
    for position, index in enumerate(kept):
        news = dict(after[position].named_modules())
        for name, module in before[index].named_modules():
            # Integers are not compared: layer_idx and the widths change on purpose.
            settings = {key: value for key, value in vars(module).items() if isinstance(value, (bool, float, str))}
            new = news.get(name)
            if type(new) is not type(module) or any(vars(new).get(key) != value for key, value in settings.items()):
                raise UserError(
                    f"Layer {index} of the teacher would compute something else as layer {position} of the student: "
                    f"its {type(module).__name__} is set up by the layer's number or the number of heads. Leave that "
                    "as it is, or use another teacher.",
                    because="not built",
                )


def _kept_weights(
    model: PreTrainedModel, stack: nn.ModuleList, kept: list[int], cuts: list[Cuts]
) -> dict[str, Tensor]:
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    weights = {}
    for name, tensor in model.state_dict().items():
        cut = None
        if name.startswith(prefix):
            index, parameter = name.removeprefix(prefix).split(".", 1)
            if int(index) not in kept:
                continue
            position = kept.index(int(index))
            name, cut = f"{prefix}{position}.{parameter}", cuts[position].get(parameter)
        weights[name] = tensor.clone() if cut is None else tensor.index_select(*cut)
    return weights


def _load(student: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in student.state_dict().items()}
    odd = sorted({name for name, _ in expected.items() ^ {name: t.shape for name, t in weights.items()}.items()})
    if odd:
        raise UserError(
            f"{odd[0]} (and {len(odd) - 1} more) does not fit the pruned {type(student).__name__}: its shape depends "
            "on another size in this architecture. Prune layers only, or use another teacher.",
            because="not built",
        )
    # assign keeps the type of every tensor, which the config may contradict, but unties the embeddings.
    student.load_state_dict(weights, assign=True)
    student.tie_weights()
