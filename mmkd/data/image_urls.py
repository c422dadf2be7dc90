"""Download of pictures that a data set gives as http(s) URLs: once, before training, and only on request.

Rows come from strangers. They must not make this machine ask servers that only it can reach, such as a cloud's
metadata service or a neighbour on the local network.
"""

import ipaddress
import socket
import time

import httpx

from mmkd.errors import UserError

TIMEOUT = 30.0
"""The longest time in seconds without data from the server."""

LONGEST = 300.0
"""The longest time in seconds of a whole download."""

LARGEST = 100_000_000
"""The largest picture file that is downloaded, in bytes."""


_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")


def is_url(text: str) -> bool:
    """Whether a text is an http(s) URL."""
    return text.startswith(("http://", "https://"))


def download(url: str) -> bytes:
    """The content of a URL. Raises UserError when it cannot be downloaded, is too large or takes too long."""
    end = time.monotonic() + LONGEST
    try:
        with (
            httpx.Client(transport=_PublicTransport(retries=2), follow_redirects=True, timeout=TIMEOUT) as client,
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


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address belongs to the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        # Addresses of IPv6 that stand for one of IPv4, and reach it where a gateway translates.
        inside = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        inside += [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)] if address in _TRANSLATED else []
        if not all(is_public(own) for own in inside if own is not None):
            return False
    return address.is_global and not address.is_multicast


class _PublicTransport(httpx.HTTPTransport):
    """Connects to public addresses alone. A redirect is a request of its own, and is checked like the first one."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        # To the address that was checked: asked again, a name may resolve to another one.
        url = request.url.copy_with(host=_public_address(request.url))
        extensions = {**request.extensions, "sni_hostname": host}
        checked = httpx.Request(
            request.method, url, headers=request.headers, stream=request.stream, extensions=extensions
        )
        return super().handle_request(checked)


def _public_address(url: httpx.URL) -> str:
    """An address of the URL's host. Raises UserError when one of them is private."""
    try:
        resolved = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpx.ConnectError(str(error)) from error
    addresses = [str(place[4][0]) for place in resolved]
    for address in addresses:
        if not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise UserError(
                f"URL {url} is not downloaded: {url.host} is {address}, an address of a private network, which the "
                "rows of a data set may not ask. Save these pictures as files, and give their paths"
            )
    return addresses[0]
