"""METHOD: dual-head optimisation, whose students predict classes."""

from mmkd.training.method import Method

from .class_checks import check_classes_run, examine_classes
from .class_comparison import COMPARISON
from .class_plan import plan_classes
from .class_run import class_data_facts, unused_keys
from .class_teacher import build_class_cache
from .dho_build import build_dho_trainer
from .dho_dry_run import dry_run_dho
from .dho_trainer import DHOTrainer

METHOD = Method(
    DHOTrainer,
    predicts="classes",
    build=build_dho_trainer,
    dry_run=dry_run_dho,
    check=check_classes_run,
    examine=examine_classes,
    plan=plan_classes,
    data_facts=class_data_facts,
    build_cache=build_class_cache,
    unused=unused_keys(),
    comparison=COMPARISON,
)
