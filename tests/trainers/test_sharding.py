"""Students and teachers cut over two ranks by FSDP2; that losses are those of one rank is a test of each method."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mmkd.eval.model import find_model
from mmkd.methods.kd import KDTrainer
from mmkd.models.consolidate import consolidate
from mmkd.models.sharded_weights import cut_by_layers, settle_fsdp
from mmkd.teachers.local import LocalTeacher
from scripts.make_tiny_models import make_model
from tests.classes import dho
from tests.forked import on_two_ranks
from tests.helpers import LORA, Build, losses_of


@pytest.mark.parametrize("method", ["kd", "taid", "alm", "llava_kd"])
def test_a_rank_holds_half_of_student_and_teacher(ranks: Any, method: str) -> None:
    for rank in ranks[f"{method} fsdp2"]:
        assert rank["share"] == pytest.approx(0.5, abs=0.01)
        assert rank["teacher_share"] == pytest.approx(0.5, abs=0.01)
    assert ranks[f"{method} ddp"][0]["teacher_share"] == 1


def test_each_head_is_gathered_once_per_micro_batch(ranks: Any) -> None:
    """Not once per chunk: of four steps with two micro-batches each, every one has several chunks."""
    for rank in ranks["kd fsdp2 in chunks"]:
        assert rank["gathers"] == [8, 8, 0]
    for rank in ranks["alm fsdp2"]:
        assert rank["gathers"] == [4, 4, 0]


def test_chunks_and_accumulation_change_nothing(build: Build, completions: Any, ranks: Any, untied: Any) -> None:
    models = {"model": str(untied["student"]), "teacher": str(untied["teacher"])}
    alone = build(KDTrainer, completions, trainer=models)
    alone.train()
    expected = list(zip(losses_of(alone), losses_of(alone, "grad_norm"), strict=True))
    for rank in ranks["kd fsdp2 in chunks"]:
        assert rank["steps"] == [pytest.approx(step, rel=1e-4) for step in expected]
    for rank in ranks["kd fsdp2 in bf16"]:
        assert rank["steps"] == [pytest.approx(step, rel=0.03) for step in expected]
        # accelerate would hand losses out in bf16.
        losses = torch.tensor([step[0] for step in rank["steps"]])
        assert not torch.equal(losses, losses.bfloat16().float())


def test_a_student_is_evaluated_before_it_is_trained(build: Build, completions: Any, ranks: Any) -> None:
    """`test_balance.py` looks at the training after it."""
    alone = build(KDTrainer, completions, ce_weight=0.3, max_length=128, per_device_eval_batch_size=4)
    expected = alone.evaluate(completions.select(range(5)))["eval_loss"]
    for rank in ranks["kd fsdp2 balanced"]:
        assert rank["before"] == pytest.approx(expected, rel=1e-5)
        assert rank["share"] == pytest.approx(0.5, abs=0.01)


def test_resume_from_shards(ranks: Any) -> None:
    for whole, resumed in zip(ranks["taid fsdp2 saved"], ranks["taid fsdp2 resumed"], strict=True):
        assert resumed["steps"] == whole["steps"]
        assert resumed["t"] == whole["t"]
        assert resumed["evaluated"] == whole["evaluated"]


def test_shards_become_one_student(ranks: Any, tmp_path: Any) -> None:
    folder = ranks["taid fsdp2 saved"][0]["folder"]
    consolidate(folder / "checkpoint-4", tmp_path / "student")
    found, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "student", folder))
    for (name, ours), (_, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert {path.name for path in tmp_path.glob("student/*.safetensors")} == {"model.safetensors"}
    assert (tmp_path / "student" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="not empty"):
        consolidate(folder / "checkpoint-4", tmp_path / "student")
    with pytest.raises(ValueError, match="whole student already"):
        consolidate(folder, tmp_path / "again")
    with pytest.raises(ValueError, match="no shards"):
        consolidate(tmp_path, tmp_path / "again")


def test_adapters_are_cut_saved_and_resumed(
    build: Build, completions: Any, ranks: Any, tiny: Any, tmp_path: Any
) -> None:
    """Below FSDP's own activation checkpointing PEFT would find no adapter, and write empty files."""
    torch.manual_seed(0)
    alone = build(KDTrainer, completions, trainer={"peft_config": LoraConfig(**LORA)}, max_steps=4)
    alone.train()
    expected = list(zip(losses_of(alone), losses_of(alone, "grad_norm"), strict=True))
    for rank, resumed in zip(ranks["kd fsdp2 lora saved"], ranks["kd fsdp2 lora resumed"], strict=True):
        assert rank["steps"] == [pytest.approx(step, rel=1e-4) for step in expected]
        assert resumed["steps"] == rank["steps"]
        assert resumed["evaluated"] == rank["evaluated"]
    folder = ranks["kd fsdp2 lora saved"][0]["folder"]
    consolidate(folder / "checkpoint-4", tmp_path / "student")
    trained = get_peft_model_state_dict(alone.model)
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    assert base is not None
    assert Path(base).name == tiny["student"].name
    for path in (tmp_path / "student", folder):
        model = find_model(str(path))
        assert (model.path, model.adapter) == (base, str(path))
        student: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
        found = get_peft_model_state_dict(student)
        assert found.keys() == trained.keys()
        for name, weights in trained.items():
            torch.testing.assert_close(found[name], weights, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_shards_of_zero_become_one_student(tiny: Any, tmp_path: Any, how: str, adapted: bool) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not among mmkd's dependencies")
    saved = {"settings": {"save_strategy": "steps", "save_steps": 4}, "save": True}
    job = {"method": "kd", "how": how, **{name: str(path) for name, path in tiny.items()}, **saved}
    on_two_ranks({"job": {**job, **({"lora": LORA} if adapted else {})}}, tmp_path, DS_ACCELERATOR="cpu")
    folder = tmp_path / "runs" / "job"
    consolidate(folder / "checkpoint-4", tmp_path / "student")
    (found,) = map(load_file, (tmp_path / "student").glob("*.safetensors"))
    assert (tmp_path / "student" / "tokenizer.json").is_file()
    if adapted:
        expected = load_file(folder / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], weights) for name, weights in expected.items())
    else:
        ours, expected = (
            AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "student", folder)
        )
        assert all(torch.equal(ours[name], weights) for name, weights in expected.items())


