"""Teaches a small vision-language student easy-VQA, in three stages with and without a teacher, and shows how they do.

    python scripts/quickstart_vlm.py [--output runs/quickstart/easy_vqa]

Makes what is missing: the data, the models that the recipes start from, the teacher (sft/easy_vqa_teacher), and two
students of llava_kd/easy_vqa with as many updates: PT-SFT-SFT, which never sees the teacher, and LLaVA-KD's
DPT-SFT-DFT. Ends with their accuracy on test questions and a picture of some of them with every model's answer. What
is finished is kept, so that the command can be repeated after an interruption.
"""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mmkd.commands.train import train
from mmkd.recipe.flags import recipe_of
from scripts import make_easy_vqa_models
from scripts.compare_stages import Results, answers, questions, run_schedule, show
from scripts.make_easy_vqa import OUTPUT_DIR, make_easy_vqa

RECIPE, TEACHER = "llava_kd/easy_vqa", "sft/easy_vqa_teacher"
SCHEDULES = {"SFT only (PT-SFT-SFT)": "PT-SFT-SFT", "LLaVA-KD (DPT-SFT-DFT)": "DPT-SFT-DFT"}
QUESTIONS, SHOWN = 2000, 8
SIDE, WIDTH, TEXT, FONT = 192, 232, 118, 13
"""Pixels of a picture, its cell's width, the text below it, and the height of a letter."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/easy_vqa"))
    parser.add_argument("--seed", type=int, default=0)
    options, flags = parser.parse_known_args()
    if not (OUTPUT_DIR / "captions.jsonl").is_file():
        make_easy_vqa(OUTPUT_DIR)
    make_easy_vqa_models.main([])
    if train(recipe_of(TEACHER, flags)):
        raise SystemExit(130)
    recipe = recipe_of(RECIPE, flags)
    test = OUTPUT_DIR / "test.jsonl"
    rows = questions(test, recipe, QUESTIONS)
    results = Results(options.output / "results.json", test, QUESTIONS)
    folders: dict[str, Path] = {}
    table: list[tuple[str, list[dict[str, float]]]] = []
    for name, schedule in SCHEDULES.items():
        folders[name], steps, identity = run_schedule(recipe, schedule, options.seed, options.output)
        table.append((name, [{**results.get(folders[name], rows, identity), "steps": float(steps)}]))
    folders["teacher"] = Path(recipe.written["stages"]["DFT"]["teacher"])
    table.append(("teacher", [results.get(folders["teacher"], rows, str(folders["teacher"]))]))
    # Evenly from all questions asked, not picked.
    some = rows[:: len(rows) // SHOWN][:SHOWN]
    picture = options.output / "answers.png"
    contact_sheet(some, {name: answers(folder, some) for name, folder in folders.items()}).save(picture)
    show(table, [options.seed], len(rows))
    print(f"Some of the questions with the models' answers: {picture}")


def contact_sheet(rows: Sequence[Mapping[str, Any]], said: Mapping[str, Sequence[str]]) -> Image.Image:
    """Pictures with question, right answer and every model's answer below, wrong ones in red; four a line."""
    sheet = Image.new("RGB", (4 * WIDTH, -(-len(rows) // 4) * (SIDE + TEXT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for number, row in enumerate(rows):
        left, top = number % 4 * WIDTH + (WIDTH - SIDE) // 2, number // 4 * (SIDE + TEXT) + 8
        image = Image.open(row["images"][0]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
        sheet.paste(image, (left, top))
        question, answer = (row["messages"][turn]["content"][-1]["text"] for turn in (0, 1))
        lines = [(line, "black") for line in textwrap.wrap(question, 30)] + [(f"right: {answer}", "black")]
        for name, answers_of in said.items():
            color = "darkgreen" if answers_of[number] == answer else "red"
            lines.append((f"{name.partition(' (')[0]}: {answers_of[number]}", color))
        for line, (text, color) in enumerate(lines):
            draw.text((left, top + SIDE + 4 + line * (FONT + 4)), text, fill=color, font=font)
    return sheet


if __name__ == "__main__":
    main()
