"""For probes and operators: is the process alive, can it serve, and what does it count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from marshmallow import Schema, fields

from auth.errors import Unauthenticated
from gateway.context import CONTEXT, Context
from gateway.fields import moment
from gateway.metrics import METRICS
from gateway.operation import Call, Database, answer, lease, operation
from gateway.siblings import SIBLINGS
from orchestrator import machines
from orchestrator.database import UNAVAILABLE
from orchestrator.errors import LogUnavailable
from orchestrator.settings import may_read_metrics

# Seconds that a part may take to answer: probes give up after a few.
_DEADLINE = 2.0


# In `cluster-code dev`: what keeps the Docker engine of the apps from answering; "": nothing, None: it was not asked.
ENGINE: web.AppKey[Callable[[], str | None]] = web.AppKey("engine")


class Health(Schema):
    """The process lives."""

    status = fields.String(required=True)


class Part(Schema):
    """One thing that this gateway needs."""

    state = fields.String(required=True, metadata={"description": "ready or down"})
    message = fields.String(required=True)


class ProviderPart(Schema):
    """One provider, as an orchestrator found it."""

    state = fields.String(required=True, metadata={"description": "unknown, up or down"})
    message = fields.String(required=True)
    checked_at = moment(allow_none=True)


class Ready(Schema):
    """Whether this gateway can serve, part by part.

    Providers are told, and do not count: others serve meanwhile. So is the Docker engine of the apps, by a gateway that
    shares its process with an orchestrator.
    """

    status = fields.String(required=True, metadata={"description": "ready, degraded, down or draining"})
    database = fields.Nested(Part, required=True)
    log = fields.Nested(Part, required=True)
    feed = fields.Nested(Part, required=True)
    apps = fields.Nested(Part)
    providers = fields.Dict(keys=fields.String(), values=fields.Nested(ProviderPart), required=True)


@operation("Is the process alive", tag="health", answers={200: Health}, signed_in=False, database=Database.NONE)
async def health(call: Call) -> web.Response:
    """Always 200: what else is away is no reason to restart this process."""
    return answer({"status": "ok"})


@operation(
    "Can it serve",
    tag="health",
    answers={200: Ready, 503: Ready},
    signed_in=False,
    database=Database.NONE,
)
async def ready(call: Call) -> web.Response:
    """503 while the database is away, until the feed has caught up with the event log, or while it drains.

    What is told of the event log and of providers is for those who show METRICS_TOKEN, when that is set.

    An event log that goes away later is told ("degraded") with 200. All replicas lose it at once, and taking them all
    out of service would end what works without it: REST, whose events wait in the outbox, and the open connections.
    """
    context = call.context
    (database, providers), log = await asyncio.gather(_database(context), _log(context))
    ask = call.request.app.get(ENGINE)
    apps = {} if ask is None else {"apps": _engine(ask())}
    if not may_read_metrics(call.request.headers.get("Authorization", ""), context.settings.metrics_token):
        # They may name hosts.
        for part in (log, *apps.values(), *providers.values()):
            part["message"] = ""
    feed = _part("ready") if context.feed.ready else _part("down", "It has not caught up with the event log.")
    status = _status(context, *(part["state"] == "ready" for part in (database, log, feed)))
    return answer(
        {"status": status, "database": database, "log": log, "feed": feed, **apps, "providers": providers},
        200 if status in ("ready", "degraded") else 503,
    )


def _status(context: Context, database: bool, log: bool, feed: bool) -> str:
    if context.hub.draining:
        return "draining"
    if not (database and feed):
        return "down"
    return "ready" if log else "degraded"


def _part(state: str, message: str = "") -> dict[str, str]:
    return {"state": state, "message": message}


def _engine(trouble: str | None) -> dict[str, str]:
    if trouble is None:
        return _part("down", "The Docker engine has not answered yet.")
    return _part("down", trouble) if trouble else _part("ready")


async def _database(context: Context) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        async with asyncio.timeout(_DEADLINE), lease(context) as connection:
            rows = await machines.providers(connection)
    except UNAVAILABLE:
        # Not its words: the probe is open to everybody, and they may name hosts and users.
        return _part("down", "It does not answer."), {}
    providers = {
        row.name: {"state": row.state, "message": row.message, "checked_at": row.checked_at}
        for row in rows
        if row.enabled
    }
    return _part("ready"), providers


async def _log(context: Context) -> dict[str, str]:
    try:
        async with asyncio.timeout(_DEADLINE):
            await context.log.check()
    except LogUnavailable as error:
        return _part("down", str(error))
    except TimeoutError:
        return _part("down", "It does not answer.")
    return _part("ready")


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text format. Asks for METRICS_TOKEN when that is set. Of all workers, where they share the port."""
    if not may_read_metrics(request.headers.get("Authorization", ""), request.app[CONTEXT].settings.metrics_token):
        raise Unauthenticated("/metrics takes the bearer token of METRICS_TOKEN.")
    return web.Response(
        body=await request.app.get(SIBLINGS, request.app[METRICS]).render(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8", "Cache-Control": "no-store"},
    )
