"""What mmkd knows of bitsandbytes beyond its documentation."""

import logging

LOGGER, MESSAGE = "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"


def silence_missing_kernel() -> None:
    """Keeps back a warning of its import that a kernel of the Hub is missing, also where nothing is quantised.

    Without the kernel, 4-bit products on a CPU are slower and no different.
    """
    logging.getLogger(LOGGER).addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(MESSAGE)
