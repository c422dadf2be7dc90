"""Students that are trained as they will be quantised: int8, int4, fp8, nvfp4, mxfp4."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
)

from mmkd.errors import UserError
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.models.quantisation_grids import FORMATS
from mmkd.models.quantised_experts import by_expert
from mmkd.models.quantised_students import (
    KEY,
    QuantisedLinear,
    StudentQuantisation,
    joined_layers,
    load_as_trained,
    quantisation_off,
    quantise_forward,
    quantise_weights,
    quantised_experts,
    quantised_layers,
)
from mmkd.results.trained_as import FILE
from scripts.make_tiny_models import make_model
from tests.helpers import LORA, Build, losses_of, steps
from tests.vlms import make_llava, vision_rows

IDS = torch.tensor([[5, 9, 2, 40, 7, 3]])


def log_probs(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.log_softmax(-1)


def itself(**trainer: Any) -> dict[str, Any]:
    return {"teacher": "self", **trainer}


@pytest.mark.parametrize("format", FORMATS)
def test_at_first_only_rounding_tells_student_and_teacher_apart(
    build: Build, texts: Dataset, tiny: Any, format: str
) -> None:
    trainer = build(KDTrainer, texts, trainer=itself(), student_quantization=format)
    quantised = AutoModelForCausalLM.from_pretrained(tiny["student"], dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(tiny["student"], dtype=torch.float32)
    quantise_weights(quantised, StudentQuantisation.of(format))
    total, count = torch.zeros(()), 0
    for row in list(trainer.train_dataset)[:6]:
        ids = torch.tensor([row["input_ids"]])
        ours, theirs = log_probs(quantised, ids)[:, :-1], log_probs(original, ids)[:, :-1]
        total, count = total + (theirs.exp() * (theirs - ours)).sum(), count + ours.shape[1]
    measured = trainer.evaluate(trainer.train_dataset.select(range(6)))["eval_kl"]
    # Rounding errors of padded rows decide where an activation is near the middle of two values.
    rounds_activations = StudentQuantisation.of(format).activations
    assert measured == pytest.approx(float(total / count), rel=0.05 if rounds_activations else 1e-3)
    assert measured > 1e-7


@pytest.mark.parametrize("format, lora", [("int4", True), ("nvfp4", False)])
def test_training_brings_the_quantised_student_nearer_to_the_original(
    build: Build, texts: Dataset, tiny: Any, format: str, lora: bool
) -> None:
    adapter = {"peft_config": LoraConfig(**LORA)} if lora else {}
    trainer = build(
        KDTrainer, texts, trainer=itself(**adapter), student_quantization=format, learning_rate=2e-3, max_steps=12
    )
    before = trainer.evaluate(trainer.train_dataset)["eval_kl"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_kl"] < before


def test_what_is_saved_is_the_student_in_full_precision(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, trainer=itself(), student_quantization="int4", student_quantization_group=16)
    trainer.train()
    folder = Path(str(trainer.args.output_dir))
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name)), name
    assert not any(isinstance(module, QuantisedLinear) for module in saved.modules())
    recorded = AutoConfig.from_pretrained(folder)
    assert StudentQuantisation.read(getattr(recorded, KEY)) == StudentQuantisation.of("int4", 16)
    # What is deployed computes as what was trained.
    quantise_weights(saved, StudentQuantisation.of("int4", 16))
    assert torch.equal(log_probs(saved), log_probs(trainer.model))
    with quantisation_off(trainer.model):
        assert not torch.equal(log_probs(saved), log_probs(trainer.model))


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_trained_as_it_will_be_merged(build: Build, texts: Dataset, tiny: Any, dora: bool) -> None:
    adapter = LoraConfig(**LORA, lora_dropout=0.1, use_dora=dora)
    trainer = build(KDTrainer, texts, trainer=itself(peft_config=adapter), student_quantization="nvfp4")
    trainer.train()
    trainer.save_model()
    folder = Path(str(trainer.args.output_dir))
    merged: Any = AutoModelForCausalLM.from_pretrained(tiny["student"], dtype=torch.float32)
    merged = PeftModel.from_pretrained(merged, str(folder)).merge_and_unload()  # pyright: ignore
    quantise_weights(merged, StudentQuantisation.of("nvfp4"))
    torch.testing.assert_close(log_probs(merged), log_probs(trainer.model), rtol=1e-4, atol=1e-4)
    assert json.loads((folder / FILE).read_text())["format"] == "nvfp4"
    if dora:
        # The magnitudes are trained, too.
        norms = [p for name, p in trainer.model.named_parameters() if "lora_magnitude_vector" in name]
        plain = torch.linalg.norm(trainer.model.get_base_model().model.layers[0].self_attn.q_proj.weight, dim=1)
        assert not torch.equal(norms[0], plain)


@pytest.mark.parametrize("cls", [SFTBaselineTrainer, TAIDTrainer, ALMTrainer])
def test_other_methods_train_quantised_students(build: Build, texts: Dataset, tiny: Any, cls: Any) -> None:
    teacher = None if cls is SFTBaselineTrainer else str(tiny["teacher"])
    runs = []
    for format in (None, "int4"):
        torch.manual_seed(0)
        trainer = build(cls, texts, trainer={"teacher": teacher}, student_quantization=format, max_steps=3)
        runs.append(steps(trainer))
    assert runs[0] != runs[1]
    assert runs[1] == pytest.approx(runs[0], rel=0.3)


def test_checkpointing_and_accumulation_change_nothing(build: Build, texts: Dataset) -> None:
    def run(**keys: Any) -> list[float]:
        torch.manual_seed(0)
        return steps(build(KDTrainer, texts, student_quantization="int4", **keys))

    whole = run()
    assert run(gradient_checkpointing=True) == pytest.approx(whole, rel=1e-5)
    # After a step, sums in another order may round a weight to the neighbouring code.
    first = run(max_steps=1)
    assert run(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2) == pytest.approx(
        first, rel=1e-5
    )


def test_a_vision_tower_and_the_projector_stay_as_they_are(tmp_path: Path) -> None:
    model: Any = LlavaForConditionalGeneration.from_pretrained(make_llava(tmp_path))
    names = quantise_forward(model, StudentQuantisation.of("fp8"))
    assert names
    assert all("language_model" in name and "lm_head" not in name for name in names)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    every = quantise_forward(model, StudentQuantisation.of("fp8", skip=[]))
    assert any("vision_tower" in name for name in every)
    assert any("projector" in name for name in every)
    assert not any("lm_head" in name for name in every)


def test_a_vision_language_student_teaches_itself(build: Build, tmp_path: Path) -> None:
    student = str(make_llava(tmp_path / "student"))
    trainer = build(
        LLaVAKDTrainer, vision_rows([1] * 8), trainer=itself(model=student), student_quantization="int4", max_steps=2
    )
    trainer.train()
    assert losses_of(trainer)[0] > 0


def test_what_is_left_out_is_named_by_parts_words_and_patterns() -> None:
    def names(*skip: str) -> list[str]:
        return quantise_forward(make_model(), StudentQuantisation.of("int8", skip=list(skip)))

    every = names()
    assert len(names("down_proj")) < len(every)
    assert not any(".layers.0." in name for name in names("layers.0"))
    assert not any(name.endswith("_proj") and ".mlp." in name for name in names("*.mlp.*"))
    with pytest.raises(UserError, match="finds no layer to quantise"):
        names("layers")


def test_a_run_is_resumed_as_what_it_was_trained(build: Build, texts: Dataset) -> None:
    keys = {"save_strategy": "steps", "save_steps": 2}

    def trainer_of(format: str | None) -> Any:
        torch.manual_seed(0)
        return build(KDTrainer, texts, student_quantization=format, **keys)

    whole = trainer_of("int4")
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    resumed = trainer_of("int4")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses_of(resumed) == losses_of(whole)
    with pytest.raises(UserError, match=r"trained as int4 weights \(groups of 32\), and this run trains in full"):
        trainer_of(None).train(resume_from_checkpoint=checkpoint)


def test_a_later_training_in_full_precision_records_nothing(build: Build, texts: Dataset) -> None:
    first = build(KDTrainer, texts, student_quantization="int4", max_steps=1)
    first.save_model()
    second = build(KDTrainer, texts, trainer={"model": first.args.output_dir}, max_steps=1, output_dir="unused")
    assert not hasattr(second.model.config, KEY)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"student_quantization": "int3"}, "int3"),
        ({"student_quantization": "fp8", "student_quantization_group": 32}, "fp8 has one scale for each row"),
        ({"student_quantization": "int4", "student_quantization_activations": True}, "format of weights alone"),
        ({"student_quantization_group": 32}, "student_quantization names no format"),
        ({"student_quantization": "int4", "student_quantization_group": 48}, "cannot be cut into groups of 48"),
    ],
)
def test_keys_that_cannot_be_are_refused(build: Build, texts: Dataset, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(KDTrainer, texts, **keys)


def test_adapters_that_are_more_than_a_weight_are_refused(build: Build, texts: Dataset) -> None:
    adapter = LoraConfig(**LORA, lora_bias=True)
    with pytest.raises(UserError, match="lora_bias changes more"):
        build(KDTrainer, texts, trainer=itself(peft_config=adapter), student_quantization="int4")


def moe(**sizes: Any) -> Any:
    """A tiny Qwen3 of experts, whose vocabulary is that of the tiny models."""
    config = Qwen3MoeConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 32,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "initializer_range": 0.2,
            **sizes,
        }
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def gpt_oss() -> Any:
    """Whose experts have biases, gates and ups side by side, and rows where others have columns."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("make", [moe, gpt_oss])
