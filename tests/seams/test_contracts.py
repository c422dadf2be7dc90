"""Each private touch of another package: these fail, with the name of the touch, where upstream moves it.

They run on tiny objects, so that raising a cap in pyproject.toml is one commit: new versions, these tests, repairs.
"""

import importlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    core_model_loading,
)
from transformers.integrations import deepspeed as integration
from transformers.trainer_callback import TrainerState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from mmkd.export.compressed_writer import write_compressed
from mmkd.models.quantised_students import StudentQuantisation
from mmkd.seams import (
    accelerate_seam,
    bitsandbytes_seam,
    compressed_tensors_seam,
    datasets_seam,
    decoding_seam,
    deepspeed_seam,
    lm_eval_seam,
    peft_seam,
    torch_seam,
    trainer_seam,
    transformers_seam,
    trl_seam,
    upstream_messages,
)
from scripts.make_tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


# transformers' Trainer

HOOKED = {
    "_build_accelerator_args": ["self", "kwargs"],
    "_wrap_model": ["self", "model", "training", "dataloader"],
    "_init_training_state": [
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_callback_state": ["self"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_best_model": ["self"],
    "_load_rng_state": ["self", "checkpoint"],
    "_get_output_dir": ["self", "trial"],
    "_save": ["self", "output_dir", "state_dict"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_set_signature_columns_if_needed": ["self"],
    "_prepare_inputs": ["self", "inputs"],
    "_get_dataloader": [
        "self",
        "dataset",
        "description",
        "batch_size",
        "sampler_fn",
        "is_training",
        "dataloader_key",
    ],
    "_prepare_input": ["self", "data"],
}


@pytest.mark.parametrize("name", HOOKED)
def test_the_trainer_has_the_place_of_a_hook(name: str) -> None:
    assert parameters_of(getattr(Trainer, name)) == HOOKED[name]
    called = ("_prepare_input", "_get_output_dir")
    assert name in called or name in vars(trainer_seam.HookedTrainer), "no hook stands there"


class Hooked(trainer_seam.HookedTrainer):
    """Writes down which hooks are called, and in which order."""

    state_name = "test"

    def __init__(self, *args: Any, **kwargs: Any):
        self.called: list[str] = []
        self.restored: list[Any] = []
        super().__init__(*args, **kwargs)

    def before_accelerator(self) -> None:
        self.called.append("before_accelerator")

    def before_wrapping(self, training: bool) -> None:
        self.called.append("before_wrapping")

    def training_starts(self) -> None:
        self.called.append("training_starts")

    def state_to_save(self) -> dict[str, Any]:
        self.called.append("state_to_save")
        return {"loss": self.unlogged.loss.item(), "step": self.unlogged.logged_step}

    def state_restored(self, state: dict[str, Any] | None) -> None:
        self.called.append("state_restored")
        self.restored.append(state)

    def before_restoring(self, checkpoint: Any) -> None:
        self.called.append(f"before_restoring {checkpoint.name}")

    def checkpoint_to_save(self, folder: Any) -> None:
        complete = (folder / "trainer_state.json").is_file()
        self.called.append(f"checkpoint_to_save {folder.name}, complete: {complete}")

    def checkpoint_restored(self, folder: Any) -> None:
        self.called.append(f"checkpoint_restored {folder.name}")

    def weights_restored(self, checkpoint: Any) -> None:
        self.called.append(f"weights_restored {checkpoint.name}")

    def weights_to_save(self, folder: Any, weights: Any) -> Any:
        self.called.append(f"weights_to_save {folder.name}")
        return weights

    def columns_to_keep(self) -> list[str]:
        return ["kept"]

    def collator_of(self, training: bool) -> Any:
        self.called.append(f"collator_of {training}")
        return super().collator_of(training)


class Seen:
    """A collator that remembers the columns it got."""

    columns: ClassVar[set[str]] = set()

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        type(self).columns = {*examples[0]}
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "labels": ids}


def test_every_hook_is_called_in_training_and_resuming(tmp_path) -> None:
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "kept": 1, "dropped": 1}] * 8)
    settings: Any = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2}
    settings |= {"max_steps": 3, "save_steps": 2, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 2}

    def trainer(**more: Any) -> Hooked:
        args = TrainingArguments(str(tmp_path), **{**settings, **more})
        return Hooked(make_model(), args, Seen(), rows, rows.select(range(2)))

    first = trainer()
    first.train()
    assert first.called[0] == "before_accelerator"
    assert "training_starts" in first.called
    assert {"before_wrapping", "collator_of True", "collator_of False"} <= {*first.called}
    assert {"weights_to_save checkpoint-2", "checkpoint_to_save checkpoint-2, complete: False"} <= {*first.called}
    assert first.restored == []
    assert Seen.columns == {"input_ids", "kept"}
    saved = TrainerState.load_from_json(str(tmp_path / "checkpoint-2" / "trainer_state.json"))
    callbacks: Any = saved.stateful_callbacks
    state = callbacks["test"]
    assert state["attributes"]["loss"] > 0, "the loss of two steps that were not logged"
    assert state["attributes"]["step"] == 0
    again = trainer(load_best_model_at_end=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.restored == [state["attributes"]]
    assert again.called.index("training_starts") < again.called.index("state_restored")
    restored = [name for name in again.called if name.startswith("weights_restored")]
    assert restored[0] == "weights_restored checkpoint-2"
    assert again.called.index("before_restoring checkpoint-2") < again.called.index(restored[0])
    assert sum(name.startswith("before_restoring") for name in again.called) == 1, "not of the best one"
    assert again.called.count("checkpoint_restored checkpoint-2") == 1
    assert len(restored) == 2, "the best one is loaded at the end"


def test_the_loss_since_the_last_log_can_be_restored(tmp_path) -> None:
    trainer = Hooked(make_model(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer._tr_loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = torch.tensor(1.0), 5.0, 2
    trainer.restore_unlogged(3.0, 4)
    assert trainer.unlogged == (torch.tensor(4.0), 4)
    assert trainer._total_loss_scalar == 2.0
    for name in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"):
        assert f"self.{name}" in inspect.getsource(Trainer), name


def test_training_arguments_count_gpus_in_n_gpu(tmp_path) -> None:
    args: Any = TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 4
    assert args.n_gpu == 4
    trainer_seam.take_one_gpu(args)
    assert args.n_gpu == 1


def test_training_arguments_read_json_keys(tmp_path) -> None:
    assert "accelerator_config" in trainer_seam.with_json_keys(TrainingArguments)
    assert "_VALID_DICT_FIELDS" in inspect.getsource(TrainingArguments.__post_init__)
    assert trainer_seam.with_json_keys(SFTConfig, "mine")[-1] == "mine"


# TRL


def test_trl_prepares_rows_without_a_trainer(tmp_path) -> None:
    expected = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert parameters_of(SFTTrainer._prepare_dataset) == expected
    rows = Dataset.from_list([{"prompt": "the cat", "completion": " sat"}] * 3)
    args = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, max_length=None)
    tokenizer: Any = make_tokenizer()
    settings: Any = {"chat_template": None, "completion_only": True}
    prepared = trl_seam.prepare_rows(rows, tokenizer, args, False, None, "train", **settings)
    ids, labels = prepared[0]["input_ids"], prepared[0]["labels"]
    prompt = len(tokenizer("the cat")["input_ids"])
    assert ids == tokenizer("the cat sat" + tokenizer.eos_token)["input_ids"]
    assert labels == [-100] * prompt + ids[prompt:]
    args.max_length = 64
    (packed,) = trl_seam.prepare_rows(prepared, tokenizer, args, True, None, "train", **settings)
    assert packed["seq_lengths"] == [len(ids)] * 3


def test_trl_prepares_the_rows_of_a_trainer_by_the_same_method() -> None:
    source = inspect.getsource(SFTTrainer)
    assert source.count("self._prepare_dataset(") >= 4, "train, one or several evaluations, and evaluate"
    assert {"_is_vision_dataset", "_tag_names", "_name"} <= {word.split("(")[0] for word in _words(source)}


def _words(source: str) -> set[str]:
    return {word.strip(",:()=") for line in source.splitlines() for word in line.replace("self.", " ").split()}


def test_trl_clones_a_template_without_a_model(tmp_path) -> None:
    source, tokenizer = make_tokenizer(), make_tokenizer()
    source.add_tokens(["<|turn|>"])
    source.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    source.save_pretrained(tmp_path)
    trl_seam.clone_template(tokenizer, str(tmp_path))
    assert tokenizer.chat_template == source.chat_template
    assert "<|turn|>" in tokenizer.get_vocab()
    assert len(tokenizer) % 64 == 0


def test_trl_lets_the_first_process_prepare_first() -> None:
    with trl_seam.first_process_first():
        pass


def test_trl_prepares_rows_in_one_process_that_waits_for_none(tmp_path, monkeypatch) -> None:
    waited: list[int] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        waited.append(1)
        yield

    monkeypatch.setattr("trl.trainer.sft_trainer.global_then_local_main_first", waiting)
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=8)
    rows, tokenizer = Dataset.from_dict({"text": ["the cat"]}), make_tokenizer()
    settings: Any = {"chat_template": None, "completion_only": False}
    with trl_seam.preparing_alone():
        trl_seam.prepare_rows(rows, tokenizer, args, False, None, "train", **settings)
    assert waited == []
    trl_seam.prepare_rows(rows, tokenizer, args, False, None, "train", **settings)
    assert waited


# transformers


def test_layers_of_a_frozen_model_are_computed_again_in_evaluation_mode() -> None:
    model = make_model(rows=len(make_tokenizer())).eval().requires_grad_(False)
    states = torch.randn(1, 4, model.config.hidden_size)
    kept: list[int] = []

    def gradient() -> torch.Tensor:
        leaf, sizes = states.clone().requires_grad_(), list[int]()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(inputs_embeds=leaf).logits.sum()
        kept.append(sum(sizes))
        return torch.autograd.grad(output, leaf)[0]

    plain = gradient()
    transformers_seam.checkpoint_frozen_layers(model)
    torch.testing.assert_close(gradient(), plain)
    assert kept[1] < kept[0] / 2
    assert not model.training


def test_attention_is_an_attribute_of_configs() -> None:
    config = make_model().config
    transformers_seam.set_attention(config, "eager")
    assert transformers_seam.attention_of(config) == "eager"


def test_a_class_makes_a_model_of_a_config() -> None:
    model = make_model()
    made = transformers_seam.empty_like(type(model), model.config, torch.bfloat16)
    assert type(made) is type(model)
    assert made.dtype == torch.bfloat16


def test_published_names_are_conversions_of_a_model() -> None:
    model = make_model()
    transformers_seam.save_under_published_names(model)
    assert "_weight_conversions" in inspect.getsource(core_model_loading.revert_weight_conversion)


def test_tensors_of_a_checkpoint_are_found_in_a_model() -> None:
    model = make_model(width=32, rows=60)
    assert transformers_seam.parameter_names(model, ["embed_tokens.weight", "lm_head.weight"]) == {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
    }
    assert transformers_seam.tied_parameters(model) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_weights_that_are_left_out_are_neither_saved_nor_missed(tmp_path: Path) -> None:
    model = make_model(width=32, rows=60)
    model.add_module("extra", torch.nn.Linear(2, 2, bias=False))
    transformers_seam.leave_out_of_saves(model, ["extra.weight"])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in saved
    assert "extra.weight" not in saved
    assert "_keys_to_ignore_on_save" in inspect.getsource(Trainer._issue_warnings_after_load)


def test_auto_classes_know_their_configs() -> None:
    assert transformers_seam.has_class_for(AutoModelForImageClassification, ViTConfig)
    assert not transformers_seam.has_class_for(AutoModelForImageClassification, AutoConfig)  # pyright: ignore
    config = ViTConfig()
    model: Any = transformers_seam.model_class(config)
    assert model.__name__ == "ViTModel"
    assert transformers_seam.model_class(SimpleNamespace()) is None  # pyright: ignore[reportArgumentType]
    assert transformers_seam.generates_text(make_model().config)
    assert not transformers_seam.generates_text(config)


def test_a_template_gives_the_characters_between_its_marks() -> None:
    messages = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
    special = make_tokenizer().special_tokens_map
    text, ((start, end),) = transformers_seam.marked_spans(messages, CHAT_TEMPLATE, special)
    assert "me" in text[start:end]
    assert "who" not in text[start:end]


def test_bytes_have_letters() -> None:
    assert len(transformers_seam.byte_letters()) == 256
    assert transformers_seam.byte_letters()[ord(" ")] == "Ġ"


def test_trackers_are_known_by_name() -> None:
    known = transformers_seam.tracker_classes()
    assert {"wandb", "tensorboard", "trackio", "mlflow"} <= known.keys()
    assert all(callable(tracker.on_train_end) for tracker in known.values())
    assert {*transformers_seam.installed_trackers()} <= known.keys()


def model_of_experts() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "moe_intermediate_size": 4, "head_dim": 4}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(num_experts=2, num_experts_per_tok=1, **sizes))


