"""Made what lies in v0.1 and parsed.json, with mmkd 0.1.0 at commit 2ca031e, and is kept to say how.

`python -m tests.compat.make` writes both anew with the mmkd that is imported, which is of use at the next release
only: what an older one wrote is what `tests/test_compat.py` reads.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmkd.commands.main import main
from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences
from tests.classes import NAMES, make_clip, pictures, pixels, vit
from tests.compat.values import own_keys_of, values_of

HERE = Path(__file__).parent
PLACE, RECIPES, PARSED = HERE / "v0.1", HERE / "recipes", HERE / "parsed.json"

COMMON: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
SAVED = {"save_strategy": "steps", "save_steps": 3}
TINY = {"student": "models/student", "teacher": "models/teacher", "data": "words.yaml", "max_length": 64}
COMPARE = ["compare", "short.yaml", "--seeds", "0", "--output", "compared", "--learning_rate", "2e-2"]
TASKS = ["--tasks", "tiny_choice", "tiny_text", "--include_path", "tasks", "--batch_size", "4"]

FLAGS: dict[str, list[list[str]]] = {
    "numbers": [
        [],
        ["--learning_rate", "1e-4", "--max_steps=7", "--temperature", "3"],
        ["--max_steps", "7", "--max_steps", "8", "--bf16", "no", "--warmup_steps", "0.1"],
    ],
    "text": [[], ["--run_name", "007", "--teacher_revision=1e5"], ["--teacher_revision", "null"]],
    "lists": [
        [],
        ["--student_layers", "0", "2", "5", "--lora_target_modules", "q_proj", "v_proj", "--report_to", "none"],
        ["--teacher_server", "http://a:1", "http://b:2", "--label_names", "labels"],
    ],
    "env": [[]],
    "nothing": [[], ["--max_train_rows", "none", "--teacher_revision", "null"]],
    "stages": [
        [],
        ["--stages", "SFT", "KD", "--learning_rate", "1e-5"],
        ["--stages", "KD", "--output_dir", "elsewhere", "--student", "org/earlier"],
    ],
    "teachers": [
        [],
        ["--teachers", '{"a": {"teacher": "org/a"}, "b": {"teacher_cache": "caches/b", "weight": 3}}'],
    ],
    "teacher_of_a_row": [[]],
    "launched": [[], ["--num_processes", "4", "--accelerate_config", "fsdp2", "--max_steps", "5"]],
    "comd": [[], ["--round_settings", '{"divergence": "jsd", "beta": 0.5}', "--rounds", "0"]],
    "dho": [[], ["--alphas", "0", "0.5", "1", "--betas", "1", "--objective", "ce"]],
    "cache": [[], ["--shard", "1/4", "--job", "score"]],
    "alm": [[]],
    "llava_kd": [[], ["--trainable", "connector", "language_model"]],
    "on_policy": [[], ["--model_init_kwargs", '{"attn_implementation": "eager"}']],
    **{f"least_{method}": [[]] for method in ("alm", "comd", "dho", "kd", "llava_kd", "sft", "taid")},
}
"""Recipe -> the flags that follow it, one command line each."""


def make() -> None:
    """Writes the folder of 0.1, and what its recipes mean."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    before = Path.cwd()
    os.chdir(PLACE)
    write_models()
    write_rows()
    write_recipes()
    told: dict[str, Any] = {}
    run("train", "speaker.yaml")
    for name in ("trainer_state.json", "log.jsonl", "run.json", "training_args.bin"):
        Path("models/speaker", name).unlink()
    for name in ("kd", "taid", "dho", "adapter"):
        run("train", f"{name}.yaml")
        told[name] = log_of(f"runs/{name}")
        interrupt(f"runs/{name}", step=3)
    make_caches(told)
    make_stages(told)
    make_rounds(told)
    run("train", "kd.yaml", "--output_dir", "runs/finished", "--save_strategy", "no", "--learning_rate", "2e-2")
    run("eval", "runs/finished", *TASKS, "--measures", "cost", "bytes", "--data", "words.yaml", "--rows", "4")
    run(*COMPARE)
    # Only its weights are left out: nothing that is kept is read from them.
    for path in Path("compared").glob("*/*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("log.jsonl", "run.json"):
            path.unlink() if path.parent.name != "measured" else None
    Path("expected.json").write_text(json.dumps(told, indent=1) + "\n")
    for path in [*PLACE.rglob("*.lock"), *PLACE.rglob(".gitignore")]:
        path.unlink()
    os.chdir(HERE)
    write_parsed()
    os.chdir(before)


def run(*command: str) -> None:
    """Runs a command of mmkd."""
    assert main(list(command)) == 0, command


def write_models() -> None:
    """Models of some thousand parameters."""
    tokenizer, other = make_tokenizer(), make_tokenizer(280)
    save(make_model(width=8, layers=1, seed=2, rows=len(tokenizer)), tokenizer, Path("models/student"))
    save(make_model(width=16, layers=1, seed=1, rows=len(tokenizer)), tokenizer, Path("models/teacher"))
    save(make_model(width=8, layers=1, seed=3, rows=len(other)), other, Path("models/other_student"))
    make_clip(Path("models/clip"))
    vit().config.backbone_config.save_pretrained("models/vit")
    pixels().save_pretrained("models/vit")


def write_rows() -> None:
    """Texts, questions with answers, and pictures, with their data recipes and tasks."""
    rows = {
        split: [
            {"text": text, "question": question, "answer": answer, "choices": [" cat", " dog", " tree"]}
            for text, question, answer in zip(
                sentences(12, seed=seed),
                sentences(12, seed=5 + seed, low=5),
                sentences(12, seed=7 + seed),
                strict=True,
            )
        ]
        for split, seed in (("train", 0), ("eval", 1))
    }
    for split, own in rows.items():
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    files = {
        "data_files": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "splits": {"train": "train", "eval": "eval"},
    }
    words = {"name": "words", "license": "CC0-1.0", "source": "json", **files, "shuffle_seed": None}
    write("words.yaml", {**words, "columns": {"text": "text"}})
    chats = {"columns": {"messages": {"user": "{question}", "assistant": "{answer}"}}}
    write("chats.yaml", {**words, "name": "chats", **chats})
    short = [{**row, "answer": "house"} for row in rows["train"]]
    Path("short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    write("short_chats.yaml", {**words, **chats, "data_files": {"train": "short.jsonl"}, "splits": {"train": "train"}})
    for split, per_class, seed in (("train", 6, 0), ("validation", 2, 1), ("test", 2, 2)):
        pictures(per_class, seed).to_parquet(f"{split}.parquet")
    splits = ("train", "validation", "test")
    write(
        "pictures.yaml",
        {
            "source": "parquet",
            "data_files": {split: f"{split}.parquet" for split in splits},
            "splits": {split: split for split in splits},
            "image": "image",
            "class_names": NAMES,
            "prompts": ["a photo of a {}.", "a picture of the {}."],
        },
    )
    task = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "eval.jsonl"}}, "test_split": "test"}
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    choice = {**task, "task": "tiny_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}"}
    choice |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{ text | length % 3 }}", "metric_list": [metric]}
    write("tasks/tiny_choice.yaml", choice)
    metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    rolling = {**task, "task": "tiny_text", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
    write("tasks/tiny_text.yaml", {**rolling, "doc_to_target": "{{text}}", "metric_list": [metric]})


def write_recipes() -> None:
    """The recipes of what is trained."""
    kd = {"method": "kd", **TINY, **COMMON, "divergence": "jsd", "temperature": 2.0, "ce_weight": 0.3}
    write("kd.yaml", {**kd, **SAVED, "eval_strategy": "steps", "eval_steps": 3, "output_dir": "runs/kd"})
    write("short.yaml", {**kd, "max_steps": 3, "output_dir": "runs/short"})
    taid = {"method": "taid", **TINY, **COMMON, **SAVED, "taid_alpha": 0.3, "t_start": 0.2, "output_dir": "runs/taid"}
    write("taid.yaml", taid)
    dho = {"method": "dho", "teacher": "models/clip", "student": "models/vit", "student_init": "random"}
    dho |= {
        "data": "pictures.yaml",
        "labels_per_class": 2,
        "unlabeled_batch_size": 4,
        "teacher_cache": "caches/classes",
    }
    write("dho.yaml", {**dho, **COMMON, **SAVED, "per_device_train_batch_size": 2, "output_dir": "runs/dho"})
    adapter = {key: value for key, value in kd.items() if key not in ("teacher", "temperature", "ce_weight")}
    adapter["teachers"] = {
        "first": {"teacher": "models/teacher"},
        "second": {"teacher": "models/speaker", "weight": 2},
    }
    adapter |= {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    write("adapter.yaml", {**adapter, **SAVED, "output_dir": "runs/adapter"})
    cached = {**kd, "temperature": 1.0, "teacher_top_k": 8, "cache_shard_rows": 8, "output_dir": "runs/cached"}
    write("cached.yaml", {**cached, "teacher_cache": "caches/top_k"})
    draws = {"teacher_top_k": 4, "cache_tail_draws": 4, "teacher_tail": "unbiased", "divergence": "forward_kl"}
    write("drawn.yaml", {**cached, **draws, "ce_weight": 0.0, "teacher_cache": "caches/drawn"})
    alm = {"method": "alm", **TINY, **COMMON, "student": "models/other_student", "chunks": "space"}
    write(
        "alm.yaml", {**alm, "cache_signal": "log_probs", "teacher_cache": "caches/log_probs", "output_dir": "runs/alm"}
    )
    write(
        "generate.yaml",
        {
            **kd,
            "teacher": "models/speaker",
            "data": "chats.yaml",
            "job": "generate",
            "cache_max_new_tokens": 8,
            "cache_seed": 3,
        },
    )
    shared = {**TINY, **COMMON, "output_dir": "runs/stages", "schedule": ["SFT", "KD"], "learning_rate": 1e-2}
    stages = {"SFT": {"method": "sft", "teacher": None}, "KD": {"divergence": "jsd", "learning_rate": 5e-3}}
    write("stages.yaml", {"method": "kd", **shared, "stages": stages})
    speaker = {"method": "sft", **COMMON, "student": "models/teacher", "data": "short_chats.yaml", "max_steps": 30}
    write("speaker.yaml", {**speaker, "learning_rate": 3e-2, "output_dir": "models/speaker"})
    comd = {"method": "comd", "student": "models/student", "teacher": "models/speaker", "data": "chats.yaml"}
    comd |= {"rounds": 0, "assessor": "likelihood", "hard_threshold": 0.0, "augmentor": "none", "max_steps": 2}
    write("comd.yaml", {**COMMON, **comd, "answer_max_new_tokens": 8, "max_length": 64, "output_dir": "runs/comd"})


def make_caches(told: dict[str, Any]) -> None:
    """Teachers on disk of every kind, and what training from them says."""
    for name in ("cached", "drawn", "alm"):
        run("cache", "build", f"{name}.yaml")
        run("train", f"{name}.yaml", "--output_dir", f"runs/from_{name}")
        told[name] = log_of(f"runs/from_{name}")
        shutil.rmtree(f"runs/from_{name}")
    run("cache", "build", "generate.yaml", "--teacher_cache", "caches/answers")
    run("cache", "build", "cached.yaml", "--teacher_cache", "caches/parted", "--shard", "0/2")
    run("cache", "build", "cached.yaml", "--teacher_cache", "caches/parted", "--shard", "1/2")


def make_stages(told: dict[str, Any]) -> None:
    """A run of two stages, of which the first is finished."""
    run("train", "stages.yaml")
    told["stages"] = log_of("runs/stages/2-KD")
    shutil.rmtree("runs/stages/2-KD")


def make_rounds(told: dict[str, Any]) -> None:
    """A loop whose first round is finished."""
    run("train", "comd.yaml")
    shutil.copytree("runs/comd", "runs/kept")
    run("train", "comd.yaml", "--rounds", "1")
    told["comd"] = log_of("runs/comd/round-1/student")
    shutil.rmtree("runs/comd")
    Path("runs/kept").rename("runs/comd")


def log_of(folder: str) -> list[dict[str, Any]]:
    """What a training logged, without times and speeds."""
    lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not is_of_time(name)} for line in lines]


