"""Real vLLM servers of vision-language models: each family says at every position what it says in this process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmkd.preparation.collation import Rows, VisionViews
from mmkd.preparation.vision_labels import VisionLabels
from mmkd.teachers.batch import ONLY, View
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.served_head import head_of_checkpoint
from mmkd.teachers.server import ServerTeacher
from tests import families
from tests.teachers.conftest import serve
from tests.teachers.vlm import make_image
from tests.vlms import make_llava

pytestmark = pytest.mark.slow
# Nats, in fp32.
TOLERANCE = 1e-4
# Where images are resized: vLLM does so with torchvision, and transformers here with Pillow.
RESIZED = {"Idefics3": 2e-2}
# vLLM 0.32 loads them, and does not find the places of two images side by side ("Expected there to be 2 prompt
# placeholders", Gemma 3), or does not answer about such a row.
NOT_SERVED = ("Gemma 3", "LLaVA-OneVision")
NO_VIDEOS = ("--limit-mm-per-prompt", '{"image": 4, "video": 0}')


def family(name: str, folder: Path) -> tuple[Any, Any]:
    """A random model that a vLLM on a CPU serves from the folder, and its processor."""
    if name == "LLaVA":
        make_llava(folder, seed=2, width=64)
        return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with families.as_served():
        make, processor = families.made(name)
        model = families.model_of(make, 0)
    families.save_for_vllm(model, processor, folder)
    return model, processor


def view_of(processor: Any, side: int) -> View:
    """A batch of conversations with one image, two and none, as a served teacher reads it."""

    def row(seed: int, images: int, question: str) -> dict[str, Any]:
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        said = {"role": "assistant", "content": [{"type": "text", "text": "on a mat"}]}
        shown = [make_image(seed + number, side, side) for number in range(images)]
        return {"messages": [{"role": "user", "content": content}, said], "images": shown}

    rows = [row(0, 1, "the cat sat"), row(1, 2, "\nwhere?"), row(3, 0, "who"), row(4, 1, "what is it")]
    views = VisionViews(VisionLabels(processor)).with_teachers({}, served=[ONLY])
    return views(Rows(rows))[1].teacher_view()


@pytest.mark.parametrize("signal", ["hidden", "top_k"])
@pytest.mark.parametrize("name", ["LLaVA", *(name for name in families.FAMILIES if name not in NOT_SERVED)])
def test_a_served_family_says_what_the_model_says(name: str, signal: str, tmp_path: Path) -> None:
    tolerance = RESIZED.get(name, TOLERANCE)
    model, processor = family(name, tmp_path / "model")
    view = view_of(processor, 8 if name == "LLaVA" else 16)
    everywhere = view["attention_mask"][:, 1:].bool()
    local = LocalTeacher(model)
    local.prepare(Accelerator(cpu=True))
    dense = local.ask(view, everywhere)
    log_probs = dense.head.log_probs(dense.hidden)
    flags = ["--max-model-len", "256", *(NO_VIDEOS if type(processor).__name__ in families.VIDEO else ())]
    pooling = ["--runner", "pooling", "--convert", "embed", "--pooler-config.task", "token_embed"]
    flags += pooling if signal == "hidden" else ["--enable-scale-out"]
    with serve(tmp_path / "model", tmp_path / "server.log", *flags) as server:
        if signal == "hidden":
            states = HiddenServerTeacher(server.url, head_of_checkpoint(str(tmp_path / "model")))
            states.prepare(Accelerator(cpu=True))
            told = states.ask(view, everywhere)
            torch.testing.assert_close(told.head.log_probs(told.hidden), log_probs, atol=tolerance, rtol=0)
        else:
            top = ServerTeacher(server.url, k=32).ask(view, everywhere)
            torch.testing.assert_close(top.log_probs, log_probs.gather(-1, top.ids), atol=tolerance, rtol=0)
            torch.testing.assert_close(top.log_probs, log_probs.topk(32).values, atol=tolerance, rtol=0)
