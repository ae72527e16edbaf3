"""A session's output as it is written: `GET /api/v1/sessions/{id}/logs?follow=true`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar

import orjson
from aiohttp import web

from auth.tokens import ShortGrant
from gateway.realtime import following
from gateway.realtime.following import Progress
from gateway.realtime.protocol import CloseCode
from orchestrator.database import Connection as Sql
from orchestrator.events import session_channel
from orchestrator.sessions import store
from orchestrator.sessions.record import moment
from orchestrator.sessions.state import Status

# Lines read at once: at most 1.6 MB, mostly some 20 KB.
_BATCH = 200
_MISSING = "Lines are missing here: they were dropped before they could be read."
# From here on a close code says: do not come back.
_FINAL = 4500

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """How lines are written. `heartbeat`: what passes over a connection that has nothing to say."""

    content_type: str
    line: Callable[[Item], bytes]
    heartbeat: bytes

    def render(self, items: Iterable[Item]) -> bytes:
        """Lines as they are sent."""
        return b"".join(map(self.line, items))


def _as_text(item: Item) -> bytes:
    return f"{moment(item['at'])} {item['service'] or item['stream']} | {item['line']}\n".encode()


JSON_LINES = Format(
    "application/x-ndjson",
    lambda item: orjson.dumps(item, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE),
    b"\n",
)
# People would see a heartbeat; here the kernel's own must do.
TEXT = Format("text/plain", _as_text, b"")


def format_for(accept: str) -> Format:
    """What a client with this `Accept` gets: text when it names that, and no kind of JSON before it."""
    for name in (media.partition(";")[0].strip().lower() for media in accept.split(",")):
        if name == TEXT.content_type:
            return TEXT
        if "json" in name:
            break
    return JSON_LINES


def item_of(record: store.LogRecord) -> Item:
    """A line as REST answers it."""
    return {
        "id": record.id,
        "at": record.at,
        "service": record.service,
        "stream": record.stream,
        "line": record.line,
    }


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be followed: a session's lines after the id `after`, of one service or all, from a moment on or ever.

    `resumed`: the client has read the line `after`, so that whatever was pruned behind it is missing.
    """

    session_id: int
    after: int
    service: str | None
    since: datetime | None
    resumed: bool


@dataclass(slots=True, eq=False)
class Follower(following.Follower):
    """A connection that is written a session's lines."""

    complete: ClassVar[str] = "session deleted"

    wish: Wish = field(kw_only=True)
    format: Format = field(kw_only=True)
    # The last line read, whether or not it was wanted.
    after: int = field(init=False)

    def __post_init__(self) -> None:
        following.Follower.__post_init__(self)
        self.after = self.wish.after
        self.heartbeat = self.format.heartbeat

    async def look(self, sql: Sql) -> store.Output | None:
        """The next lines, wanted or not; None: the session is gone."""
        return await store.logs_after(sql, self.wish.session_id, self.after, _BATCH)

    def take(self, found: store.Output | None) -> Progress:
        """Write those that are wanted."""
        wish = self.wish
        if found is not None and found.records:
            if not found.kept and (wish.resumed or self.after != wish.after):
                self.tell(_MISSING)
            self.after = found.records[-1].id
            wanted = (record for record in found.records if _is_wanted(record, wish))
            self.put(self.format.render(map(item_of, wanted)))
        if found is not None and len(found.records) == _BATCH:
            return Progress.MORE
        return Progress.OVER if found is None or found.status == Status.DELETED else Progress.CAUGHT_UP

    def tell(self, line: str, **more: Any) -> None:
        """A line of ours. Its id is the last that was read, so that a client resumes from whichever it saw last."""
        item = {"id": self.after, "at": datetime.now(UTC), "service": "", "stream": "system", "line": line}
        self.put(self.format.line(item | more))

    def say_end(self, code: int, reason: str) -> bool:
        """By the last line, so that the answer is whole in any case."""
        again = CloseCode.DRAINING <= code < _FINAL
        self.tell(f"The stream ends: {reason}.", end={"code": code, "reason": reason, "reconnect": again})
        return True


async def follow(
    request: web.Request, grant: ShortGrant, generation: int, wish: Wish, form: Format
) -> web.StreamResponse:
    """As `following.follow`."""
    make = partial(Follower, wish=wish, format=form)
    channel = session_channel(wish.session_id)
    return await following.follow(request, grant, generation, make, channel=channel, content_type=form.content_type)


def _is_wanted(record: store.LogRecord, wish: Wish) -> bool:
    return wish.service in (None, record.service) and (wish.since is None or record.at >= wish.since)
