"""The table `cluster_objects`: what was told of each object, written in the transaction that tells it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import msgspec

from orchestrator.bridge.visible import Kind
from orchestrator.database import Connection


class Row(NamedTuple):
    """One change to tell; or one that is only noted (`silent`), as what was so before anybody looked."""

    kind: str
    event_type: str
    to_session: bool
    uid: str
    session_id: int | None
    version: int
    digest: int
    told: str
    gone: bool = False
    silent: bool = False
    # Whether it may mean something for its session's row.
    matters: bool = False
    # When it came (`time.monotonic()`).
    at: float = 0.0


class Told(msgspec.Struct, frozen=True, gc=False):
    """What a leader remembers of an object: 64 bits of each."""

    version: int
    digest: int


async def load(connection: Connection, provider_id: int) -> dict[str, dict[str, Told]]:
    """By kind and uid, what was told of everything at this provider."""
    told: dict[str, dict[str, Told]] = {}
    async with connection.transaction():
        # By a cursor: there may be a hundred thousand.
        async for kind, uid, version, digest in connection.cursor(
            "SELECT kind, uid, version, digest FROM cluster_objects WHERE provider_id = $1", provider_id, prefetch=1000
        ):
            told.setdefault(kind, {})[uid] = Told(version, digest)
    return told


async def find(
    connection: Connection, provider_id: int, kind: Kind, uids: Collection[str]
) -> list[tuple[str, int | None, int, int, str]]:
    """`(uid, session id, version, digest, what was told)` of these objects."""
    rows = await connection.fetch(
        """SELECT uid, session_id, version, digest, told FROM cluster_objects
            WHERE provider_id = $1 AND kind = $2 AND uid = ANY ($3)""",
        provider_id,
        kind.name,
        list(uids),
    )
    return [tuple(row) for row in rows]


async def write(connection: Connection, provider_id: int, rows: Sequence[Row]) -> None:
    """Note and tell changes, in their order, within the caller's transaction: four statements, however many they are.

    What is of a session is told on its channel and on `cluster`, with one event each, from the same JSON.
    """
    last = {row.uid: row for row in rows}
    kept = [row for row in last.values() if not row.gone]
    gone = [row.uid for row in last.values() if row.gone]
    if kept:
        await connection.execute(
            """INSERT INTO cluster_objects (provider_id, uid, kind, session_id, version, digest, told)
               SELECT $1, * FROM unnest($2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::text[])
               ON CONFLICT (provider_id, uid) DO UPDATE
                  SET session_id = excluded.session_id, version = excluded.version, digest = excluded.digest,
                      told = excluded.told""",
            provider_id,
            [row.uid for row in kept],
            [row.kind for row in kept],
            [row.session_id for row in kept],
            [row.version for row in kept],
            [row.digest for row in kept],
            [row.told for row in kept],
        )
    if gone:
        await connection.execute(
            "DELETE FROM cluster_objects WHERE provider_id = $1 AND uid = ANY ($2)", provider_id, gone
        )
    if news := [row for row in rows if not row.silent]:
        await connection.execute(
            """INSERT INTO outbox (event_type, channel, data)
               SELECT event_type, channel, told
                 FROM unnest($1::text[], $2::bigint[], $3::text[])
                      WITH ORDINALITY AS new (event_type, session_id, told, place),
                      LATERAL (SELECT 'session:' || session_id AS channel WHERE session_id IS NOT NULL
                               UNION ALL SELECT 'cluster') AS channels
                ORDER BY place, channel DESC""",
            [row.event_type for row in news],
            [row.session_id if row.to_session else None for row in news],
            [row.told for row in news],
        )