@pytest.mark.parametrize("format", FORMATS)
def test_experts_in_one_tensor_compute_with_values_of_the_grid(make: Any, format: str) -> None:
    quantisation = StudentQuantisation.of(format, activations=False if format in ("int8", "fp8", "nvfp4") else None)
    model, expected = make(), make()
    names = quantise_forward(model, quantisation)
    assert [name for name in names if name.endswith("experts")] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    quantised = dict(quantised_layers(expected, quantisation))
    with torch.no_grad():
        for name, layer in quantised.items():
            scale = quantisation.grid.tensor_scale(*(each.weight for each in joined_layers(name, quantised)))
            layer.new_weight = quantisation.grid.fake_quantised(layer.weight, scale)
        for layer in quantised.values():
            layer.weight.data = layer.new_weight
        for layer in expected.model.layers:
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                for expert in weight:
                    # Each expert is a matrix of its own.
                    rows = expert.T if make is gpt_oss else expert
                    values = quantisation.grid.fake_quantised(rows.contiguous())
                    expert.copy_(values.T if make is gpt_oss else values)
    torch.testing.assert_close(log_probs(model), log_probs(expected))
    with quantisation_off(model):
        torch.testing.assert_close(log_probs(model), log_probs(make()))
    whole = make()
    quantise_weights(whole, quantisation)
    torch.testing.assert_close(log_probs(whole), log_probs(expected))


