"""HTTP to servers that answer alike: the least busy one is asked, failures are retried, answers keep their order."""

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import takewhile
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)
from tenacity.wait import wait_base

from mmkd.data.credentials import refuse_user_info
from mmkd.errors import UserError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# Seconds without new questions for a server that failed, as long as another one has not.
REST = 30.0
CONNECT_TIMEOUT = 10.0
# Seconds before another try: 0.5, 1, 2, ... with jitter, so that rows that failed together do not come back together.
BACK_OFF = wait_exponential(multiplier=0.5, max=20) + wait_random(0, 0.5)
# Seconds that a server may ask for before another try (Retry-After).
LONGEST_WAIT = 300.0


class Refusal(Exception):
    """A server understood the request and said no (HTTP 4xx): asking again would not change it."""

    def __init__(self, url: str, status: int, message: str, parameter: str | None):
        super().__init__(f"{url} answered HTTP {status}: {message}")
        self.url, self.status, self.message, self.parameter = url, status, message, parameter


class NoAnswer(UserError):
    """Nobody answered, however often they were asked."""


class _Failure(Exception):
    """No answer, or one that asking again may change: refused connection, time-out, HTTP 408, 429 or 5xx.

    `wait` is after how many seconds the server wants to be asked again (Retry-After).
    """

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


class _RetryAfter(wait_base):
    """The seconds that the server asked for."""

    def __call__(self, retry_state: RetryCallState) -> float:
        error = None if retry_state.outcome is None else retry_state.outcome.exception()
        return error.wait if isinstance(error, _Failure) else 0.0


@dataclass(frozen=True)
class Reply:
    """What a server answered a request that it granted."""

    url: str
    headers: Mapping[str, str]
    content: bytearray


@dataclass
class _Endpoint:
    url: str
    in_flight: int = 0
    rests_until: float = 0.0


