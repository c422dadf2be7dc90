"""Models, caches, recipes and templates of strangers: what they bring is data, and none of it runs."""

import ast
import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPConfig, CLIPModel, ViTConfig, ViTModel

from mmkd.cache.manifest import Manifest
from mmkd.cache.side_files import TOKEN_ORDER, codec_of
from mmkd.data.data_recipe import DataRecipe
from mmkd.errors import UserError
from mmkd.methods.kd import KDTrainer
from mmkd.models.adapters import merge_adapter, with_adapter
from mmkd.models.dual_head import DualHeadForImageClassification
from mmkd.models.load import load_model, load_processing_class
from mmkd.recipe.recipe import Recipe
from mmkd.teachers.classifiers import TransformersEmbedder
from mmkd.yaml_files import read_yaml
from tests.helpers import VISION, Build

ROOT = Path(__file__).resolve().parents[2]


class Opened:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once code of a file has run."""
    return tmp_path / "ran"


def test_the_mark_tells(mark: Path) -> None:
    """Otherwise the tests below could not fail."""
    pickle.loads(pickle.dumps(Opened(mark))).close()
    assert mark.is_file()


def pickled(folder: Path, name: str, mark: Path) -> None:
    """Puts a pickle that runs code in the place of the safetensors of a folder."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"a": Opened(mark)}, folder / name)


def saved(model: Any, folder: Path, mark: Path) -> str:
    model.save_pretrained(folder)
    pickled(folder, "pytorch_model.bin", mark)
    return str(folder)


def test_weights_that_are_pickles_are_refused(tiny: dict[str, Path], tmp_path: Path, mark: Path) -> None:
    vit, clip = ViTModel(ViTConfig(**VISION)), CLIPModel(CLIPConfig(vision_config=VISION, text_config=VISION))
    plain = Path(shutil.copytree(tiny["student"], tmp_path / "model"))
    pickled(plain, "pytorch_model.bin", mark)
    tower, dual = saved(vit, tmp_path / "vit", mark), saved(clip, tmp_path / "clip", mark)
    refused: list[tuple[Any, ...]] = [
        (load_model, str(plain)),
        (load_model, str(plain), "teacher"),
        (DualHeadForImageClassification.from_backbone, tower, ["a", "b"]),
        (TransformersEmbedder.load, dual),
    ]
    for call, *arguments in refused:
        with pytest.raises((UserError, OSError), match="safetensors"):
            call(*arguments)
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_not_opened(tiny: dict[str, Path], tmp_path: Path, mark: Path) -> None:
    folder = Path(shutil.copytree(tiny["student"], tmp_path / "model"))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        torch.save(Opened(mark), folder / name)
    expected, loaded = load_model(str(tiny["student"])), load_model(str(folder))
    assert all(map(torch.equal, expected.state_dict().values(), loaded.state_dict().values()))
    assert not mark.exists()


def test_an_adapter_that_is_a_pickle_is_refused(tiny: dict[str, Path], tmp_path: Path, mark: Path) -> None:
    base = load_model(str(tiny["student"]))
    adapter = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules="all-linear", base_model_name_or_path=str(tiny["student"]))
    get_peft_model(base, config).save_pretrained(str(adapter))
    assert with_adapter(load_model(str(tiny["student"])), adapter)
    pickled(adapter, "adapter_model.bin", mark)
    for call in (
        lambda: with_adapter(load_model(str(tiny["student"])), adapter),
        lambda: merge_adapter(adapter, tmp_path / "merged"),
        lambda: load_model(str(adapter)),
    ):
        with pytest.raises(UserError, match="pickle"):
            call()
    assert not mark.exists()
    assert not (tmp_path / "merged").exists()


def test_a_damaged_adapter_is_named(tiny: dict[str, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules="all-linear", base_model_name_or_path=str(tiny["student"]))
    get_peft_model(load_model(str(tiny["student"])), config).save_pretrained(str(adapter))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"adapter.* cannot be read"):
        with_adapter(load_model(str(tiny["student"])), adapter)


def test_the_order_of_tokens_of_a_cache_is_no_pickle(tmp_path: Path, mark: Path) -> None:
    """With a checksum that fits: whoever publishes a cache can write any manifest."""
    sink = io.BytesIO()
    np.save(sink, np.array([Opened(mark)], dtype=object), allow_pickle=True)
    (tmp_path / TOKEN_ORDER).write_bytes(sink.getvalue())
    signal = {"kind": "top_k", "k": 4, "tail_draws": 3, "vocab_size": 300}
    signal["token_order"] = hashlib.sha256(sink.getvalue()).hexdigest()
    with pytest.raises(UserError, match=f"{TOKEN_ORDER} is missing or damaged"):
        codec_of(tmp_path, Manifest({"signal": signal}, 4, {"train": 8}))
    assert not mark.exists()


