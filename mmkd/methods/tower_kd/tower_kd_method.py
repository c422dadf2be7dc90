"""METHOD: vision tower distillation, whose students are towers without text."""

from mmkd.data.picture_source import picture_facts
from mmkd.training.method import Method

from .tower_build import build_tower_trainer, check_tower_run, write_stand_in
from .tower_checks import examine_tower
from .tower_plan import dry_run_tower, plan_tower
from .tower_run import unused_keys
from .tower_trainer import TowerKDTrainer

METHOD = Method(
    TowerKDTrainer,
    predicts="features",
    leaves="student_vision_tower",
    build=build_tower_trainer,
    dry_run=dry_run_tower,
    check=check_tower_run,
    examine=examine_tower,
    plan=plan_tower,
    data_facts=picture_facts,
    stand_in=write_stand_in,
    unused=unused_keys(),
)