@pytest.mark.parametrize("make", [moe, gpt_oss])
def test_experts_one_after_another_compute_what_those_of_transformers_do(make: Any) -> None:
    model = make()
    layer = model.model.layers[0]
    hidden, index = torch.randn(6, 32), torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1], [0, 3], [1, 0]])
    weights = torch.rand(6, 2)
    expected = layer.mlp.experts(hidden, index, weights)
    alone = by_expert(layer.mlp.experts, {}, lambda _, reads: reads, hidden, index, weights)
    torch.testing.assert_close(alone, expected)
    quantise_forward(model, StudentQuantisation.of("int8"))
    rounded = layer.mlp.experts(hidden, index, weights)
    assert not torch.equal(rounded, expected)
    torch.testing.assert_close(rounded, expected, rtol=0.1, atol=0.1)


def test_weights_of_experts_are_left_out_by_name_and_layout() -> None:
    quantisation = StudentQuantisation.of("int4", skip=["router", "gate_up_proj"])
    ((_, names), *_) = quantised_experts(moe(), quantisation).values()
    assert names == ("down_proj",)
    assert quantised_experts(moe(), StudentQuantisation.of("int4", skip=["experts", "router"])) == {}
    with pytest.raises(UserError, match=r"gate_up_proj has 24 weights in a row, .* groups of 32"):
        quantised_experts(moe(hidden_size=24), StudentQuantisation.of("int4"))
    strange: Any = make_model()
    strange.model.layers[0].mlp.experts = torch.nn.Module()
    strange.model.layers[0].mlp.experts.register_parameter("both", torch.nn.Parameter(torch.zeros(2, 32, 32)))
    with pytest.raises(UserError, match=r"one tensor .*both.*, in a layout that"):
        quantise_forward(strange, StudentQuantisation.of("int4"))
    strange.model.layers[0].input_linear = strange.model.layers[0].mlp.experts
    del strange.model.layers[0].mlp.experts
    strange.model.layers[0].input_linear.__class__ = type("ParallelExperts", (torch.nn.Module,), {})
    with pytest.raises(UserError, match=r"input_linear\.both.*skip: \[input_linear, router\]"):
        quantise_forward(strange, StudentQuantisation.of("int4"))


@pytest.mark.parametrize("format, adapted", [("int4", ""), ("int8", ""), ("int4", "linear"), ("int4", "experts")])
def test_a_student_of_experts_is_trained_as_it_is_evaluated(
    build: Build, texts: Dataset, tiny: Any, tmp_path: Path, format: str, adapted: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny["student"])
    student = moe(vocab_size=len(tokenizer))
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
    if adapted == "experts":
        lora["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = {"peft_config": LoraConfig(**lora)} if adapted else {}
    trainer = build(
        KDTrainer, texts, trainer=itself(model=str(tmp_path / "student"), **adapter), student_quantization=format,
        learning_rate=5e-3 if adapted else 2e-4, max_steps=12,
    )  # fmt: skip
    before = trainer.evaluate(trainer.train_dataset)["eval_kl"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_kl"] < before or format == "int8"
    trainer.save_model()
    folder = str(trainer.args.output_dir)
    if adapted:
        merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
        merged = PeftModel.from_pretrained(merged, folder).merge_and_unload()  # pyright: ignore
        changed = merged.model.layers[0].mlp.experts.down_proj
        assert torch.equal(changed, student.model.layers[0].mlp.experts.down_proj) == (adapted == "linear")
        quantise_weights(merged, StudentQuantisation.of(format))
        torch.testing.assert_close(log_probs(merged), log_probs(trainer.model), rtol=1e-3, atol=1e-3)
        return
    evaluated = load_as_trained(folder, dtype="float32")
    torch.testing.assert_close(log_probs(evaluated), log_probs(trainer.model), rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    saved, own = plain.model.layers[0].mlp.experts, trainer.model.model.layers[0].mlp.experts
    assert torch.equal(saved.down_proj, own.down_proj)
    assert not torch.equal(own.down_proj, student.model.layers[0].mlp.experts.down_proj)