def test_transformers_marks_experts_that_it_computes_itself() -> None:
    model = model_of_experts()
    block = model.model.layers[0].mlp
    assert transformers_seam.is_fused_experts(block.experts)
    assert not transformers_seam.is_fused_experts(block)
    projected = torch.randn(3, 8)
    expected = block.experts.act_fn(projected[:, :4]) * projected[:, 4:]
    assert torch.equal(transformers_seam.gated(block.experts, projected), expected)


# accelerate


def test_generation_goes_on_token_by_token() -> None:
    """`custom_generate` is handed what `_sample` is, and each token is computed by the same private steps."""
    model: Any = make_model(layers=1, width=32, seed=0)
    inputs = {
        "input_ids": torch.tensor([[0, 0, 5], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
    }
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=1, pad_token_id=0, suppress_tokens=[3])
    decoding = decoding_seam.Decoding(model, inputs, config)
    ended = torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        while not ended.all():
            decoding.append(decoding.processed(decoding.logits()).argmax(-1))
            ended |= decoding.ended()
    assert torch.equal(decoding.ids, model.generate(**inputs, generation_config=config))


def test_accelerate_forgets_a_prepared_model() -> None:
    accelerator = Accelerator(cpu=True)
    kept, model = accelerator.prepare(torch.nn.Linear(1, 1)), accelerator.prepare(torch.nn.Linear(1, 1))
    assert model._is_accelerate_prepared
    accelerate_seam.forget_prepared(accelerator, model)
    assert [one is kept for one in accelerator._models] == [True]
    assert not model._is_accelerate_prepared


def test_accelerate_shares_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState()
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)
    accelerate_seam.count_ranks_as_gpus()
    assert PartialState().distributed_type == DistributedType.MULTI_GPU


