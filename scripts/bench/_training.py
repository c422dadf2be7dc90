"""What the benchmarks of whole training steps share: models, one batch, trainers, a teacher whose answer is ready."""

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _measure import Run, Step, alone, arguments, faster, interleaved
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from mmkd.teachers.base import Teacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.signals import TopKSignal
from mmkd.trainers.base import ItemLosses, Supervised
from mmkd.trainers.kd import KDConfig, KDTrainer
from mmkd.trainers.sft import SFTBaselineConfig, SFTBaselineTrainer

REAL_STUDENT = Path(".cache/mmkd/SmolLM2-135M-Instruct")


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int = 49152


SMOLLM2_135M = Shape(576, 30, 9, 3, 1536)
SMOLLM2_360M = Shape(960, 32, 15, 5, 2560)
QUICK_STUDENT = Shape(64, 2, 2, 1, 128, 4096)
QUICK_TEACHER = Shape(96, 2, 3, 1, 192, 4096)


@dataclass(frozen=True)
class Training:
    """One variant of a training step: which trainer, with which loss, on which models and batch."""

    trainer: str
    loss: str = ""
    batch: int = 2
    length: int = 512
    supervised: float = 1.0
    k: int = 64
    logged: bool = False
    quick: bool = False
    device: str = "cpu"

    @property
    def vocab(self) -> int:
        return (QUICK_STUDENT if self.quick else SMOLLM2_135M).vocab

    @property
    def name(self) -> str:
        return f"{self.trainer} {self.loss}".strip() + ", a logged step" * self.logged


def step_arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags of a benchmark of training steps."""
    parser = arguments(description)
    parser.add_argument("--batch", type=int, default=2, help="rows of the batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of each row; none is padding")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens that is supervised")
    return parser


def base_case(args: argparse.Namespace) -> Training:
    """The batch and the device that the flags ask for."""
    batch, length = (2, 64) if args.quick else (args.batch, args.length)
    return Training("", "", batch, length, args.supervised, quick=args.quick, device=args.device)


class CachedTeacher(Teacher[TopKSignal]):
    """A cache whose every answer is in memory: what is left of distillation when the teacher costs nothing."""

    signal_type = TopKSignal

    def __init__(self, vocab: int, tokens: int, k: int):
        log_probs = torch.randn(tokens, k).sort(descending=True).values.log_softmax(-1) + torch.tensor(0.9).log()
        tail = torch.full_like(log_probs[:, 0], 0.1).log()
        self.signal = TopKSignal(torch.randint(vocab, (tokens, k)), log_probs, tail)

    def prepare(self, accelerator: Any) -> None:
        """Puts the signal on the student's device."""
        signal = self.signal
        parts = (part.to(accelerator.device) for part in (signal.ids, signal.log_probs, signal.tail_log_prob))
        self.signal = TopKSignal(*parts)

    def ask(self, inputs: dict[str, Any], supervised: torch.Tensor) -> TopKSignal:
        """As many rows of the signal as there are supervised tokens; which ones makes no difference to the cost."""
        return next(self.signal.chunks(int(supervised.sum())))


class ModelsOnlyTrainer(KDTrainer):
    """Both models without their heads, forward and backward: what no loss can save."""

    def item_losses(self, student: Supervised, signal: Any) -> ItemLosses:
        """The sum of the hidden states, whose gradient costs nothing."""
        return ItemLosses({"token": student.hidden.sum()})


def llama(shape: Shape, seed: int) -> LlamaForCausalLM:
    """A bf16 Llama with random weights and a tied head."""
    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocab,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    # In bf16 from the start: a fp32 copy of the teacher would be the highest peak of the process.
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    return model


def student_of(case: Training) -> Any:
    """SmolLM2-135M, the real one where scripts/get_teacher.py has made it."""
    if REAL_STUDENT.is_dir() and not case.quick:
        return AutoModelForCausalLM.from_pretrained(REAL_STUDENT, dtype=torch.bfloat16)
    return llama(QUICK_STUDENT if case.quick else SMOLLM2_135M, 0)


