"""Users of another service, as it tells of them: by messages (`auth.user.created | updated | deleted`) or in a file.

What is told about one user is obeyed in order, and telling it again changes nothing. Messages may have a version (a
number, or the moment of the change): then an older one is passed over, whenever it comes. Without versions, the order
in which they arrive is the order.

A deletion is final: what was told before it may well arrive after it. Only a message with a greater version, or the
operator's own list, brings a deleted user back. A `created` without a version that comes after the deletion cannot be
told from a repeated one; it is refused, which its sender can see, and not passed over in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum, StrEnum, auto
from typing import Any

import orjson
import structlog
from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate

from auth import accounts, audit
from auth.accounts import Removal
from auth.errors import Taken, Unacceptable
from auth.names import clean
from orchestrator import permissions_changed
from orchestrator.database import Connection, Pool
from orchestrator.errors import Conflict
from orchestrator.eventlog.contract import Delivery, Undeliverable
from orchestrator.machine_fields import flatten

log = structlog.get_logger("user sync")

_CREATED, _UPDATED, _DELETED = "auth.user.created", "auth.user.updated", "auth.user.deleted"
_LARGEST_VERSION = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class SyncedUser:
    """What the other service says of a user. `external_id` is its id there; of a deleted one nothing else counts."""

    external_id: str
    email: str = ""
    name: str = ""
    deleted: bool = False
    # It says that the user is new.
    created: bool = False
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """The last that was obeyed about a user."""

    version: int | None
    deleted: bool


class Outcome(StrEnum):
    """What became of it."""

    ADDED = "added"
    # An account of the same address is the user's now.
    LINKED = "linked"
    CHANGED = "changed"
    UNCHANGED = "unchanged"
    # It was deleted, and is not any more.
    RESTORED = "restored"
    DELETED = "deleted"
    # It owns what others may need, and can no longer sign in.
    DISABLED = "disabled"
    # There was no such account.
    UNKNOWN = "unknown"
    # Something newer was heard before.
    OUTDATED = "outdated"


class Verdict(Enum):
    """Whether to obey."""

    OBEY = auto()
    PASS_OVER = auto()
    REFUSE = auto()


def judge(heard: Heard | None, user: SyncedUser) -> Verdict:
    """Whether to obey a message, after what was heard before."""
    if heard is None:
        return Verdict.OBEY
    if user.version is not None and heard.version is not None:
        if user.version > heard.version:
            return Verdict.OBEY
        # A repetition changes nothing, but for that of a life before the deletion.
        again = user.version == heard.version and user.deleted >= heard.deleted
        return Verdict.OBEY if again else Verdict.PASS_OVER
    if user.deleted or not heard.deleted:
        return Verdict.OBEY
    return Verdict.REFUSE if user.created else Verdict.PASS_OVER


async def apply(connection: Connection, user: SyncedUser, *, by_operator: bool = False) -> Outcome:
    """Bring the account in line, within the caller's transaction. `by_operator`: whatever was heard before.

    Raises Conflict: a `created` after the deletion; Taken, Unacceptable: `auth.accounts` says why it cannot be; Taken,
    too, for an administrator's address: whoever names it at the other service would be one here.
    """
    # As the accounts have it, so that one user has one history, and its id can be stored.
    user = replace(user, external_id=clean(user.external_id, field="id", longest=255))
    heard = await _heard(connection, user.external_id)
    verdict = Verdict.OBEY if by_operator else judge(heard, user)
    if verdict is Verdict.PASS_OVER:
        return Outcome.OUTDATED
    if verdict is Verdict.REFUSE:
        raise Conflict(
            f"The user {user.external_id!r} was deleted; without a greater version, only an operator brings it back."
        )
    await connection.execute(
        """INSERT INTO synced_users (external_id, version, deleted_at)
           VALUES ($1, $2, CASE WHEN $3 THEN now() END)
               ON CONFLICT (external_id) DO UPDATE
              SET version = coalesce(EXCLUDED.version, synced_users.version),
                  deleted_at = CASE WHEN $3 THEN coalesce(synced_users.deleted_at, now()) END""",
        user.external_id,
        user.version,
        user.deleted,
    )
    if user.deleted:
        return await _delete(connection, user)
    restores = heard is not None and heard.deleted
    return await _upsert(connection, user, restores=restores, by_operator=by_operator)


async def _heard(connection: Connection, external_id: str) -> Heard | None:
    """Nobody else is told of this user until the transaction ends."""
    # A lock of its own, since there may be no row yet.
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('synced user ' || $1, 0))", external_id)
    row = await connection.fetchrow("SELECT version, deleted_at FROM synced_users WHERE external_id = $1", external_id)
    return None if row is None else Heard(row["version"], row["deleted_at"] is not None)


async def _delete(connection: Connection, user: SyncedUser) -> Outcome:
    known = await connection.fetchrow("SELECT id, is_disabled FROM users WHERE external_id = $1", user.external_id)
    removal = await accounts.delete_synced(connection, user.external_id)
    if known is None or removal is Removal.UNKNOWN:
        return Outcome.UNKNOWN
    if removal is Removal.DISABLED and known["is_disabled"]:
        return Outcome.UNCHANGED
    await permissions_changed.tell(connection, known["id"])
    return Outcome(removal.value)


async def _upsert(connection: Connection, user: SyncedUser, *, restores: bool, by_operator: bool) -> Outcome:
    known = await connection.fetchrow(
        "SELECT id, email, name, is_disabled FROM users WHERE external_id = $1", user.external_id
    )
    of_address = None if known else await accounts.find_by_email(connection, user.email)
    if of_address is not None and of_address.is_admin and not by_operator:
        raise Taken(
            f"The address {user.email!r} is an administrator's: only an operator's `sync-users` gives it to another "
            "service's user.",
            field="email",
        )
    after = await accounts.upsert_synced(connection, user.external_id, user.email, user.name)
    if known is None:
        if of_address is None:
            return Outcome.ADDED
        # Whoever had it is signed out.
        await permissions_changed.tell(connection, after.id)
        return Outcome.LINKED
    if restores and known["is_disabled"]:
        await accounts.update(connection, after.id, is_disabled=False)
        await permissions_changed.tell(connection, after.id)
        return Outcome.RESTORED
    same = (known["email"], known["name"]) == (after.email, after.name)
    return Outcome.UNCHANGED if same else Outcome.CHANGED


class UserSync:
    """Obeys the messages of the queue, one after the other."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def handle(self, delivery: Delivery) -> None:
        """Obey one. Raises Undeliverable when it will never do, and what is in `database.UNAVAILABLE`."""
        user = parse(delivery.routing_key, delivery.body)
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                outcome = await apply(connection, user)
                if outcome not in (Outcome.UNCHANGED, Outcome.OUTDATED, Outcome.UNKNOWN):
                    await audit.record(
                        connection, None, "user.sync", f"external user:{user.external_id}",
                        by=delivery.routing_key, outcome=outcome.value,
                    )  # fmt: skip
        except (Taken, Unacceptable, Conflict) as error:
            raise Undeliverable(str(error)) from error
        log.info("heard of a user", external_id=user.external_id, key=delivery.routing_key, outcome=outcome.value)