def test_students_of_classes_are_not_cut(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def under_fsdp(trainer: Any) -> None:
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr("mmkd.training.sharding.ShardedTrainer.create_accelerator_and_postprocess", under_fsdp)
    with pytest.raises(ValueError, match="ddp or zero2"):
        dho(tmp_path)


def accelerator(kind: DistributedType, **state: Any) -> Any:
    """What a machine with GPUs would have."""
    state = {"deepspeed_plugin": SimpleNamespace(zero_stage=3), "fsdp_plugin": None, **state}
    return SimpleNamespace(
        distributed_type=kind,
        device=torch.device("cpu"),
        is_local_main_process=True,
        is_fsdp2=False,
        mixed_precision="no",
        state=SimpleNamespace(**state),
    )


def test_what_cannot_be_cut_is_refused(tiny: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny["teacher"])
    with pytest.raises(ValueError, match="FSDP 1"):
        settle_fsdp(accelerator(DistributedType.FSDP), False)
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="ZeRO-3 cannot cut"):
        LocalTeacher(model).prepare(accelerator(DistributedType.DEEPSPEED))
    model.model.norm.to(torch.bfloat16)
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    with pytest.raises(ValueError, match=r"bfloat16 and torch\.float32"):
        cut_by_layers(accelerator(DistributedType.FSDP, fsdp_plugin=plugin), model.requires_grad_())


@pytest.mark.parametrize(("tied", "saved"), [(True, "lm_head"), (True, "embed_tokens"), (False, "lm_head")])
def test_a_copy_of_tied_embeddings_is_refused(tied: bool, saved: str) -> None:
    """FSDP2 is prepared by tying weights once more."""
    model = get_peft_model(make_model(tied=tied), LoraConfig(**LORA, modules_to_save=[saved]))
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no")
    with pytest.raises(ValueError, match="tie them again") if tied else nullcontext():
        cut_by_layers(accelerator, model)
