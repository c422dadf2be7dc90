"""The step that all methods share: what SFTTrainer gives is kept, and nothing depends on how a batch is cut."""

import copy
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from mmkd.losses.divergences import forward_kl
from mmkd.methods.comd.comd_trainer import CoMDTrainer
from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.teachers.batch import Batch, View
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.several import SeveralTeachers
from mmkd.teachers.teacher import Teacher
from mmkd.training.base import DistillationTrainer
from mmkd.training.method import METHODS
from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences
from tests.forked import on_two_ranks
from tests.helpers import Build, losses_of


def dense_kl(trainer: DistillationTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean forward KL over supervised tokens, from the models' own logits."""
    labels = batch["labels"][:, 1:]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    student = trainer.model(**inputs).logits[:, :-1].log_softmax(-1)
    assert isinstance(trainer.teacher, LocalTeacher)
    teacher = trainer.teacher.model(**inputs).logits[:, :-1].log_softmax(-1)
    return forward_kl(student, teacher)[labels != -100].mean()


def test_loss_is_the_mean_divergence_of_the_models_own_logits(build: Build, completions: Dataset) -> None:
    trainer = build(KDTrainer, completions, max_steps=1, lr_scheduler_type="constant", learning_rate=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = dense_kl(trainer, batch).item()
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-5)


def test_gradient_is_that_of_the_dense_loss(build: Build, completions: Dataset) -> None:
    trainer = build(KDTrainer, completions)
    batch = next(iter(trainer.get_train_dataloader()))
    dense_kl(trainer, batch).backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer.model.train()
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    trainer.compute_loss(trainer.model, batch).backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_the_first_completion_token_is_supervised(build: Build, completions: Dataset) -> None:
    seen: list[torch.Tensor] = []

    class Spy(KDTrainer):
        def item_losses(self, student: Any, signal: Any) -> Any:
            seen.append(student.labels)
            return super().item_losses(student, signal)

    trainer = build(Spy, completions, max_steps=1, per_device_train_batch_size=1)
    batch = next(iter(trainer.get_train_dataloader()))
    first = batch["labels"][0][batch["labels"][0] != -100]
    trainer.train()
    assert torch.equal(seen[0], first)
    assert batch["labels"][0][0] == -100


def steps(trainer: Any) -> list[tuple[float, float]]:
    trainer.train()
    return list(zip(losses_of(trainer), losses_of(trainer, "grad_norm"), strict=True))


TOKEN_METHODS = [KDTrainer, TAIDTrainer, SFTBaselineTrainer, CoMDTrainer]


def taught(cls: Any) -> dict[str, Any]:
    """Arguments of the constructor: no teacher for a method that has none."""
    return {} if cls.needs_teacher else {"teacher": None}


def test_a_stream_drops_the_batches_with_which_it_ends(build: Build, completions: Dataset) -> None:
    """6 micro-batches, of which 4 make a step: the others are not in the next epoch's gradient."""
    stream = completions.to_iterable_dataset()
    trainer = build(KDTrainer, stream, gradient_accumulation_steps=4, max_steps=3, learning_rate=0.0)
    trainer.train()
    first, *others = zip(losses_of(trainer), losses_of(trainer, "grad_norm"), strict=True)
    assert others == [pytest.approx(first)] * 2
    short = build(KDTrainer, completions.select(range(8)).to_iterable_dataset(), gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="a stream of 2 batches"):
        short.train()


@pytest.mark.parametrize("cls", TOKEN_METHODS)
def test_losses_do_not_depend_on_gradient_accumulation(build: Build, completions: Dataset, cls: Any) -> None:
    def cut(rows: int, micro_batches: int) -> list[tuple[float, float]]:
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
        return steps(build(cls, completions, trainer=taught(cls), **sizes))

    whole, halves, single = cut(4, 1), cut(2, 2), cut(1, 4)
    assert halves == [pytest.approx(pair, rel=1e-4) for pair in whole]
    assert single == [pytest.approx(pair, rel=1e-4) for pair in whole]


def test_a_rank_without_tokens_reports_what_the_others_do(build: Build, completions: Dataset) -> None:
    """Ranks reduce their reports together: a missing name on one of them would hang the others."""
    names: list[set[str]] = []
    for labels in ([5, 6, 7], [-100, -100, -100]):
        trainer = build(TAIDTrainer, completions, ce_weight=0.5)
        batch = Batch(View({"input_ids": torch.tensor([[5, 6, 7]])}, torch.tensor([labels])), torch.tensor([3]))
        trainer.model.train()
        trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        trainer.compute_loss(trainer.model, batch)
        names.append(set(trainer._sums["train"]))
    assert names[0] == names[1] >= {"divergence", "ce", "progress_loss"}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["kd", "taid"])