def title_of(case: Training) -> str:
    """Which student `student_of` returns, and the batch; for the report."""
    real = "SmolLM2-135M-Instruct" if REAL_STUDENT.is_dir() else "random weights in the shape of SmolLM2-135M"
    student = "a tiny random student" if case.quick else real
    batch = f"{case.batch} x {case.length} tokens, {100 * case.supervised:g} % supervised"
    return f"One step of {student}, bf16, {batch}"


def _tokenizer() -> PreTrainedTokenizerFast:
    """The trainers insist on one; the rows hold ids already."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_batch(case: Training) -> dict[str, torch.Tensor]:
    """Random tokens without padding; the last `supervised` share of each row is supervised."""
    ids = torch.randint(3, case.vocab, (case.batch, case.length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : round((1 - case.supervised) * case.length)] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: values.to(case.device) for name, values in batch.items()}


def make_trainer(case: Training, folder: str) -> Trainer:
    """The real trainer of a variant. Weights are bf16 already, so none of them uses autocast or checkpointing."""
    disable_progress_bars()
    student = student_of(case)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "bf16": False,
        "activation_checkpointing": False,
        "per_device_train_batch_size": case.batch,
        "logging_steps": 1 if case.logged else 10,
        "report_to": "none",
        "use_cpu": case.device == "cpu",
        "disable_tqdm": True,
    }
    ids = [list(range(3, 19))] * case.batch
    rows = {"input_ids": ids, "labels": ids}
    common: dict[str, Any] = {"train_dataset": Dataset.from_dict(rows), "processing_class": _tokenizer()}
    if case.trainer == "transformers SFT":
        return Trainer(student, TrainingArguments(**settings), **common)
    # The trainers below prepare the rows; length limits them, and not the batch.
    settings["max_length"] = case.length
    if case.trainer == "TRL SFT":
        return SFTTrainer(student, SFTConfig(**settings), **common)
    if case.trainer == "mmkd sft":
        return SFTBaselineTrainer(student, None, SFTBaselineConfig(**settings), **common)
    if case.trainer == "mmkd cached":
        teacher = CachedTeacher(case.vocab, case.batch * case.length, case.k)
        return KDTrainer(student, teacher, KDConfig(**settings), **common)
    model = llama(QUICK_TEACHER if case.quick else SMOLLM2_360M, 1)
    if case.trainer == "mmkd online":
        return KDTrainer(student, LocalTeacher(model), KDConfig(**settings, divergence=case.loss), **common)
    if case.trainer == "models only":
        return ModelsOnlyTrainer(student, LocalTeacher(model), KDConfig(**settings), **common)
    assert case.trainer == "TRL GKD", case
    beta = {"forward_kl": 0.0, "jsd": 0.5}[case.loss]
    return GKDTrainer(student, model, GKDConfig(**settings, lmbda=0.0, beta=beta), **common)


def make_step(trainer: Trainer, batch: dict[str, torch.Tensor]) -> Step:
    """`get_batch_samples` and `training_step` as `train()` calls them; no optimizer, which all variants share."""
    model = trainer.model
    assert isinstance(model, torch.nn.Module)
    model.train()
    # train() sets it from the arguments: mmkd computes its diagnostics in the steps that are logged, SFT in all.
    trainer.state.logging_steps = int(trainer.args.logging_steps)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        batches, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        return float(trainer.training_step(model, dict(batches[0]), items))

    return step


def build(case: Training) -> tuple[Step, Step]:
    """A step on 32 tokens and the step of one variant, by the same trainer; the gradients of the first are dropped."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, folder)
    model = trainer.model
    small = make_step(trainer, make_batch(replace(case, batch=1, length=32)))

    def warm_up() -> float:
        value = small()
        assert isinstance(model, torch.nn.Module)
        model.zero_grad(set_to_none=True)
        return value

    return warm_up, make_step(trainer, make_batch(case))


def measure_steps(cases: list[Training], args: argparse.Namespace) -> dict[str, Run]:
    """Time and peak memory of a step of each variant."""
    steps = {case.name: build(case)[1] for case in cases}
    # The run that measures memory is one of the repeats.
    runs = interleaved(steps, {name: args.repeats - args.memory for name in steps}, args.device)
    del steps
    if args.memory:
        runs = {case.name: faster(runs.get(case.name), alone(build, case, args.device)) for case in cases}
    return runs
