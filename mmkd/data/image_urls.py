"""Download of pictures that a data set gives as http(s) URLs: once, before training, and only on request."""

import time

import httpx

from mmkd.errors import UserError

TIMEOUT = 30.0
"""The longest time in seconds without data from the server."""

LONGEST = 300.0
"""The longest time in seconds of a whole download."""

LARGEST = 100_000_000
"""The largest picture file that is downloaded, in bytes."""


def is_url(text: str) -> bool:
    """Whether a text is an http(s) URL."""
    return text.startswith(("http://", "https://"))


def download(url: str) -> bytes:
    """The content of a URL. Raises UserError when it cannot be downloaded, is too large or takes too long."""
    end = time.monotonic() + LONGEST
    try:
        with (
            httpx.Client(transport=httpx.HTTPTransport(retries=2), follow_redirects=True, timeout=TIMEOUT) as client,
            client.stream("GET", url) as response,
        ):
            response.raise_for_status()
            content = bytearray()
            for part in response.iter_bytes():
                content += part
                if len(content) > LARGEST:
                    raise UserError(f"URL {url} has more than {LARGEST:,} bytes; no picture file is that large.")
                if time.monotonic() > end:
                    raise UserError(f"URL {url} cannot be downloaded: it takes longer than {LONGEST:g} seconds.")
            return bytes(content)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"URL {url} cannot be downloaded: {type(error).__name__}: {error}") from error
