"""What mmkd borrows of transformers' processors beyond their documentation: images without the packages for videos."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.smolvlm import processing_smolvlm as smolvlm
from transformers.processing_utils import MODALITY_TO_BASE_CLASS_MAPPING
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

_NO_VIDEOS = "mmkd processes images, and no videos; videos need torchvision, and num2words for SmolVLM"


class VideoSettings(VideoProcessorMixin):
    """The settings of a checkpoint's video processor, which are saved again as they were; it processes no videos."""

    # Read by SmolVLM's processor for any conversation, and missing where a checkpoint leaves them to the class.
    num_frames = fps = None

    def __init__(self, settings: dict[str, Any]):
        super().__init__(**settings)
        self._settings = settings

    def preprocess(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(_NO_VIDEOS)

    def to_dict(self) -> dict[str, Any]:
        # With the type of the image processor, by which `AutoVideoProcessor` finds some classes.
        return copy.deepcopy(self._settings)


@contextmanager
def loading_for_images() -> Iterator[None]:
    """Processors that are loaded in here need no package that only videos need; what is installed is used.

    transformers refuses to load the processors of most vision-language models without torchvision, and SmolVLM's
    without num2words, whether or not there are videos.
    """
    with _without_torchvision(), _without_num2words():
        yield


@contextmanager
def _without_torchvision() -> Iterator[None]:
    if is_torchvision_available():
        yield
        return

    def settings_of(name: str, *_: Any, **kwargs: Any) -> VideoSettings:
        return VideoSettings(VideoSettings.get_video_processor_dict(name, **kwargs)[0])

    # The mixin of video processors is not in transformers' namespace without torchvision; this is a base of it.
    base = {"video_processor": "ImageProcessingMixin"}
    with (
        patch.object(AutoVideoProcessor, "from_pretrained", settings_of),
        patch.dict(MODALITY_TO_BASE_CLASS_MAPPING, base),
    ):
        yield


@contextmanager
def _without_num2words() -> Iterator[None]:
    if vars(smolvlm)["num2words"] is not None:
        yield
        return

    def refuse(*_: Any) -> str:
        raise NotImplementedError(_NO_VIDEOS)

    with patch.object(smolvlm, "num2words", refuse):
        yield
