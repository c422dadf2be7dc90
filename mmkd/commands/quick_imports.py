"""Imports of the packages that a training needs, in less time."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports inside are not interrupted to look for garbage, and what they bring is never looked through again.

    Python looks once per some hundred new objects, and all modules of transformers, TRL and PEFT make millions: this
    takes a tenth of the time in which they are imported. Where they are there already, this does nothing.
    """
    if "transformers.trainer" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
