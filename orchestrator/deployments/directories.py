"""The working directories of deployments under way, one of each claim: `{deployment id}-{lease owner}`."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from orchestrator.children.processes import Selection, end
from orchestrator.database import Connection
from orchestrator.deployments import leases
from orchestrator.deployments.source import MARKER

log = structlog.get_logger("deployments")


def of_claim(directory: Path, deployment_id: int, owner: UUID) -> Path:
    """Where a claim's is."""
    return directory / f"{deployment_id}-{owner}"


async def make(path: Path) -> None:
    """Make an empty one that only we can read. Raises OSError."""

    def made() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)

    await asyncio.to_thread(made)


async def remove(path: Path) -> None:
    """Remove one with all that is in it. What cannot be removed is told, and left."""

    def told(_: object, name: str, error: Any) -> None:
        if not issubclass(error[0], FileNotFoundError):
            log.warning("not removed", path=name, error=str(error[1]))

    await asyncio.to_thread(shutil.rmtree, path, onerror=told)


async def remove_leftovers(connection: Connection, directory: Path) -> int:
    """Remove those whose claim holds no more: their worker was killed. How many there were.

    What still runs in one is ended first. Other workers may have theirs beside ours.
    """
    found = await asyncio.to_thread(_found, directory)
    held = await leases.owners(connection, found.keys())
    left = [path for owner, path in found.items() if owner not in held]
    for path in left:
        await end(Selection({MARKER: str(path)}), grace=0)
        await remove(path)
    return len(left)


def _found(directory: Path) -> dict[UUID, Path]:
    found = {}
    if directory.is_dir():
        for path in directory.iterdir():
            _, _, owner = path.name.partition("-")
            try:
                found[UUID(owner)] = path
            except ValueError:
                continue
    return found
