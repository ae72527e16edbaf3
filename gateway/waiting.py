"""The port while a gateway waits for its database and its event log: alive, not ready, and whoever comes is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from gateway.port import listen
from gateway.problems import Problem
from gateway.settings import GatewaySettings

_PROBLEM = Problem(
    503, "The gateway waits for its database or its event log; try again later.", headers={"Retry-After": "2"}
)


@asynccontextmanager
async def answering(settings: GatewaySettings, *, reuse_port: bool = False) -> AsyncIterator[None]:
    """Answer `/health` with 200 and all else with 503 while the body runs. Raises SettingsError: the port is taken.

    Not where the system chooses the port: it would be another one later.
    """
    if not settings.port:
        yield
        return
    app = web.Application()
    app.router.add_get("/health", _alive)
    app.router.add_route("*", "/{path:.*}", _not_yet)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await listen(runner, settings, reuse_port=reuse_port)
        yield
    finally:
        await runner.cleanup()


async def _alive(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _not_yet(_: web.Request) -> web.Response:
    # Closed, since the gateway itself will listen on a socket of its own.
    response = _PROBLEM.response("")
    response.force_close()
    return response
