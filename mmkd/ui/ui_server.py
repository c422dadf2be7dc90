"""The pages of `mmkd ui`: served to this machine only, over what the commands report, train and chat use too."""

import base64
import binascii
import html
import io
import json
import math
import secrets
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mmkd import __version__
from mmkd.data.images import UnreadableImage, read_image
from mmkd.errors import UserError
from mmkd.publish.curves import panels_of
from mmkd.publish.report_page import HTML, page_facts, render
from mmkd.publish.run_samples import make_samples
from mmkd.publish.runs import Part, RunFiles
from mmkd.publish.samples import samples_of
from mmkd.units import readable_count

from .run_list import RunList, UnknownRun

if TYPE_CHECKING:
    from mmkd.generation.generator import Sampling

    from .conversation import LoadedModels

HOSTS = ("127.0.0.1", "localhost", "[::1]")
TOKEN = "x-mmkd-token"
"""Header of every request that changes something. Pages of other sites can neither know nor send it."""

MOST_TOKENS = 4096
MOST_SAMPLES = 16
MOST_BYTES = 30_000_000
"""Of a request: a conversation with pictures."""

_PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
_PAGE_POLICY += "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
_REPORT_POLICY += "frame-ancestors 'self'"
_ASSETS = {"ui.css": "text/css", "ui.js": "text/javascript"}


def build_app(root: Path, token: str | None = None, trust_remote_code: bool = False) -> Starlette:
    """The application over the runs under a folder. `token` is made up where it is not given."""
    pages = _Pages(RunList(root), token or secrets.token_urlsafe(24), trust_remote_code)
    routes = [
        Route("/", pages.page),
        *(Route(f"/{name}", pages.asset) for name in _ASSETS),
        Route("/api/runs", pages.runs),
        Route("/api/curves", pages.curves),
        Route("/api/samples", pages.samples, methods=["GET"]),
        Route("/api/samples", pages.make_samples, methods=["POST"]),
        Route("/api/sides", pages.sides),
        Route("/api/chat", pages.chat, methods=["POST"]),
        Route("/api/unload", pages.unload, methods=["POST"]),
        Route("/report", pages.report),
    ]
    handlers: Any = {UserError: _refused, UnknownRun: _unknown}
    return Starlette(routes=routes, middleware=[Middleware(_OnlyHere, pages.token)], exception_handlers=handlers)


class _OnlyHere:
    """Refuses requests that name another host, as those of a page do whose name was rebound to this machine, requests
    from other sites, and those without the token that would change something."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        reason = self._refusal(request)
        response = None if reason is None else PlainTextResponse(reason, status_code=403)
        await (response or self.app)(scope, receive, send)

    def _refusal(self, request: Request) -> str | None:
        host = request.headers.get("host", "")
        if host.rpartition(":")[0] not in HOSTS and host not in HOSTS:
            return "This page answers on 127.0.0.1 and localhost only."
        origin = request.headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return "Requests of other sites are refused."
        if request.method not in ("GET", "HEAD"):
            given = request.headers.get(TOKEN, "")
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                return "The page is older than this server. Load it again."
            if int(request.headers.get("content-length") or MOST_BYTES + 1) > MOST_BYTES:
                return f"A request has at most {MOST_BYTES:,} bytes. Send fewer or smaller pictures."
        return None


class _Pages:
    """What is answered to each path. What needs torch is imported when it is first asked for."""

    def __init__(self, runs: RunList, token: str, trust_remote_code: bool) -> None:
        self.list, self.token, self.trust_remote_code = runs, token, trust_remote_code

    @cached_property
    def models(self) -> "LoadedModels":
        """The models of all conversations."""
        from .conversation import LoadedModels

        return LoadedModels()

    async def page(self, request: Request) -> Response:
        """The page itself, with the token of this server."""
        text = _asset("ui_page.html").replace("{{token}}", self.token).replace("{{version}}", __version__)
        text = text.replace("{{root}}", html.escape(str(self.list.root)))
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-store"})

    async def asset(self, request: Request) -> Response:
        """Its styles and scripts."""
        name = request.url.path.lstrip("/")
        return Response(_asset(name), media_type=_ASSETS[name], headers={"Cache-Control": "no-store"})

    def runs(self, request: Request) -> Response:
        """All runs and how they stand."""
        return JSONResponse({"root": str(self.list.root), "runs": self.list.rows()})

    def curves(self, request: Request) -> Response:
        """The panels of one run, or the main lines of several."""
        names = _runs_named(request)
        shown = {name: _own_lines(self.list.run(name)) for name in names}
        runs = (
            shown[names[0]]
            if len(names) == 1
            else {name: parts for name, lines in shown.items() for parts in list(lines.values())[:1]}
        )
        panels = [
            {
                "title": panel.panel.title,
                "unit": panel.panel.unit,
                "log": panel.log_scale,
                "spans": panel.spans,
                "lines": [
                    {"name": name, "points": [[x, None if math.isnan(y) else y] for x, y in zip(xs, ys, strict=True)]}
                    for name, xs, ys in panel.lines
                ],
            }
            for panel in panels_of(runs)
        ]
        return JSONResponse(panels)

    def samples(self, request: Request) -> Response:
        """The samples of one run or several."""
        names = _runs_named(request)
        return JSONResponse([_samples(name, self.list.run(name)) for name in names])

    def sides(self, request: Request) -> Response:
        """The models of a run that can be talked to."""
        from .conversation import sides_named, silent_side

        folder = self.list.folder(_runs_named(request)[0])
        sides = sides_named(str(folder), self.trust_remote_code)
        loaded = len(self.models.loaded)
        facts = [
            {
                "name": name,
                "model": side.title,
                "size": "" if side.parameters is None else f"{readable_count(side.parameters)} parameters",
                "images": side.model.vision,
                "fits": side.fits,
            }
            for name, side in sides.items()
        ]
        return JSONResponse({"sides": facts, "loaded": loaded, "note": silent_side(str(folder))})

    def report(self, request: Request) -> Response:
        """The report of a run as `mmkd report` would write it, written nowhere."""
        page = render(HTML, page_facts(self.list.run(_runs_named(request)[0])))
        return HTMLResponse(page, headers={"Content-Security-Policy": _REPORT_POLICY, "Cache-Control": "no-store"})

    async def make_samples(self, request: Request) -> Response:
        """Has the models of a run answer held-out questions, as `mmkd report --samples` does."""
        body = await _body(request)
        run, count = self.list.run(_text_in(body, "run")), body.get("count", 4)
        if not isinstance(count, int) or not 1 <= count <= MOST_SAMPLES:
            raise UserError(f"count is a whole number from 1 to {MOST_SAMPLES}.")
        reason = await run_in_threadpool(self._with_models_free, run, count)
        return JSONResponse({"reason": reason})

    def _with_models_free(self, run: RunFiles, count: int) -> str:
        # They are loaded for the samples, beside which those of a conversation may have no room.
        self.models.unload()
        with self.models.lock:
            return make_samples(run, count, self.trust_remote_code)

    async def chat(self, request: Request) -> Response:
        """The answer of one side, streamed as text; an error after its start as a last line that begins with NUL."""
        body = await _body(request)
        folder = self.list.folder(_text_in(body, "run"))
        side = await run_in_threadpool(self._side, folder, _text_in(body, "side"))
        messages, images = _conversation(body)
        sampling = _sampling(body)
        pieces = _told(self.models.reply(side, messages, images, sampling))
        return StreamingResponse(pieces, media_type="text/plain; charset=utf-8")

    def _side(self, folder: Path, name: str) -> Any:
        from .conversation import sides_named

        sides = sides_named(str(folder), self.trust_remote_code)
        if name not in sides:
            raise UnknownRun(f"There is no {name!r} that answers here, only {', '.join(sides)}.")
        return sides[name]

    async def unload(self, request: Request) -> Response:
        """Frees the memory of the models."""
        return JSONResponse({"unloaded": await run_in_threadpool(self.models.unload)})


def _told(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of an answer; what a user can mend is told at the end, since the status is sent by then."""
    try:
        yield from pieces
    except (UserError, RuntimeError) as error:
        yield f"\0{error}"


