"""Every axis of every family: the pruned model computes what the whole one does with the other units at 0."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mmkd.errors import UserError
from mmkd.models.assemble import prune, pruned
from mmkd.models.prune_cut import Cut
from mmkd.models.prune_search import SizeSearch
from mmkd.models.prune_sizes import PruneSizes

Model = Any
# No two sizes are the same, so that a tensor's width tells what it holds.
HIDDEN, TOWER, PATCH = 24, 16, 4
VOCAB, IMAGE = 61, 60
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Over fewer channels it weighs a little more.
    "rms_norm_eps": 1e-12,
}
VISION: dict[str, Any] = {
    "hidden_size": TOWER,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": PATCH,
}
QWEN_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": 59,
    "vision_start_token_id": 58,
    "vision_end_token_id": 57,
}
QWEN_TEXT = SHAPE | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
QWEN_TOWER: dict[str, Any] = {
    "hidden_size": TOWER,
    "intermediate_size": 28,
    "depth": 3,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
}


def text(config: PreTrainedConfig) -> Callable[[], Model]:
    return lambda: AutoModelForCausalLM.from_config(config)


def llava() -> Model:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**SHAPE),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config)


def idefics3() -> Model:
    text_config = {"model_type": "llama", **SHAPE, "tie_word_embeddings": True}
    return Idefics3ForConditionalGeneration(
        Idefics3Config(vision_config=VISION, text_config=text_config, image_token_id=IMAGE, scale_factor=2)
    )


def qwen2_5_vl() -> Model:
    tower = QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [0, 2]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=tower, **QWEN_IDS))


def qwen3_vl() -> Model:
    tower = QWEN_TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=QWEN_TEXT | {"head_dim": 4}, vision_config=tower, **QWEN_IDS)
    )


EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
MOE: dict[str, Any] = SHAPE | {"num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 5, "moe_intermediate_size": 12, "head_dim": 8, "norm_topk_prob": True}
UNGROUPED: dict[str, Any] = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
MAKERS: dict[str, Callable[[], Model]] = {
    "llama": text(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "qwen2": text(Qwen2Config(**SHAPE)),
    "qwen3": text(Qwen3Config(**SHAPE, head_dim=8)),
    "gemma3": text(Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=3)),
    "phi3": text(Phi3Config(**SHAPE)),
    "opt": text(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=20,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=64,
        )
    ),
    "gpt2": text(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=HIDDEN, n_layer=2, n_head=6)),
    "gpt_neox": text(GPTNeoXConfig(**UNGROUPED)),
    "mixtral": text(MixtralConfig(**MOE, num_local_experts=5)),
    "qwen3_moe": text(Qwen3MoeConfig(**(MOE | QWEN_MOE))),
    "gpt_oss": text(GptOssConfig(**MOE, num_local_experts=5, head_dim=8, sliding_window=8)),
    "llava": llava,
    "idefics3": idefics3,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}


def model_of(family: str) -> Model:
    torch.manual_seed(0)
    # The grouped products of experts know no float64.
    model = MAKERS[family]().eval().to(torch.float32 if family in EXPERTS else torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh models have zero biases and unit norms, which would hide a wrong cut.
            parameter.normal_(0, 0.3)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return model


@torch.no_grad()
def logits_of(model: Model) -> Tensor:
    kind, generator = model.config.model_type, torch.Generator().manual_seed(1)
    ids = torch.randint(3, 57, (2, 9), generator=generator)
    if not hasattr(model.config, "vision_config"):
        return model(input_ids=ids).logits
    tokens = 1 if kind == "idefics3" else 4
    ids[:, 1 : 1 + tokens] = IMAGE
    if kind.startswith("qwen"):
        patches = torch.randn(2 * 16, 3 * 2 * PATCH * PATCH, generator=generator, dtype=torch.float64)
        types = (ids == IMAGE).int()
        grid = torch.tensor([[1, 4, 4]] * 2)
        return model(input_ids=ids, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=types).logits
    pixels = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return model(input_ids=ids, pixel_values=pixels[:, None] if kind == "idefics3" else pixels).logits


def without(size: int, kept: Tensor) -> Tensor:
    return torch.zeros(size).index_fill(0, kept, 1.0)


@contextmanager
def masked_width(model: Model, width: int, kept: Tensor, tower: bool) -> Iterator[None]:
    """Within it, all but the kept channels are 0 wherever something is written to a hidden state."""
    mask, handles = without(width, kept), []

    def blank(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return output * mask.view(-1, *[1] * (output.ndim - 2))
        return output * mask.repeat(output.shape[-1] // width)

    def normalised(module: Any, args: Any, output: Tensor) -> Tensor:
        places = torch.cat([block * width + kept for block in range(output.shape[-1] // width)])
        own = layer_norm(args[0][..., places], [len(places)], module.weight[places], module.bias[places], module.eps)
        return torch.zeros_like(output).index_copy(-1, places, own)

    for name, module in model.named_modules():
        if tower != any(part in name for part in ("vision_tower", "vision_model", "visual")) and tower:
            continue
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            # What they write are heads.
            continue
        size = getattr(module, "out_features", None) or getattr(module, "embedding_dim", None)
        size = size or getattr(module, "out_channels", None) or getattr(module, "nf", None)
        if type(module).__name__.endswith("Experts"):
            size = width
        if isinstance(module, nn.LayerNorm) and not module.normalized_shape[0] % width:
            handles.append(module.register_forward_hook(normalised))
        elif size is not None and (size == width or (tower and size == 4 * width)):
            handles.append(module.register_forward_hook(blank))
    before = {}
    for name, parameter in model.named_parameters():
        if name.endswith("class_embedding") and tower:
            before[parameter] = parameter.detach().clone()
            parameter.data *= mask
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, values in before.items():
            parameter.data = values


@contextmanager
def masked_inputs(model: Model, masks: dict[str, Tensor]) -> Iterator[None]:
    """Within it, what the named modules read is multiplied by a mask."""

    def times(mask: Tensor) -> Callable[..., Any]:
        return lambda module, args: (args[0] * mask,)

    handles = [model.get_submodule(name).register_forward_pre_hook(times(mask)) for name, mask in masks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reading(model: Model, words: tuple[str, ...], tower: bool) -> dict[int, str]:
    """The module of each layer that reads what the units give."""
    names = {}
    for name, _ in model.named_modules():
        inside = any(part in name for part in ("vision_tower", "vision_model", "visual"))
        numbers = [int(word) for word in name.split(".") if word.isdigit()]
        if name.endswith(words) and numbers and inside == tower and "merger" not in name:
            names[numbers[0]] = name
    return names


FFN_OUT = ("mlp.down_proj", "mlp.c_proj", "fc2", "mlp.dense_4h_to_h", "mlp.linear_fc2")
HEADS_OUT = ("o_proj", "out_proj", "attn.proj", "attn.c_proj", "attention.dense")


def same(model: Model, cut: Cut, student: Model, tmp_path: Path) -> None:
    """The student's logits are those of the model, whose other units are masked by the caller; it loads again."""
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(student), expected, rtol=1e-5, atol=1e-5)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert again.dtype == model.dtype
    torch.testing.assert_close(logits_of(again), logits_of(student), rtol=0, atol=1e-6)


