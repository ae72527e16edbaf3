"""Personal API tokens: for scripts, named, scoped, perhaps expiring. The secret is shown once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web
from marshmallow import Schema, fields, validate

from auth import api_tokens, audit
from auth.permissions import Scope
from gateway.fields import Text, moment
from gateway.operation import Call, Database, PathKind, answer, nothing, operation
from orchestrator import permissions_changed
from orchestrator.errors import Invalid

_LONGEST = timedelta(days=3653)


class NewApiToken(Schema):
    """A token to be made. Nobody hands out more than the token of the request holds."""

    name = Text(required=True)
    scopes = fields.List(
        fields.String(validate=validate.OneOf([scope.value for scope in Scope])),
        required=True,
        validate=validate.Length(1, 3),
    )
    channels = fields.List(Text(), load_default=list, validate=validate.Length(max=128))
    expires_at = fields.AwareDateTime(
        default_timezone=UTC, allow_none=True, load_default=None, metadata={"description": "null: never."}
    )


class ApiToken(Schema):
    """A token, without its secret."""

    id = fields.Integer(required=True)
    name = fields.String(required=True)
    scopes = fields.List(fields.String(), required=True)
    channels = fields.List(fields.String(), required=True)
    created_at = moment()
    expires_at = moment(allow_none=True)
    last_used_at = moment(allow_none=True)


class MadeApiToken(ApiToken):
    """A token that was just made, with its secret, which cannot be had again."""

    token = fields.String(required=True)


class ApiTokens(Schema):
    """All the tokens of the caller."""

    items = fields.List(fields.Nested(ApiToken), required=True)


def _public(token: api_tokens.ApiToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "name": token.name,
        "scopes": token.scopes,
        "channels": token.channels,
        "created_at": token.created_at,
        "expires_at": token.expires_at,
        "last_used_at": token.last_used_at,
    }


@operation("List one's API tokens", tag="tokens", answers={200: ApiTokens})
async def list_tokens(call: Call) -> web.Response:
    """Newest first, expired ones included."""
    tokens = await api_tokens.list_for(call.connection, call.identity.user_id)
    return answer({"items": [_public(token) for token in tokens]})


@operation("Make an API token", tag="tokens", body=NewApiToken, answers={201: MadeApiToken}, database=Database.WRITE)
async def create(call: Call) -> web.Response:
    """The only answer that has the secret. One made with a token of limited scopes ends with that, at the latest."""
    body, identity = call.body, call.identity
    expires_at: datetime | None = body["expires_at"]
    now = datetime.now(UTC)
    if expires_at is not None and not now < expires_at < now + _LONGEST:
        raise Invalid("expires_at must lie in the future, at most ten years from now.", field="expires_at")
    if identity.scopes is not None and identity.expires_at is not None:
        # A limited token is lent for a time: what it makes must not outlive it.
        end = datetime.fromtimestamp(identity.expires_at, UTC)
        expires_at = min(expires_at, end) if expires_at else end
    token, secret = await api_tokens.create(
        call.connection, identity.user_id, body["name"], body["scopes"], body["channels"], expires_at, by=identity
    )
    await audit.record(
        call.connection, identity.user_id, "token.create", f"api-token:{token.id}", call.address, scopes=token.scopes
    )
    return answer({**_public(token), "token": secret}, 201, location=f"/api/v1/tokens/{token.id}")


@operation(
    "Revoke an API token",
    tag="tokens",
    path={"token_id": PathKind.ID},
    answers={204: None},
    database=Database.WRITE,
)
async def delete(call: Call) -> web.Response:
    """It stops working at once, and the sockets that it opened are closed."""
    token_id = call.path["token_id"]
    await api_tokens.delete(call.connection, call.identity.user_id, token_id)
    await permissions_changed.tell(call.connection, call.identity.user_id)
    await audit.record(call.connection, call.identity.user_id, "token.delete", f"api-token:{token_id}", call.address)
    return nothing()
