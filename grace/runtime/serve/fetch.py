"""Pictures from other servers, without becoming their way into this network.

A name is resolved once, every address is checked, and the connection goes to a checked address: a name that resolves
differently a moment later gains nothing. Redirects start over. Proxies of the environment are not used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

MAX_REDIRECTS = 3
_BLOCK = 1 << 16
_REDIRECTS = {301, 302, 303, 307, 308}
# IPv6 networks whose last 32 bits are an IPv4 address: NAT64, and the old IPv4-compatible form.
_CARRIERS = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class FetchError(Exception):
    """The picture is not to be had; the message says why in a clause."""


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public Internet, by every address that it may stand for."""
    if isinstance(address, ipaddress.IPv6Address):
        if (inner := _carried(address)) is not None:
            return is_public(inner)
        if address.is_site_local or not all(
            is_public(one) for one in (address.sixtofour, *(address.teredo or ())) if one is not None
        ):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _carried(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that is meant by an IPv6 one."""
    if any(address in network for network in _CARRIERS):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped


@dataclass(frozen=True)
class _Target:
    host: str
    port: int
    secure: bool
    path: str


def fetch(url: str, limit: int, seconds: float, allowed: Callable[[Address], bool] = is_public) -> bytes:
    """The bytes behind an http(s) URL.

    Args:
        limit: bytes at most.
        seconds: in all, redirects included.
        allowed: which addresses may be connected to.

    Raises:
        FetchError: refused, failed, too large or too slow.
    """
    deadline = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        answer = _get(_target(url), limit, deadline, allowed)
        if isinstance(answer, bytes):
            return answer
        try:
            url = urljoin(url, answer)
        except ValueError as error:
            raise FetchError("it is redirected to no valid URL") from error
    raise FetchError(f"more than {MAX_REDIRECTS} redirects")


def _target(url: str) -> _Target:
    try:
        parts: SplitResult = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchError("it is no valid URL") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError("only http and https URLs are fetched")
    if parts.username is not None or parts.password is not None:
        raise FetchError("a URL with a user name is not fetched")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not path.isascii() or any(ord(c) <= 32 or ord(c) == 127 for c in path + parts.hostname):
        raise FetchError("it is no valid URL")
    secure = parts.scheme == "https"
    return _Target(parts.hostname, port or (443 if secure else 80), secure, path)


def _get(target: _Target, limit: int, deadline: float, allowed: Callable[[Address], bool]) -> bytes | str:
    """The contents, or where a redirect leads."""
    address = _resolve(target, allowed)
    try:
        plain = socket.create_connection(address, timeout=_left(deadline))
        with _cut_at(plain, deadline), _secured(plain, target) as link:
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = link
            headers = {
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "grace",
                "Connection": "close",
            }
            connection.request("GET", target.path, headers=headers)
            response = connection.getresponse()
            if response.status in _REDIRECTS and (place := response.headers.get("Location")):
                return place
            if response.status != 200:
                raise FetchError(f"the other server answers {response.status}")
            data = _contents(response, limit, deadline)
            _left(deadline)  # a connection that was cut off looks like one that has ended
            return data
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() >= deadline:
            raise FetchError("it takes too long") from error
        raise FetchError("the other server cannot be reached or answers nonsense") from error


def _resolve(target: _Target, allowed: Callable[[Address], bool]) -> tuple[str, int]:
    """An address of the host. One that is not allowed refuses them all: there is no good reason for such a mix."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError("its host is not known") from error
    addresses = [str(entry[4][0]) for entry in found]
    for text in addresses:
        if "%" in text or not allowed(ipaddress.ip_address(text)):  # a zone belongs to a local link
            raise FetchError("its address is not public")
    return addresses[0], target.port


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise FetchError("it takes too long")
    return left


@contextlib.contextmanager
def _cut_at(plain: socket.socket, deadline: float) -> Iterator[None]:
    """Breaks a connection off at the deadline, however slowly it drips until then."""
    try:
        handle = plain.dup()  # TLS takes the socket's own descriptor away
    except OSError:
        plain.close()
        raise

    def cut() -> None:
        with contextlib.suppress(OSError):
            handle.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        handle.close()


def _secured(plain: socket.socket, target: _Target) -> socket.socket:
    if not target.secure:
        return plain
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=target.host)
    except BaseException:
        plain.close()
        raise


def _contents(response: http.client.HTTPResponse, limit: int, deadline: float) -> bytes:
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchError("it comes compressed")
    if response.length is not None and response.length > limit:
        raise FetchError(f"it has more than {limit:,} bytes")
    data = bytearray()
    while block := response.read(_BLOCK):
        data += block
        if len(data) > limit:
            raise FetchError(f"it has more than {limit:,} bytes")
        _left(deadline)
    if response.length:  # `read` ends quietly where the connection does
        raise FetchError("the connection broke off")
    return bytes(data)
