"""The audit log: who did what to what, from where. Written in the transaction of the deed."""

from __future__ import annotations

from typing import Any

import asyncpg


async def record(
    connection: asyncpg.Connection,
    actor_id: int | None,
    action: str,
    object: str,  # noqa: A002  The column's name, and what the reader looks for.
    address: str | None = None,
    **details: Any,
) -> None:
    """Append one record. `actor_id` None: nobody signed in, or the operator at the command line.

    `object` names what was acted on (`project:7`), `address` the client's. `details` is anything that orjson can write;
    never put a secret into it.
    """
    await connection.execute(
        "INSERT INTO audit_log (actor_id, action, object, address, details) VALUES ($1, $2, $3, $4, $5)",
        actor_id,
        action,
        object,
        address,
        details,
    )