def test_sharding_by_zero3_changes_nothing(tmp_path: Path, tokenizer: Any, method: str, tied: bool) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not among mmkd's dependencies")
    models = {"teacher": {"layers": 3, "seed": 1}, "student": {"layers": 2, "seed": 2}}
    for name, sizes in models.items():
        save(make_model(**sizes, rows=len(tokenizer), tied=tied), tokenizer, tmp_path / name)
    paths = {name: str(tmp_path / name) for name in models}
    whole, sharded = (
        on_two_ranks({"job": {"method": method, "how": how, **paths}}, tmp_path, DS_ACCELERATOR="cpu")["job"]
        for how in ("zero2", "zero3")
    )
    for rank in range(2):
        assert sharded[rank]["steps"] == [pytest.approx(pair, rel=1e-4) for pair in whole[rank]["steps"]]
        assert sharded[rank]["t"] == pytest.approx(whole[rank]["t"])


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("cls", TOKEN_METHODS)
def test_losses_do_not_depend_on_ranks(build: Build, completions: Dataset, ranks: Any, cls: Any, how: str) -> None:
    """Two gloo ranks of two rows are one rank of four; TAID's t moves identically on both."""
    alone: Any = build(cls, completions, trainer=taught(cls), per_device_train_batch_size=4)
    expected = steps(alone)
    # Five rows on two ranks of two: some are repeated to make the batches even, and must not count twice.
    evaluated = alone.evaluate(eval_dataset=completions.select(range(5)))
    found = ranks[f"{cls.method} {how}"]
    for rank in found:
        assert rank["steps"] == [pytest.approx(pair, rel=1e-4) for pair in expected]
        assert rank["evaluated"] == pytest.approx({name: evaluated[name] for name in rank["evaluated"]}, rel=1e-4)
        if cls.needs_teacher:
            assert rank["kl"] == pytest.approx(losses_of(alone, "kl"), rel=1e-4)
    if how == "ddp":
        assert found[0]["weights"] == found[1]["weights"]
    if isinstance(alone, TAIDTrainer):
        assert found[0]["t"] == found[1]["t"] == pytest.approx(losses_of(alone, "taid_t")[:4], rel=1e-6)


@pytest.mark.parametrize("cls", [KDTrainer, TAIDTrainer])
def test_a_student_that_is_the_teacher_has_no_loss(build: Build, texts: Dataset, tiny: Any, cls: Any) -> None:
    trainer = build(cls, texts, trainer={"model": str(tiny["teacher"])}, max_steps=1)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(0, abs=1e-6)
    assert losses_of(trainer, "grad_norm")[0] == pytest.approx(0, abs=1e-4)
    assert losses_of(trainer, "top1_agreement")[0] == 1


def test_the_student_moves_towards_the_teacher(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, max_steps=30)
    trainer.train()
    kl = losses_of(trainer, "kl")
    assert kl[-1] < 0.6 * kl[0]


def test_what_a_trainer_is_given_stays_as_it_is(tiny: dict[str, Path], texts: Dataset, tmp_path: Path) -> None:
    config = KDConfig(
        str(tmp_path), model_init_kwargs={"dtype": "float32"}, bf16=False, report_to="none", max_length=64
    )
    before = {field.name: copy.copy(getattr(config, field.name)) for field in fields(config)}
    local = LocalTeacher(AutoModelForCausalLM.from_pretrained(tiny["teacher"]))
    tokens = local.vocab_size = local.vocab_size + 5
    several = SeveralTeachers({"a": str(tiny["teacher"]), "b": local})
    trainer = KDTrainer(str(tiny["student"]), several, config, texts)
    assert {name: getattr(config, name) for name in before} == before
    assert (several.teachers, local.vocab_size) == ({"a": str(tiny["teacher"]), "b": local}, tokens)
    assert trainer.vocab_size < tokens


