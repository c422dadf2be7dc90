"""Pictures that a data set has as http(s) URLs: downloaded once, before anything reads them, and only if asked for."""

import time

import httpx

from mmkd.errors import UserError

TIMEOUT = 30.0
"""Seconds that a server may be silent."""

LONGEST = 300.0
"""Seconds that a download may take in all, however little comes at a time."""

LARGEST = 100_000_000
"""Bytes of the largest picture file that is downloaded."""


def is_url(text: str) -> bool:
    """Whether it is an http(s) URL, which a path never is."""
    return text.startswith(("http://", "https://"))


def download(url: str) -> bytes:
    """The content of a URL. Raises UserError when it cannot be downloaded, is too large or takes too long."""
    end = time.monotonic() + LONGEST
    try:
        with (
            httpx.Client(transport=httpx.HTTPTransport(retries=2), follow_redirects=True, timeout=TIMEOUT) as client,
            client.stream("GET", url) as answer,
        ):
            answer.raise_for_status()
            content = bytearray()
            for part in answer.iter_bytes():
                content += part
                if len(content) > LARGEST:
                    raise UserError(f"URL {url} has more than {LARGEST:,} bytes; no picture file is that large.")
                if time.monotonic() > end:
                    raise UserError(f"URL {url} cannot be downloaded: it takes longer than {LONGEST:g} seconds.")
            return bytes(content)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"URL {url} cannot be downloaded: {type(error).__name__}: {error}") from error
