"""HTTP servers on a free port of the loopback interface, for as long as a `with` lasts."""

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class QuietHandler(BaseHTTPRequestHandler):
    """Keeps connections open and says nothing about them."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tells of all but a client that gave up waiting, which is what some tests want."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that handles its requests like this."""
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@dataclass(frozen=True)
class Binary:
    """An answer that is bytes, with headers of its own."""

    content: bytes
    headers: Mapping[str, str]


@contextmanager
def answering(respond: Callable[[str, Message, dict[str, Any]], tuple[int, Any]]) -> Iterator[str]:
    """The address of a server whose status and answer are a function of path, headers and JSON body.

    An answer that is text is sent as a page, `Binary` as it is, all others as JSON.
    """

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: dict[str, Any]) -> None:
            status, answer = respond(self.path, self.headers, body)
            kind = "text/html" if isinstance(answer, str) else "application/json"
            headers: Mapping[str, str] = {"Content-Type": kind}
            if isinstance(answer, Binary):
                content, headers = answer.content, answer.headers
            else:
                content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with listening(Handler) as url:
        yield url