def test_a_stream_is_evaluated_like_rows(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, per_device_eval_batch_size=5)
    streamed, whole = trainer.evaluate(texts.to_iterable_dataset()), trainer.evaluate(texts)
    names = ("eval_loss", "eval_kl", "eval_top1_agreement", "eval_perplexity")
    assert [streamed[name] for name in names] == pytest.approx([whole[name] for name in names], rel=1e-5)


def test_a_batch_without_supervised_tokens_is_a_zero(build: Build, completions: Dataset) -> None:
    trainer = build(KDTrainer, completions)
    batch = next(iter(trainer.get_train_dataloader()))
    batch = batch.with_labels(torch.full_like(batch["labels"], -100))
    trainer.model.train()
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("cls", TOKEN_METHODS)
def test_packing_and_padding_free_see_the_same_tokens(build: Build, texts: Dataset, cls: Any) -> None:
    """Without flash-attn, where trl warns: what keeps sequences apart are their positions."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 24, "trainer": taught(cls)}
    padded = steps(build(cls, texts, **settings))
    flat = steps(build(cls, texts, **settings, padding_free=True, max_length=None))
    packed = steps(build(cls, texts, **settings, packing=True))
    assert flat == [pytest.approx(pair, rel=1e-4) for pair in padded]
    assert packed == [pytest.approx(pair, rel=1e-4) for pair in padded]


@pytest.mark.parametrize("role", ["model", "teacher"])
@pytest.mark.parametrize("layout", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_packing_is_refused_where_rows_would_see_each_other(
    build: Build, texts: Dataset, tokenizer: Any, role: str, layout: dict[str, Any]
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = FalconConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **ids)
    models = {role: FalconForCausalLM(config), "processing_class": tokenizer, "teacher_processing_class": tokenizer}
    name = "student" if role == "model" else "teacher"
    with pytest.raises(ValueError, match=rf"The {name} \(FalconForCausalLM.*packing: false"):
        build(KDTrainer, texts, trainer=models, **layout)
    build(KDTrainer, texts, trainer=models, packing=True, packing_strategy="wrapped")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
@pytest.mark.parametrize("cls", [KDTrainer, TAIDTrainer, SFTBaselineTrainer])
def test_flash_attention_sees_what_eager_attention_sees(build: Build, texts: Dataset, cls: Any) -> None:
    pytest.importorskip("flash_attn")
    settings: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 24, "bf16": True}

    def attention(name: str) -> dict[str, Any]:
        return {f"{role}model_init_kwargs": {"attn_implementation": name} for role in ("", "teacher_")}

    padded = steps(build(cls, texts, **settings, **attention("eager")))
    flash: dict[str, Any] = {**settings, **attention("flash_attention_2")}
    for layout in ({"padding_free": True, "max_length": None}, {"packing": True}):
        assert steps(build(cls, texts, **flash, **layout)) == [pytest.approx(pair, rel=0.02) for pair in padded]


def test_assistant_only_loss_supervises_the_assistant(build: Build, chats: Dataset, tokenizer: Any) -> None:
    trainer = build(KDTrainer, chats, assistant_only_loss=True, max_steps=1)
    row = trainer.train_dataset[0]
    answer = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(answer).endswith("<|end|>")
    assert tokenizer.decode(answer).removesuffix("<|end|>") == chats[0]["messages"][1]["content"]
    trainer.train()


def test_conversational_prompt_completion(build: Build) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": a}], "completion": [{"role": "assistant", "content": b}]}
        for a, b in zip(sentences(8), sentences(8, seed=5), strict=True)
    ]
    trainer = build(KDTrainer, Dataset.from_list(rows), max_steps=1)
    trainer.train()
    assert losses_of(trainer)[0] > 0


def test_gradient_checkpointing_changes_nothing(build: Build, texts: Dataset) -> None:
    plain = steps(build(KDTrainer, texts, activation_checkpointing=False))
    checkpointed = steps(build(KDTrainer, texts, activation_checkpointing=True))
    assert checkpointed == [pytest.approx(pair, rel=1e-5) for pair in plain]


def test_lora_trains_adapters_and_saves_them(build: Build, texts: Dataset, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = build(KDTrainer, texts, trainer={"peft_config": config}, max_steps=20)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    kl = losses_of(trainer, "kl")
    assert kl[-1] < kl[0]
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_evaluation_without_rows_is_refused_before_models_are_loaded(build: Build, texts: Dataset) -> None:
    with pytest.raises(ValueError, match="has no rows for evaluation"):
        build(KDTrainer, texts, trainer={"model": "no/such-model"}, eval_strategy="steps", eval_steps=1)


def test_lora_on_the_head_is_refused(build: Build, texts: Dataset) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lm_head"):
        build(KDTrainer, texts, trainer={"peft_config": config})


def test_qlora_student_and_4bit_teacher(build: Build, texts: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    # bitsandbytes' 4-bit kernel wants widths that its blocks of 64 divide.
    wide = save(make_model(width=128, rows=len(tokenizer)), tokenizer, tmp_path / "wide")
    wider = save(make_model(width=128, layers=3, rows=len(tokenizer), seed=1), tokenizer, tmp_path / "wider")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(wider, quantization_config=four_bits)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments = {"model": str(wide), "teacher": teacher, "peft_config": config, "quantization_config": four_bits}
    trainer = build(KDTrainer, texts, trainer=arguments, max_steps=10)
    assert trainer.model.is_loaded_in_4bit
    trainer.train()
    kl = losses_of(trainer, "kl")
    assert kl[-1] < kl[0]
    # An evaluation leaves the layers of 4 bits as training needs them: packed for inference they have no gradient.
    trainer.evaluate(trainer.train_dataset)
    weights: list[Any] = [layer.weight for layer in trainer.model.modules() if isinstance(layer, Linear4bit)]
    assert len(weights) == 14
    assert not any(getattr(weight.quant_state, "packing_format_for_cpu", False) for weight in weights)


def test_an_8bit_teacher_of_a_full_student(build: Build, texts: Dataset, tiny: dict[str, Path]) -> None:
    init = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    trainer = build(KDTrainer, texts, teacher_model_init_kwargs=init, max_steps=10)
    assert isinstance(trainer.teacher, LocalTeacher)
    assert trainer.teacher.model.is_loaded_in_8bit
    trainer.train()
    assert losses_of(trainer, "kl")[-1] < losses_of(trainer, "kl")[0]


def test_vocabularies_padded_differently_are_trimmed(
    build: Build, texts: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    tokens = len(tokenizer)
    student = save(make_model(rows=tokens + 20, seed=2), tokenizer, tmp_path / "student")
    teacher = save(make_model(layers=3, rows=tokens + 84, seed=1), tokenizer, tmp_path / "teacher")
    padded = build(KDTrainer, texts, trainer={"model": str(student), "teacher": str(teacher)})
    assert padded.vocab_size == tokens
    # Padding rows carry mass until they are cut off: the loss must be that of models without them.
    for name, path in (("s", student), ("t", teacher)):
        model = LlamaForCausalLM.from_pretrained(path)
        model.resize_token_embeddings(tokens)
        save(model, tokenizer, tmp_path / name)
    exact = build(KDTrainer, texts, trainer={"model": str(tmp_path / "s"), "teacher": str(tmp_path / "t")})
    assert steps(padded)[0] == pytest.approx(steps(exact)[0], rel=1e-4)


def test_different_tokenizers_are_refused_with_a_way_out(build: Build, texts: Dataset, tmp_path: Path) -> None:
    shorter = save(make_model(rows=280), make_tokenizer(280), tmp_path / "shorter")
    with pytest.raises(ValueError, match="method alm"):
        build(KDTrainer, texts, trainer={"teacher": str(shorter)})


def test_a_special_token_that_the_teacher_lacks_is_left_out(
    build: Build, texts: Dataset, tiny: Any, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|student pad|>"})
    student = save(make_model(rows=len(tokenizer), seed=2), tokenizer, tmp_path / "padded")
    trainer = build(KDTrainer, texts, trainer={"model": str(student)})
    assert trainer.vocab_size == len(tokenizer) - 1
    trainer.train()
    assert losses_of(trainer)[0] > 0


class Mute(Teacher[str]):
    signal_type = str

    def prepare(self, accelerator: Any) -> None: ...

    def ask(self, inputs: Any, supervised: Any) -> str:
        return ""


def test_a_teacher_with_the_wrong_signal_is_refused(build: Build, texts: Dataset) -> None:
    with pytest.raises(ValueError, match="answers with str, method kd needs DenseSignal or TopKSignal"):
        build(KDTrainer, texts, trainer={"teacher": Mute()})


def test_nan_in_the_teacher_is_found_before_training(build: Build, texts: Dataset, tiny: dict[str, Path]) -> None:
    teacher: Any = LlamaForCausalLM.from_pretrained(tiny["teacher"])
    teacher.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        build(KDTrainer, texts, trainer={"teacher": teacher})


def test_a_teacher_that_cannot_come_to_the_device_is_refused(build: Build, texts: Dataset, tiny: Any) -> None:
    with torch.device("meta"):
        teacher = make_model(layers=3, width=48)
    teacher.config.name_or_path = str(tiny["teacher"])
    with pytest.raises(ValueError, match="on meta and cannot be moved"):
        build(KDTrainer, texts, trainer={"teacher": teacher})


@pytest.mark.parametrize("method", METHODS)
def test_a_process_takes_one_of_several_gpus(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = TrainingArguments._setup_devices.func  # pyright: ignore[reportFunctionMemberAccess]

    def with_two(self: Any) -> torch.device:
        device = found(self)
        self._n_gpu = 2
        return device

    devices = cached_property(with_two)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    settings: dict[str, Any] = {"labels_per_class": 1} if method == "dho" else {"bf16": False}
    args = METHODS[method].config(str(tmp_path), report_to="none", per_device_train_batch_size=4, **settings)
    assert (args.n_gpu, args.train_batch_size) == (1, 4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ce_weight": 1.5}, "ce_weight is 1.5"),
        ({"ce_weight": -0.1}, "ce_weight is -0.1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"divergence": "kl"}, "divergence is 'kl'; choose one of"),
        ({"beta": 2.0}, "beta is 2.0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_settings_that_cannot_be(build: Build, texts: Dataset, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(KDTrainer, texts, **settings)


def test_missing_models(build: Build, texts: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        build(KDTrainer, texts, trainer={"teacher": None})
    with pytest.raises(ValueError, match=r"student .* (cannot be loaded|has no loadable tokenizer)"):
        build(KDTrainer, texts, trainer={"model": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match=r"teacher .* cannot be loaded"):
        build(KDTrainer, texts, trainer={"teacher": str(tmp_path / "nowhere")})


def test_data_without_anything_to_learn(build: Build, chats: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no train_dataset"):
        build(KDTrainer, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="train data set is empty"):
        build(KDTrainer, Dataset.from_dict({"text": []}))
    ids = {"input_ids": [[5, 6, 7]] * 4}
    with pytest.raises(ValueError, match="every label is -100"):
        build(KDTrainer, Dataset.from_dict({**ids, "labels": [[-100] * 3] * 4}), max_length=None)
    with pytest.raises(ValueError, match="within max_length 4: the prompts fill it"):
        build(
            KDTrainer,
            Dataset.from_dict({"prompt": ["the cat sat on a mat"] * 4, "completion": [" dog"] * 4}),
            max_length=4,
        )
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        build(KDTrainer, chats, trainer={"processing_class": bare})


def test_evaluation_is_exact_whatever_the_batch(build: Build, texts: Dataset) -> None:
    results = [
        build(KDTrainer, texts, trainer={"eval_dataset": texts}, per_device_eval_batch_size=size).evaluate()
        for size in (1, 5, 24)
    ]
    names = ("eval_loss", "eval_kl", "eval_ce", "eval_perplexity", "eval_top1_agreement", "eval_teacher_entropy")
    for name in names:
        assert [result[name] for result in results] == pytest.approx([results[0][name]] * 3, rel=1e-5)
    assert results[0]["eval_loss"] == pytest.approx(results[0]["eval_kl"])


def test_each_evaluation_reports_under_its_own_name(build: Build, texts: Dataset) -> None:
    parts = {"first": texts.select(range(6)), "second": texts.select(range(6, 24))}
    trainer = build(KDTrainer, texts, trainer={"eval_dataset": parts})
    results = trainer.evaluate()
    for name, part in parts.items():
        alone = trainer.evaluate(eval_dataset=part, metric_key_prefix="alone")
        assert results[f"eval_{name}_kl"] == results[f"eval_{name}_loss"] == pytest.approx(alone["alone_kl"])
    prepared: Any = trainer.eval_dataset
    trainer.predict(prepared["first"])
    assert trainer.evaluate(eval_dataset=parts["second"])["eval_kl"] == pytest.approx(results["eval_second_kl"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_teacher_placed_where_the_student_is_stays(tiny: Any, monkeypatch: Any, device: str) -> None:
    """The accelerator says `cuda` where parameters say `cuda:0`; on a machine without a GPU both are pretended."""
    here = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    monkeypatch.setattr("mmkd.teachers.local.devices_of", lambda model: {here})
    if not torch.cuda.is_available():
        monkeypatch.setattr("mmkd.teachers.local._with_index", lambda device: here)
    model: Any = LlamaForCausalLM.from_pretrained(tiny["teacher"])
    model.hf_device_map = {"": 0}
    accelerator: Any = SimpleNamespace(
        device=torch.device(device), distributed_type="NO", prepare_model=lambda model, evaluation_mode: model
    )
    LocalTeacher(model).prepare(accelerator)


def test_logs_say_what_users_watch(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, ce_weight=0.3, logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    names = {
        "loss",
        "divergence",
        "ce",
        "kl",
        "top1_agreement",
        "teacher_entropy",
        "student_entropy",
        "token_accuracy",
    }
    assert names | {"supervised_tokens_per_second", "eta_minutes"} <= set(logs[0])
    assert logs[1]["eta_minutes"] == 0


def test_speed_and_time_left_count_the_teacher_wherever_it_is_asked_and_no_evaluation(
    build: Build, texts: Dataset, monkeypatch: Any
) -> None:
    now = [0.0]
    monkeypatch.setattr("mmkd.training.clock.time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(KDTrainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches = super().get_batch_samples(*args, **kwargs)
            now[0] += 5
            return batches

        def ask(self, batch: Any) -> Any:
            now[0] += 2 if self.model.training else 1000
            return super().ask(batch)

    settings = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = build(Slow, texts, trainer={"eval_dataset": texts.select(range(2))}, **settings)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "eta_minutes" in entry)
    assert first["supervised_tokens_per_second"] == pytest.approx(first["supervised_tokens"] / 14)
    assert first["eta_minutes"] == pytest.approx(14 / 60)
    learnt = second["supervised_tokens"] - first["supervised_tokens"]
    assert second["supervised_tokens_per_second"] == pytest.approx(learnt / 14)


def test_resume_gives_the_losses_of_an_uninterrupted_run(build: Build, texts: Dataset, tmp_path: Path) -> None:
    whole = build(TAIDTrainer, texts, max_steps=6, taid_alpha=0.5, taid_beta=0.5)
    whole.train()
    settings = {"taid_alpha": 0.5, "taid_beta": 0.5, "output_dir": str(tmp_path / "cut")}
    build(TAIDTrainer, texts, max_steps=6, save_strategy="steps", save_steps=3, **settings).train()
    resumed = build(TAIDTrainer, texts, max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for name in ("loss", "kl", "taid_t", "taid_momentum", "taid_delta", "grad_norm"):
        assert losses_of(resumed, name)[-3:] == losses_of(whole, name)[-3:], name


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_backbones_give_the_same_steps(build: Build, completions: Dataset, backend: str) -> None:
    """The loss is in no graph: its consumer is another function in each step, and it reads values."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 24}
    plain = steps(build(KDTrainer, completions, **settings))
    torch._dynamo.reset()
    counters.clear()
    compiled = build(KDTrainer, completions, **settings, torch_compile=True, torch_compile_backend=backend)
    assert steps(compiled) == [pytest.approx(pair, rel=1e-4) for pair in plain]
    # The teacher for the first row, then teacher and student for the batch.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_fp16_without_a_gpu_is_refused(build: Build, texts: Dataset) -> None:
    with pytest.raises(ValueError, match=r"fp16 trains on a GPU.*bf16: true"):
        build(KDTrainer, texts, fp16=True, use_cpu=True)
