"""What `mmkd cache build` reads from a recipe besides what `mmkd train` does."""

from dataclasses import dataclass, field
from typing import Annotated

from mmkd.cache.codec import KINDS
from mmkd.errors import UserError
from mmkd.schema import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Share, check_fields

JOBS = ("score", "generate")


@dataclass
class CacheArguments:
    """How the teacher's pass over the data is made and written down. A recipe for training may hold these keys too."""

    job: str = field(
        default="score",
        metadata={
            "help": "score: the teacher's distribution over the tokens of the data's own answers. generate: the "
            "teacher's answers to the data's prompts, as text; the result is a data set to train on or to score.",
            "choices": list(JOBS),
        },
    )
    cache_signal: str = field(
        default="top_k",
        metadata={
            "help": "top_k: teacher_top_k exact outcomes, the tail's mass and cache_tail_draws per token. log_probs: "
            "the token's own log-prob, in the teacher's tokens, for method alm.",
            "choices": list(KINDS),
        },
    )
    cache_tail_draws: NonNegativeInt = field(
        default=0,
        metadata={
            "help": "Systematic draws from the tail per token, for teacher_tail: unbiased. 32 exact and 32 draws cost "
            "less than 64 exact and give a better gradient; teacher_top_k: 0 with 50 draws is RS-KD."
        },
    )
    cache_shard_rows: PositiveInt = field(
        default=512,
        metadata={"help": "Sequences per shard: what a killed build loses at most, and what one worker takes."},
    )
    cache_batch_tokens: PositiveInt = field(
        default=8192, metadata={"help": "Tokens, padding included, that a local teacher reads at a time."}
    )
    on_error: str = field(
        default="fail",
        metadata={
            "help": "A row the teacher cannot read (an undecodable image, image tokens that max_length cuts off, more "
            "tokens than the teacher or its server has room for). fail: stop there. skip: leave it out, count it in "
            "the manifest, and leave it out of training from the cache.",
            "choices": ["fail", "skip"],
        },
    )
    max_skipped: Share = field(
        default=0.1,
        metadata={
            "help": "on_error: skip: the largest share of the rows that may be left out. A build that would leave "
            "out more ends with an error; what it wrote is kept."
        },
    )
    shard: str | None = field(
        default=None,
        metadata={"help": "i/n: build the i-th (from 0) of n parts, on as many machines; then `mmkd cache merge`."},
    )
    engine: str = field(
        default="process",
        metadata={
            "help": "process: this process. ray: Ray Data over cache_workers workers, on one machine or a cluster.",
            "choices": ["process", "ray"],
        },
    )
    cache_workers: PositiveInt = field(
        default=2, metadata={"help": "Workers of engine: ray, each with a teacher of its own."}
    )
    cache_worker_cpus: NonNegativeFloat = field(default=1, metadata={"help": "CPUs that each Ray worker reserves."})
    cache_worker_gpus: NonNegativeFloat = field(
        default=0,
        metadata={"help": "GPUs that each Ray worker reserves: 1 for a local teacher on GPUs, 0 for servers."},
    )
    cache_samples: PositiveInt = field(default=1, metadata={"help": "generate: answers per prompt."})
    cache_max_new_tokens: PositiveInt = field(default=512, metadata={"help": "generate: longest answer, in tokens."})
    cache_keep_truncated: bool = field(
        default=False,
        metadata={
            "help": "generate: also train on answers that cache_max_new_tokens cut off. The data.yaml beside the "
            "answers leaves them out by default. Kept, they are marked (column `truncated`), and the end that the "
            "template writes after them is not learnt: the teacher had more to say. Build again with another value "
            "to change data.yaml; nothing is asked anew."
        },
    )
    cache_temperature: NonNegativeFloat = field(
        default=1.0, metadata={"help": "generate: sampling temperature; 0 is greedy decoding."}
    )
    cache_top_p: Annotated[float, Range(above=0, max=1)] = field(
        default=1.0, metadata={"help": "generate: nucleus of the sampled distribution."}
    )
    cache_seed: NonNegativeInt = field(
        default=0, metadata={"help": "generate: seed of the sampling; draws have none."}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.job == "generate" and self.cache_samples > 1 and self.cache_temperature == 0:
            raise UserError(
                "cache_samples above 1 with cache_temperature 0 gives the same answer several times.",
                because="meaning",
            )
        if self.engine == "ray" and self.shard is not None:
            raise UserError(
                "engine: ray spreads the shards over its workers itself; leave shard out.", because="meaning"
            )
        self.part = _part(self.shard)


def _part(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    index, slash, count = str(shard).partition("/")
    if not slash or not index.isdigit() or not count.isdigit() or not int(index) < int(count):
        raise UserError(f"shard is {shard!r}; write i/n, the i-th (from 0) of n parts, such as 0/4.")
    return int(index), int(count)
