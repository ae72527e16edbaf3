"""Who may subscribe to what: the table of channels in `docs/protocol.md`.

What needs no database is decided without one (`decide_alone`), so that it works while the database is away.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from auth.channels import covers
from auth.errors import AuthError, Forbidden, NotVisible
from auth.permissions import Action, Identity, Role, Scope, decide, has_scope
from gateway.realtime.protocol import is_name
from orchestrator.database import Connection
from orchestrator.events import BROADCAST, CLUSTER, GATEWAY, user_channel

_OURS = re.compile(r"(user|session|workspace|deployment):([1-9][0-9]{0,18})")
_OUR_KINDS = frozenset({"user", "session", "workspace", "deployment", BROADCAST, CLUSTER, GATEWAY})
_FOREIGN = re.compile(r"([^:]+):.+", re.DOTALL)
_LARGEST_ID = 2**63 - 1

# Existence and role come in one answer: a row says that the object exists, its role that the user is a member.
_SESSION_ROLES = """
    SELECT s.id, m.role::text AS role FROM sessions s
      LEFT JOIN workspace_members m ON m.workspace_id = s.workspace_id AND m.user_id = $1
     WHERE s.id = ANY($2::bigint[])"""
_WORKSPACE_ROLES = """
    SELECT w.id, m.role::text AS role FROM workspaces w
      LEFT JOIN workspace_members m ON m.workspace_id = w.id AND m.user_id = $1
     WHERE w.id = ANY($2::bigint[])"""
_DEPLOYMENT_ROLES = """
    SELECT d.id, m.role::text AS role FROM deployments d
      LEFT JOIN workspace_members m ON m.workspace_id = d.workspace_id AND m.user_id = $1
     WHERE d.id = ANY($2::bigint[])"""
_ROLES = {"session": _SESSION_ROLES, "workspace": _WORKSPACE_ROLES, "deployment": _DEPLOYMENT_ROLES}
_READS = {
    "session": Action.SESSION_READ,
    "workspace": Action.WORKSPACE_READ,
    "deployment": Action.DEPLOYMENT_READ,
}


class UnknownChannel(NotVisible):
    """A name that no channel can have."""


@dataclass(frozen=True, slots=True)
class Channel:
    """`kind` is `foreign` for other services' channels, which have no `id`; nor have `broadcast` and `cluster`."""

    name: str
    kind: str
    id: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """What of a user's account matters to a connection that is open. `valid_from` is in Unix seconds."""

    is_admin: bool
    valid_from: float


def parse_channel(name: str) -> Channel:
    """The channel of that name. Raises UnknownChannel."""
    if is_name(name):
        if name in (BROADCAST, CLUSTER):
            return Channel(name, name)
        if (ours := _OURS.fullmatch(name)) and int(ours[2]) <= _LARGEST_ID:
            return Channel(name, ours[1], int(ours[2]))
        if (foreign := _FOREIGN.fullmatch(name)) and foreign[1] not in _OUR_KINDS:
            return Channel(name, "foreign")
    raise UnknownChannel("There is no such channel. Names are like session:42, workspace:7, user:3 or broadcast.")


def decide_alone(identity: Identity, name: str, narrowed: Collection[str] | None = None) -> Channel | None:
    """Decide without the database: None when `identity` may subscribe, the channel when only the database can say.

    `narrowed` is what the short token was narrowed to (names or patterns; None: not at all); it never takes the user's
    own channel away. Raises UnknownChannel, NotVisible or Forbidden.
    """
    channel = parse_channel(name)
    if name == user_channel(identity.user_id):
        return None
    if not has_scope(identity, Scope.READ):
        raise Forbidden(f"This token lacks the scope {Scope.READ.value!r} that subscribing takes.")
    if narrowed is not None and not covers(narrowed, name):
        raise Forbidden("The short token was narrowed to other channels.")
    match channel.kind:
        case "session" | "workspace" | "deployment":
            return channel
        case "user":
            decide(identity, Action.USER_ADMIN_READ)
        case "cluster":
            decide(identity, Action.CLUSTER_READ)
        case "foreign":
            _decide_foreign(identity, name)
    return None


def _decide_foreign(identity: Identity, name: str) -> None:
    if covers(identity.channels, name):
        return
    if not (identity.is_admin and has_scope(identity, Scope.ADMIN)):
        raise Forbidden("This takes a token whose channels name it.")


async def may_subscribe(
    connection: Connection, identity: Identity, name: str, narrowed: Collection[str] | None = None
) -> None:
    """Return when `identity` may subscribe to the channel. Raises UnknownChannel, NotVisible or Forbidden."""
    refused = await refusals(connection, identity, [name], narrowed)
    if refused:
        raise refused[name]


def decide_all_alone(
    identity: Identity, names: Iterable[str], narrowed: Collection[str] | None = None
) -> tuple[dict[str, AuthError], list[str]]:
    """What can be decided of the channels without the database: those refused, with the reason, and those to ask it."""
    refused: dict[str, AuthError] = {}
    asked: list[str] = []
    for name in names:
        try:
            if decide_alone(identity, name, narrowed) is not None:
                asked.append(name)
        except AuthError as error:
            refused[name] = error
    return refused, asked


async def refusals(
    connection: Connection, identity: Identity, names: Iterable[str], narrowed: Collection[str] | None = None
) -> dict[str, AuthError]:
    """Those of the channels that `identity` may not subscribe to, each with the reason. At most one query a kind."""
    refused: dict[str, AuthError] = {}
    asked: defaultdict[str, list[Channel]] = defaultdict(list)
    for name in names:
        try:
            if channel := decide_alone(identity, name, narrowed):
                asked[channel.kind].append(channel)
        except AuthError as error:
            refused[name] = error
    for kind, channels in asked.items():
        rows = await connection.fetch(_ROLES[kind], identity.user_id, [channel.id for channel in channels])
        roles = {row["id"]: Role[row["role"].upper()] if row["role"] else None for row in rows}
        for channel in channels:
            try:
                if channel.id not in roles:
                    raise NotVisible(f"There is no such {kind}.")
                decide(identity, _READS[kind], roles[channel.id], what=kind)
            except AuthError as error:
                refused[channel.name] = error
    return refused


async def standing(connection: Connection, user_id: int) -> Standing | None:
    """What of the account matters to its open connections; None when it is deleted or disabled."""
    row = await connection.fetchrow(
        """SELECT is_admin, greatest(extract(epoch FROM tokens_valid_from), 0)::float8 AS valid_from
             FROM users WHERE id = $1 AND NOT is_disabled""",
        user_id,
    )
    return Standing(row["is_admin"], row["valid_from"]) if row else None


async def api_tokens_left(connection: Connection, user_id: int) -> set[str]:
    """The ids, as `Identity.token_id` gives them, of the API tokens that the user still has."""
    rows = await connection.fetch("SELECT id FROM api_tokens WHERE user_id = $1", user_id)
    return {f"api:{row['id']}" for row in rows}