async def _body(request: Request) -> Mapping[str, Any]:
    try:
        body = json.loads(await request.body())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The request is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise UserError("The request must be a JSON object.")
    return body


def _runs_named(request: Request) -> list[str]:
    """The runs that a request is about. Raises UserError where it names none."""
    names = request.query_params.getlist("run")
    if not names:
        raise UserError("The request must name a run.")
    return names


def _text_in(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise UserError(f"The request must have a text {key!r}.")
    return value


def _conversation(body: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[Image]]:
    """Messages and pictures of a request. Raises UserError for what is none."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError("A conversation needs messages.")
    plain = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UserError("A message needs a role (system, user or assistant) and a text.")
        plain.append({"role": role, "content": content})
    return plain, [_picture(image) for image in body.get("images") or []]


def _picture(url: Any) -> Image:
    """The picture in a data URL. Paths are refused: a page must not read files of this machine."""
    head, _, content = str(url).partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise UserError("A picture must be sent as a data URL.")
    try:
        return read_image({"bytes": io.BytesIO(base64.b64decode(content, validate=True)).getvalue(), "path": None})
    except (UnreadableImage, binascii.Error) as error:
        raise UserError(f"The picture cannot be read: {error}") from error


def _sampling(body: Mapping[str, Any]) -> "Sampling":
    from mmkd.generation.generator import Sampling

    tokens, temperature, seed = body.get("max_new_tokens", 256), body.get("temperature", 0), body.get("seed", 0)
    if not all(isinstance(value, int | float) for value in (tokens, temperature, seed)):
        raise UserError("max_new_tokens, temperature and seed must be numbers.")
    if not 1 <= tokens <= MOST_TOKENS or not 0 <= temperature <= 10:
        raise UserError(f"max_new_tokens is at most {MOST_TOKENS}, temperature from 0 to 10.")
    return Sampling(int(tokens), float(temperature), seed=int(seed))


def _own_lines(run: RunFiles) -> dict[str, list[Part]]:
    return {name: parts for name, parts in run.lines.items() if any(part.log for part in parts)}


def _samples(name: str, run: RunFiles) -> dict[str, Any]:
    samples = [
        {
            "source": sample.source,
            "prompt": sample.prompt,
            "target": sample.target,
            "images": sample.images,
            "answers": [vars(answer) for answer in sample.answers],
        }
        for sample in samples_of(run)
    ]
    return {"run": name, "samples": samples}


def _asset(name: str) -> str:
    return files("mmkd.ui").joinpath(name).read_text(encoding="utf-8")


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _unknown(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=404)
