"""Published vision-language models are built at their true sizes."""

import pytest

from mmkd.models.load import empty_model
from tests.published_vlms import FAMILIES, write_checkpoint

PARAMETERS = {
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "SmolVLM2-2.2B-Instruct": 2_246_784_880,
    "SmolVLM2-500M-Video-Instruct": 507_482_304,
    "SmolVLM2-256M-Video-Instruct": 256_484_928,
    "InternVL3_5-8B-HF": 8_528_318_464,
    "InternVL3_5-1B-HF": 1_060_897_792,
    "gemma-3-12b-it": 12_187_325_040,
    "gemma-3-4b-it": 4_300_079_472,
    "llava-onevision-qwen2-7b-ov-hf": 8_030_807_584,
    "llava-onevision-qwen2-0.5b-ov-hf": 893_675_552,
}


def test_every_model_is_known() -> None:
    assert PARAMETERS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_published_model(name: str, tmp_path) -> None:
    model = empty_model(str(write_checkpoint(name, tmp_path / "model")))
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
