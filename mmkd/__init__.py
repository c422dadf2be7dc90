"""mmkd distils large language and vision-language models into small ones."""

import importlib
from typing import TYPE_CHECKING, Any

from mmkd.models.registration import register_models as _register_models

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmkd.errors import UserError as UserError
    from mmkd.methods.alm import ALMConfig as ALMConfig
    from mmkd.methods.alm import ALMTrainer as ALMTrainer
    from mmkd.methods.clip_kd.clip_trainer import ContrastiveKDConfig as ContrastiveKDConfig
    from mmkd.methods.clip_kd.clip_trainer import ContrastiveKDTrainer as ContrastiveKDTrainer
    from mmkd.methods.clip_kd.clip_trainer import TeacherEncoder as TeacherEncoder
    from mmkd.methods.comd.comd_trainer import CoMDConfig as CoMDConfig
    from mmkd.methods.comd.comd_trainer import CoMDTrainer as CoMDTrainer
    from mmkd.methods.dho.dho_trainer import DHOConfig as DHOConfig
    from mmkd.methods.dho.dho_trainer import DHOTrainer as DHOTrainer
    from mmkd.methods.kd import KDConfig as KDConfig
    from mmkd.methods.kd import KDTrainer as KDTrainer
    from mmkd.methods.llava_kd import LLaVAKDConfig as LLaVAKDConfig
    from mmkd.methods.llava_kd import LLaVAKDTrainer as LLaVAKDTrainer
    from mmkd.methods.sft import SFTBaselineConfig as SFTBaselineConfig
    from mmkd.methods.sft import SFTBaselineTrainer as SFTBaselineTrainer
    from mmkd.methods.taid import TAIDConfig as TAIDConfig
    from mmkd.methods.taid import TAIDTrainer as TAIDTrainer
    from mmkd.methods.tower_kd.tower_trainer import TeacherTower as TeacherTower
    from mmkd.methods.tower_kd.tower_trainer import TowerKDConfig as TowerKDConfig
    from mmkd.methods.tower_kd.tower_trainer import TowerKDTrainer as TowerKDTrainer
    from mmkd.methods.trans_encoder.trans_encoder_trainer import TransEncoderConfig as TransEncoderConfig
    from mmkd.methods.trans_encoder.trans_encoder_trainer import TransEncoderTrainer as TransEncoderTrainer
    from mmkd.models.dual_head import DualHeadForImageClassification as DualHeadForImageClassification
    from mmkd.models.dual_head import DualHeadForSequenceClassification as DualHeadForSequenceClassification
    from mmkd.teachers.cached import CachedTeacher as CachedTeacher
    from mmkd.teachers.hidden_server import HiddenServerTeacher as HiddenServerTeacher
    from mmkd.teachers.local import LocalTeacher as LocalTeacher
    from mmkd.teachers.served_head import head_of_checkpoint as head_of_checkpoint
    from mmkd.teachers.server import ServerTeacher as ServerTeacher
    from mmkd.teachers.several import SeveralTeachers as SeveralTeachers

_MODULES = {
    "ALMConfig": "mmkd.methods.alm",
    "ALMTrainer": "mmkd.methods.alm",
    "CachedTeacher": "mmkd.teachers.cached",
    "CoMDConfig": "mmkd.methods.comd.comd_trainer",
    "CoMDTrainer": "mmkd.methods.comd.comd_trainer",
    "ContrastiveKDConfig": "mmkd.methods.clip_kd.clip_trainer",
    "ContrastiveKDTrainer": "mmkd.methods.clip_kd.clip_trainer",
    "DHOConfig": "mmkd.methods.dho.dho_trainer",
    "DHOTrainer": "mmkd.methods.dho.dho_trainer",
    "DualHeadForImageClassification": "mmkd.models.dual_head",
    "DualHeadForSequenceClassification": "mmkd.models.dual_head",
    "KDConfig": "mmkd.methods.kd",
    "KDTrainer": "mmkd.methods.kd",
    "LLaVAKDConfig": "mmkd.methods.llava_kd",
    "LLaVAKDTrainer": "mmkd.methods.llava_kd",
    "HiddenServerTeacher": "mmkd.teachers.hidden_server",
    "LocalTeacher": "mmkd.teachers.local",
    "head_of_checkpoint": "mmkd.teachers.served_head",
    "SFTBaselineConfig": "mmkd.methods.sft",
    "SFTBaselineTrainer": "mmkd.methods.sft",
    "ServerTeacher": "mmkd.teachers.server",
    "SeveralTeachers": "mmkd.teachers.several",
    "TAIDConfig": "mmkd.methods.taid",
    "TAIDTrainer": "mmkd.methods.taid",
    "TeacherEncoder": "mmkd.methods.clip_kd.clip_trainer",
    "TeacherTower": "mmkd.methods.tower_kd.tower_trainer",
    "TowerKDConfig": "mmkd.methods.tower_kd.tower_trainer",
    "TowerKDTrainer": "mmkd.methods.tower_kd.tower_trainer",
    "TransEncoderConfig": "mmkd.methods.trans_encoder.trans_encoder_trainer",
    "TransEncoderTrainer": "mmkd.methods.trans_encoder.trans_encoder_trainer",
    "UserError": "mmkd.errors",
}

_PUBLIC = sorted([*_MODULES, "__version__"])

if not TYPE_CHECKING:
    # Type checkers take the names imported above, and none that is computed.
    __all__ = _PUBLIC

_register_models()


def __getattr__(name: str) -> Any:
    # Trainers pull in torch and trl, seconds that `mmkd recipes ls` need not wait for.
    if name not in _MODULES:
        raise AttributeError(f"module 'mmkd' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, also those that nothing has imported yet."""
    return _PUBLIC
