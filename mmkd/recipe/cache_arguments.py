"""What `mmkd cache build` reads from a recipe besides what `mmkd train` does."""

from dataclasses import dataclass, field
from typing import Annotated

from mmkd.cache.codec import KINDS
from mmkd.cache.state_codec import DTYPES
from mmkd.errors import UserError
from mmkd.schema import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Share, check_fields

JOBS = ("score", "generate")


@dataclass
class CacheArguments:
    """How the teacher's pass over the data is made and written down. A recipe for training may hold these keys too."""

    job: str = field(
        default="score",
        metadata={
            "help": "What the teacher does with the data. score (default): it predicts every token of the data's "
            "own answers. generate: it writes answers to the data's prompts; the result is a data set to "
            "train on or to score.",
            "choices": list(JOBS),
        },
    )
    cache_signal: str = field(
        default="top_k",
        metadata={
            "help": "What is stored of each token. top_k (default): the teacher_top_k most likely tokens with "
            "their probabilities, the probability of the rest, and cache_tail_draws. log_probs: the "
            "probability of the token itself, in the teacher's tokenization, for method alm. hidden: the "
            "teacher's last hidden state, and once its head, from which training forms the whole distribution: any "
            "divergence and temperature work. It takes 1,000 to 6,000 bytes per token, top_k about 130.",
            "choices": list(KINDS),
        },
    )
    cache_hidden_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "For cache_signal: hidden. The type that hidden states are stored in. bfloat16 (default) is exact "
            "for a teacher in bfloat16, float16 for one in float16, float32 for any. int8 takes two thirds of the "
            "room of bfloat16 and changes the teacher's distribution by about 3e-4 nats.",
            "choices": list(DTYPES),
        },
    )
    cache_tail_draws: NonNegativeInt = field(
        default=0,
        metadata={
            "help": "Random draws from the tail to store for each token, for teacher_tail: unbiased. Default: 0, "
            "none. 32 exact tokens with 32 draws take less space than 64 exact ones and give a better "
            "gradient; teacher_top_k: 0 with 50 draws is RS-KD."
        },
    )
    cache_shard_rows: PositiveInt = field(
        default=512,
        metadata={
            "help": "Sequences in one shard. A build that is killed loses at most one unfinished shard, and "
            "workers take one shard at a time."
        },
    )
    cache_batch_tokens: PositiveInt = field(
        default=8192,
        metadata={
            "help": "Tokens, padding included, that a local teacher reads in one forward pass. Lower it if the "
            "teacher runs out of memory."
        },
    )
    on_error: str = field(
        default="fail",
        metadata={
            "help": "What to do with a row that the teacher cannot read, such as a broken image or a row too long "
            "for the teacher. fail (default): stop. skip: leave it out of cache and training, and count "
            "it.",
            "choices": ["fail", "skip"],
        },
    )
    max_skipped: Share = field(
        default=0.1,
        metadata={
            "help": "For on_error: skip. The largest share of rows to leave out. A build above it ends with an "
            "error and keeps what it wrote."
        },
    )
    shard: str | None = field(
        default=None,
        metadata={
            "help": "Build part i of n only, written i/n with i from 0, such as 0/4. Use it to divide a build "
            "between machines, then join the parts with `mmkd cache merge`."
        },
    )
    engine: str = field(
        default="process",
        metadata={
            "help": "Where the teacher runs. process (default): in this process. ray: in cache_workers workers of "
            "Ray Data, on one machine or a cluster.",
            "choices": ["process", "ray"],
        },
    )
    cache_workers: PositiveInt = field(
        default=2, metadata={"help": "For engine: ray. Number of workers; each loads a teacher of its own."}
    )
    cache_worker_cpus: NonNegativeFloat = field(
        default=1, metadata={"help": "For engine: ray. CPUs to reserve for each worker."}
    )
    cache_worker_gpus: NonNegativeFloat = field(
        default=0,
        metadata={
            "help": "For engine: ray. GPUs to reserve for each worker: 1 for a local teacher on GPUs, 0 (default) "
            "for servers."
        },
    )
    cache_samples: PositiveInt = field(
        default=1, metadata={"help": "For job: generate. Answers to write for each prompt."}
    )
    cache_max_new_tokens: PositiveInt = field(
        default=512, metadata={"help": "For job: generate. Tokens after which an answer is cut off."}
    )
    cache_keep_truncated: bool = field(
        default=False,
        metadata={
            "help": "For job: generate. Train on cut-off answers too. By default the data.yaml beside the answers "
            "leaves them out. If they are kept, the end that the chat template adds to them is not learnt. "
            "Build again with the other value to change data.yaml; no answer is generated again."
        },
    )
    cache_temperature: NonNegativeFloat = field(
        default=1.0, metadata={"help": "For job: generate. Sampling temperature of the answers; 0 is greedy decoding."}
    )
    cache_top_p: Annotated[float, Range(above=0, max=1)] = field(
        default=1.0,
        metadata={
            "help": "For job: generate. Sample from the most likely tokens that have this total probability. 1 "
            "(default) samples from all."
        },
    )
    cache_seed: NonNegativeInt = field(default=0, metadata={"help": "For job: generate. Seed of the sampling."})

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
