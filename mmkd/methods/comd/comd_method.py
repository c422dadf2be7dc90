"""METHOD: competitive distillation, a driver around trainings of other methods."""

from mmkd.training.method import Method

from .comd_comparison import COMPARISON
from .comd_dry_run import dry_run_comd
from .comd_trainer import CoMDTrainer
from .round_checks import examine_rounds
from .rounds import train_rounds

# An adapter is merged after every round.
METHOD = Method(
    CoMDTrainer,
    leaves_whole_student=True,
    drive=train_rounds,
    answer_tokens=lambda training: training.answer_max_new_tokens,
    dry_run=dry_run_comd,
    examine=examine_rounds,
    unused={
        "ce_weight": "Always 1: set round_method to kd and ce_weight in round_settings.",
        "teacher_cache": "The teacher answers instructions that are not known before. See round_cache.",
        "job": "A round builds its cache itself. See round_cache.",
    },
    comparison=COMPARISON,
)
