"""Which type is computed in: with bf16 instructions of the CPU shown and hidden, on every way to a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset

from mmkd import precision
from mmkd.cache.manifest import Manifest
from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.eval.harness import Harness, Settings
from mmkd.eval.measures import measure
from mmkd.eval.model import find_model
from mmkd.eval.suites import SuiteTask
from mmkd.methods.comd.roles import Roles
from mmkd.methods.dho.dho_trainer import DHOConfig
from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.models.load import load_model
from mmkd.precision import NATIVE_BF16, native_dtype, product_dtype
from mmkd.preflight.estimate import uses_bf16
from mmkd.preflight.hardware import choose_device
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from mmkd.recipe.run_models import load_teacher
from scripts.make_tiny_models import sentences
from tests.helpers import Build, losses_of

WORDS = "computed in float32"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a process of its own: what is said once was not said yet."""
    monkeypatch.setattr(precision, "_warned", [])


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE_BF16, "0")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE_BF16, "1")


@pytest.fixture
def half(tiny: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The tiny models, saved in bf16."""
    folders = {}
    for role in ("student", "teacher"):
        folders[role] = Path(shutil.copytree(tiny[role], tmp_path / f"half-{role}"))
        load_model(str(tiny[role]), dtype="bfloat16").save_pretrained(folders[role])
    return folders


def without_dtype(folder: Path) -> None:
    """Takes the type out of a model's config, as older ones have none."""
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def recipe(half: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A KD recipe of models in bf16 that names no type."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "eval"):
        pairs = zip(sentences(12, seed=1), sentences(12, seed=2), strict=True)
        rows = [json.dumps({"prompt": f"{prompt} ", "completion": answer}) for prompt, answer in pairs]
        Path(f"{split}.jsonl").write_text("\n".join(rows))
    columns = {name: name for name in ("prompt", "completion")}
    data: dict[str, Any] = {"name": "words", "license": "CC0-1.0", "source": "json", "columns": columns}
    data["data_files"] = {split: f"{split}.jsonl" for split in ("train", "eval")}
    Path("words.yaml").write_text(yaml.safe_dump(data | {"splits": {"train": "train", "eval": "eval"}}))
    keys: dict[str, Any] = {"method": "kd", "data": "words.yaml", "output_dir": "run", "max_steps": 1}
    keys |= {"student": str(half["student"]), "teacher": str(half["teacher"]), "per_device_train_batch_size": 4}
    keys |= {"save_strategy": "no", "report_to": "none", "logging_steps": 1}
    Path("recipe.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("onednn", "flags", "expected"),
    [
        (True, {"avx512_bf16": True}, torch.bfloat16),
        (True, {"amx_bf16": True}, torch.bfloat16),
        (True, {"bf16": True, "neon": True}, torch.bfloat16),
        # Skylake: oneDNN supports the type, and emulates it.
        (True, {"avx512_f": True, "avx512_bf16": False}, torch.float32),
        # ONEDNN_MAX_CPU_ISA=AVX2 on a new processor.
        (False, {"avx512_bf16": True}, torch.float32),
        (False, {"avx2": True}, torch.float32),
    ],
)
def test_bf16_is_native_where_onednn_and_the_processor_have_it(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, flags: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.delenv(NATIVE_BF16, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert native_dtype("cpu") == expected
    assert product_dtype(torch.float32, "cpu") == torch.float32
    assert product_dtype(torch.float64, "cpu") == torch.float64
    assert product_dtype(torch.bfloat16, "cuda:0") == torch.bfloat16
    assert product_dtype(torch.float16, "cuda") == torch.float16


def test_without_onednn_nothing_multiplies_bf16_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NATIVE_BF16, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert native_dtype("cpu") == torch.float32


def test_the_variable_overrules_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("0", torch.float32), ("1", torch.bfloat16)):
        monkeypatch.setenv(NATIVE_BF16, value)
        assert native_dtype("cpu") == expected
    # Whoever insists means both half types.
    assert product_dtype(torch.float16, "cpu") == torch.float16
    monkeypatch.setenv(NATIVE_BF16, "yes")
    with pytest.raises(UserError, match="MMKD_NATIVE_BF16 is 'yes'; set it to 1 or 0"):
        native_dtype("cpu")


@pytest.mark.parametrize("cls", [KDConfig, DHOConfig])
@pytest.mark.parametrize("asked", [True, False])
def test_settings_ask_for_bf16_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cls: Any, asked: bool
) -> None:
    for value in ("0", "1"):
        monkeypatch.setenv(NATIVE_BF16, value)
        args = cls(str(tmp_path), bf16=asked, report_to="none", use_cpu=True)
        computed = asked and value == "1"
        assert (args.bf16, args.mixed_precision) == (computed, "bf16" if computed else "no")
        assert args.emulated_bf16 == (asked and not computed)
        assert "emulated_bf16" not in args.to_dict()


def test_an_accelerate_config_that_says_bf16_is_no_way_around(
    hidden: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert KDConfig(str(tmp_path), bf16=False, use_cpu=True).mixed_precision == "no"


def test_training_that_asks_for_bf16_is_that_in_fp32_and_says_so_once(
    hidden: None, build: Build, texts: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    losses = []
    for settings in ({"bf16": False}, {"bf16": True}, {"bf16": None}):
        trainer = build(KDTrainer, texts, max_steps=2, **settings)
        trainer.train()
        losses.append(losses_of(trainer))
        said = [record for record in caplog.records if WORDS in record.getMessage()]
        assert len(said) == (settings["bf16"] is not False)
    assert losses[0] == losses[1] == losses[2]
    assert f"set {NATIVE_BF16}=1 in the environment" in said[0].getMessage()


def test_training_in_bf16_stays_where_it_is_native(
    shown: None, build: Build, texts: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    losses = []
    for bf16 in (True, False):
        trainer = build(KDTrainer, texts, max_steps=1, bf16=bf16)
        assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert WORDS not in caplog.text


@pytest.mark.parametrize(("value", "expected"), [("0", torch.float32), ("1", torch.bfloat16)])
def test_models_of_a_recipe_come_in_the_type_that_is_computed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, expected: Any
) -> None:
    monkeypatch.setenv(NATIVE_BF16, value)
    for flags in ([], ["--teacher_dtype", "bfloat16"]):
        run = recipe_of("recipe.yaml", flags).parse()
        assert load_teacher(run, str(run.arguments.teacher)).dtype == expected
    trainer: Any = build_trainer(recipe_of("recipe.yaml", ["--dtype", "bfloat16"]).parse())
    assert trainer.model.dtype == trainer.teacher.model.dtype == expected


def test_models_of_the_python_trainers_come_in_the_type_that_is_computed(
    hidden: None, half: dict[str, Path], build: Build, texts: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    names: dict[str, Any] = {role if role == "teacher" else "model": str(half[role]) for role in half}
    trainer = build(KDTrainer, texts, trainer=names, model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.dtype == trainer.teacher.model.dtype == torch.float32
    assert "Load it with" not in caplog.text
    # A model that somebody made is theirs.
    given = {role: load_model(name, dtype="bfloat16") for role, name in names.items()}
    trainer = build(KDTrainer, texts, trainer=given)
    assert trainer.teacher.model.dtype == torch.bfloat16
    for role in ("student", "teacher"):
        assert f"The {role} is in bfloat16, which this CPU emulates" in caplog.text


def test_the_type_of_weights_whose_config_names_none_is_found(hidden: None, half: dict[str, Path]) -> None:
    without_dtype(half["teacher"])
    assert load_model(str(half["teacher"]), device="cpu").dtype == torch.float32
    assert load_model(str(half["teacher"])).dtype == torch.bfloat16


@pytest.mark.parametrize("job", ["score", "generate"])
def test_a_cache_records_what_was_computed_and_is_gone_on_with_and_read(
    hidden: None, recipe: Path, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    flags = ["recipe.yaml", "--teacher_cache", "cache", "--cache_shard_rows", "8", "--teacher_top_k", "8"]
    build = ["cache", "build", *flags, "--job", job, "--cache_max_new_tokens", "4"]
    assert main([*build, "--teacher_dtype", "bfloat16"]) == 0
    assert Manifest.read(Path("cache")).identity["teacher"]["dtype"] == "float32"
    capsys.readouterr()
    assert main(build) == 0
    assert "shards are there and intact" in capsys.readouterr().err
    if job == "score":
        for dtype in ("auto", "bfloat16", "float32"):
            assert main(["train", *flags[:3], "--teacher_dtype", dtype]) == 0


def test_a_cache_in_bf16_is_read_where_it_cannot_be_gone_on_with(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["recipe.yaml", "--teacher_cache", "cache", "--teacher_dtype", "bfloat16"]
    monkeypatch.setenv(NATIVE_BF16, "1")
    assert main(["cache", "build", *flags]) == 0
    assert Manifest.read(Path("cache")).identity["teacher"]["dtype"] == "bfloat16"
    monkeypatch.setenv(NATIVE_BF16, "0")
    assert main(["train", *flags]) == 0
    capsys.readouterr()
    assert main(["cache", "build", *flags]) == 2
    refused = capsys.readouterr().err
    assert "teacher.dtype: 'float32' here, 'bfloat16' there. A cache is of one type." in refused
    assert f"set {NATIVE_BF16}=1 to emulate it" in refused


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("value", "expected"), [("0", "float32"), ("1", "auto")])
def test_results_are_kept_by_the_type_that_was_computed(
    half: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: str, named: bool
) -> None:
    monkeypatch.setenv(NATIVE_BF16, value)
    if not named:
        without_dtype(half["student"])
    model = find_model(str(half["student"]))
    for dtype in ("auto", "bfloat16"):
        told = expected if value == "0" else dtype
        settings = Settings(dtype=dtype, device="cpu")
        harness = Harness(model, settings)
        monkeypatch.setattr(Harness, "_model_type", lambda self, task: "hf")
        task: Any = type("Task", (), {"vision": False, "needs_template": False, "name": "some"})
        assert harness.settings_of(SuiteTask("some"), task)["model_args"]["dtype"] == told
    entry = measure(model, ["cost"], None, Settings(device="cpu"), output=tmp_path / "results")["cost"]
    assert entry["settings"]["dtype"] == expected
    assert entry["values"]["student"]["dtype"] == ("float32" if value == "0" else "bfloat16")


@pytest.mark.parametrize(("value", "expected"), [("0", torch.float32), ("1", torch.bfloat16)])
def test_lm_eval_computes_in_the_type_that_is_recorded(
    half: dict[str, Path], monkeypatch: pytest.MonkeyPatch, value: str, expected: torch.dtype
) -> None:
    monkeypatch.setenv(NATIVE_BF16, value)
    without_dtype(half["student"])
    harness = Harness(find_model(str(half["student"])), Settings(model_type="hf", device="cpu"))
    task: Any = type("Task", (), {"vision": False, "name": "some"})
    asked = harness.settings_of(SuiteTask("some"), task)
    assert harness._load("hf", asked["model_args"]).model.dtype == expected
    # What the user says about it stands.
    told = Harness(harness.model, Settings(model_type="hf", device="cpu", model_args={"dtype": "bfloat16"}))
    assert told.settings_of(SuiteTask("some"), task)["model_args"]["dtype"] == "bfloat16"


def test_weights_of_float32_need_no_other_type(hidden: None, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["student"], tmp_path / "whole"))
    without_dtype(folder)
    assert find_model(str(folder)).computed_dtype("auto", "cpu") == "auto"


def test_roles_of_comd_compute_and_record_float32(hidden: None, half: dict[str, Path], recipe: Path) -> None:
    run = recipe_of("recipe.yaml", ["--method", "comd"]).parse()
    roles = Roles(run)
    assert roles.teacher.identity["dtype"] == "float32"  # pyright: ignore[reportAttributeAccessIssue]
    model, _ = roles.teacher._load()  # pyright: ignore[reportAttributeAccessIssue]
    assert model.dtype == torch.float32


def test_a_plan_is_of_the_device_that_it_is_for(hidden: None, recipe: Path) -> None:
    args = recipe_of("recipe.yaml", []).parse().training
    assert uses_bf16(args, "cuda")
    assert not uses_bf16(args, "cpu")
    assert choose_device("here", None, None).dtype == "fp32"
    assert choose_device("H100", None, None).dtype == "bf16"
