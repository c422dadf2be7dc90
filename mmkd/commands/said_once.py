"""Log messages about the data that a command says once, however often it reads them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def said_once() -> Iterator[None]:
    """What is said of the data every time they are read is said the first time only."""
    handlers = [logging.lastResort, *logging.getLogger().handlers, *logging.getLogger("mmkd").handlers]
    filters = [(handler, _First()) for handler in handlers if handler is not None]
    for handler, first in filters:
        handler.addFilter(first)
    try:
        yield
    finally:
        for handler, first in filters:
            handler.removeFilter(first)


class _First(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("mmkd.data"):
            return True
        message = record.getMessage()
        first = message not in self._said
        self._said.add(message)
        return first
