"""What the benchmarks of whole training steps share: models, rows, trainers, a teacher on disk."""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _caching import write_cache
from _measure import Run, Step, alone, arguments, dtype_of, faster, interleaved, timed
from datasets import Dataset, DatasetDict, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from mmkd.cache.codec import Codec, TokenOrder, TokenScores
from mmkd.capture.sequences import TokenSequence, prepare, usable
from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.methods.sft import SFTBaselineConfig, SFTBaselineTrainer
from mmkd.precision import name_of_dtype
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.training.items import ItemLosses, Supervised

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
    dtype: torch.dtype = torch.bfloat16

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
    return Training("", "", batch, length, args.supervised, quick=args.quick, device=args.device, dtype=dtype_of(args))


def random_cache(case: Training, settings: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> CachedTeacher:
    """A teacher on disk with random answers about these rows; what it says makes no difference to the cost."""
    data = DatasetDict({"train": Dataset.from_list(rows)})
    prepared = prepare(data, KDConfig(**settings), _tokenizer())
    codec = Codec("top_k", case.k, 0, TokenOrder(np.arange(case.vocab, dtype=np.int32)))
    asked = [one for _, one in usable(prepared.splits["train"], range(len(rows))) if isinstance(one, TokenSequence)]
    scores = [random_scores(int(one.supervised.sum()), codec, seed) for seed, one in enumerate(asked)]
    write_cache(folder, codec, [one.key for one in asked], scores, prepared.preparation)
    return CachedTeacher(folder)


def random_scores(tokens: int, codec: Codec, seed: int) -> TokenScores:
    """Any ids with nine tenths of the mass, most likely first."""
    random = np.random.default_rng(seed)
    ids = np.stack([random.choice(len(codec.order.ids), codec.k, replace=False) for _ in range(tokens)])
    mass = -np.sort(-random.lognormal(size=(tokens, codec.k)))
    log_probs = np.log(0.9 * mass / mass.sum(1, keepdims=True)).astype(np.float32)
    tail = np.full(tokens, np.log(0.1), dtype=np.float32)
    return TokenScores(ids.astype(np.int32), log_probs, np.zeros((tokens, 0), dtype=np.int32), tail)


class ModelsOnlyTrainer(KDTrainer):
    """Both models without their heads, forward and backward: what no loss can save."""

    def item_losses(self, student: Supervised, signal: Any) -> ItemLosses:
        """The sum of the hidden states, whose gradient costs nothing."""
        return ItemLosses({"token": student.hidden.sum()})


def llama(shape: Shape, seed: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama with random weights and a tied head."""
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
    # In its type from the start: a fp32 copy of the teacher would be the highest peak of the process.
    model = LlamaForCausalLM._from_config(config, dtype=dtype)
    assert isinstance(model, LlamaForCausalLM)
    return model


def student_of(case: Training) -> Any:
    """SmolLM2-135M, the real one where scripts/get_teacher.py has made it."""
    if REAL_STUDENT.is_dir() and not case.quick:
        return AutoModelForCausalLM.from_pretrained(REAL_STUDENT, dtype=case.dtype)
    return llama(QUICK_STUDENT if case.quick else SMOLLM2_135M, 0, case.dtype)


def title_of(case: Training) -> str:
    """Which student `student_of` returns, and the batch; for the report."""
    real = "SmolLM2-135M-Instruct" if REAL_STUDENT.is_dir() else "random weights in the shape of SmolLM2-135M"
    student = "a tiny random student" if case.quick else real
    batch = f"{case.batch} x {case.length} tokens, {100 * case.supervised:g} % supervised"
    return f"One step of {student}, {name_of_dtype(case.dtype)}, {batch}"


def _tokenizer() -> PreTrainedTokenizerFast:
    """The trainers insist on one; the rows hold ids already."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_rows(case: Training) -> list[dict[str, Any]]:
    """Random tokens without padding; the last `supervised` share of each row is supervised."""
    ids = torch.randint(3, case.vocab, (case.batch, case.length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : round((1 - case.supervised) * case.length)] = -100
    mask = [1] * case.length
    pairs = zip(ids.tolist(), labels.tolist(), strict=True)
    return [{"input_ids": row, "labels": wanted, "attention_mask": mask} for row, wanted in pairs]


def make_trainer(case: Training, rows: list[dict[str, Any]], folder: str) -> Trainer:
    """The real trainer of a variant on these rows. Weights are in the type that is measured: none uses autocast."""
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
    common: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "processing_class": _tokenizer()}
    if case.trainer == "transformers SFT":
        return Trainer(student, TrainingArguments(**settings), **common)
    # The trainers below prepare the rows; length limits them, and not the batch.
    settings["max_length"] = case.length
    if case.trainer == "TRL SFT":
        return SFTTrainer(student, SFTConfig(**settings), **common)
    if case.trainer == "mmkd sft":
        return SFTBaselineTrainer(student, None, SFTBaselineConfig(**settings), **common)
    if case.trainer == "mmkd cached":
        teacher = random_cache(case, settings, rows, Path(folder) / "cache")
        return KDTrainer(student, teacher, KDConfig(**settings), **common)
    model = llama(QUICK_TEACHER if case.quick else SMOLLM2_360M, 1, case.dtype)
    if case.trainer == "mmkd online":
        return KDTrainer(student, LocalTeacher(model), KDConfig(**settings, divergence=case.loss), **common)
    if case.trainer == "models only":
        return ModelsOnlyTrainer(student, LocalTeacher(model), KDConfig(**settings), **common)
    assert case.trainer == "TRL GKD", case
    beta = {"forward_kl": 0.0, "jsd": 0.5}[case.loss]
    return GKDTrainer(student, model, GKDConfig(**settings, lmbda=0.0, beta=beta), **common)


def collator_of(trainer: Trainer) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The trainer's own collator; GKD's reads messages, and gets tokens that need no collating."""
    collator: Any = default_data_collator if isinstance(trainer, GKDTrainer) else trainer.data_collator
    # The trainers take the columns out of their data set, and collators may change their examples.
    return lambda rows: collator([dict(row) for row in rows])


def make_step(trainer: Trainer, rows: list[dict[str, Any]]) -> Step:
    """Collator, `get_batch_samples` and `training_step` as `train()` calls them; no optimizer, which all share."""
    model, collate = trainer.model, collator_of(trainer)
    assert isinstance(model, torch.nn.Module)
    model.train()
    # train() sets it from the arguments: mmkd computes its diagnostics in the steps that are logged, SFT in all.
    trainer.state.logging_steps = int(trainer.args.logging_steps)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        batches, items = trainer.get_batch_samples(iter([collate(rows)]), 1, trainer.args.device)
        return float(trainer.training_step(model, batches[0], items))

    return step


def build(case: Training) -> tuple[Step, Step]:
    """A step on 32 tokens and the step of one variant, by the same trainer; the gradients of the first are dropped."""
    small, rows = make_rows(replace(case, batch=1, length=32)), make_rows(case)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, [*small, *rows], folder)
        # A cache stays readable without its folder: its files are mapped.
        warm_up_step, step = make_step(trainer, small), make_step(trainer, rows)
    model = trainer.model

    def warm_up() -> float:
        value = warm_up_step()
        assert isinstance(model, torch.nn.Module)
        model.zero_grad(set_to_none=True)
        return value

    return warm_up, step


def collating(case: Training, repeats: int = 20) -> float:
    """Seconds that the trainer's collator takes for one batch; of a cached teacher, reading its answers included."""
    rows = make_rows(case)
    with tempfile.TemporaryDirectory() as folder:
        collate = collator_of(make_trainer(case, rows, folder))
    return min(timed(lambda: len(collate(rows)), "cpu").seconds for _ in range(repeats))


def measure_steps(cases: list[Training], args: argparse.Namespace) -> dict[str, Run]:
    """Time and peak memory of a step of each variant."""
    steps = {case.name: build(case)[1] for case in cases}
    # The run that measures memory is one of the repeats.
    runs = interleaved(steps, {name: args.repeats - args.memory for name in steps}, args.device)
    del steps
    if args.memory:
        runs = {case.name: faster(runs.get(case.name), alone(build, case, args.device)) for case in cases}
    return runs
