"""The port that a gateway listens on, and what is said when it cannot."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from gateway.settings import GatewaySettings
from orchestrator.errors import SettingsError

_BACKLOG = 1024


async def listen(runner: web.AppRunner, settings: GatewaySettings, *, reuse_port: bool = False) -> None:
    """Serve the runner's application there. `reuse_port`: share it with other processes. Raises SettingsError."""
    site = web.TCPSite(
        runner, settings.host, settings.port, reuse_address=True, reuse_port=reuse_port or None, backlog=_BACKLOG
    )
    try:
        await site.start()
    except OSError as error:
        raise SettingsError(_cannot_listen(settings, error)) from error


@contextmanager
def reserved(settings: GatewaySettings) -> Iterator[int]:
    """Keep the port for processes that are to share it, while the body runs; yields it. Raises SettingsError.

    The socket is bound and does not listen: no connection comes to it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family) as alone:
            # Without SO_REUSEPORT, or else another one's processes would share it with ours, unnoticed.
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
        shared = socket.socket(family)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind(address)
    except OSError as error:
        raise SettingsError(_cannot_listen(settings, error)) from error
    with shared:
        yield int(shared.getsockname()[1])


def _cannot_listen(settings: GatewaySettings, error: OSError) -> str:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return f"PORT: {where} is in use by another process: stop it, or set another PORT"
    if error.errno == errno.EACCES:
        return f"PORT: this user may not listen on {where}: set a PORT above 1023"
    return f"HOST: cannot listen on {where}: {error.strerror or error}"
