"""The claims of a token whose signature holds: pure functions that give them the types they must have.

Each raises Unauthenticated, naming the claim, for a value of the wrong type: who holds a key may still sign nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from auth.errors import Unauthenticated
from auth.permissions import Scope

# 9999-12-31: what comes later is no moment that PostgreSQL's and Python's clocks both know.
LATEST = 253402300799
_ID = re.compile(r"[1-9][0-9]{0,18}")
_LARGEST_ID = 2**63 - 1
# How `Identity.token_id` begins for an API token.
API_PREFIX = "api:"
# Characters of a `jti`. One that is longer, or cannot be stored, names no token that could be revoked.
LONGEST_TOKEN_ID = 200


@dataclass(frozen=True, slots=True)
class Claims:
    """A believed token's claims, of the types that they must have. Times are Unix seconds."""

    subject: str
    issued_at: float
    expires_at: float
    token_id: str
    scopes: frozenset[str] | None
    channels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShortClaims:
    """A short token's claims: those that every token has, and what it says of the main token behind it."""

    claims: Claims
    jti: UUID
    main_jti: str
    main_exp: float | None
    api_token_id: int | None
    only: tuple[str, ...] | None


def parse_own(payload: Mapping[str, Any]) -> Claims:
    """The claims of a main or short token of ours, of which the library has seen that all are there."""
    subject = payload["sub"]
    if not _is_id(subject):
        raise Unauthenticated("The token is malformed: its 'sub' is no user.")
    return Claims(
        subject=subject,
        issued_at=_moment(payload, "iat"),
        expires_at=_moment(payload, "exp"),
        token_id=_token_id(payload["jti"]),
        scopes=_scopes(payload),
        channels=_texts(payload, "channels"),
    )


def parse_outside(payload: Mapping[str, Any]) -> Claims:
    """The claims of a token of the outside issuer, which owes us no `iat` and no `jti`."""
    subject: str = payload["sub"]
    if not 0 < len(subject) <= 255 or not subject.isprintable():
        raise Unauthenticated("The token is malformed: its 'sub' must be 1 to 255 printable characters.")
    # The issuer's scopes are about itself (`openid profile`); where ours are among them they narrow, as in our tokens.
    named = (_scopes(payload) or frozenset()) & frozenset(Scope)
    return Claims(
        subject=subject,
        # Without one (RFC 7519 does not ask for it) nothing shows that it is newer than a withdrawal.
        issued_at=_moment(payload, "iat") if "iat" in payload else 0.0,
        expires_at=_moment(payload, "exp"),
        token_id=token_id if _is_token_id(token_id := str(payload.get("jti", ""))) else "",
        scopes=named or None,
        channels=_texts(payload, "channels"),
    )


def parse_short(payload: Mapping[str, Any]) -> ShortClaims:
    """The claims of a short token."""
    claims = parse_own(payload)
    main_jti = payload.get("main_jti", "")
    if not isinstance(main_jti, str):
        raise Unauthenticated("The token is malformed: its 'main_jti' is no text.")
    if main_jti and not _is_token_id(main_jti):
        raise Unauthenticated("The token is malformed: its 'main_jti' names no token.")
    by_api_token = main_jti.startswith(API_PREFIX)
    if by_api_token and api_token_id(main_jti) is None:
        raise Unauthenticated("The token is malformed: its 'main_jti' is no API token.")
    try:
        jti = UUID(claims.token_id)
    except ValueError as error:
        raise Unauthenticated("The token is malformed: its 'jti' is no UUID.") from error
    return ShortClaims(
        claims=claims,
        jti=jti,
        main_jti=main_jti,
        main_exp=_moment(payload, "main_exp") if "main_exp" in payload else None,
        api_token_id=api_token_id(main_jti) if by_api_token else None,
        only=_texts(payload, "only") if "only" in payload else None,
    )


def api_token_id(token_id: str) -> int | None:
    """The number in the `Identity.token_id` of an API token; None when it is none."""
    number = token_id.removeprefix(API_PREFIX)
    return int(number) if token_id.startswith(API_PREFIX) and _is_id(number) else None


def _token_id(jti: str) -> str:
    if not _is_token_id(jti):
        raise Unauthenticated("The token is malformed: its 'jti' names no token.")
    return jti


def _is_token_id(text: str) -> bool:
    return 0 < len(text) <= LONGEST_TOKEN_ID and text.isprintable()


def _is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None and int(text) <= _LARGEST_ID


def _moment(payload: Mapping[str, Any], claim: str) -> float:
    value = payload[claim]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LATEST:
        raise Unauthenticated(f"The token is malformed: its {claim!r} is no moment.")
    return float(value)


def _scopes(payload: Mapping[str, Any]) -> frozenset[str] | None:
    scope = payload.get("scope")
    if scope is None:
        return None
    if not isinstance(scope, str):
        raise Unauthenticated("The token is malformed: its 'scope' is no text.")
    return frozenset(scope.split())


def _texts(payload: Mapping[str, Any], claim: str) -> tuple[str, ...]:
    values = payload.get(claim, ())
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise Unauthenticated(f"The token is malformed: its {claim!r} is no list of texts.")
    return tuple(values)
