"""Teaches a small vision-language student easy-VQA, in three stages with and without a teacher, and shows how they do.

    python scripts/quickstart_vlm.py [--output runs/quickstart/easy_vqa]

Makes what is missing: the data, the models that the recipes start from, the teacher (sft/easy_vqa_teacher), and two
students of llava_kd/easy_vqa with as many updates: PT-SFT-SFT, which never sees the teacher, and LLaVA-KD's
DPT-SFT-DFT. Ends with their accuracy on test questions and a picture of some of them with every model's answer. What
is finished is kept, so that the command can be repeated after an interruption.
"""

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mmkd.commands.train import train
from mmkd.eval.asked_questions import Questions
from mmkd.eval.compare import Asked, compare
from mmkd.recipe.flags import recipe_of
from mmkd.results.tables import show, table_console
from scripts import make_easy_vqa_models
from scripts.make_easy_vqa import OUTPUT_DIR, make_easy_vqa

RECIPE, TEACHER = "llava_kd/easy_vqa", "sft/easy_vqa_teacher"
NAMES = {"PT-SFT-SFT": "SFT only", "DPT-SFT-DFT": "LLaVA-KD", "teacher": "teacher"}
"""Row of the comparison -> what the picture calls it."""
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
    recipe, test = recipe_of(RECIPE, flags), OUTPUT_DIR / "test.jsonl"
    asked = Asked(schedules=[name for name in NAMES if name != "teacher"], test=test, max_questions=QUESTIONS)
    comparison = compare([recipe], [options.seed], options.output, train, asked)
    folders = {NAMES[row["name"]]: row["folders"][0] for row in comparison["rows"]}
    # Evenly from all questions asked, not picked.
    questions = Questions.in_file(test, QUESTIONS)
    places = range(0, len(questions.rows), len(questions.rows) // SHOWN)[:SHOWN]
    some = Questions(questions.rows.select(places), f"{SHOWN} questions")
    lines = test.read_text(encoding="utf-8").splitlines()
    sheet = contact_sheet(
        [json.loads(lines[place]) for place in places], {name: some.ask(folder)[1] for name, folder in folders.items()}
    )
    picture = options.output / "answers.png"
    sheet.save(picture)
    show(comparison, table_console())
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
            lines.append((f"{name}: {answers_of[number]}", color))
        for line, (text, color) in enumerate(lines):
            draw.text((left, top + SIDE + 4 + line * (FONT + 4)), text, fill=color, font=font)
    return sheet


if __name__ == "__main__":
    main()
