"""Text, tokenizer and language models of the lab, all of which are made here.

The text is English that every environment of mmkd holds: the docstrings of Python's standard library, torch,
transformers and further packages of constraints.txt, about 17 MB. Passages are split by a hash of their module's name,
so that a module is in one split only.
"""

import ast
import hashlib
import importlib.util
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from transformers import LlamaConfig

from mmkd.files import write_file
from mmkd.prepare.small_models import make_tokenizer
from mmkd.recipe.recipe import Recipe
from mmkd.training.method import Train

FOLDER = Path(".cache/mmkd/lab")
PACKAGES = ("torch", "transformers", "scipy", "sympy", "numpy", "pandas", "networkx", "datasets", "accelerate", "peft")
VOCABULARY = 2048
SHORTEST = 200
"""Characters of a docstring that is a passage."""

SIZES = {"student": (128, 4), "small": (192, 4), "medium": (256, 5), "large": (384, 6)}
"""Width and layers: 1.1, 2.0, 4.1 and 10.7 million parameters."""

TEACHERS = Path(__file__).parent / "recipes"

_SKIPPED = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "site-packages"}


def docstrings(root: Path, name: str) -> Iterator[tuple[str, str]]:
    """(module, docstring) of everything under a folder that has a long one."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= SHORTEST:
                    yield "/".join((name, *parts)), text


def split_of(module: str) -> str:
    """Of 20 modules one is for validation and one for the test."""
    number = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 20
    return {0: "validation", 1: "test"}.get(number, "train")


def make_text(folder: Path) -> None:
    """Writes train.jsonl, validation.jsonl and test.jsonl, no passage twice."""
    roots = {"stdlib": Path(sysconfig.get_paths()["stdlib"])}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None, "mmkd needs all of them"
        assert spec.submodule_search_locations, "they are packages"
        roots[name] = Path(spec.submodule_search_locations[0])
    rows: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for name, root in roots.items():
        for module, text in docstrings(root, name):
            if text not in seen:
                seen.add(text)
                rows[split_of(module)].append(text)
    for split, texts in rows.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_file(folder / f"{split}.jsonl", "".join(lines))


def make_models(folder: Path) -> None:
    """Writes a tokenizer of the training text, and a config of each size beside it."""
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = make_tokenizer(texts, VOCABULARY, ("<pad>", "</s>"))
    for name, (width, layers) in SIZES.items():
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)


def prepare(train: Train) -> int:
    """Makes what is not there yet; the models take hours. Returns the status of the training that failed, or 0."""
    if not (FOLDER / "test.jsonl").is_file():
        make_text(FOLDER)
    if not (FOLDER / "models" / "large" / "tokenizer.json").is_file():
        make_models(FOLDER)
    for path in sorted(TEACHERS.glob("*.yaml")):
        recipe = Recipe.read(path)
        if not (Path(recipe.keys["output_dir"]) / "model.safetensors").is_file():
            print(f"Training {path.stem}.", flush=True)
            if status := train(recipe):
                return status
    return 0
