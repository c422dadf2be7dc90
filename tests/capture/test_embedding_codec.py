"""Embeddings of pairs as bytes, the keys that find them, and views of a picture that are shown again as they were."""

import numpy as np
import pytest
from PIL import Image

from mmkd.cache.embedding_codec import EmbeddingCodec, PairEmbeddings, pair_key, text_key
from mmkd.data.picture_views import PictureView
from mmkd.errors import UserError


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def picture(seed: int = 0, size: tuple[int, int] = (90, 70)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pair(views: int = 3, captions: int = 2, width: int = 6) -> PairEmbeddings:
    random = np.random.default_rng(1)
    shown = tuple(PictureView.drawn("crop_flip", random) for _ in range(views))
    keys = tuple(text_key(f"caption {number}") for number in range(captions))
    return PairEmbeddings(unit(views, width), shown, unit(captions, width, seed=2), keys)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 1e-3)])
def test_what_is_encoded_comes_back(dtype: str, tolerance: float) -> None:
    whole, codec = pair(), EmbeddingCodec(dtype, 6)
    back = codec.decode(memoryview(codec.encode(whole)), len(whole))
    assert (back.views, back.keys) == (whole.views, whole.keys)
    np.testing.assert_allclose(back.firsts, whole.firsts, atol=tolerance, rtol=0)
    np.testing.assert_allclose(back.caption("caption 1"), whole.captions[1], atol=tolerance, rtol=0)
    with pytest.raises(UserError, match="no embedding of the caption 'another'"):
        back.caption("another")


def test_other_bytes_are_refused() -> None:
    codec, blob = EmbeddingCodec("float16", 6), EmbeddingCodec("float16", 6).encode(pair())
    for damaged, vectors in ((blob[:-1], 5), (blob, 4), (b"", 0), (b"\xff" * len(blob), 5)):
        with pytest.raises(UserError, match="embeddings of 6 channels"):
            codec.decode(memoryview(damaged), vectors)


def test_a_view_is_the_same_after_it_was_written_down() -> None:
    random, image = np.random.default_rng(3), picture()
    seen = set()
    for _ in range(20):
        view = PictureView.drawn("crop_flip", random)
        again = PictureView.of(view.numbers)
        assert again == view
        assert view.show(image).size == image.size
        assert view.show(image).tobytes() == again.show(image).tobytes()
        assert (view.right - view.left) * (view.bottom - view.top) > 0.49
        seen.add(view.show(image).tobytes())
    assert len(seen) == 20
    assert PictureView.drawn("none", random).show(image) is image
    mirrored = {PictureView.drawn("flip", random) for _ in range(20)}
    assert mirrored == {PictureView(), PictureView(mirrored=True)}


def test_a_pair_is_found_by_its_picture_and_its_captions_in_any_order() -> None:
    key = pair_key(picture(), ["one", "two"])
    assert key == pair_key(picture(), ["two", "one"])
    others = [pair_key(picture(1), ["one", "two"]), pair_key(picture(), ["one"]), pair_key("one", ["two"])]
    assert len({key, *others, pair_key("onet", ["wo"])}) == 5
