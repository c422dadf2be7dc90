"""METHOD: contrastive distillation, whose students are dual encoders."""

from mmkd.data.picture_source import picture_facts
from mmkd.training.method import Method

from .clip_build import build_clip_trainer, check_clip_run, write_stand_in
from .clip_checks import examine_clip
from .clip_comparison import COMPARISON
from .clip_plan import dry_run_clip, plan_clip
from .clip_run import unused_keys
from .clip_trainer import ContrastiveKDTrainer
from .embedding_cache import build_embedding_cache

METHOD = Method(
    ContrastiveKDTrainer,
    predicts="embeddings",
    build=build_clip_trainer,
    dry_run=dry_run_clip,
    check=check_clip_run,
    examine=examine_clip,
    plan=plan_clip,
    data_facts=picture_facts,
    stand_in=write_stand_in,
    build_cache=build_embedding_cache,
    inherits=True,
    leaves_whole_student=True,
    unused=unused_keys(),
    comparison=COMPARISON,
)