def test_accelerate_shards_a_second_model() -> None:
    assert parameters_of(fsdp2_prepare_model) == ["accelerator", "model"]


def test_accelerate_asks_two_towers_for_embeddings() -> None:
    source = inspect.getsource(fsdp2_prepare_model)
    assert 'getattr(model, "get_input_embeddings", lambda: None)()' in source
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPModel(CLIPConfig(text_config=tower, vision_config=tower))
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    accelerate_seam.has_no_embeddings(model)
    assert model.get_input_embeddings() is None


def test_accelerate_launch_has_a_parser() -> None:
    options = {action.dest for action in accelerate_seam.launch_actions()}
    assert {"num_processes", "config_file", "module"} <= options
    parsed = accelerate_seam.parsed_launch(["--num_processes", "2", "--module", "a", "--b"])
    assert (parsed.num_processes, parsed.training_script_args) == (2, ["--b"])


# PEFT


def test_bitsandbytes_packs_no_weights_of_a_student() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32).to("cpu")
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    # As on a CPU that has the instructions, which this one may lack.
    layer.support_avx512bf16_for_cpu = True
    bitsandbytes_seam.keep_differentiable(torch.nn.Sequential(layer))
    weights = layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.ones(1, 128))
    assert torch.equal(layer.weight.data, weights)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_peft_marks_its_layers() -> None:
    model: Any = get_peft_model(
        make_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    layer = model.base_model.model.model.layers[0].self_attn
    assert peft_seam.is_adapted(layer.q_proj)
    assert not peft_seam.is_adapted(layer.k_proj)
    assert peft_seam.is_copied(model.base_model.model.lm_head)
    assert not peft_seam.is_copied(layer.q_proj)


@torch.no_grad()
def test_adapters_are_switched_off_and_stay_trainable() -> None:
    bare, ids = make_model().eval(), torch.tensor([[1, 2, 3]])
    expected = bare(ids).logits
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model: Any = get_peft_model(bare, config).eval()
    assert peft_seam.adapts_weights_of_its_own(model)
    model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    changed = model(ids).logits
    with peft_seam.adapters_off(model):
        assert torch.equal(model(ids).logits, expected)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert torch.equal(model(ids).logits, changed)
    assert not torch.equal(changed, expected)


def test_an_adapter_may_begin_with_a_part_of_the_weights() -> None:
    model: Any = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    assert not peft_seam.adapts_weights_of_its_own(model)


def test_peft_merges_its_layers() -> None:
    model: Any = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    assert peft_seam.is_lora(layer)
    assert peft_seam.drops_out(layer)
    assert peft_seam.merges_otherwise(layer) is None
    assert not peft_seam.is_lora(model.base_model.model.model.layers[0].self_attn.k_proj)
    ours = peft_seam.merged_weight(layer)
    assert ours.requires_grad
    with peft_seam.adapters_off(model):
        assert peft_seam.merged_weight(layer) is layer.get_base_layer().weight
    assert torch.equal(ours, model.merge_and_unload().model.layers[0].self_attn.q_proj.weight)


def test_peft_merges_layers_of_dora() -> None:
    model: Any = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    torch.nn.init.uniform_(layer.lora_magnitude_vector["default"].weight, 0.5, 2)
    assert peft_seam.merges_otherwise(layer) is None
    hidden = torch.randn(3, layer.in_features)
    ours = peft_seam.merged_weight(layer)
    torch.testing.assert_close(hidden @ ours.T, layer(hidden), rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad(output.square().sum(), layer.lora_A["default"].weight)[0]
        for output in (hidden @ ours.T, layer(hidden))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours, model.merge_and_unload().model.layers[0].self_attn.q_proj.weight)


def test_peft_adapts_parameters_that_are_no_layers() -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    model: Any = get_peft_model(model_of_experts(), LoraConfig(r=2, **settings))
    layer = model.base_model.model.model.layers[0]
    assert peft_seam.adapts_a_parameter(layer.mlp.experts)
    assert not peft_seam.adapts_a_parameter(layer.self_attn.q_proj)


def test_peft_says_what_is_more_than_a_change_of_the_weight() -> None:
    config = LoraConfig(target_modules=["q_proj"], lora_bias=True)
    layer = get_peft_model(make_model(), config).base_model.model.model.layers[0].self_attn.q_proj  # pyright: ignore
    assert peft_seam.merges_otherwise(layer) == "lora_bias"


def test_peft_copies_modules() -> None:
    model: Any = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"]))
    wrapper = model.base_model.model.model.layers[0].mlp.up_proj
    assert len(peft_seam.copies_of(wrapper)) == 2
    assert all(isinstance(copy, torch.nn.Linear) for copy in peft_seam.copies_of(wrapper))


# datasets


def test_a_selection_knows_where_its_rows_were() -> None:
    rows = Dataset.from_dict({"number": [0, 1, 2]})
    assert datasets_seam.indices_of(rows) is None
    assert datasets_seam.indices_of(rows.select([2, 0])).column(0).to_pylist() == [2, 0]
    changed = rows.map(lambda row: {"number": row["number"] + 1})
    assert datasets_seam.fingerprint_of(changed) != datasets_seam.fingerprint_of(rows)
    assert datasets_seam.fingerprint_of(rows) == Dataset(rows.data, fingerprint=rows._fingerprint)._fingerprint


def test_files_of_datasets_open_by_address(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    with datasets_seam.xopen(str(tmp_path / "a.txt"), "rb") as file:
        assert file.read() == b"a"
    key = datasets_seam.Key(1, 2)
    assert (key.original_shard_id, key.item_or_batch_id) == (1, 2)


# lm-eval


def test_lm_eval_scores_texts() -> None:
    asked: list[Any] = []

    def rolling(requests: list[Any], disable_tqdm: bool) -> list[float]:
        asked.extend(request.args for request in requests)
        return [-1.0] * len(requests)

    lm = SimpleNamespace(loglikelihood_rolling=rolling)
    assert lm_eval_seam.rolling_log_likelihoods(lm, ["a", "b"]) == [-1.0, -1.0]
    assert asked == [("a",), ("b",)]
    kind = lm_eval_seam.model_class("hf")
    assert {"pretrained", "tokenizer", "batch_size"} <= {*parameters_of(kind.__init__)}
    assert parameters_of(kind.loglikelihood_rolling) == ["self", "requests", "disable_tqdm"]
    base = lm_eval_seam.base_of_models()
    assert issubclass(kind, base)
    abstract = {"_loglikelihood_tokens", "eot_token_id", "generate_until", "loglikelihood_rolling", "tok_encode"}
    assert base.__abstractmethods__ == abstract


# DeepSpeed


def test_deepspeed_marks_what_it_cuts() -> None:
    assert not deepspeed_seam.is_zero3()
    assert not deepspeed_seam.is_partitioned(torch.nn.Parameter(torch.zeros(1)))
    with deepspeed_seam.gathered([]):
        pass
    with deepspeed_seam.whole_for_now([torch.zeros(1)]):
        pass

    class Config:
        def is_zero3(self) -> bool:
            return True

    config: Any = Config()
    integration.set_hf_deepspeed_config(config)
    assert deepspeed_seam.is_zero3()
    with deepspeed_seam.without_zero3():
        assert not deepspeed_seam.is_zero3()
    assert deepspeed_seam.is_zero3()
    integration.unset_hf_deepspeed_config()
    deepspeed = pytest.importorskip("deepspeed")
    assert "ds_id" in inspect.getsource(deepspeed.runtime.zero.partition_parameters)
    source = inspect.getsource(deepspeed.runtime.zero.partition_parameters)
    assert all(name in source for name in ("ds_status", "ds_tensor", "ds_numel", "ds_shape", "ds_process_group"))
    assert parameters_of(deepspeed.runtime.zero.GatheredParameters.__init__)[:2] == ["self", "params"]
    offload = deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload
    assert "self.fwd_pre_hook = self.module.register_forward_pre_hook(" in inspect.getsource(offload)
    assert "self.parameter_offload" in inspect.getsource(deepspeed.runtime.zero.stage3)
    assert deepspeed_seam.weights_of(torch.nn.Parameter(torch.zeros(3))) == 3
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # pyright: ignore

    assert parameters_of(get_fp32_state_dict_from_zero_checkpoint)[0] == "checkpoint_dir"


# torch


def test_torch_knows_the_products_of_its_cpu() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert torch_seam.cpu_has_products_of(dtype) in (True, False)


def test_torch_runs_modules_without_their_hooks() -> None:
    module = torch.nn.Sequential(torch.nn.Identity())
    module[0].register_forward_hook(lambda *_: torch.ones(1))
    module[0].register_forward_pre_hook(lambda *_: (torch.full((1,), 2.0),))
    with torch_seam.without_hooks([module]):
        assert module(torch.zeros(1)) == 0
    assert module(torch.zeros(1)) == 1


def test_torch_lets_a_module_compute_with_other_values() -> None:
    module, value = torch.nn.Linear(2, 2, bias=False), torch.eye(2, requires_grad=True)
    own = module.weight
    with torch_seam.computing_with(module, {"weight": value}):
        module(torch.ones(1, 2)).sum().backward()
    assert module.weight is own
    assert own.grad is None
    assert value.grad is not None


def test_torch_runs_models_without_data() -> None:
    with torch_seam.without_data():
        weight = torch.zeros(1 << 20, 1 << 20)
        assert (weight @ weight).shape == weight.shape
        assert torch_seam.storage_key(weight) == torch_seam.storage_key(weight.T)
        assert torch_seam.storage_key(weight) != torch_seam.storage_key(torch.zeros(1))


def test_torch_counts_attention_by_our_formulas() -> None:
    formulas = torch_seam.cpu_attention_flops(lambda *_, **__: 7, lambda *_, **__: 11)
    query = torch.zeros(1, 2, 4, 8, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert counter.get_total_flops() == 18


def test_torch_shards_below_a_root() -> None:
    assert {"_get_fsdp_state", "unshard", "set_reshard_after_forward"} <= {*dir(FSDPModule)}
    state = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_state").FSDPState
    assert parameters_of(state._lazy_init) == ["self"]


def test_trl_takes_the_hooks_off_an_engine() -> None:
    utils = importlib.import_module("trl.models.utils")
    assert [parameters_of(hooks) for hooks in (utils.remove_hooks, utils.add_hooks)] == [["model"], ["model"]]


# Messages that are kept back


@pytest.mark.parametrize("message", upstream_messages.MESSAGES, ids=lambda message: message.text)
def test_a_message_that_is_kept_back_still_occurs(message: upstream_messages.Message) -> None:
    """One that upstream has dropped or reworded leaves the table."""
    module = pytest.importorskip(message.source)
    # A message is written over several lines.
    source = re.sub(r'"\s*\n\s*f?"', "", inspect.getsource(module))
    assert message.text in source
    if message.category is None:
        assert module.logger.name == message.source


def test_messages_are_kept_back_by_name_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def heard() -> list[str]:
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            upstream_messages.keep_back_messages()
            for message in upstream_messages.MESSAGES:
                for text in (message.printed, f"Something else than: {message.printed}"):
                    if message.category is None:
                        logging.getLogger(message.source).warning("%s and more", text)
                    else:
                        warnings.warn(f"{text} and more", message.category, stacklevel=1)
        return [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in caught]

    others = [text for text in heard() if text.startswith("Something else")]
    assert heard() == others
    assert len(others) == len(upstream_messages.MESSAGES)
    monkeypatch.setenv(upstream_messages.SHOW_ALL, "all")
    assert len(heard()) == 2 * len(others)
    monkeypatch.undo()
    upstream_messages.keep_back_messages()


# compressed-tensors


def test_packed_weights_can_be_unpacked_before_the_first_forward_pass(tmp_path):
    pytest.importorskip("compressed_tensors")
    make_model().save_pretrained(tmp_path / "model")
    write_compressed(str(tmp_path / "model"), tmp_path / "packed", StudentQuantisation.of("mxfp4"))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert hasattr(model, "ct_decompress_hook")
    assert not hasattr(model.model.layers[0].mlp.up_proj, "weight")
    compressed_tensors_seam.unpack_weights(model, torch.float64)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float64
    assert not hasattr(model, "ct_decompress_hook")
