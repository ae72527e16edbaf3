"""A deployment's log as it is written: `GET /api/v1/deployments/{id}/logs?follow=true`.

The answer is the log, byte for byte, and nothing else, so that a client which was cut off goes on by `after` with the
number of bytes that it has. What is cut off lacks the mark of its end (RFC 9112, section 8), and is so told from a
whole one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from aiohttp import web

from auth.tokens import ShortGrant
from gateway.context import Context
from gateway.operation import lease
from gateway.realtime import following
from gateway.realtime.following import Progress
from gateway.realtime.protocol import CloseCode
from orchestrator.database import Connection as Sql
from orchestrator.deployments import log_reading
from orchestrator.events import deployment_channel

# Pieces read at once; each has 32 KiB at most.
_BATCH = 16


@dataclass(slots=True, eq=False)
class Follower(following.Follower):
    """A connection that is written a deployment's log."""

    complete: ClassVar[str] = "deployment ended"

    deployment_id: int = field(kw_only=True)
    # Bytes of the log that were read.
    after: int = field(kw_only=True)

    async def look(self, sql: Sql) -> log_reading.LogPart | None:
        """What comes next; None: the deployment is gone."""
        return await log_reading.read(sql, self.deployment_id, self.after, _BATCH)

    def take(self, found: log_reading.LogPart | None) -> Progress:
        """Write it."""
        if found is None:
            return Progress.OVER
        self.put(found.text)
        self.after += len(found.text)
        if found.more:
            return Progress.MORE
        return Progress.OVER if found.finished else Progress.CAUGHT_UP

    def say_end(self, code: int, reason: str) -> bool:
        """By the mark of the end alone."""
        return code == CloseCode.NORMAL


async def parts(context: Context, deployment_id: int, after: int) -> AsyncIterator[bytes]:
    """What there is of the log, from the byte `after` on; without a database connection while the client reads."""
    more = True
    while more:
        async with lease(context) as sql:
            found = await log_reading.read(sql, deployment_id, after, _BATCH)
        if found is None:
            return
        yield found.text
        after += len(found.text)
        more = found.more


async def follow(
    request: web.Request, grant: ShortGrant, generation: int, deployment_id: int, after: int
) -> web.StreamResponse:
    """As `following.follow`, from the byte `after` on."""
    make = partial(Follower, deployment_id=deployment_id, after=after)
    channel = deployment_channel(deployment_id)
    return await following.follow(request, grant, generation, make, channel=channel, content_type="text/plain")
