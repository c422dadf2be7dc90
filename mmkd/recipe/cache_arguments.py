"""What `mmkd cache build` reads from a recipe besides what `mmkd train` does."""

from dataclasses import dataclass, field
from typing import Annotated

from mmkd.cache.codec import KINDS
from mmkd.cache.state_codec import DTYPES
from mmkd.errors import UserError
from mmkd.generation.verifier_names import PYTHON, VERIFIERS
from mmkd.schema import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Share, check_fields

JOBS = ("score", "generate", "aspects")
KEEPS = ("all", "correct", "majority", "judge")


@dataclass
class CacheArguments:
    """How the teacher's pass over the data is made and written down. A recipe for training may hold these keys too."""

    job: str = field(
        default="score",
        metadata={
            "help": "What the teacher does with the data. score (default): it predicts every token of the data's "
            "own answers. generate: it writes answers to the data's prompts; the result is a data set to "
            "train on or to score. aspects: for method dho, a vision-language model answers the questions of "
            "`aspects` about every image.",
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

    cache_keep: str = field(
        default="all",
        metadata={
            "help": "For job: generate. Which answers data.yaml trains on. all (default): every answer that ends by "
            "itself. correct: those that cache_verifier finds right. majority: those whose final answer most of the "
            "cache_samples answers to the prompt share. judge: those that cache_judge_server rates well. Build again "
            "with another value to choose anew; no answer is generated again.",
            "choices": list(KEEPS),
        },
    )
    cache_verifier: str | None = field(
        default=None,
        metadata={
            "help": "For job: generate. How final answers are read and compared. number: the number in a box, after "
            "#### or 'the answer is', or the last one. math: mathematical expressions, with the package math-verify. "
            "choice: the letter of a multiple choice. json: valid JSON, which fits cache_json_schema. "
            "python:package.module:function, or python:path/to/file.py:function: function(answer, row) gives True, "
            "False or a score, of which 1 and more is right."
        },
    )
    cache_gold_column: str | None = field(
        default=None,
        metadata={
            "help": "For cache_verifier and the judge. Column of the data with the right answer, or a whole solution "
            "that ends in it. Default: the answer that the row itself has."
        },
    )
    cache_verifier_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "For cache_verifier: python:... Columns of the data that the function finds in its row, besides "
            "what the teacher was asked and the row's own answer."
        },
    )
    cache_json_schema: str | None = field(
        default=None, metadata={"help": "For cache_verifier: json. Path of a JSON Schema that answers must fit."}
    )
    cache_majority: Annotated[float, Range(min=0, below=1)] = field(
        default=0.5,
        metadata={
            "help": "For cache_keep: majority. More than this share of the answers to a prompt must have the same "
            "final answer. 0.5 (default): more than half. 0: more than any other final answer has."
        },
    )
    cache_judge_server: list[str] | None = field(
        default=None,
        metadata={
            "help": "For cache_keep: judge. URLs of a chat server (OpenAI's protocol) whose model rates each answer "
            "from 1 to 10. With another cache_keep, answers are rated too and chosen without the ratings."
        },
    )
    cache_judge_model: str | None = field(
        default=None, metadata={"help": "The judge's name on its server. Needed if it offers several models."}
    )
    cache_judge_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "Name of the environment variable that holds the key of cache_judge_server."},
    )
    cache_judge_min: Annotated[int, Range(min=1, max=10)] = field(
        default=8, metadata={"help": "For cache_keep: judge. The lowest rating of an answer that is kept."}
    )
    cache_max_think_tokens: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "For job: generate. Tokens that thoughts (<think>...</think>) may take. Where they reach it, "
            "</think> is written for the teacher, which then goes on with its answer. Default: no limit."
        },
    )
    cache_thoughts: str = field(
        default="keep",
        metadata={
            "help": "For job: generate. keep (default): data.yaml trains on thoughts and answers. strip: on the "
            "answers only. Build again with the other value to change it; no answer is generated again.",
            "choices": ["keep", "strip"],
        },
    )
    cache_pairs: NonNegativeInt = field(
        default=0,
        metadata={
            "help": "For job: generate with cache_keep. Pairs of a kept and a rejected answer to write for each "
            "prompt at most, as a data set for DPO beside the answers (pairs.yaml). Default: 0, none."
        },
    )

    @property
    def read_columns(self) -> list[str]:
        """The columns of the data that answers are verified with, besides those that are trained on."""
        named = [self.cache_gold_column, *(self.cache_verifier_columns or [])]
        return list(dict.fromkeys(name for name in named if name is not None))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.job == "generate":
            _check_verification(self)
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


def _check_verification(arguments: CacheArguments) -> None:
    """Raises UserError for a choice of answers that lacks what it needs."""
    keep, verifier = arguments.cache_keep, arguments.cache_verifier
    if verifier is not None and verifier not in VERIFIERS and not verifier.startswith(PYTHON):
        raise UserError(
            f"cache_verifier is {verifier!r}; choose one of {', '.join(VERIFIERS)}, or python:package.module:function."
        )
    if keep in ("correct", "majority") and verifier is None:
        raise UserError(f"cache_keep: {keep} needs a cache_verifier, which reads the final answers.")
    if keep == "judge" and arguments.cache_judge_server is None:
        raise UserError("cache_keep: judge needs cache_judge_server, the URL of the judge.")
    if arguments.cache_json_schema is not None and verifier != "json":
        raise UserError("cache_json_schema is for cache_verifier: json only.", because="meaning")
    if arguments.cache_verifier_columns and not (verifier or "").startswith(PYTHON):
        raise UserError("cache_verifier_columns is for cache_verifier: python:... only.", because="meaning")
    if arguments.cache_gold_column is not None and verifier is None and arguments.cache_judge_server is None:
        raise UserError(
            "cache_gold_column names the right answers, and nobody compares with them. Set cache_verifier or "
            "cache_judge_server, or remove cache_gold_column.",
            because="meaning",
        )
    if keep == "majority" and arguments.cache_samples < 2:
        raise UserError("cache_keep: majority compares several answers: set cache_samples.", because="meaning")
    if arguments.cache_pairs and (keep == "all" or arguments.cache_samples < 2):
        raise UserError(
            "cache_pairs needs kept and rejected answers to the same prompt: set cache_keep to correct, majority or "
            "judge, and cache_samples above 1.",
            because="meaning",
        )
    budget = arguments.cache_max_think_tokens
    if budget is not None and budget >= arguments.cache_max_new_tokens:
        raise UserError(
            f"cache_max_think_tokens {budget} leaves no room for an answer in cache_max_new_tokens "
            f"{arguments.cache_max_new_tokens}. Raise the latter."
        )


def _part(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    index, slash, count = str(shard).partition("/")
    if not slash or not index.isdigit() or not count.isdigit() or not int(index) < int(count):
        raise UserError(f"shard is {shard!r}; write i/n, the i-th (from 0) of n parts, such as 0/4.")
    return int(index), int(count)
