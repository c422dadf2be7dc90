"""Teachers of classes, and the cache of what they say."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, ViTConfig
from transformers.models.vit.modeling_vit import ViTForImageClassification

from mmkd.data.class_rows import ClassRows
from mmkd.teachers.class_logits import (
    LOGITS,
    ClassLogits,
    class_identity,
    compute_class_logits,
    read_class_logits,
    rows_digest,
    write_class_logits,
)
from mmkd.teachers.classifiers import (
    ClassifierTeacher,
    OpenClipEmbedder,
    QuestionTeacher,
    TipAdapterTeacher,
    TransformersEmbedder,
    ZeroShotTeacher,
)
from tests.classes import NAMES, make_clip, pictures, pixels
from tests.helpers import VISION
from tests.teachers.vlm import make_processor, make_vlm

PROMPTS = ["a photo of a {}.", "a picture of the {}."]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rows = ClassRows(pictures(4), None)
    return [rows.raw(row) for row in range(len(rows))]


def test_zero_shot_averages_unit_features_over_prompts(clip: Path, images: list[Image.Image]) -> None:
    embedder = TransformersEmbedder.load(str(clip))
    teacher = ZeroShotTeacher(embedder, NAMES, PROMPTS)
    for number, name in enumerate(NAMES):
        features = embedder.text_features([prompt.format(name) for prompt in PROMPTS])
        torch.testing.assert_close(teacher.text_embeddings[number], features.mean(0))
        mean = normalize(normalize(features, dim=-1).mean(0), dim=0)
        torch.testing.assert_close(teacher.text_weights[number], mean)
    logits = teacher.logits(images)
    seen = normalize(embedder.image_features(images), dim=-1)
    torch.testing.assert_close(logits, embedder.scale * seen @ teacher.text_weights.T)
    raw = ZeroShotTeacher(embedder, NAMES, PROMPTS, normalize_mean=False)
    assert (raw.text_weights.norm(dim=-1) < 1).all()
    assert raw.settings != teacher.settings


def test_zero_shot_with_one_prompt_is_clips_own_answer(clip: Path, images: list[Image.Image]) -> None:
    embedder = TransformersEmbedder.load(str(clip))
    teacher = ZeroShotTeacher(embedder, NAMES, PROMPTS[:1])
    texts = [PROMPTS[0].format(name) for name in NAMES]
    inputs = embedder.processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = embedder.model(**inputs).logits_per_image
    torch.testing.assert_close(teacher.logits(images), expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_shared_space_is_refused() -> None:
    with pytest.raises(ValueError, match="does not embed images and texts in one space"):
        TransformersEmbedder(ViTForImageClassification(ViTConfig(**VISION)), None)


def test_tip_adapter_fits_its_labelled_images(clip: Path, images: list[Image.Image]) -> None:
    zero_shot = ZeroShotTeacher(TransformersEmbedder.load(str(clip)), NAMES, PROMPTS)
    labels = [row // 4 for row in range(12)]
    before = torch.nn.functional.cross_entropy(zero_shot.logits(images), torch.tensor(labels))
    teacher = TipAdapterTeacher.fit(zero_shot, images, labels, alpha=10.0, epochs=50, learning_rate=1e-2)
    after = torch.nn.functional.cross_entropy(teacher.logits(images), torch.tensor(labels))
    assert after < 0.8 * before
    again = TipAdapterTeacher.fit(zero_shot, images, labels, alpha=10.0, epochs=50, learning_rate=1e-2)
    assert torch.equal(again.logits(images), teacher.logits(images))
    without = TipAdapterTeacher(zero_shot, teacher.keys, torch.tensor(labels), alpha=0.0)
    torch.testing.assert_close(without.logits(images), zero_shot.logits(images))


def test_open_clip_is_asked_through_its_own_interface(
    monkeypatch: pytest.MonkeyPatch, clip: Path, images: list[Image.Image]
) -> None:
    """open_clip needs torchvision; what stands in for it here answers with a transformers model."""
    inner = TransformersEmbedder.load(str(clip))
    asked: list[Any] = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = torch.nn.Parameter(inner.model.logit_scale.detach().clone())

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return inner.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output

        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return inner.model.get_text_features(input_ids=tokens, return_dict=True).pooler_output

    def create(architecture: str, pretrained: str | None) -> tuple[Any, Any, Any]:
        asked.append((architecture, pretrained))
        return Model(), None, lambda one: inner.processor(images=one, return_tensors="pt")["pixel_values"][0]

    def tokenize(texts: list[str]) -> torch.Tensor:
        return inner.processor(text=texts, padding=True, return_tensors="pt")["input_ids"]

    fake: Any = types.ModuleType("open_clip")
    fake.create_model_and_transforms, fake.get_tokenizer = create, lambda architecture: tokenize
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    embedder = OpenClipEmbedder("open_clip:ViT-B-32/laion2b_s34b_b79k")
    OpenClipEmbedder("open_clip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378")
    assert asked == [("ViT-B-32", "laion2b_s34b_b79k"), ("hf-hub:apple/DFN5B-CLIP-ViT-H-14-378", None)]
    ours = ZeroShotTeacher(embedder, NAMES, PROMPTS[:1]).logits(images)
    torch.testing.assert_close(ours, ZeroShotTeacher(inner, NAMES, PROMPTS[:1]).logits(images))


def test_open_clip_itself(images: list[Image.Image], tmp_path: Path) -> None:
    open_clip: Any = pytest.importorskip("open_clip", reason="needs mmkd[open_clip] and a torchvision that works")
    model, _, transform = open_clip.create_model_and_transforms("ViT-S-32-alt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    teacher = ZeroShotTeacher(
        OpenClipEmbedder(f"open_clip:ViT-S-32-alt/{tmp_path / 'weights.pt'}"), NAMES, PROMPTS[:1]
    )
    texts = open_clip.get_tokenizer("ViT-S-32-alt")([PROMPTS[0].format(name) for name in NAMES])
    with torch.no_grad():
        seen = model.eval().encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        expected = model.logit_scale.exp() * seen @ model.encode_text(texts, normalize=True).T
    torch.testing.assert_close(teacher.logits(images), expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_answers_with_its_own_logits(images: list[Image.Image]) -> None:
    config: Any = ViTConfig
    model = ViTForImageClassification(config(**VISION, num_labels=3)).eval()
    teacher = ClassifierTeacher(model, pixels(), NAMES)
    with torch.no_grad():
        expected = model(**pixels()(images=images, return_tensors="pt")).logits
    torch.testing.assert_close(teacher.logits(images), expected)
    with pytest.raises(ValueError, match="The teacher answers with 3 classes, the data has 2"):
        ClassifierTeacher(model, pixels(), NAMES[:2])


def test_an_llm_is_asked_the_class(tiny: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny["teacher"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny["teacher"])
    teacher = QuestionTeacher(model, tokenizer, NAMES, "Which colour?")
    assert teacher.question == "Which colour? A. red, B. green, C. blue. Answer with the letter alone."
    texts = ["a short text", "a rather longer text, to be padded", "one"]
    together = teacher.logits(texts)
    alone = torch.cat([teacher.logits([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{texts[0]}\n\n{teacher.question}"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABC"]
    with torch.no_grad():
        torch.testing.assert_close(alone[0], model(ids).logits[0, -1, letters], rtol=1e-4, atol=1e-4)


def test_answers_with_one_first_token_are_refused(tiny: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny["teacher"])
    model = AutoModelForCausalLM.from_pretrained(tiny["teacher"])
    names = [f"class {number}" for number in range(30)]
    with pytest.raises(ValueError, match="'class 0' and 'class 1' begin with the same token"):
        QuestionTeacher(model, tokenizer, names)


def test_a_vlm_is_asked_the_class(tmp_path: Path, images: list[Image.Image]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(make_vlm(tmp_path), dtype=torch.float32)
    teacher = QuestionTeacher(model, make_processor(), NAMES)
    logits = teacher.logits(images[:3])
    assert logits.shape == (3, 3)
    assert not torch.equal(logits[0], logits[1])
    torch.testing.assert_close(teacher.logits(images[1:2])[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.fixture
def cached(clip: Path, tmp_path: Path) -> tuple[Path, ClassLogits]:
    rows = ClassRows(pictures(4), None)
    teacher = ZeroShotTeacher(TransformersEmbedder.load(str(clip)), NAMES, PROMPTS)
    logits = compute_class_logits(teacher, rows.raw, len(rows), batch_size=5)
    torch.testing.assert_close(logits, teacher.logits([rows.raw(row) for row in range(12)]), rtol=1e-4, atol=1e-4)
    identity = class_identity("clip", "sha", teacher, NAMES, rows_digest(rows.content, len(rows)))
    written = ClassLogits(logits, identity)
    write_class_logits(tmp_path, written)
    return tmp_path, written


def test_cached_logits_come_back(cached: tuple[Path, ClassLogits]) -> None:
    folder, written = cached
    again = read_class_logits(folder, written.identity)
    assert torch.equal(again.logits, written.logits)
    assert again.identity == written.identity


def test_cached_logits_of_something_else_are_refused(cached: tuple[Path, ClassLogits]) -> None:
    folder, written = cached
    identity = written.identity
    for key, value in (
        ("class_names", ["a", "b", "c"]),
        ("rows", rows_digest(ClassRows(pictures(4, seed=9), None).content, 12)),
        ("teacher", {**identity["teacher"], "weights": "other"}),
        ("settings", {**identity["settings"], "prompts": ["{}"]}),
    ):
        with pytest.raises(ValueError, match=f"made with another {key.replace('_', ' ')}"):
            read_class_logits(folder, {**identity, key: value})


def test_damaged_or_missing_logits_are_refused(cached: tuple[Path, ClassLogits], tmp_path: Path) -> None:
    folder, written = cached
    content = bytearray((folder / LOGITS).read_bytes())
    content[-1] ^= 1
    (folder / LOGITS).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_class_logits(folder, written.identity)
    with pytest.raises(ValueError, match="holds no class logits"):
        read_class_logits(tmp_path / "nothing", {})
