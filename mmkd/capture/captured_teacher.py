"""The teacher that a cache is made of: what decides its numbers, the tokens that it shares, and its head."""

import hashlib
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from mmkd.alignment.vocab import shared_tokens
from mmkd.cache.identity import saved_dtype
from mmkd.cache.side_files import head_bytes
from mmkd.cache.state_codec import BLOCK
from mmkd.errors import UserError
from mmkd.models.backbone import full_head
from mmkd.models.heads import LMHead
from mmkd.models.load import image_token_of, tokenizer_of
from mmkd.precision import name_of_dtype, product_dtype, say_float32
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_teacher import server_client, server_teacher, teacher_identity
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.served_head import head_of_checkpoint
from mmkd.teachers.vllm_client import VLLMClient


def described_teacher(
    run: Run, tokenizer: Any, k: int, max_length: int | None, served: str | None = None
) -> dict[str, Any]:
    """What decides the teacher's numbers; a server, which answers with the signal `served`, is checked on the way."""
    backend = "transformers"
    if served == "hidden":
        teacher = hidden_teacher(run, tokenizer)
        with teacher.client:
            teacher.check()
        backend = f"vllm {teacher.facts.vllm_version}, hidden states in {name_of_dtype(teacher.dtype)}"
    elif run.arguments.teacher_server is not None:
        with client_of(run) as client:
            if run.cache.job == "generate":
                check_generates(client)
            facts = client.check(run.arguments.teacher, k, max_length, tokenizer)
        backend = f"vllm {facts.vllm_version}"
    return {**teacher_identity(run), "backend": backend, **_precision(run)}


def hidden_teacher(run: Run, tokenizer: Any) -> HiddenServerTeacher:
    """The teacher whose hidden states a run's servers give, for sequences of this tokenizer's tokens."""
    urls = run.arguments.teacher_server
    assert urls is not None
    teacher = server_teacher(run, urls, tokenizer)
    assert isinstance(teacher, HiddenServerTeacher), "the servers were asked before"
    return teacher


def states_signal(run: Run, vocab_size: int, visual: bool) -> dict[str, Any]:
    """What a manifest says of hidden states, and of the head that reads them."""
    head, dtype = teacher_head(run, vocab_size), run.cache.cache_hidden_dtype
    return {
        "kind": "hidden",
        "dtype": dtype,
        **({"block": BLOCK} if dtype == "int8" else {}),
        "width": head.weight.shape[1],
        "vocab_size": vocab_size,
        "visual": visual,
        "head": hashlib.sha256(head_bytes(head)).hexdigest(),
        "head_dtype": name_of_dtype(head.weight.dtype),
        "head_scale": head.scale,
        "head_softcap": head.softcap,
    }


def teacher_head(run: Run, vocab_size: int) -> LMHead:
    """The head of a run's teacher over the first tokens, in the type that was asked for on whichever machine."""
    settings = run.arguments
    assert settings.teacher is not None
    trust = run.training.trust_remote_code
    # A GPU multiplies in every type, so that the head is the same on all machines.
    head = head_of_checkpoint(settings.teacher, settings.teacher_revision, settings.teacher_dtype, trust, "cuda")
    return head.trimmed(vocab_size)


def check_loaded_head(model: PreTrainedModel, head: LMHead) -> None:
    """Raises UserError where the head of a loaded model is not that of its checkpoint, which a cache holds."""
    loaded = full_head(model).trimmed(head.vocab_size).frozen()
    ours = head.frozen(loaded.weight.dtype)
    same = torch.equal(loaded.weight.cpu(), ours.weight)
    if not same or (loaded.scale, loaded.softcap) != (head.scale, head.softcap):
        raise UserError(
            "The head of the loaded teacher is not the one in its files: an adapter, a quantisation or code of its "
            "own changes it, and a cache of hidden states would be read with another head. Save the whole model with "
            "save_pretrained, or set cache_signal: top_k.",
            because="not built",
        )