DENSE = ["llama", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "llava", "idefics3"]
ALL = [*DENSE, "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("family", [*ALL, *EXPERTS])
def test_a_narrower_model(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    # Of Qwen2.5-VL heads make up the width, two at a time.
    width = 16 if family == "qwen2_5_vl" else 12
    student, cut = pruned(model, PruneSizes(hidden_size=width))
    kept = cut.units["hidden", None]
    heads = {
        name: without(6, cut.units["queries", layer]).repeat_interleave(HIDDEN // 6)
        for layer, name in reading(model, HEADS_OUT, tower=False).items()
        if ("queries", layer) in cut.units
    }
    assert (student.config.get_text_config().hidden_size, len(kept)) == (width, width)
    with masked_width(model, HIDDEN, kept, tower=False), masked_inputs(model, heads):
        same(model, cut, student, tmp_path)


@pytest.mark.parametrize("family", ALL)
def test_a_narrower_ffn(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    student, cut = pruned(model, PruneSizes(intermediate_size=12))
    total = 96 if family == "gpt2" else 20
    masks = {
        name: without(total, cut.units["ffn", layer]) for layer, name in reading(model, FFN_OUT, tower=False).items()
    }
    assert len(masks) == 2
    with masked_inputs(model, masks):
        same(model, cut, student, tmp_path)


@pytest.mark.parametrize("heads, groups", [(4, None), (None, 1), (3, 3), (2, 2), (2, 1)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt_oss", "qwen3_vl"])
def test_fewer_heads(family: str, heads: int | None, groups: int | None, tmp_path: Path) -> None:
    model = model_of(family)
    student, cut = pruned(model, PruneSizes(num_attention_heads=heads, num_key_value_heads=groups))
    config = student.config.get_text_config()
    left = heads or (groups or 0) * 2
    assert (config.num_attention_heads, config.num_key_value_heads) == (left, groups or left // 2)
    names = reading(model, HEADS_OUT, tower=False)
    width = model.get_submodule(names[0]).in_features // 6
    masks = {name: without(6, cut.units["queries", layer]).repeat_interleave(width) for layer, name in names.items()}
    with masked_inputs(model, masks):
        same(model, cut, student, tmp_path)


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2_5_vl", "qwen3_vl"])
def test_a_smaller_tower(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    student, cut = pruned(model, PruneSizes(vision_hidden_size=8, vision_intermediate_size=13))
    vision = student.config.vision_config
    assert (vision.hidden_size, vision.intermediate_size) == (8, 13)
    heads, kept = reading(model, HEADS_OUT, tower=True), cut.units["vision_hidden", None]
    masks = {
        name: without(4, cut.units["vision_queries", layer]).repeat_interleave(TOWER // 4)
        for layer, name in heads.items()
    }
    masks |= {
        name: without(28, cut.units["vision_ffn", layer])
        for layer, name in reading(model, FFN_OUT, tower=True).items()
    }
    assert len(masks) == 6
    with masked_width(model, TOWER, kept, tower=True), masked_inputs(model, masks):
        same(model, cut, student, tmp_path)


@pytest.mark.parametrize(
    "family, layers, kept",
    [("llava", 2, [0, 2]), ("idefics3", [1], [1]), ("qwen2_5_vl", 2, [0, 2]), ("qwen3_vl", 1, [1])],
)
def test_a_shallower_tower(family: str, layers: Any, kept: list[int], tmp_path: Path) -> None:
    model = model_of(family)
    student, cut = pruned(model, PruneSizes(vision_layers=layers))
    assert cut.layers["vision_"] == kept
    stack: Any = model.get_submodule(next(part.stack for part in cut.axes.parts if part.mark))
    for number, layer in enumerate(stack):
        if number not in kept:
            layer.register_forward_hook(lambda module, args, output: args[0])
    same(model, cut, student, tmp_path)


@pytest.mark.parametrize("family", EXPERTS)
def test_fewer_experts(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    student, cut = pruned(model, PruneSizes(num_experts=3))
    for layer, block in enumerate(model.model.layers):
        router = block.mlp.router if family == "gpt_oss" else block.mlp.gate
        dropped = [each for each in range(5) if each not in cut.units["experts", layer].tolist()]
        router.forward = without_experts(router, dropped)
    same(model, cut, student, tmp_path)


def without_experts(router: Any, dropped: list[int]) -> Callable[..., Any]:
    """A router's forward whose logits of some experts are -inf."""
    bias = getattr(router, "bias", None)

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight, bias)
        logits[:, dropped] = -torch.inf
        top = logits.softmax(-1, dtype=torch.float).topk(2, dim=-1)
        return logits, (top.values / top.values.sum(-1, keepdim=True)).to(logits.dtype), top.indices

    return forward


@pytest.mark.parametrize("family", EXPERTS)
def test_narrower_experts(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    name = "expert_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    student, cut = pruned(model, PruneSizes(**{name: 8}))
    kind = "expert_ffn" if family == "qwen3_moe" else "ffn"
    for layer, block in enumerate(model.model.layers):
        down, kept = block.mlp.experts.down_proj, cut.units[kind, layer]
        assert kept.shape == (5, 8)
        side = 1 if family == "gpt_oss" else 2
        for expert in range(5):
            mask = without(down.shape[side], kept[expert])
            down.data[expert] *= mask[:, None] if side == 1 else mask
    same(model, cut, student, tmp_path)


@pytest.mark.parametrize("family", [*ALL, *EXPERTS])
def test_sizes_are_found_for_a_number_of_parameters(family: str) -> None:
    model = model_of(family)
    tower = {"vision_layers": 2, "vision_hidden_size": 8} if hasattr(model.config, "vision_config") else {}
    # Those whose outputs the language model reads stay.
    tower |= {"vision_layers": 1} if family == "qwen3_vl" else {}
    experts = {"num_experts": 4} if family in EXPERTS else {}
    search = SizeSearch(model, PruneSizes(**tower, **experts), None)
    whole = search.parameters(PruneSizes(layers=2, **tower, **experts))
    found = search.candidates(int(0.8 * whole))
    for candidate in (found[0], found[len(found) // 2], found[-1]):
        student = pruned(model, candidate.sizes)[0]
        assert student.num_parameters() == candidate.parameters <= 0.8 * whole, candidate
    assert len({each.sizes for each in found}) > 2
    assert logits_of(pruned(model, found[0].sizes)[0]).isfinite().all()


@pytest.mark.parametrize("given", [{"num_attention_heads": 4}, {"num_key_value_heads": 2}, {"hidden_size": 16}])
def test_a_search_keeps_heads_that_make_up_the_width(given: dict[str, int]) -> None:
    found = SizeSearch(model_of("qwen2_5_vl"), PruneSizes(**given), None).candidates(20000)
    assert {(each.sizes.hidden_size, each.sizes.num_key_value_heads) for each in found} == {(16, 2)}


def test_everything_at_once(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 1, "hidden_size": 16, "intermediate_size": 9, "num_attention_heads": 2}
    sizes |= {"vision_layers": 2, "vision_num_attention_heads": 2, "vision_intermediate_size": 11}
    student: Any = prune(model_of("llava"), **sizes)
    config = student.config
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (16, 8)
    assert student.model.multi_modal_projector.linear_1.weight.shape == (16, 8)
    assert logits_of(student).isfinite().all()


@pytest.mark.parametrize(
    "family, sizes, message",
    [
        ("llama", {"hidden_size": 25}, "hidden_size=25, but the teacher's is 24"),
        ("llama", {"hidden_size": 13}, "not a multiple of the number of attention heads"),
        ("llama", {"num_key_value_heads": 4}, "pass 1 to 3"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 2}, "multiple of 2 from 2 to 4"),
        ("llama", {"vision_hidden_size": 8}, "has no vision tower"),
        ("llama", {"num_experts": 2}, "num_experts of LlamaForCausalLM cannot be pruned"),
        ("mixtral", {"num_experts": 1}, "each token is read by 2 experts"),
        ("opt", {"hidden_size": 10}, "multiple of 4 up to 24"),
        ("opt", {"hidden_size": 12, "num_key_value_heads": 2}, "num_key_value_heads=2 and hidden_size=12 do not go"),
        ("opt", {"num_attention_heads": 3}, "heads go with the width: set hidden_size"),
        ("llava", {"vision_hidden_size": 9}, "multiple of 4 up to 16"),
        ("llava", {"vision_hidden_size": 8, "vision_num_attention_heads": 3}, "do not go together"),
        ("qwen3_vl", {"vision_layers": [0, 2]}, "whose outputs the language model reads"),
    ],
)
def test_what_cannot_be(family: str, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune(model_of(family), **sizes)
