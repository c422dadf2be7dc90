"""The published form of a dual encoder: its numbers on the card, and code that loads it in plain transformers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmkd.commands.main import main
from mmkd.publish.push_folder import Published, PushOptions, prepare
from tests.dual_encoders import caption, make_clip, photo
from tests.helpers import environment


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """A tiny CLIP that was distilled, measured and prepared to be pushed."""
    monkeypatch.chdir(tmp_path)
    files = {}
    for name, numbers in {"train": range(8), "eval": range(8, 12)}.items():
        rows = []
        for number in numbers:
            photo(number).save(f"{number}.png")
            rows.append({"image": f"{number}.png", "text": caption(number)})
        files[name] = f"{name}.jsonl"
        Path(files[name]).write_text("\n".join(map(json.dumps, rows)))
    data = {"name": "photos", "license": "mit", "source": "json", "data_files": files}
    Path("photos.yaml").write_text(yaml.safe_dump({**data, "splits": {name: name for name in files}}))
    recipe = {"method": "clip_kd", "data": "photos.yaml", "output_dir": "run", "max_steps": 1}
    recipe |= {"teacher": str(make_clip(Path("teacher"), 1)), "student": str(make_clip(Path("student")))}
    recipe |= {"per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no"}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "recipe.yaml"]) == 0
    assert main(["eval", "run", "--measures"]) == 0
    return prepare(Path("run"), PushOptions("me/clip"))


def test_the_card_tells_what_it_is_and_what_was_measured(published: Published) -> None:
    header = published.card.data.to_dict()
    assert header["pipeline_tag"] == "zero-shot-image-classification"
    assert header["library_name"] == "transformers"
    named = {score["metric"]["type"] for result in header["model-index"] for score in _scores(result)}
    assert {"recall@1", "recall@5", "image_to_text_recall"} <= named
    assert "AutoProcessor" in published.card.text
    assert "photos image_to_text | recall@1" in published.card.text


def _scores(result: dict) -> list[dict]:
    return [{"metric": metric} for own in result["results"] for metric in own["metrics"]]


@pytest.mark.slow
def test_the_code_of_the_card_runs_in_a_fresh_process(published: Published) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", published.card.text, re.DOTALL)
    code = code.replace('"me/clip"', '"run"') + (
        "\nfrom PIL import Image\n"
        'inputs = processor(text=["a red star", "a blue circle"], images=Image.open("0.png"), return_tensors="pt")\n'
        "print(model(**inputs).logits_per_image.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.strip() == "torch.Size([1, 2])", done.stderr
