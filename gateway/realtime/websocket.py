"""`GET /ws`: the handshake, and the handing over of the connection after it."""

from __future__ import annotations

from aiohttp import web

from auth.errors import Unauthenticated
from gateway.context import CONTEXT
from gateway.problems import Problem
from gateway.realtime import admission, protocol, upgrade
from gateway.realtime.connection import Connection
from gateway.realtime.stream import Stream


async def handle(request: web.Request) -> web.StreamResponse:
    """Answer a handshake; the connection goes on without this handler.

    Raises Problem, auth.errors or what is in `orchestrator.database.UNAVAILABLE` on a handshake that is refused.
    """
    context = request.app[CONTEXT]
    admission.require_way_in(request)
    upgrade.require_handshake(request)
    token = _token(request)
    generation = context.hub.generation
    grant = await context.redemptions.redeem(token)
    admitted = await admission.admit_bearer(request, grant, generation)
    try:
        answer = await upgrade.accept(request)
        transport, early = upgrade.take_over(request)
    except ConnectionError:
        context.hub.leave(admitted.grant.identity.user_id)
        raise Problem(400, "The connection was lost during the handshake.") from None
    except BaseException:
        context.hub.leave(admitted.grant.identity.user_id)
        raise
    connection = Connection(transport=transport, batch=request.query.get("batch") == "1", **admitted.fields(request))
    stream = Stream(context, connection)
    admission.begin(context, connection, stream, admitted.generation, request.query.get("since"))
    if early:
        stream.data_received(early)
    return answer


def _token(request: web.Request) -> str:
    """The short token, from the subprotocols or the query."""
    offered = ",".join(request.headers.getall("Sec-WebSocket-Protocol", ()))
    names = (name.strip() for name in offered.split(","))
    bearer = next((name.removeprefix(protocol.BEARER) for name in names if name.startswith(protocol.BEARER)), None)
    token = bearer or request.query.get("token")
    if not token:
        raise Unauthenticated("The short token is missing: pass ?token= or the subprotocol bearer.{short_token}.")
    return token
