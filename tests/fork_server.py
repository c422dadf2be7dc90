"""Started by forked.py: imports what mmkd needs, then forks a process for each request, which has imported it too."""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
import types
from contextlib import suppress
from typing import Any, NoReturn

import torch

from mmkd.commands.main import _show_long_bars_only
from mmkd.training.method import METHODS

PRELOADED = (
    "mmkd.capture.build",
    "mmkd.commands.train",
    "mmkd.preflight.doctor",
    "scipy.io",
    "transformers.integrations.integration_utils",
    "transformers.models.auto.processing_auto",
    "transformers.models.llama.modeling_llama",
)


def serve(connection: socket.socket) -> None:
    """Answers requests until the tests end."""
    # tqdm reads what the command line sets for it when it is imported.
    _show_long_bars_only()
    for name in PRELOADED:
        importlib.import_module(name)
    # Each is imported when it is asked for.
    list(METHODS.values())
    gc.collect()
    gc.freeze()
    # Nobody waits for the processes that wait for those of the tests.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            return
        if os.fork() == 0:
            connection.close()
            _watch(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(request: dict[str, Any], output: int, errors: int, report: int) -> NoReturn:
    """Forks the process, and reports its id and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(report)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        for descriptor in (output, errors):
            os.close(descriptor)
        _become(request)
    for descriptor in (output, errors):
        os.close(descriptor)
    os.write(report, f"{pid}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    # The tests may have ended meanwhile.
    with suppress(BrokenPipeError):
        os.write(report, f"{status}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any]) -> NoReturn:
    """Runs `python -m` or `python -c` with arguments in a folder and an environment."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[0] = os.getcwd()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The first threads would make torch's pool of threads anew all at once, and one of them would find none.
    torch.set_num_threads(torch.get_num_threads())
    status: Any = 0
    try:
        _run(*request["arguments"])
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    # What an interpreter does at its end, without taking apart what was imported.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else status is not None)


def _run(option: str, name: str, *arguments: str) -> None:
    sys.argv = [option, *arguments]
    if option == "-m":
        # It is run under another name, and runpy warns of a module that is there under its own.
        sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(name, "<string>", "exec"), vars(module))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
