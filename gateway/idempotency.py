"""The header `Idempotency-Key`: a request that is sent again is answered again, and carried out once.

The key is claimed by a row in the transaction that does the work, so that a second request with the same key waits
for the first one's commit, and takes over when it was rolled back
(https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import orjson
from aiohttp import web

from gateway.operation import Call
from gateway.problems import Problem

HEADER = "Idempotency-Key"
_KEY = re.compile(r"[!-~]{1,255}")
PARAMETER = {
    "description": "A repeated request with the same key gets the first one's answer, for a day.",
    "schema": {"type": "string", "pattern": f"^{_KEY.pattern}$"},
}

# An answer is kept for a day; then the key may be used anew.
_CLAIM = """
    INSERT INTO idempotency_keys AS kept (user_id, key, request_hash, status, body) VALUES ($1, $2, $3, 0, '')
    ON CONFLICT (user_id, key) DO UPDATE
       SET request_hash = excluded.request_hash, status = 0, body = '', created_at = now()
     WHERE kept.created_at < now() - interval '1 day'
    RETURNING true"""


async def once(
    call: Call,
    perform: Callable[[], Awaitable[web.Response]],
    *,
    place: str | None = None,
    hidden: Collection[str] = (),
) -> web.Response:
    """The answer of `perform`, or, when this key has been answered, that answer. Within the caller's transaction.

    `place` is where what is made is found by its id, when that is not the address of the request. `hidden` are the keys
    of the answer that are shown once: they are kept nowhere, and null when the request is repeated. Raises Problem 422
    when the key came with another request, and 400 when it is malformed.
    """
    key = call.request.headers.get(HEADER)
    if key is None:
        return await perform()
    if not _KEY.fullmatch(key):
        raise Problem(400, f"{HEADER} must be 1 to 255 visible ASCII characters.")
    request = hashlib.sha256(f"{call.request.method} {call.request.path}\n".encode() + await call.request.read())
    user_id = call.identity.user_id
    if await call.connection.fetchval(_CLAIM, user_id, key, request.digest()):
        response = await perform()
        await call.connection.execute(
            "UPDATE idempotency_keys SET status = $3, body = $4 WHERE user_id = $1 AND key = $2",
            user_id, key, response.status, _without(response.body, hidden),
        )  # fmt: skip
        return response
    kept = await call.connection.fetchrow(
        "SELECT request_hash, status, body FROM idempotency_keys WHERE user_id = $1 AND key = $2", user_id, key
    )
    if kept["request_hash"] != request.digest():
        raise Problem(422, f"This {HEADER} was sent with another request.", errors={HEADER: ["Already used."]})
    headers = {"Cache-Control": "no-store", "Idempotency-Replayed": "true"}
    if kept["status"] == 201:
        headers["Location"] = f"{place or call.request.path}/{orjson.loads(kept['body'])['id']}"
    return web.Response(status=kept["status"], body=kept["body"], content_type="application/json", headers=headers)


def _without(body: Any, hidden: Collection[str]) -> bytes:
    return orjson.dumps(orjson.loads(body) | dict.fromkeys(hidden)) if hidden else bytes(body)
