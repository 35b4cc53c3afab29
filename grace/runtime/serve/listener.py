"""Where a server listens, and who can reach that."""

import errno
import ipaddress
import socket

from grace.errors import UserError

_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the port is taken or not allowed, or the host is not this machine's.
    """
    if port > 65535:  # the resolver would take the rest of a division
        raise UserError(f"--port {port} is no port: the largest is 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host} is not known ({error}): give an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: choose another --port") from error
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another --host or --port"
        ) from error
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
