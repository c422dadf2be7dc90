"""Students that were trained quantised, and adapters on a base in 4 bits, are measured as they were trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mmkd.eval.harness import Harness, Settings
from mmkd.eval.model import find_model
from mmkd.methods.kd import KDTrainer
from mmkd.models.adapters import merge_adapter
from mmkd.models.quantised_students import (
    KEY,
    StudentQuantisation,
    quantise_weights,
    record_in_config,
    recorded_in_config,
)
from mmkd.results.trained_as import BASE, FILE, trained_as
from scripts.make_tiny_models import make_model, make_tokenizer, save
from tests.helpers import LORA, Build

IDS = torch.tensor([[5, 9, 2, 40, 7, 3]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student whose rows are as long as a block of bitsandbytes."""
    tokenizer = make_tokenizer()
    return str(save(make_model(width=64, rows=len(tokenizer)), tokenizer, tmp_path_factory.mktemp("wide")))


def trained(build: Build, texts: Dataset, trainer: dict[str, Any], **keys: Any) -> Any:
    torch.manual_seed(0)
    made = build(KDTrainer, texts, trainer=trainer, **keys)
    made.train()
    made.save_model()
    return made


@pytest.mark.parametrize("lora", [False, True])
def test_a_student_computes_as_it_was_trained(
    build: Build, texts: Dataset, tmp_path: Path, capsys: Any, lora: bool
) -> None:
    adapter = {"peft_config": LoraConfig(**LORA)} if lora else {}
    trainer = trained(build, texts, adapter, student_quantization="int4")
    model = find_model(trainer.args.output_dir)
    assert model.trained_as == "int4 weights (groups of 32)"
    assert torch.equal(logits(model.load("float32")), logits(trainer.model))
    assert "computes as it was trained: int4 weights (groups of 32)." in capsys.readouterr().err
    if not lora:
        return
    merge_adapter(Path(trainer.args.output_dir), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    quantisation = recorded_in_config(merged.config)
    assert quantisation is not None
    assert quantisation == trainer.args.quantisation
    quantise_weights(merged, quantisation)
    assert torch.equal(logits(merged), logits(trainer.model))


def test_results_of_the_rounded_model_are_not_those_of_its_weights(build: Build, texts: Dataset) -> None:
    folder = Path(trained(build, texts, {}, student_quantization="int4").args.output_dir)
    rounded = find_model(str(folder)).weights
    config = json.loads((folder / "config.json").read_text())
    del config[KEY]
    (folder / "config.json").write_text(json.dumps(config))
    assert find_model(str(folder)).weights != rounded


def test_a_student_with_quantised_weights_is_not_rounded_again() -> None:
    model = make_model(width=64, rows=64)
    record_in_config(model, StudentQuantisation.of("int4"))
    assert recorded_in_config(model.config) is not None
    # As a converter leaves it that keeps what a config says.
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    assert recorded_in_config(model.config) is None


def test_lm_eval_is_given_the_rounded_model(build: Build, texts: Dataset) -> None:
    trainer = trained(build, texts, {}, student_quantization="int4")
    harness = Harness(find_model(trainer.args.output_dir), Settings(device="cpu"))
    lm = harness._lm("hf", {"dtype": "float32"})
    assert torch.equal(logits(lm.model), logits(trainer.model))


def test_an_adapter_stands_on_its_base_in_4_bits(build: Build, texts: Dataset, wide: str) -> None:
    pytest.importorskip("bitsandbytes")
    loading = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    given = {"model": wide, "teacher": wide, "peft_config": LoraConfig(**LORA), "quantization_config": loading}
    trainer = trained(build, texts, given, ce_weight=0.5)
    folder = Path(trainer.args.output_dir)
    model = find_model(str(folder))
    assert model.trained_as == "a base in 4 bits (bitsandbytes)"
    assert trained_as(folder)[BASE]["bnb_4bit_quant_type"] == "nf4"
    expected = logits(trainer.model)
    # Computed in bf16 here, and the merged values in float32.
    assert (logits(model.load()) - expected).norm() < 0.02 * expected.norm()
    assert (logits(model.merged()) - expected).norm() < 0.005 * expected.norm()
    in_4_bits = model.weights
    (folder / FILE).unlink()
    unquantised = find_model(str(folder))
    assert unquantised.weights != in_4_bits
    assert (logits(unquantised.load("float32")) - expected).norm() > 0.02 * expected.norm()
    # Of a run before there was such a file, its recipe tells.
    (folder / "run.json").write_text(json.dumps({"keys": {"load_in_4bit": True, "use_peft": True}}))
    assert trained_as(folder) == {
        BASE: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    }
    assert find_model(str(folder)).weights != unquantised.weights


def test_a_student_trained_quantised_teaches_as_it_was_trained(build: Build, texts: Dataset, tmp_path: Path) -> None:
    first = trained(build, texts, {}, student_quantization="int4", output_dir=str(tmp_path / "first"))
    second = build(KDTrainer, texts, trainer={"teacher": first.args.output_dir})
    assert torch.equal(logits(second.teacher.model), logits(first.model))
