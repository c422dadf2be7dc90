"""Checks of `mmkd doctor` on a teacher that is not loaded here: a server, or a cache."""

import copy
from dataclasses import replace

import numpy as np
from datasets import DatasetDict

from mmkd.cache.hub import local_cache
from mmkd.cache.store import Cache
from mmkd.capture.build_plan import check_place, check_settings
from mmkd.capture.captured_teacher import check_generates
from mmkd.capture.scorers import question_of
from mmkd.capture.sequences import TokenSequence, prepare, usable
from mmkd.errors import UserError
from mmkd.models.load import load_processing_class
from mmkd.precision import name_of_dtype
from mmkd.recipe.cautions import cautions_of
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_teacher import check_cache, own_rows_of, server_signal, server_teacher
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.vllm_client import VLLMClient
from mmkd.teachers.vllm_rows import RowError, ScoreRequest
from mmkd.training.method import METHODS
from mmkd.training.self_teaching import nothing_to_learn
from mmkd.units import readable_size, with_noun

from .facts import Finding, Sample, Side

# Seconds: a server that answers two tokens later than this is no teacher to train with.
PATIENCE = 30


def literature(run: Run) -> list[Finding]:
    """What papers warn of in settings like these."""
    return [Finding("warning", "literature", caution.message, caution.advice) for caution in cautions_of(run)]


def server(run: Run, student: Side, teacher: Side | None, sample: Sample | None) -> list[Finding]:
    """Whether the servers answer, with the model, room, log-probs and tokens that are needed."""
    arguments, urls = run.arguments, run.arguments.teacher_server
    assert urls is not None
    live = arguments.teacher_cache is None
    reader = student if teacher is None else teacher
    shown = None if sample is None or not sample.has_images else _row_with_images(run, reader, sample)
    if run.cache.job == "generate" and not live:
        with VLLMClient(urls, arguments.teacher_server_model, timeout=PATIENCE) as client:
            check_generates(client)
    elif server_signal(run, urls) == "hidden":
        return _hidden_server(run, urls, student, live, shown)
    own = not METHODS[run.arguments.method].one_vocabulary
    # Of a text that a teacher reads in tokens of its own, these alone are asked.
    k = 1 if own or not (live or run.cache.cache_signal == "top_k") else arguments.teacher_top_k
    if live:
        _check_method(run, ServerTeacher(urls, k=k, model=arguments.teacher_server_model))
    with VLLMClient(urls, arguments.teacher_server_model, timeout=PATIENCE) as client:
        facts = client.check(arguments.teacher, k, run.training.teacher_length, reader.tokenizer)
        asked = [] if shown is None else [_asked(shown, next(client.score([shown], k)))]
    message = (
        f"{', '.join(facts.urls)}: vLLM {facts.vllm_version} serves {facts.model!r} with room for "
        f"{facts.max_model_len:,} tokens, gives the top {k} and tokenises alike."
    )
    return [Finding("ok", "server", message), *asked]


def itself(run: Run, alone: bool) -> list[Finding]:
    """In which form a student that is its own teacher teaches, and whether it has anything to learn from that.

    Beside other teachers (not `alone`) it has.
    """
    form = run.training.self_teacher or "base"
    forms = {
        "base": "as it was before training" + (", which is without its adapter" if run.student.use_peft else ""),
        "live": "as it is now",
        "ema": f"averaged over the steps (ema_decay {run.training.ema_decay:g})",
    }
    found = [Finding("ok", "teacher", f"The student is its own teacher, {forms[form]}.")]
    missing = nothing_to_learn(run.training) if alone and METHODS[run.arguments.method].needs_teacher else None
    if missing is not None:
        message, _, advice = missing.partition(" Set ")
        found.append(Finding("warning", "teacher", message, f"Set {advice}"))
    return found


def _row_with_images(run: Run, reader: Side, sample: Sample) -> ScoreRequest | None:
    """The first row of the sample with images, as a server is asked about it; None where there is none."""
    rows = own_rows_of(run, sample.rows)
    if not len(rows["train"]):
        return None
    training = run.training.for_teacher()
    prepared = prepare(DatasetDict({"train": rows["train"]}), training, copy.deepcopy(reader.processing_class))
    sequences = prepared.splits["train"]
    for _, sequence in usable(sequences, range(len(sequences))):
        if isinstance(sequence, TokenSequence) and sequence.images:
            return question_of(sequence, sequence.supervised)
    return None


def _asked(question: ScoreRequest, answer: object) -> Finding:
    """What became of a row with images."""
    if isinstance(answer, RowError):
        return Finding(
            "problem",
            "images",
            f"The server was asked about a row with {with_noun(len(question.images), 'image')}. {answer.reason}",
            "Serve the teacher with its own chat template and processor.",
        )
    tokens = int((np.asarray(question.ids) == question.image_token_id).sum())
    text = f"The server makes the same tokens of a row with {with_noun(len(question.images), 'image')}"
    return Finding("ok", "images", f"{text}, {tokens:,} of them the images'.")


