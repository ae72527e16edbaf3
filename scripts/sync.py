"""`sync-users FILE`: make the accounts what another service's list says.

The file (JSON, or YAML) is a list of `{id, email, name}`, with `deleted: true` for those that are gone. `id` is the
other service's. Accounts that the file does not name stay as they are. It is validated as a whole, and done as a whole
or not at all; doing it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import yaml
from marshmallow import Schema, ValidationError, fields, validate

from auth import audit
from auth.errors import Taken, Unacceptable
from orchestrator import user_sync
from orchestrator.errors import Conflict, Invalid
from orchestrator.machine_fields import flatten
from orchestrator.user_sync import ExternalId, SyncedUser
from scripts import target

if TYPE_CHECKING:
    from environs import Env

    from orchestrator.database import Connection

_LARGEST_FILE = 64 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one user, as `user_sync.Outcome` says it."""

    external_id: str
    email: str
    action: str

    def __str__(self) -> str:
        return f"user {self.external_id} ({self.email}): {self.action}"


class _Undone(Exception):
    """Takes a dry run's transaction back."""


class _UserSchema(Schema):
    id = ExternalId(required=True, validate=validate.Length(1, 255))
    email = fields.String(required=True, validate=validate.Length(3, 254))
    name = fields.String(required=True, validate=validate.Length(1, 200))
    deleted = fields.Boolean(load_default=False, truthy={True}, falsy={False})


def read_file(path: Path) -> list[dict[str, Any]]:
    """Read and validate the file, wholly. Raises Invalid that names every wrong place; blocks for the disk."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}.", field="file") from error
    if len(text) > _LARGEST_FILE:
        raise Invalid(f"{path} is larger than {_LARGEST_FILE >> 20} MiB: split it.", field="file")
    try:
        document = orjson.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (orjson.JSONDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise Invalid(f"{path} is no {kind}: {' '.join(str(error).split())}", field="file") from error
    if not isinstance(document, list):
        raise Invalid(f"{path} must be a list of users, each with id, email and name.", field="file")
    try:
        users: list[dict[str, Any]] = _UserSchema(many=True).load(document)
    except ValidationError as error:
        raise _invalid(path, flatten(error.messages)) from error
    if clashes := list(_clashes(users)):
        raise _invalid(path, clashes)
    return users


async def sync(env: Env, path: Path, *, dry_run: bool) -> list[Change]:
    """Do what the file says, in one transaction, and say what that changed; a dry run takes it back."""
    users = read_file(path)
    changes: list[Change] = []
    async with target.connection(env) as connection:
        try:
            async with connection.transaction():
                changes = await apply(connection, users)
                if dry_run:
                    raise _Undone
        except _Undone:
            return changes
    return changes


async def apply(connection: Connection, users: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Bring the accounts in line; the caller opens the transaction. Raises Conflict, saying whose entry cannot be."""
    # The gone ones first: their addresses may have new owners.
    order = sorted(range(len(users)), key=lambda index: not users[index]["deleted"])
    changes = {}
    for index in order:
        try:
            changes[index] = await _apply_one(connection, users[index])
        except (Taken, Unacceptable) as error:
            raise Conflict(f"[{index}] (id {users[index]['id']}): {error} Nothing was changed.") from error
    if any(change.action != "unchanged" for change in changes.values()):
        await audit.record(connection, None, "user.sync", "users", by="cluster-code sync-users", entries=len(users))
    return [changes[index] for index in sorted(changes)]


async def _apply_one(connection: Connection, user: Mapping[str, Any]) -> Change:
    told = SyncedUser(user["id"], user["email"], user["name"], deleted=user["deleted"])
    outcome = await user_sync.apply(connection, told, by_operator=True)
    return Change(user["id"], user["email"], outcome.value)


def _clashes(users: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    ids: dict[str, int] = {}
    emails: dict[str, int] = {}
    for index, user in enumerate(users):
        if (first := ids.setdefault(user["id"], index)) != index:
            yield f"[{index}].id: {user['id']!r} is the id of [{first}] already"
        if user["deleted"]:
            continue
        if (first := emails.setdefault(user["email"].strip().lower(), index)) != index:
            yield f"[{index}].email: {user['email']!r} is the address of [{first}] already"


def _invalid(path: Path, lines: Sequence[str]) -> Invalid:
    shown = "\n".join(f"  {line}" for line in lines[:20])
    more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
    return Invalid(f"{path} is not valid, nothing was changed:\n{shown}{more}", field="file")
