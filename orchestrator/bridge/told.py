"""The table `cluster_objects`: what was told of each object, written in the transaction that tells it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import msgspec

from orchestrator.bridge.visible import KINDS, Kind
from orchestrator.database import Connection


class Row(NamedTuple):
    """One change to tell; or one that is only noted (`silent`), as what was so before anybody looked."""

    kind: str
    uid: str
    session_id: int | None
    version: int
    digest: int
    told: str
    gone: bool
    silent: bool
    # Whether it may mean something for its session's row.
    matters: bool
    # When it came (`time.monotonic()`).
    at: float


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


_WRITE = """
    WITH new AS (
        SELECT * FROM unnest($2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::text[], $8::bool[],
                             $9::bool[], $10::bool[])
               WITH ORDINALITY AS row (kind, uid, session_id, version, digest, told, gone, silent, last, place)),
    kept AS (
        INSERT INTO cluster_objects (provider_id, uid, kind, session_id, version, digest, told)
        SELECT $1, uid, kind, session_id, version, digest, told FROM new WHERE last AND NOT gone
        ON CONFLICT (provider_id, uid) DO UPDATE
           SET session_id = excluded.session_id, version = excluded.version, digest = excluded.digest,
               told = excluded.told),
    forgotten AS (
        DELETE FROM cluster_objects
         WHERE provider_id = $1 AND uid = ANY (ARRAY(SELECT uid FROM new WHERE last AND gone)))
    INSERT INTO outbox (event_type, channel, data)
    SELECT event_type, channel, told
      FROM new JOIN unnest($11::text[], $12::text[], $13::bool[]) AS of (kind, event_type, to_session) USING (kind),
           LATERAL (SELECT 'session:' || session_id AS channel WHERE to_session AND session_id IS NOT NULL
                    UNION ALL SELECT 'cluster') AS channels
     WHERE NOT silent
     ORDER BY place, channel DESC"""
_KINDS = [[kind.name for kind in KINDS], [kind.event_type for kind in KINDS], [kind.to_session for kind in KINDS]]


async def write(connection: Connection, provider_id: int, rows: Sequence[Row]) -> None:
    """Note and tell changes, in their order, within the caller's transaction: one statement, however many they are.

    What is of a session is told on its channel and on `cluster`, with one event each, from the same JSON.
    """
    if not rows:
        return
    kind, uid, session_id, version, digest, told, gone, silent, _, _ = zip(*rows, strict=True)
    # Of an object that has changed more than once, the table knows the last.
    places = {one: place for place, one in enumerate(uid)}
    last = [places[one] == place for place, one in enumerate(uid)]
    await connection.execute(
        _WRITE, provider_id, kind, uid, session_id, version, digest, told, gone, silent, last, *_KINDS
    )
