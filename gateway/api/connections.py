"""Who is connected, over all replicas: on a channel for those who share it, all of it for administrators."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import chain
from typing import Any

from aiohttp import web
from marshmallow import Schema, ValidationError, fields, validates_schema

from auth import accounts, audit, revocation
from auth.claims import LONGEST_TOKEN_ID
from auth.permissions import Action, Scope, decide
from gateway.fields import Flag, Text, WholeInQuery, moment, object_id, object_id_in_query
from gateway.operation import Call, Database, PathKind, answer, lease, nothing, operation
from gateway.realtime import authorization, inquiries
from orchestrator import permissions_changed
from orchestrator.events import BROADCAST, MAX_NAME_LENGTH

_COMPLETE = {"description": "false: a replica that should be there has not answered."}


class PresentUser(Schema):
    """Somebody who listens to a channel."""

    id = fields.Integer(required=True)
    name = fields.String(required=True)
    connections = fields.Integer(required=True)
    since = moment(metadata={"description": "When the oldest of the connections was opened."})


class Presence(Schema):
    """Who listens to a channel now."""

    channel = fields.String(required=True)
    users = fields.List(
        fields.Nested(PresentUser),
        required=True,
        metadata={"description": f"At most {inquiries.MOST_USERS}, those first who have been there longest."},
    )
    complete = fields.Boolean(required=True, metadata=_COMPLETE)


class ConnectionsQuery(Schema):
    """Which connections."""

    user_id = object_id_in_query()
    channel = Text(most=MAX_NAME_LENGTH)
    limit = WholeInQuery(1, 500, load_default=100)


class Connection(Schema):
    """One open connection."""

    id = fields.String(required=True)
    replica = fields.String(required=True, metadata={"description": "The gateway that has it."})
    user_id = fields.Integer(required=True)
    token_id = fields.String(required=True, metadata={"description": "Revokes the token behind it; may be empty."})
    transport = fields.String(required=True, metadata={"description": "websocket, sse or logs"})
    address = fields.String(required=True)
    since = moment()
    channel_count = fields.Integer(required=True)
    channels = fields.List(
        fields.String(), required=True, metadata={"description": f"The first {inquiries.MOST_CHANNELS}."}
    )
    unsent_bytes = fields.Integer(required=True)


class Connections(Schema):
    """The newest connections, of `total` that there are."""

    items = fields.List(fields.Nested(Connection), required=True)
    total = fields.Integer(required=True)
    complete = fields.Boolean(required=True, metadata=_COMPLETE)


class Disconnect(Schema):
    """Whose connections are to be closed: all of a user's, or one."""

    user_id = object_id()
    connection_id = Text(most=64)

    @validates_schema
    def _one_of_two(self, data: dict[str, Any], **_: Any) -> None:
        if ("user_id" in data) == ("connection_id" in data):
            raise ValidationError("Give either user_id or connection_id.", "user_id")


class Disconnected(Schema):
    """What became of it."""

    disconnected = fields.Integer(required=True, metadata={"description": "How many connections were closed."})
    complete = fields.Boolean(required=True, metadata=_COMPLETE)


class Revocation(Schema):
    """Which tokens are to be void: all that a user was issued until now, or one."""

    user_id = object_id(required=True)
    token_id = Text(
        most=LONGEST_TOKEN_ID,
        metadata={
            "description": "The `jti` of a main token, which ends with the sign-in that it came from, or `api:{id}`. "
            "Without it all of the user's tokens are void."
        },
    )
    keep_api_tokens = Flag(
        load_default=False, metadata={"description": "Without `token_id`: whether personal API tokens stay good."}
    )


@operation(
    "See who listens to a channel",
    tag="connections",
    path={"channel": PathKind.CHANNEL},
    answers={200: Presence},
    database=Database.NONE,
)
async def presence(call: Call) -> web.Response:
    """For those who may subscribe to the channel; that of `broadcast`, which all share, for administrators."""
    channel = call.path["channel"]
    async with lease(call.context) as connection:
        await authorization.may_subscribe(connection, call.identity, channel)
    if channel == BROADCAST:
        decide(call.identity, Action.BROADCAST_PRESENCE)
    answers = await call.context.replicas.ask(inquiries.PRESENCE, {"channel": channel})
    users = inquiries.longest(chain.from_iterable(answers.by_replica.values()))
    async with lease(call.context) as connection:
        names = await accounts.names(connection, [user_id for user_id, _, _ in users])
    return answer(
        {
            "channel": channel,
            "users": [
                {"id": user_id, "name": names[user_id], "connections": count, "since": _moment(since)}
                for user_id, count, since in users
                # Who was deleted this moment is gone.
                if user_id in names
            ],
            "complete": answers.complete,
        }
    )


@operation(
    "List open connections",
    tag="connections",
    query=ConnectionsQuery,
    answers={200: Connections},
    database=Database.NONE,
    scope=Scope.ADMIN,
)
async def list_connections(call: Call) -> web.Response:
    """For administrators: of all replicas, the newest first."""
    decide(call.identity, Action.CONNECTION_READ)
    answers = await call.context.replicas.ask(inquiries.CONNECTIONS, call.query)
    found = [
        {**one, "replica": replica, "since": _moment(one["since"])}
        for replica, told in answers.by_replica.items()
        for one in told["items"]
    ]
    found.sort(key=lambda one: one["since"], reverse=True)
    total = sum(told["total"] for told in answers.by_replica.values())
    return answer({"items": found[: call.query["limit"]], "total": total, "complete": answers.complete})


@operation(
    "Close connections",
    tag="connections",
    body=Disconnect,
    answers={200: Disconnected},
    database=Database.NONE,
    scope=Scope.ADMIN,
)
async def disconnect(call: Call) -> web.Response:
    """For administrators: all of a user's connections or one, whichever replicas have them, with 4503.

    The client is told not to come back by itself; it may, as long as its token is good: see `revoke`.
    """
    decide(call.identity, Action.CONNECTION_CLOSE)
    # The schema leaves one.
    ((kind, which),) = call.body.items()
    async with lease(call.context) as connection:
        await audit.record(
            connection,
            call.identity.user_id,
            "connection.close",
            f"{kind.removesuffix('_id')}:{which}",
            call.address,
        )
    answers = await call.context.replicas.ask(inquiries.DISCONNECT, call.body)
    return answer({"disconnected": sum(answers.by_replica.values()), "complete": answers.complete})


@operation(
    "Revoke tokens",
    tag="connections",
    body=Revocation,
    answers={204: None},
    database=Database.WRITE,
    scope=Scope.ADMIN,
)
async def revoke(call: Call) -> web.Response:
    """For administrators. REST refuses the tokens at once; the connections that they opened are closed with 4500 within
    a second, at every replica. Short and refresh tokens go with the main tokens that they belong to.
    """
    decide(call.identity, Action.TOKEN_REVOKE)
    user_id, token_id = call.body["user_id"], call.body.get("token_id")
    if token_id is None:
        await revocation.revoke_all(call.connection, user_id, with_api_tokens=not call.body["keep_api_tokens"])
    else:
        await revocation.revoke_token(call.connection, user_id, token_id)
    await permissions_changed.tell(call.connection, user_id)
    await audit.record(
        call.connection,
        call.identity.user_id,
        "token.revoke",
        f"user:{user_id}",
        call.address,
        token_id=token_id,
        keep_api_tokens=call.body["keep_api_tokens"],
    )
    return nothing()


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
