"""The models and data that the shipped recipes and suites need, and how each is made."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mmkd.errors import UserError, nearest

CACHE = Path(".cache/mmkd")


@dataclass(frozen=True)
class Preparation:
    """Something that recipes read from `.cache/mmkd`."""

    name: str
    what: str
    size: str
    """Of what is downloaded, and how long it takes to make where that is more than moments."""
    license: str
    files: tuple[str, ...]
    """Under .cache/mmkd; all of them are there once it is complete."""
    make: Callable[[Path | None], object]
    """Makes it; its imports wait until it is called. It may be given a folder with the original files."""
    needs: tuple[str, ...] = ()
    """Names of other preparations, which are made first."""
    packages: tuple[str, ...] = ()
    """What has to be installed, as importable names."""

    @property
    def is_there(self) -> bool:
        return all((CACHE / file).exists() for file in self.files)


def _teacher(name: str) -> Callable[[Path | None], object]:
    def make(_: Path | None) -> object:
        from mmkd.prepare.teachers import get_teacher

        return get_teacher(name, CACHE / name)

    return make


def _python_docs(_: Path | None) -> None:
    from mmkd.prepare.python_docs import main

    main([])


def _python_sentences(_: Path | None) -> None:
    from mmkd.prepare.python_sentences import make_python_sentences

    make_python_sentences()


def _minilm(_: Path | None) -> None:
    from mmkd.prepare.sentence_encoders import get_minilm

    get_minilm(CACHE / "all-MiniLM-L6-v2")


def _easy_vqa(_: Path | None) -> None:
    from mmkd.prepare.easy_vqa import main

    main([])


def _easy_vqa_models(_: Path | None) -> None:
    from mmkd.prepare.easy_vqa_models import main

    main([])


def _fashion_vqa(source: Path | None) -> None:
    from mmkd.prepare.fashion_mnist import SOURCE
    from mmkd.prepare.fashion_vqa import OUTPUT_DIR, make_fashion_vqa

    make_fashion_vqa(source or SOURCE, OUTPUT_DIR)


def _fashion_vqa_models(_: Path | None) -> None:
    from mmkd.prepare.fashion_vqa_models import main

    main([])


def _eval_data(_: Path | None) -> None:
    from mmkd.prepare.eval_data import main

    main([])


def _reasoning_gym(_: Path | None) -> None:
    from mmkd.prepare.reasoning_tasks import main

    main([])


def _fashion_mnist(source: Path | None) -> None:
    from mmkd.prepare.fashion_mnist import OUTPUT_DIR, SOURCE, make_fashion_mnist

    make_fashion_mnist(source or SOURCE, OUTPUT_DIR)


def _fashion_clip(_: Path | None) -> None:
    from mmkd.prepare.fashion_clip import main

    main([])


def _emoji_names(source: Path | None) -> None:
    from mmkd.prepare.emoji_names import OUTPUT_DIR, SOURCE, make_emoji_names

    make_emoji_names(source or SOURCE, OUTPUT_DIR)


def _picture_captions(_: Path | None) -> None:
    from mmkd.prepare.picture_captions import main

    main([])


def _caption_models(_: Path | None) -> None:
    from mmkd.prepare.caption_models import make_caption_models

    make_caption_models()


PREPARATIONS = {
    preparation.name: preparation
    for preparation in (
        Preparation(
            "python_docs",
            "text: Python's language reference, as it ships with CPython",
            "nothing",
            "PSF-2.0",
            ("python_docs/train.jsonl", "python_docs/eval.jsonl"),
            _python_docs,
        ),
        Preparation(
            "python_sentences",
            "text: 2,000 pairs of sentences of it, and scored ones to measure on",
            "nothing",
            "PSF-2.0",
            tuple(f"python_sentences/{name}.jsonl" for name in ("train", "dev", "test")),
            _python_sentences,
            needs=("python_docs",),
        ),
        Preparation(
            "all-MiniLM-L6-v2",
            "model: an encoder of sentences of 23 M parameters",
            "84 MB",
            "Apache-2.0",
            ("all-MiniLM-L6-v2/modules.json",),
            _minilm,
        ),
        Preparation(
            "SmolLM2-135M-Instruct",
            "model: a chat model of 135 M parameters",
            "93 MB",
            "Apache-2.0",
            ("SmolLM2-135M-Instruct/config.json",),
            _teacher("SmolLM2-135M-Instruct"),
            packages=("gguf",),
        ),
        Preparation(
            "gemma-3-270m",
            "model: 268 M parameters, with another tokenizer",
            "240 MB",
            "Gemma Terms of Use",
            ("gemma-3-270m/config.json",),
            _teacher("gemma-3-270m"),
            packages=("gguf",),
        ),
        Preparation(
            "easy_vqa",
            "pictures: 4,000 of coloured shapes with 38,575 questions",
            "3 MB",
            "MIT",
            tuple(f"easy_vqa/{name}.jsonl" for name in ("train", "validation", "test", "captions")),
            _easy_vqa,
        ),
        Preparation(
            "easy_vqa_models",
            "models: a vision tower and two language models to begin with, trained here",
            "nothing; minutes",
            "MIT (their data)",
            tuple(f"easy_vqa/models/{name}" for name in ("tower", "large", "small")),
            _easy_vqa_models,
            needs=("easy_vqa",),
        ),
        Preparation(
            "eval_data",
            "questions of the suite offline: HumanEval and MMLU's development set",
            "1 MB",
            "MIT",
            ("eval/humaneval.jsonl", "eval/mmlu_dev.jsonl"),
            _eval_data,
            packages=("lm_eval",),
        ),
        Preparation(
            "reasoning_gym",
            "questions: sums and words spelt backward, with worked solutions",
            "4 MB",
            "Apache-2.0",
            tuple(
                f"reasoning_gym/{task}_{split}.jsonl"
                for task in ("chain_sum", "spell_backward")
                for split in ("train", "validation", "test")
            ),
            _reasoning_gym,
            packages=("reasoning_gym",),
        ),
        Preparation(
            "fashion_mnist",
            "pictures: clothes in ten classes, from the Debian package dataset-fashion-mnist or --source",
            "31 MB",
            "MIT",
            tuple(f"fashion_mnist/{name}.parquet" for name in ("captions", "train", "validation", "test")),
            _fashion_mnist,
        ),
        Preparation(
            "fashion_clip",
            "models: a small CLIP trained here, and the config of its student",
            "nothing; a minute",
            "MIT (their data)",
            ("fashion_student/config.json", "fashion_clip/config.json"),
            _fashion_clip,
            needs=("fashion_mnist",),
        ),
        Preparation(
            "fashion_vqa",
            "pictures: 6,500 of several clothes with 39,000 questions, made of Fashion-MNIST's photos",
            "31 MB",
            "MIT",
            tuple(f"fashion_vqa/{name}.jsonl" for name in ("train", "validation", "test", "captions")),
            _fashion_vqa,
        ),
        Preparation(
            "fashion_vqa_models",
            "models: two vision towers and two language models to begin with, trained here",
            "nothing; minutes",
            "MIT (their data)",
            tuple(f"fashion_vqa/models/{name}" for name in ("tower", "coarse_tower", "large", "small")),
            _fashion_vqa_models,
            needs=("fashion_vqa",),
        ),
        Preparation(
            "emoji_names",
            "pictures: 3,527 emoji with their names, from the Debian package fonts-noto-color-emoji or --source",
            "11 MB",
            "OFL-1.1, Unicode-3.0",
            tuple(f"emoji_names/{name}.parquet" for name in ("train", "validation", "test")),
            _emoji_names,
        ),
        Preparation(
            "picture_captions",
            "pictures: 8,644 of easy-VQA and Fashion-MNIST with captions",
            "nothing",
            "MIT",
            tuple(
                f"picture_captions/{name}_{split}.parquet"
                for name in ("easy_vqa", "fashion_mnist")
                for split in ("train", "validation", "test")
            ),
            _picture_captions,
            needs=("easy_vqa", "fashion_mnist"),
        ),
        Preparation(
            "caption_models",
            "models: CLIPs of three sizes with random weights, and their tokenizer",
            "nothing",
            "MIT, OFL-1.1, Unicode-3.0 (their captions)",
            tuple(f"picture_captions/models/{name}/config.json" for name in ("teacher", "quarter", "tenth")),
            _caption_models,
            needs=("emoji_names", "picture_captions"),
        ),
    )
}


def make(names: Sequence[str], source: Path | None, console: Console) -> None:
    """Makes what is missing of these and of what they need, and prints where it is.

    Raises UserError for a name that is not known and for packages that are not installed, before anything is made.
    """
    for name in names:
        if name not in PREPARATIONS:
            near = nearest(name, PREPARATIONS)
            raise UserError(f"{name!r} is nothing to prepare; did you mean {near!r}? `mmkd prepare` lists all.")
    wanted = [PREPARATIONS[name] for name in dict.fromkeys(_with_needs(names))]
    missing = [preparation for preparation in wanted if not preparation.is_there]
    for preparation in missing:
        absent = [package for package in preparation.packages if importlib.util.find_spec(package) is None]
        if absent:
            packages = " ".join(package.replace("_", "-") for package in absent)
            raise UserError(
                f"{preparation.name} is made with {packages}, which is not installed: pip install {packages}."
            )
    for preparation in wanted:
        if preparation in missing:
            console.print(f"{preparation.name}: {preparation.what} ({preparation.license}) ...", highlight=False)
            preparation.make(source)
        files = ", ".join(str(CACHE / file) for file in preparation.files)
        console.print(f"{preparation.name}: {files}", highlight=False)


def table_of_all() -> Table:
    """What there is to make, what each needs, and whether it is there."""
    table = Table(box=box.SIMPLE)
    for column in ("name", "what it is", "download", "licence", "needs", "there"):
        table.add_column(column)
    for preparation in PREPARATIONS.values():
        packages = (f"pip install {name.replace('_', '-')}" for name in preparation.packages)
        needs = ", ".join([*preparation.needs, *packages])
        there = "yes" if preparation.is_there else "no"
        table.add_row(preparation.name, preparation.what, preparation.size, preparation.license, needs, there)
    return table


def _with_needs(names: Sequence[str]) -> list[str]:
    return [word for name in names for word in [*_with_needs(PREPARATIONS[name].needs), name]]