class Endpoints:
    """Base URLs of servers that answer alike, asked from synchronous code through an event loop in a thread.

    At most `concurrency` requests are under way at a time, over all URLs; each may take `timeout` seconds and is tried
    `1 + retries` times, waiting 0.5 s, 1 s, 2 s, ... up to 20 s with jitter in between (or what the server asks for
    with Retry-After), each time at the server that is least busy and has not failed lately. Raises `NoAnswer` and
    `Refusal`.
    """

    def __init__(
        self,
        urls: Iterable[str],
        api_key: str | None,
        concurrency: int,
        timeout: float,
        retries: int,
        *,
        server: str = "The teacher's server",
        advice: str = "See that it runs and read its log; scripts/serve_teacher.sh MODEL starts one.",
    ):
        self._server, self._advice = server, advice
        self.urls = tuple(_root(url) for url in urls)
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise UserError(f"Servers must be one or more different URLs, not {list(self.urls)}.")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise UserError(
                f"concurrency must be at least 1, timeout positive and retries not negative, but they are "
                f"{concurrency}, {timeout} and {retries}."
            )
        self._endpoints = [_Endpoint(url) for url in self.urls]
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._secret = api_key
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
            # A proxy from the environment cannot reach the loopback interface of this machine.
            mounts={"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None},
        )
        self.failures = 0
        """How often a server gave no answer so far."""
        self._slots = asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mmkd-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Closes the connections; a second call does nothing."""
        if self._loop.is_closed():
            return
        self.run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def rests(self, url: str) -> bool:
        """Whether a server failed lately and has not answered since, so that others are asked before it."""
        return next(e for e in self._endpoints if e.url == url).rests_until > time.monotonic()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """What the coroutine returns, run in the event loop of these endpoints."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def map(self, ask: Callable[[Item], Coroutine[Any, Any, Result]], items: Iterable[Item]) -> Iterator[Result]:
        """The answers in the order of the items, of which at most twice the concurrency are held at a time."""
        with closing(self._under_way(ask, items)) as futures:
            for future in futures:
                yield future.result()

    def each(
        self, ask: Callable[[Item], Coroutine[Any, Any, Result]], items: Iterable[Item]
    ) -> Iterator[tuple[int, Result]]:
        """As `map`, each answer with its item's number; where one fails, those under way are waited for.

        They come before its error is raised, so that whoever records answers loses none that a server gave.
        """
        failure: UserError | None = None
        unasked = takewhile(lambda item: failure is None, items)
        with closing(self._under_way(ask, unasked)) as futures:
            for number, future in enumerate(futures):
                try:
                    answer = future.result()
                except UserError as error:
                    failure = failure or error
                    continue
                yield number, answer
        if failure is not None:
            raise failure

    def _under_way(
        self, ask: Callable[[Item], Coroutine[Any, Any, Result]], items: Iterable[Item]
    ) -> Generator[Future[Result], None, None]:
        pending = deque()
        try:
            for item in items:
                # Twice, so that one slow answer at the head of the queue does not leave the servers idle.
                if len(pending) >= 2 * self._concurrency:
                    yield pending.popleft()
                pending.append(asyncio.run_coroutine_threadsafe(ask(item), self._loop))
            while pending:
                yield pending.popleft()
        finally:
            for future in pending:
                future.cancel()

    async def request(self, path: str, body: bytes | None = None, url: str | None = None, retry: bool = True) -> bytes:
        """The body of the answer to a GET, or to a POST of a JSON body, by one URL or the least busy one."""
        return bytes((await self.reply(path, body, url, retry)).content)

    async def reply(self, path: str, body: bytes | None, url: str | None = None, retry: bool = True) -> Reply:
        """As `request`, the whole answer with its headers."""
        started = time.monotonic()
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_Failure),
            stop=stop_after_attempt(1 + self._retries if retry else 1),
            wait=BACK_OFF + _RetryAfter(),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return await attempts(self._request_once, path, body, url)
        except _Failure as failure:
            tried = f" ({1 + self._retries} tries in {time.monotonic() - started:.0f} s)" if retry else ""
            raise NoAnswer(f"{self._server} does not answer: {failure}{tried}. {self._advice}") from failure

    async def _request_once(self, path: str, body: bytes | None, url: str | None) -> Reply:
        async with self._slots:
            endpoint = next(e for e in self._endpoints if e.url == url) if url else self._least_busy()
            endpoint.in_flight += 1
            try:
                async with self._client.stream(
                    "GET" if body is None else "POST",
                    endpoint.url + path,
                    content=body,
                    headers={"Content-Type": "application/json"} if body else None,
                ) as response:
                    # Joined here and not by httpx, into a buffer that a tensor may share.
                    content = bytearray().join([part async for part in response.aiter_bytes()])
            except httpx.TransportError as error:
                self.failures += 1
                endpoint.rests_until = time.monotonic() + REST
                raise _Failure(self._describe(error, endpoint.url)) from error
            finally:
                endpoint.in_flight -= 1
        if response.is_success:
            endpoint.rests_until = 0.0
            return Reply(endpoint.url + path, response.headers, content)
        message, parameter = _error_of(response, bytes(content))
        if self._secret:
            # Some servers repeat the key that they refuse.
            message = message.replace(self._secret, "***")
        # Waiting does not fill an account.
        spent = response.status_code == 429 and b"insufficient_quota" in content
        if not spent and (response.status_code in (408, 429) or response.is_server_error):
            self.failures += 1
            endpoint.rests_until = time.monotonic() + REST
            wait = _retry_after(response.headers.get("retry-after"))
            raise _Failure(f"{endpoint.url} answered HTTP {response.status_code}: {message}", wait)
        raise Refusal(endpoint.url, response.status_code, message, parameter)

    def _tell(self, state: RetryCallState) -> None:
        """Says which server failed and why; a run whose servers keep failing would look merely slow."""
        assert state.outcome is not None
        logger.warning(
            "%s; try %d of %d in %.1f s.",
            state.outcome.exception(),
            state.attempt_number + 1,
            1 + self._retries,
            state.upcoming_sleep,
        )

    def _least_busy(self) -> _Endpoint:
        now = time.monotonic()
        return min(self._endpoints, key=lambda endpoint: (endpoint.rests_until > now, endpoint.in_flight))

    def _describe(self, error: httpx.TransportError, url: str) -> str:
        if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
            return f"no connection to {url} ({error or 'timed out'})"
        if isinstance(error, httpx.TimeoutException):
            return (
                f"no answer from {url} within {self._timeout:g} s (lower teacher_concurrency or raise teacher_timeout)"
            )
        return f"{url} broke off ({type(error).__name__}: {error})"


def _retry_after(header: str | None) -> float:
    """The seconds of a Retry-After header, which may be a date; at most `LONGEST_WAIT`, and 0 without one."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _root(url: str) -> str:
    """The base URL without the `/v1` that OpenAI's clients want at its end."""
    refuse_user_info(url, "A server")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"The server URL {url!r} is not of the form http://HOST:PORT.")
    return url.rstrip("/").removesuffix("/v1")


def _error_of(response: httpx.Response, content: bytes) -> tuple[str, str | None]:
    """vLLM's message and the parameter it blames, or the text that a proxy in between answered."""
    body = json.loads(content) if "json" in response.headers.get("content-type", "") else None
    # Since 0.10 under "error"; FastAPI's own refusals are a "detail".
    error = body.get("error", body) if isinstance(body, dict) else None
    if isinstance(error, dict):
        return str(error.get("message", error.get("detail", error))), error.get("param")
    return str(error or content[:300].decode(errors="replace") or response.reason_phrase), None
