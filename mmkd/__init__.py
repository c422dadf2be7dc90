"""mmkd distils large language and vision-language models into small ones."""

import importlib
from typing import TYPE_CHECKING, Any

from mmkd.registration import register_models

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmkd.models.dual_head import DualHeadForImageClassification as DualHeadForImageClassification
    from mmkd.models.dual_head import DualHeadForSequenceClassification as DualHeadForSequenceClassification
    from mmkd.teachers.cached import CachedTeacher as CachedTeacher
    from mmkd.teachers.local import LocalTeacher as LocalTeacher
    from mmkd.teachers.server import ServerTeacher as ServerTeacher
    from mmkd.trainers.alm import ALMConfig as ALMConfig
    from mmkd.trainers.alm import ALMTrainer as ALMTrainer
    from mmkd.trainers.comd import CoMDConfig as CoMDConfig
    from mmkd.trainers.comd import CoMDTrainer as CoMDTrainer
    from mmkd.trainers.dho import DHOConfig as DHOConfig
    from mmkd.trainers.dho import DHOTrainer as DHOTrainer
    from mmkd.trainers.kd import KDConfig as KDConfig
    from mmkd.trainers.kd import KDTrainer as KDTrainer
    from mmkd.trainers.llava_kd import LLaVAKDConfig as LLaVAKDConfig
    from mmkd.trainers.llava_kd import LLaVAKDTrainer as LLaVAKDTrainer
    from mmkd.trainers.sft import SFTBaselineConfig as SFTBaselineConfig
    from mmkd.trainers.sft import SFTBaselineTrainer as SFTBaselineTrainer
    from mmkd.trainers.taid import TAIDConfig as TAIDConfig
    from mmkd.trainers.taid import TAIDTrainer as TAIDTrainer

_MODULES = {
    "CachedTeacher": "mmkd.teachers.cached",
    "LocalTeacher": "mmkd.teachers.local",
    "ServerTeacher": "mmkd.teachers.server",
    "ALMConfig": "mmkd.trainers.alm",
    "ALMTrainer": "mmkd.trainers.alm",
    "CoMDConfig": "mmkd.trainers.comd",
    "CoMDTrainer": "mmkd.trainers.comd",
    "DHOConfig": "mmkd.trainers.dho",
    "DHOTrainer": "mmkd.trainers.dho",
    "DualHeadForImageClassification": "mmkd.models.dual_head",
    "DualHeadForSequenceClassification": "mmkd.models.dual_head",
    "KDConfig": "mmkd.trainers.kd",
    "KDTrainer": "mmkd.trainers.kd",
    "LLaVAKDConfig": "mmkd.trainers.llava_kd",
    "LLaVAKDTrainer": "mmkd.trainers.llava_kd",
    "SFTBaselineConfig": "mmkd.trainers.sft",
    "SFTBaselineTrainer": "mmkd.trainers.sft",
    "TAIDConfig": "mmkd.trainers.taid",
    "TAIDTrainer": "mmkd.trainers.taid",
}


register_models()


def __getattr__(name: str) -> Any:
    # Trainers pull in torch and trl, seconds that `mmkd recipes ls` need not wait for.
    if name not in _MODULES:
        raise AttributeError(f"module 'mmkd' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
