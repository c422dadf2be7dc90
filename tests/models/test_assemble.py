"""prune: what it keeps is the teacher's, what it drops is as if the teacher had never had it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DiffLlamaConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mmkd.models import assemble

# Tests reach into models by attribute, and nn.Module types none of those.
Model = Any
Build = Callable[[], Model]
prune: Callable[..., Model] = assemble.prune

VOCAB, IMAGE_TOKEN = 61, 60
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    # As many as there are layers, and still not one per layer.
    "eos_token_id": [2, 3, 4, 5, 6],
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def shape(**changes: Any) -> dict[str, Any]:
    return SHAPE | changes


def text_model(config: PreTrainedConfig) -> Model:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        # Fresh models have zero biases and unit norms, which would hide a wrong cut.
        nn.init.normal_(parameter, std=0.3)
    return model


def llama() -> Model:
    return text_model(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True))


def qwen2() -> Model:
    return text_model(Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=3, layer_types=LAYER_TYPES))


def qwen3() -> Model:
    return text_model(Qwen3Config(**SHAPE, head_dim=8))


def gemma3() -> Model:
    return text_model(Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=3, layer_types=LAYER_TYPES))


def gpt2(**settings: Any) -> Model:
    return text_model(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=24, n_layer=5, n_head=3, **settings))


def llava() -> Model:
    torch.manual_seed(0)
    # The vision tower is as deep as the language model, so that only its place tells them apart.
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=5, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SHAPE), image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).double().eval()


TEXT = [llama, qwen2, qwen3, gemma3]
ALL = [*TEXT, gpt2, llava]


@torch.no_grad()
def logits_of(model: Model) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, IMAGE_TOKEN, (2, 9), generator=generator)
    if model.config.model_type != "llava":
        return model(input_ids=ids).logits
    ids[:, 1:5] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return model(input_ids=ids, pixel_values=pixels).logits


def decoder_layers(model: Model) -> Model:
    decoder = model.get_decoder()
    return decoder.h if model.config.model_type == "gpt2" else decoder.layers


def importance_of_neurons(layer: Model) -> Tensor:
    mlp = layer.mlp
    gate, up, down = (linear.weight.float() for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return torch.stack([gate[i].norm() * up[i].norm() * down[:, i].norm() for i in range(len(gate))])


def importance_of_groups(layer: Model, groups: int) -> Tensor:
    values = layer.self_attn.v_proj.weight.float().chunk(groups, dim=0)
    outputs = layer.self_attn.o_proj.weight.float().chunk(groups, dim=1)
    return torch.stack([output.norm() * value.norm() for output, value in zip(outputs, values, strict=True)])


@pytest.mark.parametrize("build", ALL)
def test_a_student_that_keeps_everything_is_the_teacher(build: Build) -> None:
    teacher = build()
    whole: dict[str, Any] = {"layers": range(5)}
    if build in TEXT:
        whole |= {"intermediate_size": 20, "num_attention_heads": 6}
    for student in (prune(teacher, layers=5), prune(teacher, **whole)):
        assert type(student) is type(teacher)
        assert torch.equal(logits_of(student), logits_of(teacher))


@pytest.mark.parametrize("build", ALL)
@pytest.mark.parametrize("layers", [[0, 2, 4], [1, 3], [4]])
def test_a_shallow_student_is_a_teacher_that_skips_layers(build: Build, layers: list[int]) -> None:
    teacher = build()
    student = prune(teacher, layers=layers)

    decoder = teacher.get_decoder()
    skipping = nn.ModuleList(decoder_layers(teacher)[index] for index in layers)
    setattr(decoder, "h" if build is gpt2 else "layers", skipping)
    config = teacher.config.get_text_config()
    config.num_hidden_layers = len(layers)
    if hasattr(config, "layer_types"):
        config.layer_types = [config.layer_types[index] for index in layers]
    for position, layer in enumerate(decoder_layers(teacher)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position

    torch.testing.assert_close(logits_of(student), logits_of(teacher), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "count, expected", [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])]
)
def test_a_count_of_layers_is_spread_evenly(count: int, expected: list[int]) -> None:
    teacher = llama()
    kept = decoder_layers(prune(teacher, layers=count))
    weights = [layer.mlp.gate_proj.weight for layer in decoder_layers(teacher)]
    assert [
        index for layer in kept for index in range(5) if torch.equal(layer.mlp.gate_proj.weight, weights[index])
    ] == expected


def test_layers_are_renumbered_and_the_config_follows() -> None:
    teacher = qwen2()
    student = prune(teacher, layers=[1, 2, 4])
    assert [layer.self_attn.layer_idx for layer in decoder_layers(student)] == [0, 1, 2]
    assert student.config.num_hidden_layers == 3
    assert student.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert student.config.eos_token_id == teacher.config.eos_token_id
    # A wrong layer_idx would write two layers into one place of the cache.
    ids = torch.tensor([[7, 8, 9]])
    generated = [
        student.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cached, eos_token_id=None)
        for cached in (True, False)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("build", TEXT)
def test_a_narrow_ffn_is_a_teacher_without_its_least_important_neurons(build: Build) -> None:
    teacher = build()
    student = prune(teacher, intermediate_size=13)
    assert student.config.intermediate_size == 13
    for before, after in zip(decoder_layers(teacher), decoder_layers(student), strict=True):
        kept = importance_of_neurons(before).topk(13).indices.sort().values
        assert torch.equal(after.mlp.gate_proj.weight, before.mlp.gate_proj.weight[kept])
        assert torch.equal(after.mlp.up_proj.weight, before.mlp.up_proj.weight[kept])
        assert torch.equal(after.mlp.down_proj.weight, before.mlp.down_proj.weight[:, kept])
        dropped = torch.ones(20, dtype=torch.bool).index_fill(0, kept, False)
        with torch.no_grad():
            before.mlp.down_proj.weight[:, dropped] = 0.0
    torch.testing.assert_close(logits_of(student), logits_of(teacher), rtol=0, atol=1e-10)


@pytest.mark.parametrize("build", TEXT)
@pytest.mark.parametrize("heads", [2, 4])
def test_fewer_heads_are_a_teacher_without_its_least_important_groups(build: Build, heads: int) -> None:
    teacher = build()
    student = prune(teacher, num_attention_heads=heads)
    head_dim = decoder_layers(teacher)[0].self_attn.head_dim
    config = student.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, heads // 2, head_dim)
    assert config.hidden_size == teacher.config.hidden_size
    for before, after in zip(decoder_layers(teacher), decoder_layers(student), strict=True):
        kept = importance_of_groups(before, groups=3).topk(heads // 2).indices.sort().values.tolist()
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(before.self_attn, name).weight.chunk(3, dim=0)
            assert torch.equal(getattr(after.self_attn, name).weight, torch.cat([rows[group] for group in kept]))
        output = before.self_attn.o_proj.weight
        assert torch.equal(after.self_attn.o_proj.weight, torch.cat([output.chunk(3, 1)[g] for g in kept], 1))
        with torch.no_grad():
            for group in set(range(3)) - set(kept):
                output.chunk(3, dim=1)[group].zero_()
    torch.testing.assert_close(logits_of(student), logits_of(teacher), rtol=0, atol=1e-10)


def test_every_cut_at_once() -> None:
    teacher = qwen3()
    student = prune(teacher, layers=[0, 3], intermediate_size=8, num_attention_heads=4)
    stepwise = prune(teacher, layers=[0, 3])
    stepwise = prune(stepwise, num_attention_heads=4)
    stepwise = prune(stepwise, intermediate_size=8)
    assert torch.equal(logits_of(student), logits_of(stepwise))
    assert student.num_parameters() < teacher.num_parameters()


def test_a_vision_tower_is_left_alone() -> None:
    teacher = llava()
    student = prune(teacher, layers=2, intermediate_size=8, num_attention_heads=4)
    assert student.config.text_config.num_hidden_layers == 2
    assert student.config.vision_config.num_hidden_layers == 5
    tower = student.model.vision_tower.state_dict()
    for name, tensor in teacher.model.vision_tower.state_dict().items():
        assert torch.equal(tower[name], tensor)
    assert logits_of(student).isfinite().all()


@pytest.mark.parametrize("build", ALL)
def test_a_saved_student_comes_back_the_same(build: Build, tmp_path: Path) -> None:
    wanted = {"layers": 3}
    if build in TEXT:
        wanted |= {"intermediate_size": 9, "num_attention_heads": 4}
    student = prune(build(), **wanted)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert again.dtype == torch.float64
    torch.testing.assert_close(logits_of(again), logits_of(student), rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", ALL)
def test_the_teacher_and_the_student_share_nothing(build: Build) -> None:
    teacher = build()
    config, before = copy.deepcopy(teacher.config.to_dict()), copy.deepcopy(teacher.state_dict())
    student = prune(teacher, layers=3)
    with torch.no_grad():
        for parameter in student.parameters():
            assert parameter.requires_grad
            parameter.fill_(7.0)
    assert teacher.config.to_dict() == config
    assert teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_tied_embeddings_stay_tied_and_untied_ones_untied() -> None:
    tied, untied = prune(llama(), layers=2), prune(qwen3(), layers=2)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert not torch.equal(untied.get_output_embeddings().weight, untied.get_input_embeddings().weight)


def test_dtype_mode_and_generation_config_are_the_teachers() -> None:
    teacher = text_model(LlamaConfig(**SHAPE)).to(torch.float32)
    rotary = teacher.model.rotary_emb.inv_freq.clone()
    teacher.generation_config.max_length = 37
    for dtype in (torch.float32, torch.bfloat16):
        teacher.to(dtype).train(dtype == torch.bfloat16)
        student = prune(teacher, layers=2, intermediate_size=8)
        assert {parameter.dtype for parameter in student.parameters()} == {dtype}
        # Half precision would shift the rotary frequencies, which no checkpoint holds.
        assert torch.equal(student.model.rotary_emb.inv_freq, rotary)
        assert student.training == teacher.training
        assert student.generation_config.to_dict() == teacher.generation_config.to_dict()
        assert student.generation_config is not teacher.generation_config


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({}, "got no size"),
        ({"layers": 0}, "count from 1 to 5"),
        ({"layers": 6}, "count from 1 to 5"),
        ({"layers": []}, "does not name layers"),
        ({"layers": [0, 0, 1]}, "none of them twice"),
        ({"layers": [3, 1]}, "ascending"),
        ({"layers": [0, 5]}, "index from 0 to 4"),
        ({"layers": [-1, 2]}, "index from 0 to 4"),
        ({"intermediate_size": 0}, "pass 1 to 20"),
        ({"intermediate_size": 21}, "pass 1 to 20"),
        ({"num_attention_heads": 0}, "multiple of 2 up to 6"),
        ({"num_attention_heads": 3}, "multiple of 2 up to 6"),
        ({"num_attention_heads": 8}, "multiple of 2 up to 6"),
    ],
)
def test_what_cannot_be_is_refused(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(llama(), **wanted)


def test_a_family_has_the_last_word_on_its_config() -> None:
    teacher = text_model(LlamaConfig(**shape(num_attention_heads=8, num_key_value_heads=8)))
    with pytest.raises(ValueError, match="not a multiple of the number of attention heads"):
        prune(teacher, num_attention_heads=7)


def test_a_quantised_teacher_is_refused() -> None:
    packed, flagged, named = llama(), llama(), llama()
    packed.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    flagged.is_quantized = True
    named.quantization_method = "bitsandbytes"
    for teacher in (packed, flagged, named):
        with pytest.raises(ValueError, match="unquantised"):
            prune(teacher, layers=2)


def test_heads_that_make_up_the_width_are_cut_with_it_only() -> None:
    with pytest.raises(ValueError, match="heads go with the width: set hidden_size"):
        prune(gpt2(), num_attention_heads=1)


def test_a_norm_across_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k_norm.weight .* does not fit the pruned Olmo2ForCausalLM"):
        prune(text_model(Olmo2Config(**SHAPE)), num_attention_heads=2)


def test_layers_that_depend_on_their_number_are_refused() -> None:
    by_depth = text_model(DiffLlamaConfig(**shape(num_attention_heads=4, num_key_value_heads=2)))
    for teacher in (gpt2(scale_attn_by_inverse_layer_idx=True), by_depth):
        with pytest.raises(ValueError, match="Layer 4 of the teacher would compute something else as layer 1"):
            prune(teacher, layers=2)
        # Where every layer keeps its number, nothing changes for it.
        assert prune(teacher, layers=[0, 1]).config.num_hidden_layers == 2


def test_layers_of_different_sizes_are_refused() -> None:
    sizes = shape(num_hidden_layers=10, num_kv_shared_layers=5, intermediate_size=[20] * 10)
    teacher = text_model(Gemma3nTextConfig(**sizes, head_dim=4, vocab_size_per_layer_input=VOCAB))
    with pytest.raises(ValueError, match="sizes its layers one by one"):
        prune(teacher, intermediate_size=8)


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    teacher = llama()
    teacher.model.spare = nn.ModuleList(nn.Identity() for _ in range(5))
    with pytest.raises(ValueError, match="has 2 lists of 5 decoder layers"):
        prune(teacher, layers=2)