def check_top_k_server(run: Run) -> None:
    """Raises UserError for what a server that tells its most likely tokens only cannot give a cache."""
    settings, arguments = run.arguments, run.cache
    if arguments.cache_signal == "hidden":
        raise UserError(
            "cache_signal: hidden needs the teacher's hidden states, and the server gives its most likely tokens. "
            "Start it with --runner pooling (scripts/serve_teacher.sh MODEL --signal hidden), or use a local teacher.",
            because="upstream",
        )
    if arguments.cache_signal == "top_k" and (arguments.cache_tail_draws or not settings.teacher_top_k):
        raise UserError(
            "This server tells its most likely tokens only, not the tail to draw from. Serve the teacher's hidden "
            "states (teacher_server_signal: hidden), set cache_tail_draws: 0 and teacher_top_k above 0, or use a "
            "local teacher.",
            because="upstream",
        )
    if arguments.cache_signal == "log_probs" and run.training.needs_boundaries:
        raise UserError(
            "chunks: merge and unbiased need the probability of a word's end, which is that of thousands of tokens "
            "together, and a server in top_k mode tells its most likely tokens only. Serve the teacher's hidden "
            "states (teacher_server_signal: hidden), or set chunks: all or space.",
            because="upstream",
        )


def check_generates(client: VLLMClient) -> None:
    """Raises UserError for servers of hidden states, of which answers are wanted."""
    if client.signal() == "hidden":
        raise UserError(
            "Answers are generated, and this server gives hidden states only. Start one that generates: "
            "scripts/serve_teacher.sh MODEL without --signal hidden.",
            because="upstream",
        )


def client_of(run: Run, processing_class: Any = None) -> VLLMClient:
    """A client of the run's servers."""
    urls = run.arguments.teacher_server
    assert urls is not None
    return server_client(run, urls, image_token_of(processing_class))


def shared_rows(run: Run, processing_class: Any, teacher_class: Any) -> int:
    """The number of leading token ids that sequences and teacher share."""
    settings = run.arguments
    ours: Any = tokenizer_of(processing_class)
    theirs: Any = tokenizer_of(teacher_class)
    assert settings.teacher is not None
    rows = [config_named(run, settings.teacher).get_text_config().vocab_size]
    if settings.student is not None and ours is not theirs:
        # A student grows where a cloned chat template adds tokens.
        rows.append(max(config_named(run, settings.student).get_text_config().vocab_size, len(ours)))
    return shared_tokens(ours, theirs, *rows)


def _precision(run: Run) -> dict[str, Any]:
    """What besides the weights decides the teacher's numbers."""
    settings = run.arguments
    if settings.teacher_server is not None:
        return {"dtype": None, "quantization": None}
    assert settings.teacher is not None
    dtype = settings.teacher_dtype
    if dtype == "auto":
        dtype = config_named(run, settings.teacher).dtype
        if dtype is None:
            dtype = saved_dtype(settings.teacher, settings.teacher_revision)
    # Ray's workers have the GPUs that they are given, whatever this machine has.
    device = "cuda" if run.cache.engine == "ray" and run.cache.cache_worker_gpus else run.training.device
    # What is recorded is what is computed; a wrong name is told where the teacher is loaded.
    known = getattr(torch, name_of_dtype(dtype), None)
    if isinstance(known, torch.dtype) and product_dtype(known, device) != known:
        say_float32()
        dtype = product_dtype(known, device)
    dtype = name_of_dtype(dtype)
    quantization = "nf4" if settings.teacher_load_in_4bit else "int8" if settings.teacher_load_in_8bit else None
    return {"dtype": dtype, "quantization": quantization}


def config_named(run: Run, name: str) -> Any:
    """The configuration of a run's teacher or student."""
    revision = run.arguments.teacher_revision if name == run.arguments.teacher else run.student.model_revision
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=run.training.trust_remote_code)
