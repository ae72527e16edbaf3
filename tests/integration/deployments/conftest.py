"""Apps in the database, as the queue has them; nothing here builds or runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest_asyncio

from auth import accounts
from orchestrator.database import Pool


@dataclass(frozen=True)
class Place:
    """A user and the workspace that is theirs."""

    user_id: int
    workspace_id: int


@pytest_asyncio.fixture
async def place(pool: Pool) -> Place:
    """Where apps can be."""
    async with pool.acquire() as connection:
        user = await accounts.register(connection, "ann@example.test", None, "Ann")
        workspace = await connection.fetchval("SELECT id FROM workspaces WHERE personal_user_id = $1", user.id)
    return Place(user.id, workspace)