def is_of_time(name: str) -> bool:
    """Whether a number of a log says how fast a machine was."""
    return any(word in name for word in ("time", "per_second", "seconds", "minutes"))


def interrupt(folder: str, step: int) -> None:
    """Leaves of a finished run what it had left when the machine died soon after the checkpoint of a step."""
    for path in Path(folder).iterdir():
        kept = path.name in (f"checkpoint-{step}", "log.jsonl", "run.json")
        if path.is_dir() and not kept:
            shutil.rmtree(path)
        elif not kept:
            path.unlink()
    lines = Path(folder, "log.jsonl").read_text().splitlines(keepends=True)
    Path(folder, "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step + 1))
    record = json.loads(Path(folder, "run.json").read_text())
    Path(folder, "run.json").write_text(json.dumps({**record, "finished": None}, indent=1) + "\n")


def write_parsed() -> None:
    """What recipes and flags mean: of keys that they name, and of every key of mmkd's own in the shortest recipes."""
    cases = []
    for name, lines in FLAGS.items():
        recipe = f"recipes/{name}.yaml"
        content = yaml.safe_load(Path(recipe).read_text())
        for flags in lines:
            cases.append({"recipe": recipe, "flags": flags, "values": _named_values(content, flags, recipe)})
    PARSED.write_text(json.dumps(cases, indent=1) + "\n")


def _named_values(content: Mapping[str, Any], flags: Sequence[str], recipe: str) -> dict[str, dict[str, Any]]:
    if recipe.startswith("recipes/least_"):
        # Who computes the loss is no longer for a recipe to say.
        named = {*own_keys_of(content["method"])} - {"kernel"}
    else:
        own = [keys for keys in content.get("stages", {}).values()]
        named = {*content, *(key for keys in own for key in keys), "accelerate_config", "env"}
        named |= {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    found = values_of(recipe, flags)
    return {stage: {key: values[key] for key in sorted(named) if key in values} for stage, values in found.items()}


def write(path: str, content: Mapping[str, Any]) -> None:
    """Writes a YAML file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(dict(content), sort_keys=False))


if __name__ == "__main__":
    os.environ["MMKD_NATIVE_BF16"] = "1"
    make()
