"""Telling all gateways, through the log, that something a user may see has changed: their sockets are checked anew."""

from __future__ import annotations

from orchestrator import events
from orchestrator.database import Connection
from orchestrator.eventlog import outbox
from orchestrator.events import Event


async def tell(connection: Connection, *user_ids: int) -> None:
    """Within the transaction that makes the change, so that neither is without the other."""
    if user_ids:
        await outbox.add(
            connection,
            *(Event(events.PERMISSIONS_CHANGED, events.GATEWAY, {"user_id": user_id}) for user_id in user_ids),
        )
