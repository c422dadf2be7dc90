"""Dual encoders of every family: what they say is what their own package says."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor, CLIPModel

from mmkd.errors import UserError
from mmkd.models.dual_encoder import kind_of_encoder, load_dual_encoder, new_dual_encoder
from mmkd.models.open_clip_format import OPEN_CLIP_WEIGHTS, from_open_clip, save_open_clip, to_open_clip
from scripts.golden.contrastive_losses import NETWORK
from scripts.make_tiny_models import make_model, make_tokenizer, save
from tests.dual_encoders import (
    caption,
    make_clip,
    make_naflex,
    make_pair_of_towers,
    make_sentence_encoder,
    make_siglip,
    photo,
    word_tokenizer,
)

FAMILIES = [make_clip, make_siglip, make_naflex, make_pair_of_towers]
PICTURES, TEXTS = [photo(number) for number in range(3)], [caption(number) for number in range(3)]


@pytest.mark.parametrize("make", FAMILIES)
def test_features_are_those_of_the_model_itself(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    encoder = load_dual_encoder(str(folder))
    images = encoder.encode_images(encoder.prepare_images(PICTURES))
    texts = encoder.encode_texts(encoder.prepare_texts(TEXTS))
    assert images.shape == texts.shape == (3, encoder.width)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    padding = "max_length" if encoder.sigmoid else True
    # SigLIP2's whole processor has patches of the published models, whatever its image processor says.
    own = {"patch_size": 4, "max_num_patches": 4} if make is make_naflex else {}
    given = {"padding": padding, "max_length": 12, "truncation": True, **own}
    inputs = processor(images=PICTURES, text=TEXTS, return_tensors="pt", **given)
    with torch.no_grad():
        whole = model(**inputs)
    unit = [torch.nn.functional.normalize(features, dim=-1) for features in (images, texts)]
    logits = encoder.logit_scale * unit[0] @ unit[1].T
    if encoder.logit_bias is not None:
        logits = logits + encoder.logit_bias
    torch.testing.assert_close(logits, whole.logits_per_image, atol=1e-5, rtol=1e-5)


def test_siglips_decide_about_each_pair(tmp_path: Path) -> None:
    assert load_dual_encoder(str(make_siglip(tmp_path / "siglip"))).sigmoid
    assert not load_dual_encoder(str(make_clip(tmp_path / "clip"))).sigmoid


@pytest.mark.parametrize("make", FAMILIES)
def test_a_saved_encoder_loads_again(make: Callable[[Path], Path], tmp_path: Path) -> None:
    encoder = load_dual_encoder(str(make(tmp_path / "first")))
    encoder.save(tmp_path / "second")
    again = load_dual_encoder(str(tmp_path / "second"))
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    inputs = encoder.prepare_texts(TEXTS), again.prepare_texts(TEXTS)
    assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[0])


def test_a_text_that_is_too_long_is_cut(tmp_path: Path) -> None:
    encoder = load_dual_encoder(str(make_clip(tmp_path)))
    assert encoder.prepare_texts(["red " * 40])["input_ids"].shape[1] == 12


def test_sentence_encoders_read_texts_alone(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    encoder = load_dual_encoder(str(make_sentence_encoder(tmp_path)))
    features = encoder.encode_texts(encoder.prepare_texts(TEXTS))
    expected = encoder.model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-5)
    assert not encoder.has_images
    assert encoder.width == 16
    with pytest.raises(UserError, match="sees no images"):
        encoder.prepare_images(PICTURES)


def test_a_model_that_embeds_no_pairs_is_refused(tmp_path: Path) -> None:
    save(make_model(), make_tokenizer(), tmp_path)
    with pytest.raises(UserError, match="does not embed images and texts in one space"):
        load_dual_encoder(str(tmp_path))


def test_random_weights_of_a_config(tmp_path: Path) -> None:
    folder = make_clip(tmp_path)
    own, new = load_dual_encoder(str(folder)), new_dual_encoder(str(folder))
    assert own.parameter_count == new.parameter_count
    assert not torch.equal(own.model.visual_projection.weight, new.model.visual_projection.weight)


def test_open_clip_files_hold_the_same_network(tmp_path: Path) -> None:
    encoder = load_dual_encoder(str(make_clip(tmp_path / "clip", layers=2)))
    folder = save_open_clip(encoder, tmp_path / "open_clip")
    assert kind_of_encoder(str(folder)) == "open_clip"
    again = load_dual_encoder(str(folder))
    assert isinstance(again.model, CLIPModel)
    for ours, theirs in (
        (encoder.encode_images(encoder.prepare_images(PICTURES)), again.encode_images(again.prepare_images(PICTURES))),
        (encoder.encode_texts(encoder.prepare_texts(TEXTS)), again.encode_texts(again.prepare_texts(TEXTS))),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    weights = encoder.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in from_open_clip(to_open_clip(weights)).items())


def test_open_clip_files_without_weights_or_of_another_model_are_refused(tmp_path: Path) -> None:
    encoder = load_dual_encoder(str(make_clip(tmp_path / "clip")))
    folder = save_open_clip(encoder, tmp_path / "open_clip")
    description = json.loads((folder / "open_clip_config.json").read_text())
    description["model_cfg"]["vision_cfg"]["layers"] = 2
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="different models"):
        load_dual_encoder(str(folder))
    (folder / OPEN_CLIP_WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no open_clip_model\.safetensors"):
        load_dual_encoder(str(folder))


def test_open_clip_computes_the_same(tmp_path: Path) -> None:
    golden = np.load(Path(__file__).parents[1] / "golden" / "CONTRASTIVE_losses.npz")
    weights = {name.removeprefix("oc__"): torch.as_tensor(golden[name]) for name in golden if name.startswith("oc__")}
    save_file(weights, str(tmp_path / OPEN_CLIP_WEIGHTS))
    description = {
        "model_cfg": {**NETWORK, "quick_gelu": True},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(description))
    word_tokenizer().save_pretrained(tmp_path)
    encoder = load_dual_encoder(str(tmp_path))
    for said, features in (
        ("oc_images", encoder.encode_images({"pixel_values": torch.as_tensor(golden["oc_pixels"])})),
        ("oc_texts", encoder.encode_texts({"input_ids": torch.as_tensor(golden["oc_tokens"])})),
    ):
        torch.testing.assert_close(features, torch.as_tensor(golden[said]), atol=1e-5, rtol=1e-5)
    assert list(encoder.prepare_images(PICTURES)["pixel_values"].shape) == [3, 3, 8, 8]
