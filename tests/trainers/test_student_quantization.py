"""Students that are trained as they will be quantised: int8, int4, fp8, nvfp4, mxfp4."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration

from mmkd.errors import UserError
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.models.quantisation_grids import FORMATS
from mmkd.models.quantised_students import (
    KEY,
    QuantisedLinear,
    StudentQuantisation,
    quantisation_off,
    quantise_forward,
    quantise_weights,
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


def test_an_adapter_is_trained_as_it_will_be_merged(build: Build, texts: Dataset, tiny: Any) -> None:
    adapter = LoraConfig(**LORA, lora_dropout=0.1)
    trainer = build(KDTrainer, texts, trainer=itself(peft_config=adapter), student_quantization="nvfp4")
    trainer.train()
    trainer.save_model()
    folder = Path(str(trainer.args.output_dir))
    merged: Any = AutoModelForCausalLM.from_pretrained(tiny["student"], dtype=torch.float32)
    merged = PeftModel.from_pretrained(merged, str(folder)).merge_and_unload()  # pyright: ignore
    quantise_weights(merged, StudentQuantisation.of("nvfp4"))
    torch.testing.assert_close(log_probs(merged), log_probs(trainer.model), rtol=1e-4, atol=1e-4)
    assert json.loads((folder / FILE).read_text())["format"] == "nvfp4"


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


def test_adapters_that_are_more_than_a_sum_are_refused(build: Build, texts: Dataset) -> None:
    adapter = LoraConfig(**LORA, use_dora=True)
    with pytest.raises(UserError, match="use_dora changes more"):
        build(KDTrainer, texts, trainer=itself(peft_config=adapter), student_quantization="int4")
