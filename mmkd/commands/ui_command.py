"""`mmkd ui`: the runs under a folder in a browser on this machine."""

import importlib.util
import socket
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from pathlib import Path

from mmkd.errors import UserError

from .command import Command, add_trust

_NEEDED = ("matplotlib", "starlette", "uvicorn")


def add_flags(parser: ArgumentParser) -> None:
    """Which runs, and where the page is."""
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="folder with runs (default: runs)")
    parser.add_argument("--port", type=int, default=8765, help="port on 127.0.0.1; 0 takes a free one (default: 8765)")
    add_trust(parser)


def run(options: Namespace) -> int:
    """Serves the page until it is interrupted."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"mmkd ui needs {', '.join(missing)}: pip install 'mmkd[ui]'.")
    if not options.folder.is_dir():
        raise UserError(f"There is no folder {options.folder}. Name the folder that holds your runs: mmkd ui FOLDER.")
    listening = _socket(options.port)

    import uvicorn

    from mmkd.ui.ui_server import build_app

    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    print(f"{address}/  shows the runs in {options.folder}. Ctrl-C ends.", flush=True)
    config = uvicorn.Config(
        build_app(options.folder, trust_remote_code=options.trust_remote_code), log_level="warning", access_log=False
    )
    # Ctrl-C is how it ends. uvicorn raises it again when it has closed its connections.
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _socket(port: int) -> socket.socket:
    """A socket on the loopback interface. Raises UserError for a port that is taken."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(
            f"Port {port} cannot be used: {error}. Name another with --port, or 0 for a free one."
        ) from error
    return listening


COMMAND = Command(
    "ui",
    "runs in a browser: live curves, reports, samples, talking to student and teacher",
    run,
    add_flags,
    "Serves a page about the runs under a folder, to this machine only (127.0.0.1). Needs `pip install 'mmkd[ui]'`.",
)
