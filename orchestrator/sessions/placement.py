"""Where a new session goes: its provider and size, and the names that it has there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from orchestrator import machines
from orchestrator.database import Connection


@dataclass(frozen=True, slots=True)
class Placement:
    """What a session is made with. `machine` is the machine config as it is now; later changes do not matter."""

    provider_id: int
    provider: str
    machine_config: str
    machine: dict[str, Any]


async def place(connection: Connection, provider: str | None, machine_config: str | None) -> Placement:
    """The provider and machine config asked for, or the defaults. Raises Invalid, naming what there is."""
    row, config = await machines.choose(connection, provider, machine_config)
    return Placement(row.id, row.name, config.name, config.snapshot())


def namespace(project_uuid: UUID) -> str:
    """Where a project's sessions live at their provider: the project's own Kubernetes namespace."""
    return str(project_uuid)


def container_name(session_id: int) -> str:
    """What a session is called there: a DNS label, as Kubernetes takes them."""
    return f"session-{session_id}"
