"""The lifecycle of workspaces, their members and projects, told on their channels. Sessions tell theirs themselves."""

from __future__ import annotations

from typing import Any

from orchestrator.database import Connection
from orchestrator.eventlog import outbox
from orchestrator.events import Event, user_channel, workspace_channel


async def tell(
    connection: Connection, event_type: str, data: dict[str, Any], *, workspace_id: int, user_id: int | None = None
) -> None:
    """Within the transaction that makes the change. `user_id`: whom it concerns, and who may not be a member yet."""
    channels = [workspace_channel(workspace_id)]
    if user_id is not None:
        channels.append(user_channel(user_id))
    await outbox.add(connection, *(Event(event_type, channel, data) for channel in channels))
