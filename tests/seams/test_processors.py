"""Processors of vision-language models without the packages that only videos need."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import MODALITY_TO_BASE_CLASS_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from mmkd.models.load import load_processing_class
from mmkd.seams.processor_seam import VideoSettings, loading_for_images
from tests.published_vlms import write_checkpoint

NO_TORCHVISION = pytest.mark.skipif(
    is_torchvision_available(), reason="with torchvision, processors do process videos"
)


@NO_TORCHVISION
def test_transformers_still_refuses_them(tmp_path) -> None:
    """As soon as it does not, the seam can go."""
    folder = write_checkpoint("Qwen3-VL-2B-Instruct", tmp_path / "model")
    with pytest.raises((ImportError, ValueError), match=r"(?i)torchvision"):
        AutoProcessor.from_pretrained(folder)


@NO_TORCHVISION
@pytest.mark.parametrize("name", ["Qwen3-VL-2B-Instruct", "Qwen2.5-VL-3B-Instruct", "SmolVLM2-256M-Video-Instruct"])
def test_the_video_processor_is_saved_as_it_was(name: str, tmp_path) -> None:
    folder = write_checkpoint(name, tmp_path / "model")
    processor: Any = load_processing_class(str(folder))
    with pytest.raises(NotImplementedError, match="no videos"):
        processor.video_processor([None])
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())["video_processor"]
    own, images = (folder / f"{kind}preprocessor_config.json" for kind in ("video_", ""))
    assert saved == json.loads((own if own.is_file() else images).read_text())


def test_what_is_borrowed_is_given_back() -> None:
    def borrowed() -> list[Any]:
        return [
            vars(AutoVideoProcessor)["from_pretrained"],
            dict(MODALITY_TO_BASE_CLASS_MAPPING),
            vars(processing_smolvlm)["num2words"],
        ]

    before = borrowed()
    with pytest.raises(RuntimeError), loading_for_images():
        raise RuntimeError
    assert borrowed() == before


def test_settings_are_no_part_of_other_settings(tmp_path: Path) -> None:
    settings = VideoSettings({"size": {"longest_edge": 8}})
    settings.to_dict()["size"]["longest_edge"] = 4
    assert settings.to_dict() == {"size": {"longest_edge": 8}}
