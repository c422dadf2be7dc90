"""What a row asks: whoever answers it is given the tokens and pixels that training reads of it."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mmkd.data.image_columns import image_column
from mmkd.data.images import read_row
from mmkd.data.prompts import IllustratedText, model_inputs, pictures_of, prompt_of, words_of
from mmkd.errors import UserError
from mmkd.models.load import load_processing_class
from tests.vlms import make_llava

QUESTION, ANSWER, PART = "the cat", "sat on", {"type": "image", "text": None}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


ASKED = {"role": "user", "content": QUESTION}
ASKED_IN_PARTS = {"role": "user", "content": [PART, text(QUESTION)]}
TOLD = {"role": "assistant", "content": ANSWER}
TOLD_IN_PARTS = {"role": "assistant", "content": [text(ANSWER)]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "messages of parts": {"messages": [ASKED_IN_PARTS, TOLD_IN_PARTS]},
    "messages of strings": {"messages": [ASKED, TOLD]},
    "prompt and completion of parts": {"prompt": [ASKED_IN_PARTS], "completion": [TOLD_IN_PARTS]},
    "prompt and completion of strings": {"prompt": [ASKED], "completion": [TOLD]},
    "plain prompt and completion": {"prompt": f"<image>\n{QUESTION}", "completion": ANSWER},
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_processing_class(str(make_llava(tmp_path_factory.mktemp("vlm") / "llava")))


def file_of(shade: int) -> bytes:
    """A picture whose left half is transparent, and hides another colour there."""
    image = Image.new("RGBA", (16, 16), (shade, 0, 0, 0))
    image.paste((0, shade, 90, 255), (8, 0, 16, 16))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def rows_of(layout: str, column: str = "images") -> Dataset:
    pictures = [{"bytes": file_of(shade), "path": None} for shade in (40, 200)]
    rows = [{**LAYOUTS[layout], column: one if column == "image" else [one]} for one in pictures]
    return image_column(Dataset.from_list(rows))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_are_what_training_reads(processor: Any, layout: str) -> None:
    rows = rows_of(layout)
    pairs = [prompt_of(row) for row in rows]  # pyright: ignore[reportArgumentType]
    assert [reference for _, reference in pairs] == [ANSWER, ANSWER]
    inputs = model_inputs(processor, [asked for asked, _ in pairs])
    collate = DataCollatorForVisionLanguageModeling(processor)
    trained = collate([read_row(row) for row in rows])  # pyright: ignore[reportArgumentType]
    assert torch.equal(inputs["pixel_values"], trained["pixel_values"])
    for asked, whole in zip(inputs["input_ids"], trained["input_ids"], strict=True):
        assert asked.tolist() == whole[: len(asked)].tolist()
        assert int((asked == processor.image_token_id).sum()) > 0
    # The picture itself and not only some picture: the two rows differ.
    assert not torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])


def test_prompts_of_a_batch_may_be_of_any_number_of_pictures(processor: Any) -> None:
    file = file_of(9)
    lengths = []
    for count in (0, 1, 2):
        row = {"prompt": [ASKED], "completion": [TOLD], "images": [file] * count}
        asked, _ = prompt_of(row)
        lengths.append(len(pictures_of(asked)))
        (ids,) = model_inputs(processor, [asked])["input_ids"]
        lengths.append(int((ids == processor.image_token_id).sum()))
    tokens = lengths[3]
    assert lengths == [0, 0, 1, tokens, 2, 2 * tokens]
    assert tokens > 0
    mixed = [prompt_of({"prompt": [ASKED], "images": [file] * count})[0] for count in (2, 0)]
    inputs = model_inputs(processor, mixed)
    assert len(inputs["pixel_values"]) == 2
    # Padded on the left, where generation does not go on.
    assert inputs["attention_mask"][1, 0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


def test_texts_and_their_words() -> None:
    assert prompt_of({"prompt": "a", "completion": " b"}) == ("a", " b")
    assert prompt_of({"prompt": "a"}) == ("a", "")
    start, rest = prompt_of({"text": "word " * 100})
    assert isinstance(start, str)
    assert start + rest == "word " * 100
    asked, _ = prompt_of({"prompt": "<image> what", "images": [file_of(1)]})
    assert isinstance(asked, IllustratedText)
    assert words_of(asked) == "<image> what"
    asked, said = prompt_of({"messages": [ASKED, TOLD, {"role": "user", "content": "and then?"}]})
    assert (words_of(asked), said) == (f"{QUESTION}\n{ANSWER}\nand then?", "")


def test_pictures_that_cannot_be_asked_about_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images\[1\]: FileNotFoundError.*nowhere.png"):
        prompt_of({"prompt": [ASKED], "images": [file_of(1), str(tmp_path / "nowhere.png")]})
    with pytest.raises(UserError, match="do not fit its messages"):
        prompt_of({"prompt": [ASKED_IN_PARTS], "images": [file_of(1)] * 2})

    class Tokenizer:
        """A text model's."""

    with pytest.raises(UserError, match="reads text only"):
        model_inputs(Tokenizer(), [prompt_of({"prompt": "<image> what", "images": [file_of(1)]})[0]])
