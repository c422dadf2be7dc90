"""Recipes of cells: the models, rows, caches and servers that they name."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scripts.combination_axes import FURTHER, OWN_COPY, Cell, is_exact
from scripts.make_tiny_models import make_model, make_tiny_models, save, sentences
from tests.alignment.tiny_tokenizers import CHATTERS
from tests.combinations.served_model import serve, serve_student
from tests.teachers.caches import build_cache
from tests.vlms import make_llava, picture

ROWS = 24
ROUTES = ["a" if row % 5 in (0, 1, 4) else "b" for row in range(ROWS)]

SHARED: dict[str, Any] = {
    "max_steps": 2,
    # Adam makes a large step of a gradient that is nothing but rounding, and hides a gradient of another scale.
    "optim": "sgd",
    "learning_rate": 0.3,
    "bf16": False,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": 64,
}
# A server of log-probs does not tell what the default, merge, asks for.
METHODS: dict[str, dict[str, Any]] = {"alm": {"chunks": "all"}}
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
STUDENTS: dict[str, dict[str, Any]] = {"full": {}, "LoRA": LORA, "QLoRA": {**LORA, "load_in_4bit": True}}
ON_POLICY: dict[str, Any] = {
    "on_policy_fraction": 0.5,
    "rollout_max_tokens": 8,
    "rollout_temperature": 0.0,
    "rollout_patience": 0,
}
ANSWERS: dict[str, dict[str, Any]] = {
    "off-policy": {},
    "on-policy": ON_POLICY,
    "on-policy served": ON_POLICY,
    "packed": {"packing": True},
    "packed on-policy": {**ON_POLICY, "packing": True},
}
RANKS: dict[str, dict[str, Any]] = {
    "1 rank": {"per_device_train_batch_size": 4},
    "DDP": {"per_device_train_batch_size": 2},
    "FSDP2": {"per_device_train_batch_size": 2},
    "ZeRO-3": {"per_device_train_batch_size": 2},
}


@dataclass
class CellRecipes:
    """Writes the recipe of a cell, with everything that it names."""

    folder: Path
    stack: ExitStack
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Any) -> Any:
        """What `make` gives, made when it is asked for first."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def recipe(self, cell: Cell, **keys: Any) -> Path:
        """The recipe of a cell, with other keys besides."""
        settings = {
            **SHARED,
            "method": cell.method,
            "student": str(self._student(cell)),
            "data": str(self._data(cell)),
            **METHODS.get(cell.method, {}),
            **STUDENTS[cell.student],
            **ANSWERS[cell.answers],
            **RANKS[cell.ranks],
            **({"assistant_only_loss": True, "max_length": 128} if cell.data == "images" else {}),
            **self._teacher_keys(cell),
            **(FURTHER[cell.besides].keys if cell.besides in FURTHER else {}),
        }
        if cell.answers == "on-policy served":
            settings["rollout_server"] = [self.stack.enter_context(serve_student(self._student(cell)))]
        if cell.ranks == "ZeRO-3":
            settings["deepspeed"] = str(self.once("zero3", self._zero3))
        return self._written(str(cell), {**settings, **keys})

    def _written(self, name: str, keys: Mapping[str, Any]) -> Path:
        folder = self.folder / "recipes"
        folder.mkdir(exist_ok=True)
        stem = "".join(letter if letter.isalnum() else "-" for letter in name)
        path = folder / f"{stem}.yaml"
        path.write_text(yaml.safe_dump({**keys, "output_dir": str(self.folder / "runs" / stem)}))
        return path

    # The teacher

    def _teacher_keys(self, cell: Cell) -> dict[str, Any]:
        """The keys that say who teaches."""
        teacher = str(self._teacher(cell))
        if _is_own(cell):
            return {"teacher": "self" if cell.teacher == "self" else teacher, **_apart(cell)}
        if not cell.teacher.startswith("several"):
            return {"teacher": teacher, **self._source(cell, cell.teacher)}
        # The same teacher in two forms, which is that teacher.
        second = "top-k server" if "on-policy" in cell.answers else "top-k cache"
        if cell.teacher == "several, routed" and is_exact(cell._replace(teacher="hidden-state server")):
            second = "hidden-state server"
        if cell.method == "llava_kd":
            second = "hidden-state server"
        parts = {"a": {"teacher": teacher}, "b": {"teacher": teacher, **self._source(cell, second)}}
        if cell.teacher == "several, routed":
            return {"teachers": parts, "teacher_column": "domain"}
        return {"teachers": {"a": {**parts["a"], "weight": 1}, "b": {**parts["b"], "weight": 3}}}

    def _source(self, cell: Cell, teacher: str) -> dict[str, Any]:
        """The keys of a teacher that answers from there."""
        vocabulary = self._vocabulary(cell)
        if teacher.endswith("cache"):
            return {"teacher_cache": str(self._cache(cell, teacher)), "teacher_top_k": vocabulary}
        if teacher.endswith("server"):
            folder = self._teacher(cell)
            signal = "hidden" if teacher.startswith("hidden") else "top_k"
            url = self.once((signal, folder), lambda: self.stack.enter_context(serve(folder, signal)))
            # What text servers run is asked.
            named = {"teacher_server_signal": signal} if self._has_images(cell) else {}
            return {"teacher_server": [url], "teacher_top_k": vocabulary, **named}
        return {}

    def _cache(self, cell: Cell, teacher: str) -> Path:
        """A cache of the sequences that a cell trains on."""
        # What is kept does not depend on these.
        method = cell.method if cell.method in ("alm", "llava_kd") else "kd"
        merged = cell.besides if cell.besides == "merged chunks" else ""
        plain = Cell(method=method, data=cell.data, besides=merged)
        models = self._student(cell), self._teacher(cell)
        folder = self.folder / f"cache-{len(self._made)}"

        def build() -> Path:
            signal = "hidden" if teacher == "hidden-state cache" else "log_probs" if method == "alm" else "top_k"
            exact = {"cache_hidden_dtype": "float32"} if signal == "hidden" else {}
            keys = {"teacher_cache": str(folder), "cache_signal": signal, "teacher_top_k": self._vocabulary(cell)}
            recipe = self.recipe(plain, student=str(models[0]), teacher=str(models[1]), **keys, **exact)
            return build_cache(recipe)

        return self.once(("cache", teacher, plain, *models), build)

    # Models and rows

    def _student(self, cell: Cell) -> Path:
        return self._models(cell)["student"]

    def _teacher(self, cell: Cell) -> Path:
        return self._models(cell)["teacher"]

    def _models(self, cell: Cell) -> dict[str, Path]:
        if _is_own(cell):
            student = self._models(Cell(data=cell.data, method="kd" if cell.method == "alm" else cell.method))[
                "student"
            ]
            return {"student": student, "teacher": student}
        if self._has_images(cell):
            return self.once("vlms", self._vlms)
        tiny = self.once("tiny", lambda: make_tiny_models(self.folder / "tiny"))
        return {**tiny, "teacher": self.once("foreign", self._foreign)} if cell.method == "alm" else tiny

    def _has_images(self, cell: Cell) -> bool:
        """Whether student and teacher read images."""
        return cell.data == "images" or cell.method == "llava_kd"

    def _vlms(self) -> dict[str, Path]:
        return {
            "teacher": make_llava(self.folder / "vlm_teacher", seed=1, layers=3, width=48),
            "student": make_llava(self.folder / "vlm_student", seed=2),
        }

    def _foreign(self) -> Path:
        tokenizer: Any = CHATTERS["gemma"]()
        model = make_model(layers=3, width=48, seed=4, rows=len(tokenizer))
        return save(model, tokenizer, self.folder / "foreign")

    def _vocabulary(self, cell: Cell) -> int:
        config = json.loads((self._teacher(cell) / "config.json").read_text())
        return config.get("text_config", config)["vocab_size"]

    def _data(self, cell: Cell) -> Path:
        held_out = cell.besides.startswith("evaluation")
        return self.once(("data", cell.data, held_out), lambda: self._source_of(cell.data, held_out))

    def _source_of(self, kind: str, held_out: bool) -> Path:
        """A data recipe, of whose rows some are held out."""
        asked, told = sentences(ROWS, seed=3), sentences(ROWS, seed=4)
        rows = [
            {"prompt": question, "completion": f" {answer}", "domain": route}
            for question, answer, route in zip(asked, told, ROUTES, strict=True)
        ]
        if kind == "images":
            rows = [self._with_images(number, row) for number, row in enumerate(rows)]
        (self.folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = {
            "name": kind,
            "license": "CC0-1.0",
            "source": "json",
            "columns": {name: name for name in rows[0]},
            "data_files": {"train": f"{kind}.jsonl"},
            "splits": {"train": "train"},
            "shuffle_seed": None,
            **({"eval_rows": 5, "shuffle_seed": 7} if held_out else {}),
        }
        path = self.folder / f"{kind}-{held_out}.yaml"
        path.write_text(yaml.safe_dump(source))
        return path

    def _with_images(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        """A row whose question is about no, one or two pictures."""
        paths = [self.folder / f"{number}-{image}.png" for image in range((1, 2, 0)[number % 3])]
        for image, path in enumerate(paths):
            picture(100 * number + image).save(path)
        content = [*({"type": "image"} for _ in paths), {"type": "text", "text": row["prompt"]}]
        said = [{"type": "text", "text": row["completion"].strip()}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
        return {"messages": messages, "images": list(map(str, paths)), "domain": row["domain"]}

    def _zero3(self) -> Path:
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        settings = {
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **dict.fromkeys((*sizes, "gradient_clipping"), "auto"),
        }
        path = self.folder / "zero3.json"
        path.write_text(json.dumps(settings))
        return path


def _is_own(cell: Cell) -> bool:
    """Whether a cell's student teaches itself, or is taught by a copy of itself."""
    return cell.teacher == "self" or cell.besides == OWN_COPY


def _apart(cell: Cell) -> dict[str, Any]:
    """What a student can learn although its teacher is the same model: the data, or what the teacher alone reads."""
    if "on-policy" in cell.answers:
        return {"teacher_view": {"template": "Read this well. {prompt}"}}
    # Their losses have a cross-entropy anyway.
    return {} if cell.method in ("sft", "llava_kd") else {"ce_weight": 0.5}


@contextmanager
def cell_recipes(folder: Path) -> Iterator[CellRecipes]:
    """Recipes in a folder, whose servers run as long as this lasts."""
    with ExitStack() as stack:
        yield CellRecipes(folder, stack)
