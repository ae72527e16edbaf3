"""What is done when the log tells that somebody's permissions have changed: every subscription is looked at again."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog

from auth import revocation
from gateway.realtime import authorization
from gateway.realtime.connection import Connection
from gateway.realtime.hub import Hub
from gateway.realtime.protocol import CloseCode
from orchestrator import database
from orchestrator.database import UNAVAILABLE, Pool, backoff

log = structlog.get_logger("gateway.rechecks")

# Seconds to wait for a free database connection.
DATABASE_WAIT = 5.0
# Seconds; the hints are complete, this only bounds an idle wait.
_IDLE = 3600.0


async def run(hub: Hub, pool: Pool) -> None:
    """Look again at whoever is named in `hub.changed_users`, for ever. While the database is away it tries on."""
    failures = 0
    while True:
        if not hub.changed_users:
            await hub.changes.wait(_IDLE)
            continue
        user_id = hub.changed_users.pop()
        try:
            await recheck(hub, pool, user_id)
            failures = 0
        except UNAVAILABLE as error:
            hub.changed_users.add(user_id)
            failures += 1
            log.warning("permissions cannot be checked", error=str(error) or type(error).__name__, failures=failures)
            await asyncio.sleep(backoff(failures, cap=2.0))


async def recheck(hub: Hub, pool: Pool, user_id: int) -> None:
    """Close those of one user's connections that lost a subscription (4507), or the user itself or its token (4500).

    Raises what is in `UNAVAILABLE`.
    """
    connections = hub.of_user(user_id)
    if not connections:
        return
    async with pool.acquire(timeout=DATABASE_WAIT) as sql:
        standing = await authorization.standing(sql, user_id)
        api_tokens = await authorization.api_tokens_left(sql, user_id)
        revoked = await revocation.revoked_among(sql, user_id, [one.identity.token_id for one in connections])
        for connection in connections:
            if standing is None or _is_void(connection, standing, api_tokens, revoked):
                hub.close(connection, CloseCode.TOKEN_INVALID)
            else:
                await _recheck_channels(hub, sql, connection, is_admin=standing.is_admin)


def _is_void(connection: Connection, standing: authorization.Standing, api_tokens: set[str], revoked: set[str]) -> bool:
    """Whether the token behind the connection was revoked since it was shown."""
    token = connection.identity.token_id
    if token.startswith("api:"):
        return token not in api_tokens
    return token in revoked or standing.valid_from != connection.valid_from


async def _recheck_channels(hub: Hub, sql: database.Connection, connection: Connection, *, is_admin: bool) -> None:
    connection.identity = replace(connection.identity, is_admin=is_admin)
    lost = await authorization.refusals(sql, connection.identity, connection.channels, connection.narrowed)
    # What it left meanwhile, of its own will, is no loss.
    if any(channel in connection.channels for channel in lost):
        log.info("permission withdrawn", user_id=connection.user_id, connection_id=connection.id, channels=list(lost))
        hub.close(connection, CloseCode.PERMISSION_WITHDRAWN)
