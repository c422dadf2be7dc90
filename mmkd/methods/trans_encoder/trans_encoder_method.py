"""METHOD: Trans-Encoder, in which a bi- and a cross-encoder of sentences teach each other."""

from mmkd.data.sentence_pairs import pair_facts
from mmkd.training.method import Method

from .half_cycles import train_cycles
from .trans_encoder_plan import build_first_half, check_run, dry_run_encoders, examine_encoders, plan_encoders
from .trans_encoder_run import unused_keys
from .trans_encoder_trainer import TransEncoderTrainer

METHOD = Method(
    TransEncoderTrainer,
    predicts="embeddings",
    build=build_first_half,
    drive=train_cycles,
    dry_run=dry_run_encoders,
    check=check_run,
    examine=examine_encoders,
    plan=plan_encoders,
    data_facts=pair_facts,
    unused=unused_keys(),
)