class ExternalId(fields.String):
    """The other service's id: a string or a whole number, kept as text."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> Any:
        numeric = isinstance(value, int) and not isinstance(value, bool)
        return super()._deserialize(str(value) if numeric else value, attr, data, **kwargs)


class _Moment(fields.Field[int]):
    """Microseconds since 1970, from RFC 3339 or from a number of seconds."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> int:
        try:
            if isinstance(value, int | float) and not isinstance(value, bool):
                moment = datetime.fromtimestamp(value, UTC)
            else:
                moment = datetime.fromisoformat(value)
                moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            return round(moment.timestamp() * 1_000_000)
        except (TypeError, ValueError, OverflowError, OSError) as error:
            raise ValidationError("Not a moment: RFC 3339, or seconds since 1970.") from error


class _GoneSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    id = ExternalId(required=True, validate=validate.Length(1, 255))
    version = fields.Integer(
        strict=True, load_default=None, allow_none=True, validate=validate.Range(0, _LARGEST_VERSION)
    )
    updated_at = _Moment(load_default=None, allow_none=True)


class _UserSchema(_GoneSchema):
    email = fields.String(required=True, validate=validate.Length(3, 254))
    name = fields.String(required=True, validate=validate.Length(1, 200))


def parse(routing_key: str, body: bytes) -> SyncedUser:
    """What a message says: an envelope whose `data` is the user, or the bare user. Raises Undeliverable."""
    if routing_key not in (_CREATED, _UPDATED, _DELETED):
        raise Undeliverable(f"the routing key {routing_key!r} is none of {_CREATED}, {_UPDATED}, {_DELETED}")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Undeliverable(f"not JSON: {error}") from error
    if isinstance(document, dict) and isinstance(document.get("data"), dict) and "id" not in document:
        document = document["data"]
    if not isinstance(document, dict):
        raise Undeliverable("not a JSON object")
    deleted = routing_key == _DELETED
    try:
        found = (_GoneSchema() if deleted else _UserSchema()).load(document)
    except ValidationError as error:
        raise Undeliverable("; ".join(flatten(error.messages))) from error
    return SyncedUser(
        found["id"],
        found.get("email", ""),
        found.get("name", ""),
        deleted=deleted,
        created=routing_key == _CREATED,
        version=found["version"] if found["version"] is not None else found["updated_at"],
    )
