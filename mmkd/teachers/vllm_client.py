"""A client of vLLM servers: scores given tokens and generates, over HTTP, with what concerns one row kept to that row.

Tokens travel as ids, never as text to be tokenised again, so that the teacher scores the very tokens the student
trains on. The tokens of images are put in by the server itself: what it made of a row with images is compared with the
row's ids.
"""

import os
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmkd.errors import UserError

from . import vllm_wire as wire
from .endpoints import Endpoints, Refusal
from .endpoints import NoAnswer as NoAnswer
from .image_rows import TOKENS_IN, ImageRows, chat_of, compared, request_by_tokens, unlike
from .pooling import states_of
from .server_checks import PROBE as PROBE
from .server_checks import ServerChecks, named, row_refusal
from .server_checks import ServerFacts as ServerFacts
from .vllm_rows import NEUTRAL_SAMPLING, SAMPLING
from .vllm_rows import Answer as Answer
from .vllm_rows import Ids as Ids
from .vllm_rows import Prompt as Prompt
from .vllm_rows import RowError as RowError
from .vllm_rows import ScoreRequest as ScoreRequest
from .vllm_rows import TopK as TopK


class VLLMClient:
    """Asks one or several vLLM servers of the same model; a context manager that closes its connections.

    `model` is the served name, needed only where a server offers several. `concurrency` requests are under way at a
    time over all URLs. The key is `api_key`, or the environment's VLLM_API_KEY. `image_token_id` makes complaints
    about image tokens more precise. Raises UserError for what concerns the server (no answer after `retries`, no
    permission, unknown model, k above its cap, an answer that is not one); what concerns one row only is handed out as
    a `RowError` in its place.
    """

    def __init__(
        self,
        base_urls: str | Sequence[str],
        model: str | None = None,
        *,
        concurrency: int = 16,
        timeout: float = 600,
        retries: int = 6,
        api_key: str | None = None,
        image_token_id: int | None = None,
    ):
        key = api_key or os.environ.get("VLLM_API_KEY")
        urls = [base_urls] if isinstance(base_urls, str) else base_urls
        self._endpoints = Endpoints(urls, key, concurrency, timeout, retries)
        self._checks, self._image_token_id = ServerChecks(self._endpoints, model), image_token_id
        self._images = ImageRows(self._endpoints)
        self._facts: ServerFacts | None = None

    def __enter__(self) -> "VLLMClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; a second call does nothing."""
        self._endpoints.close()

    def check(
        self,
        teacher: str | None = None,
        k: int = 0,
        max_length: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        states: torch.dtype | None = None,
    ) -> ServerFacts:
        """Asks every URL once, without retries, what it serves, and compares it with what is wanted of it.

        Raises UserError when a server is down, serves another model than `teacher` (a folder or Hub name) or than the
        other URLs, lacks room for `max_length` tokens, gives fewer than `k` log-probs, tokenises unlike `tokenizer`,
        or gives no hidden `states` in this type.
        """
        if tokenizer is not None and k > len(tokenizer):
            raise UserError(f"k={k} is more than the teacher's {len(tokenizer)} tokens; choose a smaller k.")
        facts = [self._checks.facts_of(url) for url in self._endpoints.urls]
        for other in facts[1:]:
            if (other.model, other.root) != (facts[0].model, facts[0].root):
                raise UserError(
                    f"{facts[0].urls[0]} serves {named(facts[0])}, but {other.urls[0]} serves {named(other)}. One "
                    "teacher must answer at all URLs: start the servers with the same model and --served-model-name."
                )
        for fact in facts:
            self._checks.check_one(fact, teacher, max_length, tokenizer, generates=states is None)
            if k:
                self._checks.check_top_k(fact, k)
            if states is not None:
                self._checks.check_states(fact, states)
        shortest = min(fact.max_model_len for fact in facts)
        versions = ", ".join(sorted({fact.vllm_version for fact in facts}))
        first = facts[0]
        self._facts = ServerFacts(self._endpoints.urls, first.model, first.root, shortest, versions)
        return self._facts

    def ask_adapter(self, name: str) -> None:
        """From now on the adapter of this name is asked, and not the model that it belongs to."""
        self._facts = replace(self._facts or self.check(), model=name)

    def signal(self) -> str:
        """What all servers answer with: "hidden" states of vLLM's pooling runner, or "top_k" log-probs.

        Raises UserError where they differ, or where one gives neither.
        """
        signals = {url: self._checks.signal_of(self._checks.facts_of(url)) for url in self._endpoints.urls}
        if len(set(signals.values())) > 1:
            raise UserError(
                f"The servers answer with different signals: {signals}. Start all of them with the same --runner."
            )
        return next(iter(signals.values()))

    def score(
        self, questions: Iterable[ScoreRequest], k: int, vocab_size: int | None = None
    ) -> Iterator[TopK | RowError]:
        """The teacher's k most likely tokens at every supervised token, question by question in their order.

        With `vocab_size`, ids from there on (padding rows of the served vocabulary) are passed over, and their
        probability stays with all that is not listed.
        """
        if k < 1 or (vocab_size is not None and k > vocab_size):
            raise UserError(f"k={k} must be at least 1 and at most the {vocab_size or 'number of'} tokens.")
        model = (self._facts or self.check()).model
        return self._endpoints.map(lambda question: self._score(question, k, vocab_size, model), questions)

    def states(
        self, questions: Iterable[ScoreRequest], dtype: torch.dtype = torch.float32
    ) -> Iterator[Float[Tensor, "token width"] | RowError]:
        """For each supervised token t the last hidden state at t - 1, which predicts it, question by question.

        The state is the one after the final norm, which the head multiplies. It travels and comes in `dtype`, one of
        float32, bfloat16 and float16. The servers must run their model with the pooling runner.
        """
        facts = self._facts or self.check()
        return self._endpoints.map(
            lambda question: states_of(self._endpoints, facts, question, dtype, self._images), questions
        )

    def states_by_url(
        self, question: ScoreRequest, dtype: torch.dtype = torch.float32
    ) -> dict[str, Float[Tensor, "token width"]]:
        """As `states`, what each URL answers to one question. Raises UserError where one refuses it."""
        return {url: self.states_at(url, question, dtype) for url in (self._facts or self.check()).urls}

    def states_at(self, url: str, question: ScoreRequest, dtype: torch.dtype, retry: bool = True) -> Tensor:
        """As `states`, what one URL answers to one question. Raises UserError where it refuses it, and `NoAnswer`."""
        facts = self._facts or self.check()
        answer = self._endpoints.run(states_of(self._endpoints, facts, question, dtype, self._images, url, retry))
        if isinstance(answer, RowError):
            raise UserError(f"{url} refused a row of {len(question.ids)} tokens of plain text: {answer.reason}")
        return answer

    @property
    def failures(self) -> int:
        """How often a server gave no answer so far, and was asked again."""
        return self._endpoints.failures

    def rests(self, url: str) -> bool:
        """Whether the server of a URL failed lately and has not answered since."""
        return self._endpoints.rests(url)

    def tokens_read(self, questions: Iterable[ScoreRequest]) -> Iterator[int | RowError]:
        """How many of each question's first tokens the servers read as they are, question by question.

        Fewer than all only with images, where the servers make tokens of messages themselves.
        """
        model = (self._facts or self.check()).model
        return self._endpoints.map(lambda question: self._images.tokens_read(question, model), questions)

    def generate(
        self, prompts: Iterable[Prompt | Ids], sampling: Mapping[str, Any], n: int = 1, log_probs: bool = False
    ) -> Iterator[list[Answer] | RowError]:
        """`n` continuations of every prompt, prompt by prompt in their order.

        `sampling` holds vLLM's sampling parameters, of which max_tokens is required. Those that are left out are
        neutral (temperature 1, no filter, no penalty), whatever the model's generation_config.json says. Each prompt
        gets a seed of its own from the given one: a server draws the same random numbers for all that have the same.
        With `log_probs` answers tell the log-probs of their tokens.
        """
        unknown = sorted(set(sampling) - SAMPLING)
        if unknown or "max_tokens" not in sampling or n < 1:
            raise UserError(
                f"Sampling {dict(sampling)} with n={n}"
                + (f" holds {', '.join(unknown)}, which vLLM would ignore here" if unknown else " is incomplete")
                + f". Give max_tokens, n of at least 1, and any of {', '.join(sorted(SAMPLING))}."
            )
        if n > 1 and sampling.get("temperature") == 0:
            raise UserError(
                f"temperature 0 gives n={n} times the same answer; set n: 1, or a temperature above 0.",
                because="meaning",
            )
        body = {**NEUTRAL_SAMPLING, **sampling, "n": n, "model": (self._facts or self.check()).model}
        seed = body.pop("seed", None)

        def ask(numbered: tuple[int, Prompt | Ids]) -> Coroutine[Any, Any, list[Answer] | RowError]:
            number, prompt = numbered
            # Far apart: the n answers to a prompt have the seeds that follow its own.
            own = {} if seed is None else {"seed": (seed + number * 2654435761) % 2**32}
            return self._generate(prompt, body | own, log_probs)

        return self._endpoints.map(ask, enumerate(prompts))

    async def _score(self, question: ScoreRequest, k: int, vocab_size: int | None, model: str) -> TopK | RowError:
        places = np.flatnonzero(question.supervised).tolist()
        if not places:
            return TopK(np.empty((0, k), np.int32), np.empty((0, k), np.float32), np.empty(0, np.float32))
        asked = k
        while True:
            answer = await self._ask(question, {"model": model, **wire.scoring(asked)}, generation=False)
            if isinstance(answer, RowError):
                return answer
            log_probs_by_place = answer.prompt_logprobs or answer.choices[0].prompt_logprobs
            count = len(answer.prompt_token_ids or []) if question.images else question.needed
            positions = wire.positions(log_probs_by_place, count)
            entries = [positions[t] for t in places]
            ids, log_probs = wire.top_k(entries, asked)
            labels = wire.log_probs_of(entries, [int(question.ids[t]) for t in places])
            known = np.ones_like(ids, bool) if vocab_size is None else ids < vocab_size
            missing = k - int(known.sum(-1).min())
            if missing <= 0:
                # Stable: what is known first, each still most likely first.
                order = np.argsort(~known, axis=-1, kind="stable")[:, :k]
                return TopK(np.take_along_axis(ids, order, -1), np.take_along_axis(log_probs, order, -1), labels)
            # Each further token is known or was missing, so that this never asks for more tokens than there are.
            asked += missing

    async def _generate(self, prompt: Prompt | Ids, body: dict[str, Any], log_probs: bool) -> list[Answer] | RowError:
        prompt = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        body = {**body, **wire.sampled(bool(prompt.images))} if log_probs else body
        answer = await self._ask(prompt, body, generation=True)
        if isinstance(answer, RowError):
            return answer
        return _answers(answer.choices, body["n"], log_probs)

    async def _ask(
        self, row: ScoreRequest | Prompt, body: dict[str, Any], generation: bool
    ) -> wire.Answers | RowError:
        """The answer to a row that is known to hold the row's own tokens."""
        assert self._facts is not None, "checked before any row is asked"
        ids = np.asarray(row.ids)[: row.needed if isinstance(row, ScoreRequest) else None].tolist()
        if len(ids) >= self._facts.max_model_len:
            return RowError(
                f"The row's {len(ids)} tokens and the one that is generated do not fit into the server's "
                f"{self._facts.max_model_len}; start it with a larger --max-model-len."
            )
        if not row.images:
            return await self._row("/v1/completions", {**body, "prompt": ids, "return_token_ids": generation})
        if isinstance(row, ScoreRequest) and row.head and await self._images.takes_tokens():
            answer = await self._row(TOKENS_IN, request_by_tokens(row, body))
        else:
            chat = await chat_of(row)
            if isinstance(chat, RowError):
                return chat
            answer = await self._row("/v1/chat/completions", {**body, **chat, "return_token_ids": True})
        if isinstance(answer, RowError):
            return answer
        tokens = compared(row, answer.prompt_token_ids or [], self._image_token_id)
        # An answer continues the prompt and no more than it; behind what is scored there may be anything.
        wanted = max(len(ids), tokens.count) if generation else len(ids)
        return answer if tokens.shared >= wanted else unlike(tokens)

    async def _row(self, path: str, body: dict[str, Any]) -> wire.Answers | RowError:
        try:
            return wire.decoded(await self._endpoints.request(path, msgspec.json.encode(body)), wire.Answers, path)
        except Refusal as refusal:
            return RowError(row_refusal(refusal, body))


def _answers(choices: Sequence[wire.Choice], count: int, log_probs: bool) -> list[Answer]:
    """So many answers to one prompt. Raises UserError where the server left out what was asked for."""
    answers = []
    for choice in sorted(choices, key=lambda choice: choice.index):
        if choice.token_ids is None or choice.finish_reason is None:
            raise UserError("The server gave no token ids with its answer; vLLM does since 0.10.2: update it.")
        text = choice.message.content if choice.message else choice.text
        told = choice.logprobs.values if log_probs and choice.logprobs is not None else None
        if log_probs and (told is None or len(told) != len(choice.token_ids)):
            raise UserError("The server gave no log-probs with the tokens it generated; it must be a vLLM.")
        answers.append(Answer(text or "", choice.token_ids, choice.finish_reason, told))
    if len(answers) != count:
        raise UserError(f"The server gave {len(answers)} answers where n={count} were asked for.")
    return answers
