"""Where a new session goes: its provider and size, and the names that it has there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from orchestrator import machines
from orchestrator.database import Connection
from orchestrator.errors import Invalid

if TYPE_CHECKING:
    from auth.permissions import Identity


@dataclass(frozen=True, slots=True)
class Placement:
    """What a session is made with. `machine` is the machine config as it is now; later changes do not matter."""

    provider_id: int
    provider: str
    machine_config: str
    machine: dict[str, Any]


async def place(
    connection: Connection, provider: str | None, machine_config: str | None, asker: machines.Asker | None = None
) -> Placement:
    """The provider and machine config asked for, or the defaults, with a seat taken in the caller's transaction.

    Raises Invalid, naming what there is, Forbidden where the asker may not use it, Conflict when all seats are taken.
    """
    row, config = await machines.choose(connection, provider, machine_config, asker)
    if not await machines.take_seat(connection, config.name):
        raise Invalid(f"The machine config {config.name!r} has just been removed.", field="machine_config")
    return Placement(row.id, row.name, config.name, config.snapshot())


def asker(identity: Identity | None, workspace_id: int) -> machines.Asker | None:
    """Who asks, for a project of a workspace. None: nobody whose permission counts."""
    return machines.Asker(identity.user_id, [workspace_id], identity.is_admin) if identity is not None else None


def namespace(project_uuid: UUID) -> str:
    """Where a project's sessions live at their provider: the project's own Kubernetes namespace."""
    return str(project_uuid)


def container_name(session_id: int) -> str:
    """What a session is called there: a DNS label, as Kubernetes takes them."""
    return f"session-{session_id}"