def _hidden_server(run: Run, urls: list[str], student: Side, live: bool, shown: ScoreRequest | None) -> list[Finding]:
    """Whether the servers send the hidden states that the teacher's head was made for."""
    patient = replace(run, arguments=replace(run.arguments, teacher_timeout=PATIENCE))
    teacher = server_teacher(patient, urls, student.tokenizer)
    assert isinstance(teacher, HiddenServerTeacher)
    with teacher.client:
        if live:
            METHODS[run.arguments.method].trainer.check_teacher(teacher, run.training)
        teacher.check()
        asked = [] if shown is None else [_asked(shown, next(teacher.client.states([shown], teacher.dtype)))]
    facts, width = teacher.facts, teacher.head.weight.shape[1]
    states = Finding(
        "ok",
        "server",
        f"{', '.join(facts.urls)}: vLLM {facts.vllm_version} serves {facts.model!r} with room for "
        f"{facts.max_model_len:,} tokens, sends hidden states of {width:,} numbers in {name_of_dtype(teacher.dtype)} "
        f"({readable_size(width * teacher.dtype.itemsize)} per token), which fit the teacher's head, and tokenises "
        "alike.",
    )
    return [states, *asked]


def _check_method(run: Run, teacher: ServerTeacher) -> None:
    with teacher.client:
        METHODS[run.arguments.method].trainer.check_teacher(teacher, run.training)


def cache_to_build(run: Run) -> list[Finding]:
    """Says that a cache is yet to be built. Raises UserError for settings with which it could not be."""
    check_place(run)
    if run.cache.job == "score":
        check_settings(run)
    return [
        Finding(
            "warning",
            "cache",
            f"There is no {run.arguments.teacher_cache} yet; it must be built before anything trains from it.",
            "Run `mmkd cache build` with this recipe.",
        )
    ]


def open_cache(run: Run) -> CachedTeacher:
    """The recipe's cache, complete. Raises UserError when it is not, or lacks what the recipe asks of it."""
    assert run.arguments.teacher_cache is not None
    return CachedTeacher(local_cache(run.arguments.teacher_cache), run.arguments.teacher_tail)


def cache(run: Run, known: int, teacher: CachedTeacher) -> list[Finding]:
    """Whether the method can learn from what a cache holds; `known` is the number of the student's tokens."""
    METHODS[run.arguments.method].trainer.check_teacher(teacher, run.training)
    fixed = METHODS[run.arguments.method].one_vocabulary and teacher.states is None
    if fixed and teacher.vocab_size > known:
        raise UserError(
            f"The cache {teacher.cache.folder} speaks of {teacher.vocab_size} tokens, the student has {known}. Build "
            "it again with this student.",
            because="meaning",
        )
    facts = f"{len(teacher.cache):,} sequences, {int(teacher.cache.tokens.sum()):,} tokens"
    return [Finding("ok", "cache", f"{teacher.cache.folder} is complete: {facts}.")]


def origin(run: Run, cache: Cache) -> list[Finding]:
    """Whether a cache is of the recipe's teacher and data. Raises UserError when it is of others."""
    check_cache(run, cache)
    name = cache.manifest.identity["teacher"]["name"]
    return [Finding("ok", "cache", f"It is of the recipe's data, by the teacher {name}.")]


def preparation(run: Run, student: Side, reader: Side | None, sample: Sample, teacher: CachedTeacher) -> list[Finding]:
    """Whether a cache has the sample's sequences. Raises UserError when it was built with other settings.

    `reader` is the side of the teacher, where the recipe names one.
    """
    rows = own_rows_of(run, sample.rows)
    rows = DatasetDict({split: some for split, some in rows.items() if len(some)})
    if "train" not in rows:
        return [Finding("ok", "cache", "None of the sample's rows are of this teacher, so none were looked up.")]
    if METHODS[run.arguments.method].one_vocabulary:
        processing_class = student.processing_class
    elif reader is not None:
        processing_class = reader.processing_class
    else:
        name, trust = teacher.cache.manifest.identity["teacher"]["name"], run.training.trust_remote_code
        processing_class = load_processing_class(name, "teacher", trust_remote_code=trust)
    prepared = prepare(rows, run.training.for_teacher(), copy.deepcopy(processing_class))
    teacher.check(prepared.preparation)
    if run.training.packing and run.training.packing_strategy == "wrapped":
        text = "Where wrapped sequences begin depends on all rows, so the sample's were not looked up."
        return [Finding("ok", "cache", text)]
    keys = [
        (split, row, sequence.key)
        for split, sequences in prepared.splits.items()
        for row, sequence in usable(sequences, range(len(sequences)))
        if isinstance(sequence, TokenSequence)
    ]
    cache = teacher.cache
    missing = [(split, row) for split, row, key in keys if cache.find(key) is None and key not in cache.skipped_keys]
    if not missing:
        return [Finding("ok", "cache", f"It knows the {len(keys)} sequences of the sample.")]
    split, row = missing[0]
    return [
        Finding(
            "problem",
            "cache",
            f"It does not know {len(missing)} of the {len(keys)} sequences of the sample, the first of them number "
            f"{row} of {split}: the rows are others than when it was built.",
            "Build it again with this recipe in another folder, or train on the data it was built on.",
        )
    ]
