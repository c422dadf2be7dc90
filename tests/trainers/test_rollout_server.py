"""Rollouts by servers: they speak with the student's weights of this very step, or the run ends."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoProcessor, BitsAndBytesConfig, PreTrainedTokenizerFast

from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDTrainer
from scripts.make_tiny_models import make_model, save
from tests.helpers import LORA, Build, losses_of
from tests.teachers.conftest import serve
from tests.teachers.fake_vllm import fake_vllm
from tests.teachers.vlm import make_vlm
from tests.trainers.served_student import ServedStudent
from tests.vlms import vision_rows

SETTINGS: dict[str, Any] = {
    "on_policy_fraction": 0.5,
    "rollout_max_tokens": 8,
    "rollout_temperature": 0.0,
    "max_steps": 3,
}


def steps(trainer: Any) -> list[tuple[float, float]]:
    trainer.train()
    return list(zip(losses_of(trainer), losses_of(trainer, "grad_norm"), strict=True))


def test_a_server_gives_the_losses_of_generating_here(
    build: Build, completions: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    here = steps(build(KDTrainer, completions, **SETTINGS))
    with fake_vllm(ServedStudent, max_model_len=256, tokenizer=tokenizer) as fake:
        there = steps(build(KDTrainer, completions, rollout_server=[fake.url], **SETTINGS))
        assert fake.loads == 3
    assert there == [pytest.approx(pair, rel=1e-4) for pair in here]
    assert (tmp_path / "run" / "_rollout_weights" / "model.safetensors").is_file()


def test_weights_that_do_not_follow_end_the_run(
    build: Build, completions: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = {**SETTINGS, "max_steps": 20, "lr_scheduler_type": "constant"}
    with fake_vllm(ServedStudent, max_model_len=256, tokenizer=tokenizer, stuck_after=2) as fake:
        trainer = build(KDTrainer, completions, rollout_server=[fake.url], **settings)
        with pytest.raises(ValueError, match=r"out of date.*training has changed"):
            trainer.train()
    assert trainer.state.global_step <= 3


def test_a_server_gets_the_adapter_alone(
    build: Build, completions: Dataset, tiny: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Under a new name each time, and no more than one at a time."""

    def adapted(**more: Any) -> Any:
        torch.manual_seed(0)
        models = {"model": str(tiny["student"]), "peft_config": LoraConfig(**LORA)}
        return build(KDTrainer, completions, trainer=models, **SETTINGS, **more)

    here = steps(adapted())
    serving = {"max_model_len": 256, "tokenizer": tokenizer, "folder": str(tiny["student"])}
    with fake_vllm(ServedStudent, **serving) as fake:
        there = steps(adapted(rollout_server=[fake.url]))
        assert (fake.loads, len(fake.adapters)) == (3, 1)
        trainer = adapted(rollout_server=[fake.url])
        # A server that says it took the adapter, and speaks without it.
        fake.stuck_after, fake.stuck_folder = 4, str(tmp_path / "run" / "_rollout_weights")
        shutil.copytree(fake.stuck_folder, tmp_path / "stale")
        fake.stuck_folder = str(tmp_path / "stale")
        with pytest.raises(ValueError, match=r"out of date.*model that the adapter is trained on"):
            trainer.train()
    assert there == [pytest.approx(pair, rel=1e-4) for pair in here]
    files = {path.name for path in (tmp_path / "run" / "_rollout_weights").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


def test_what_is_learnt_beside_a_student_stays_here(
    build: Build, completions: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**SETTINGS, "chunks": "all", "tau": 5.0, "hidden_weight": 1.0, "max_steps": 2}
    # The projection starts with random weights.
    torch.manual_seed(0)
    here = steps(build(ALMTrainer, completions, **settings))
    folder = tmp_path / "run" / "_rollout_weights"
    folder.mkdir(parents=True, exist_ok=True)
    # Of an earlier run.
    (folder / "adapter_model.safetensors").touch()
    with fake_vllm(ServedStudent, max_model_len=256, tokenizer=tokenizer) as fake:
        torch.manual_seed(0)
        there = steps(build(ALMTrainer, completions, rollout_server=[fake.url], **settings))
    assert there == [pytest.approx(pair, rel=1e-4) for pair in here]
    # A server reads all of them.
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not any("projection" in name for name in load_file(folder / "model.safetensors"))


def test_a_base_that_is_quantised_here_alone_is_said(
    build: Build,
    completions: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # bitsandbytes' 4-bit kernel wants widths that its blocks of 64 divide.
    wide = save(make_model(width=128, rows=len(tokenizer)), tokenizer, tmp_path / "wide")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    adapter = LoraConfig(**{**LORA, "target_modules": ["q_proj", "v_proj"]})
    models = {"model": str(wide), "peft_config": adapter, "quantization_config": four_bits}
    with fake_vllm(ServedStudent, max_model_len=256, tokenizer=tokenizer, folder=str(wide)) as fake:
        build(KDTrainer, completions, trainer=models, rollout_server=[fake.url], **SETTINGS).train()
        assert (fake.loads, len(fake.adapters)) == (3, 1)
    (said,) = [record.message for record in caplog.records if "quantised in this process" in record.message]
    assert re.search(r"0\.\d*[1-9]\d* nats per token from the student", said)


def test_a_server_sees_the_images_of_a_prompt(build: Build, tmp_path: Path) -> None:
    student = make_vlm(tmp_path / "student")
    processor = AutoProcessor.from_pretrained(student)
    rows = vision_rows([1, 2, 0, 1] * 3)
    models = {"model": str(student), "teacher": str(student)}
    settings: dict[str, Any] = {**SETTINGS, "max_length": None, "assistant_only_loss": True, "max_steps": 2}
    here = steps(build(KDTrainer, rows, trainer=models, **settings))
    serving = {"max_model_len": 256, "tokenizer": processor.tokenizer, "processor": processor}
    with fake_vllm(ServedStudent, **serving) as fake:
        there = steps(build(KDTrainer, rows, trainer=models, rollout_server=[fake.url], **settings))
        assert fake.loads == 2
        asked = [body for body in fake.requests if "messages" in body and body["add_generation_prompt"]]
    assert there == [pytest.approx(pair, rel=1e-4) for pair in here]
    assert asked


def test_a_server_that_takes_no_weights_says_what_to_do(
    build: Build, completions: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    with fake_vllm(ServedStudent, max_model_len=256, tokenizer=tokenizer) as fake:
        trainer = build(KDTrainer, completions, rollout_server=[fake.url], **SETTINGS)
        original = fake.respond
        fake.respond = lambda path, body: (
            (404, {"detail": "Not Found"}) if path == "/collective_rpc" else original(path, body)
        )
        with pytest.raises(ValueError, match="VLLM_SERVER_DEV_MODE=1"):
            trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_real_vllm_follows_the_student(
    build: Build,
    completions: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    student = save(make_model(width=64, seed=2, rows=len(tokenizer), tied=tied), tokenizer, tmp_path / "student")
    models = {"model": str(student)}
    here = steps(build(KDTrainer, completions, trainer=models, **SETTINGS))
    with serve(student, tmp_path / "server.log") as served:
        trainer = build(KDTrainer, completions, trainer=models, rollout_server=[served.url], **SETTINGS)
        if tied:
            # vLLM 0.32 keeps the old head on a CPU.
            with pytest.raises(ValueError, match=r"out of date.*untie"):
                trainer.train()
        else:
            assert steps(trainer) == [pytest.approx(pair, rel=1e-3) for pair in here]


@pytest.mark.slow
def test_a_real_vllm_follows_an_adapter(
    build: Build,
    completions: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one step ahead: of a student that stays as it is, that changes nothing."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    student = save(make_model(width=64, seed=2, rows=len(tokenizer)), tokenizer, tmp_path / "student")

    def adapted(**settings: Any) -> list[tuple[float, float]]:
        torch.manual_seed(0)
        models = {"model": str(student), "peft_config": LoraConfig(**LORA)}
        return steps(build(KDTrainer, completions, trainer=models, **SETTINGS, **settings))

    here, still = adapted(), adapted(learning_rate=0.0)
    with serve(
        student, tmp_path / "server.log", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "1"
    ) as served:
        assert adapted(rollout_server=[served.url]) == [pytest.approx(pair, rel=1e-3) for pair in here]
        ahead = adapted(rollout_server=[served.url], rollout_ahead=1, learning_rate=0.0)
    assert ahead == [pytest.approx(pair, rel=1e-3) for pair in still]


@pytest.mark.slow
def test_a_real_vllm_sees_the_images_of_a_prompt(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a vision tower too are those of the step: what the server made of images before is forgotten."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    student = make_vlm(tmp_path / "student")
    models = {"model": str(student), "teacher": str(student)}
    settings: dict[str, Any] = {
        **SETTINGS,
        "max_length": None,
        "assistant_only_loss": True,
        "rollout_temperature": 0.0,
    }
    rows = vision_rows([1, 2, 0, 1] * 3)
    here = steps(build(KDTrainer, rows, trainer=models, **settings))
    with serve(student, tmp_path / "server.log") as served:
        there = steps(build(KDTrainer, rows, trainer=models, rollout_server=[served.url], **settings))
    assert there == [pytest.approx(pair, rel=2e-2) for pair in here]
