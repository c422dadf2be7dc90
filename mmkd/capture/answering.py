"""Who answers the prompts of a data set: a teacher in this process, vLLM servers, or any chat server."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from mmkd.data.prompts import IllustratedText
from mmkd.errors import UserError
from mmkd.generation.chat_generation import ChatGenerator
from mmkd.generation.generator import Generator, Prompt
from mmkd.generation.local_generation import LocalGenerator, on_device, prompt_inputs
from mmkd.generation.served_generation import ServerGenerator
from mmkd.generation.thoughts import BudgetedGenerator
from mmkd.models.load import tokenizer_of
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_models import load_teacher
from mmkd.teachers.chat_api import ChatClient
from mmkd.teachers.vllm_client import Ids

from .captured_teacher import client_of
from .scorers import batches


@dataclass(frozen=True)
class AskedRow:
    """A row to be answered: the tokens of its prompt, and how to make the prompt itself.

    Decoded, the images of all rows of a shard would not fit into memory.
    """

    row: int
    ids: Ids
    """Empty for a chat server, which makes tokens of its own."""
    images: tuple[str, ...]
    """Hashes of the images."""
    prompt: Callable[[], Prompt]


def generator_of(run: Run, processing_class: Any, dtype: str) -> Generator[AskedRow]:
    """Whoever answers for a run; a local teacher is loaded for it."""
    settings, budget = run.arguments, run.cache.cache_max_think_tokens
    generator: Generator[AskedRow]
    if settings.teacher_api is not None:
        return ChatGenerator(api_client(run), lambda row: row.prompt())
    if settings.teacher_server is not None:
        generator = ServerGenerator(client_of(run, processing_class), lambda row: row.prompt())
    else:
        assert settings.teacher is not None
        teacher = on_device(load_teacher(run, settings.teacher, dtype))

        def inputs(rows: list[AskedRow]) -> Mapping[str, Any]:
            return prompt_inputs(processing_class, [row.prompt() for row in rows])

        def split(rows: Sequence[AskedRow]) -> Iterator[list[int]]:
            return _batches(run, rows)

        generator = LocalGenerator(teacher, processing_class, inputs, split)
    if budget is None:
        return generator
    return BudgetedGenerator(generator, tokenizer_of(processing_class), lambda row: row.ids, _continued, budget)


def _continued(row: AskedRow, ids: list[int]) -> AskedRow:
    return replace(row, ids=ids, prompt=lambda: Prompt(ids))


def _batches(run: Run, rows: Sequence[AskedRow]) -> Iterator[list[int]]:
    """Prompts with images one by one, others in batches of like length."""
    keys = run.cache
    lengths = [(len(row.ids) + keys.cache_max_new_tokens) * keys.cache_samples for row in rows]
    return batches(lengths, 0 if any(row.images for row in rows) else keys.cache_batch_tokens)


def api_client(run: Run) -> ChatClient:
    """A client of the run's chat API."""
    arguments = run.arguments
    assert arguments.teacher_api is not None
    return ChatClient(
        arguments.teacher_api,
        arguments.teacher_api_model,
        key_names=(arguments.teacher_api_key_env,),
        concurrency=arguments.teacher_concurrency,
        timeout=arguments.teacher_timeout,
    )


def judge_client(run: Run) -> ChatClient:
    """A client of the judge's server."""
    keys = run.cache
    assert keys.cache_judge_server is not None
    return ChatClient(
        keys.cache_judge_server,
        keys.cache_judge_model,
        key_names=(keys.cache_judge_key_env,),
        model_key="cache_judge_model",
        concurrency=run.arguments.teacher_concurrency,
        timeout=run.arguments.teacher_timeout,
    )


def api_teacher(run: Run) -> dict[str, Any]:
    """What a manifest says of a teacher behind a chat API: its name, and who offers it."""
    urls = run.arguments.teacher_api
    assert urls is not None
    with api_client(run) as client:
        model = client.model
    # Without ports, which change when a server on this machine is started anew.
    hosts = ", ".join(sorted({urlsplit(url).hostname or "" for url in urls}))
    backend = f"chat API at {hosts}"
    return {
        "name": model,
        "revision": None,
        "weights": None,
        "backend": backend,
        "dtype": None,
        "quantization": None,
    }


def api_prompt(asked: Any, images: Sequence[Any], row: Mapping[str, Any]) -> Prompt:
    """What a chat API is asked. Raises UserError for what its protocol cannot say."""
    if isinstance(asked, IllustratedText):
        raise UserError(
            "A chat API is asked about images through messages, but the prompts are plain text. Map them to messages.",
            because="not built",
        )
    if row.get("tools"):
        raise UserError(
            "The rows have tools, and calls of tools by a chat API are not kept. Remove the column `tools`, or use a "
            "local teacher or vLLM (teacher_server).",
            because="not built",
        )
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    return Prompt((), messages, images)
