"""The log of a deployment, for those who read it. `logs` is for those who write it."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.database import Connection


@dataclass(frozen=True, slots=True)
class LogPart:
    """Some of a log, in UTF-8. `more`: there is more already. `finished`: what there is, is all there will be."""

    text: bytes
    more: bool
    finished: bool


async def read(connection: Connection, deployment_id: int, after: int, pieces: int) -> LogPart | None:
    """The log from its byte `after` on, of so many pieces at most; None when there is no such deployment.

    Bytes are those of what is kept, so that `after` may be anywhere, inside a character too.
    """
    rows = await connection.fetch(
        """SELECT d.finished_at IS NOT NULL AS finished, l.position, l.text
             FROM deployments d LEFT JOIN LATERAL (
                  SELECT position, text FROM deployment_logs
                   WHERE deployment_id = d.id AND position + length > $2
                     AND position >= coalesce((SELECT max(position) FROM deployment_logs
                                                WHERE deployment_id = d.id AND position <= $2), 0)
                   ORDER BY position LIMIT $3) l ON true
            WHERE d.id = $1 ORDER BY l.position""",
        deployment_id,
        after,
        pieces + 1,
    )
    if not rows:
        return None
    found = [row for row in rows if row["position"] is not None]
    taken = found[:pieces]
    text = b"".join(row["text"].encode() for row in taken)
    skipped = max(0, after - taken[0]["position"]) if taken else 0
    return LogPart(text[skipped:], more=len(found) > len(taken), finished=rows[0]["finished"])