def with_code(folder: Path, mark: Path) -> str:
    """Makes a model one of a class of its own, which its folder brings."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    code = (
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "own.py").write_text(code)
    return str(folder)


def test_code_of_a_model_runs_with_trust_alone(
    tiny: dict[str, Path], tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Where a terminal could be asked, transformers asks; a run has none.
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)
    name = with_code(Path(shutil.copytree(tiny["student"], tmp_path / "own_model")), mark)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(name)
    assert not mark.exists()
    load_model(name, trust_remote_code=True)
    assert mark.is_file()


def test_code_of_a_tokenizer_does_not_run(tiny: dict[str, Path], tmp_path: Path, mark: Path) -> None:
    folder = Path(shutil.copytree(tiny["student"], tmp_path / "own_tokenizer"))
    keys = json.loads((folder / "tokenizer_config.json").read_text())
    keys |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.raises((UserError, ValueError), match=r"."):
        load_processing_class(str(folder))
    assert not mark.exists()


TAGS = ("!!python/object/apply:builtins.open [{0}, w]", "!!python/object/new:builtins.open [{0}, w]")
TAGS += ("!!python/name:os.system", "!!python/module:os", "!!python/tuple [1]")


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_makes_plain_values_alone(tag: str, tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: kd\ndata: {tag.format(mark)}\n")
    for read in (read_yaml, Recipe.read, lambda name: DataRecipe.load(str(name))):
        with pytest.raises(UserError, match="not valid YAML"):
            read(path)
    assert not mark.exists()


def test_data_names_no_functions(tmp_path: Path) -> None:
    """Functions are named in the recipe of a run, which is its user's own, and nowhere else."""
    path = tmp_path / "data.yaml"
    for key in ("verifier", "cache_verifier", "reward", "reward_functions", "prepare_function"):
        keys = {"source": "json", "data_files": {"train": "x"}, "columns": {"text": "text"}, key: "python:os:system"}
        path.write_text(yaml.safe_dump(keys))
        with pytest.raises(UserError, match=key):
            DataRecipe.load(str(path))


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_chat_templates_are_sandboxed(
    template: str, build: Build, tiny: dict[str, Path], chats: Dataset, mark: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny["student"])
    tokenizer.chat_template = template.replace("MARK", str(mark))
    model = AutoModelForCausalLM.from_pretrained(tiny["student"])
    with pytest.raises(UserError, match=r"."):
        build(KDTrainer, chats, trainer={"processing_class": tokenizer, "model": model})
    assert not mark.exists()


def calls() -> list[tuple[str, ast.Call]]:
    """All calls in the package, with their places."""
    found = []
    for path in sorted((ROOT / "mmkd").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [
            (f"{path.relative_to(ROOT)}:{node.lineno}", node) for node in ast.walk(tree) if isinstance(node, ast.Call)
        ]
    return found


def test_nothing_is_read_that_could_run() -> None:
    """Pickles with weights_only, YAML by safe loaders, Jinja in a sandbox; weights of transformers as safetensors."""
    wrong, seen = [], set()
    for place, call in calls():
        name = ast.unparse(call.func)
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        fine = {
            "torch.load": keywords.get("weights_only") == "True",
            # Of what workers of the same run have just made.
            "pickle.loads": place.startswith("mmkd/capture/distributed.py"),
            "pickle.load": False,
            "yaml.load": "_Loader" in ast.unparse(call),
            "yaml.full_load": False,
            "yaml.unsafe_load": False,
            "np.load": keywords.get("allow_pickle") == "False",
            # To read the words of a template, which is not rendered.
            "jinja2.Environment": place.startswith("mmkd/models/token_counts.py"),
            "Environment": False,
            "Template": False,
            "eval": False,
            "exec": False,
            "os.system": False,
        }
        seen |= {name} & fine.keys()
        if not fine.get(name, True):
            wrong.append(f"{place}: {ast.unparse(call)[:100]}")
    assert not wrong
    assert {"torch.load", "yaml.load", "np.load", "pickle.loads"} <= seen
