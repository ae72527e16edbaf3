"""Main and short tokens: JWTs that are issued and believed here. The only module that knows `jwt`.

A main token says who somebody is, for an hour; a short token carries that to one connection of `/ws`, once, within a
minute. Their audiences differ, so that neither passes as the other. The algorithm is that of our key, never that of the
token (RFC 8725, 3.1): `none`, and a public key used as a secret, get nowhere. No message ever holds a token.

`Tokens.authenticate` takes what a bearer sends: a main token of ours, one of the outside issuer, or an API token.
"""

from __future__ import annotations

import binascii
import hashlib
import math
import secrets
import time
from base64 import urlsafe_b64decode
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from uuid import UUID

import asyncpg
import jwt
import orjson
import structlog
from jwt.algorithms import HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from auth import accounts, api_tokens, refresh
from auth.channels import check_patterns
from auth.claims import LATEST, Claims, ShortClaims, parse_outside, parse_own, parse_short
from auth.errors import Unacceptable, Unauthenticated
from auth.jwks import FetchJson, KeyCache
from auth.permissions import Identity, Scope
from auth.settings import TokenSettings

__all__ = ["ShortGrant", "TokenSettings", "Tokens", "purge"]

log = structlog.get_logger("tokens")

# Characters. A longer one is refused before anything in it is looked at.
LONGEST_TOKEN = 8 << 10
# What the outside issuer may sign with: nothing symmetric.
_OUTSIDE_ALGORITHMS = ("RS256", "ES256", "EdDSA")
# Seconds after its issue that a short token may open its stream of server-sent events again.
STREAM_LIFE = 86400.0
# Tokens whose signature need not be checked again: some 0.5 KiB each.
_REMEMBERED = 4096
_REFUSALS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.InvalidSignatureError, "The token's signature is wrong."),
    (jwt.InvalidAlgorithmError, "The token is signed by an algorithm that is not accepted here."),
    (jwt.InvalidKeyError, "The token's issuer publishes a key that is too weak or of the wrong kind."),
    (jwt.ExpiredSignatureError, "The token has expired."),
    (jwt.ImmatureSignatureError, "The token is not valid yet."),
    (jwt.InvalidAudienceError, "The token is for another audience."),
    (jwt.InvalidIssuerError, "The token is from another issuer."),
    (jwt.PyJWTError, "The token is malformed."),
)


@dataclass(frozen=True, slots=True)
class ShortGrant:
    """What a short token gave to the connection that redeemed it."""

    identity: Identity
    # What the connection may subscribe to at most; None: all that the identity may.
    channels: tuple[str, ...] | None
    # Unix seconds at which the main token behind it ends; None: it never does.
    expires_at: float | None
    # The user's `tokens_valid_from`, in Unix seconds, by which the token was good. Read later it might be of a
    # revocation that has made the token void.
    valid_from: float
    # The short token's own id; None: a main token was shown instead.
    jti: UUID | None = None


class _PreparedHmac(HMACAlgorithm):
    """HS256 for a key that was checked once: the library looks anew, at each use, whether it is a PEM, DER or JWK."""

    def prepare_key(self, key: str | bytes) -> bytes:
        return cast("bytes", key)


class Tokens:
    """Issues and checks tokens. Safe to use from all requests of one event loop; `close` it at the end."""

    def __init__(self, settings: TokenSettings, fetch_json: FetchJson | None = None) -> None:
        """`fetch_json` gets the JSON object at a URL, or raises anything; needed with an outside issuer only."""
        self._settings = settings
        self._short_audience = f"{settings.audience}/ws"
        self._signing_key, self._key, algorithm = _load_keys(settings)
        self._jws = jwt.PyJWS(algorithms=[])
        self._jws.register_algorithm(settings.algorithm, algorithm)
        self._own = jwt.PyJWT({"require": ["iss", "aud", "sub", "iat", "exp", "jti"], "strict_aud": True})
        self._outside = jwt.PyJWT({"require": ["aud", "sub", "exp"], "enforce_minimum_key_length": True})
        self._outside_keys: KeyCache[jwt.PyJWK] | None = None
        if settings.oidc_issuer and settings.oidc_jwks_url:
            if fetch_json is None:
                raise ValueError("an outside issuer is set, and nothing that could fetch its keys")
            self._outside_keys = KeyCache(settings.oidc_jwks_url, fetch_json, _parse_keys)
        self._verified: dict[bytes, Claims] = {}

    @property
    def settings(self) -> TokenSettings:
        """What it was made with."""
        return self._settings

    async def close(self) -> None:
        """End what runs in the background."""
        if self._outside_keys is not None:
            await self._outside_keys.close()

    def issue_main(
        self,
        user_id: int,
        *,
        scopes: Collection[str] | None = None,
        channels: Sequence[str] = (),
        expires_in: float | None = None,
        token_id: str | None = None,
    ) -> str:
        """A main token, good for `expires_in` seconds (`access_ttl`). `scopes` None: all that the user may.

        `channels` are patterns of foreign channels. Whether the bearer may have them is the caller's to have checked.
        `token_id` is its `jti` (see `announce_main`). Raises Unacceptable(field=…) for wrong values.
        """
        ttl = self._settings.access_ttl if expires_in is None else expires_in
        if not 0 < ttl < LATEST - time.time():
            raise Unacceptable(
                "A token must live for more than 0 seconds, and end before the year 10000.", field="expires"
            )
        claims = self._claims(self._settings.audience, user_id, ttl)
        if token_id is not None:
            claims["jti"] = token_id
        if scopes is not None:
            if unknown := sorted(set(scopes) - set(Scope)):
                raise Unacceptable(f"{unknown[0]!r} is no scope; the scopes are {', '.join(Scope)}.", field="scopes")
            claims["scope"] = " ".join(scope for scope in Scope if scope in scopes)
        if channels:
            claims["channels"] = check_patterns(channels)
        return self._sign(claims)

    def announce_main(self) -> refresh.Main:
        """The id of a main token that is about to be issued for `access_ttl`, and the end of all belief in it."""
        return refresh.Main(_new_id(), time.time() + self._settings.access_ttl + self._settings.leeway + 60)

    async def authenticate(self, connection: asyncpg.Connection, token: str) -> Identity:
        """Who sends the token. One query for a main token; more at the first of an outside user or use of an API token.

        Raises Unauthenticated, with a sentence that says what is wrong with the token, and IssuerUnavailable.
        """
        _check_form(token)
        if token.startswith(api_tokens.PREFIX):
            return await api_tokens.authenticate(connection, token)
        digest = hashlib.sha256(token.encode()).digest()
        claims = self._verified.get(digest)
        if claims is None:
            if self._outside_keys is not None and _unverified_issuer(token) == self._settings.oidc_issuer:
                return await self._authenticate_outside(connection, token, self._outside_keys)
            claims = self._remember(digest, self._decode(token, self._settings.audience))
        elif claims.expires_at <= time.time() - self._settings.leeway:
            del self._verified[digest]
            raise Unauthenticated("The token has expired.")
        row = await connection.fetchrow(
            """SELECT id, email, is_admin, is_disabled,
                      tokens_valid_from <= to_timestamp($2) AND NOT EXISTS (
                          SELECT FROM revoked_tokens WHERE user_id = $1 AND token_id = $3) AS is_current
                 FROM users WHERE id = $1""",
            int(claims.subject),
            claims.issued_at,
            claims.token_id,
        )
        return _identity(row, claims)

    def issue_short(self, identity: Identity, channels: Sequence[str] | None = None) -> str:
        """A short token for one connection of the identity, good for `short_ttl` seconds.

        `channels` narrows what it may subscribe to, and never widens it; None leaves it. Costs no query: what may have
        changed meanwhile is looked up when it is redeemed. Raises Unacceptable(field="channels") for too many.
        """
        claims = self._claims(self._short_audience, identity.user_id, self._settings.short_ttl)
        claims["main_jti"] = identity.token_id
        if identity.expires_at is not None:
            claims["main_exp"] = identity.expires_at
        if identity.scopes is not None:
            claims["scope"] = " ".join(identity.scopes)
        if identity.channels:
            claims["channels"] = identity.channels
        if channels is not None:
            claims["only"] = list(channels)
        return self._sign(claims)

    async def redeem_short(self, connection: asyncpg.Connection, token: str) -> ShortGrant:
        """Spend a short token, once over all gateways. One query, which must not be rolled back: call it outside of a
        transaction.

        Raises Unauthenticated: missing, malformed, expired, used, or the account or the token behind it is gone.
        """
        (answer,) = await self.redeem_many(connection, [self.read_short(token)])
        if isinstance(answer, Unauthenticated):
            raise answer
        return answer

    def read_short(self, token: str) -> ShortClaims:
        """What a short token says that was not spent yet, as far as this process knows. Raises Unauthenticated."""
        short = self._read_short(token)
        _require_fresh(short)
        return short

    async def redeem_many(
        self, connection: asyncpg.Connection, shorts: Sequence[ShortClaims]
    ) -> list[ShortGrant | Unauthenticated]:
        """Spend short tokens as `redeem_short` does, all in one query; the answer to each, in their order.

        Of two that are the same token, the first is believed.
        """
        first = {short.jti: place for place, short in reversed(list(enumerate(shorts)))}
        rows = await connection.fetch(
            # Always in the same order, so that two gateways which are shown the same tokens never wait for each other.
            """WITH asked AS (
                   SELECT * FROM unnest($1::uuid[], $2::float8[], $3::bigint[], $4::float8[], $5::bigint[], $6::text[])
                       AS a (jti, until, user_id, issued_at, api_token_id, main_jti)),
               spent AS (
                   INSERT INTO spent_short_tokens (jti, expires_at)
                   SELECT jti, to_timestamp(max(until)) FROM asked GROUP BY jti ORDER BY jti
                   ON CONFLICT DO NOTHING RETURNING jti)
               SELECT a.jti, u.id, u.email, u.is_admin, u.is_disabled,
                      greatest(extract(epoch FROM u.tokens_valid_from), 0)::float8 AS valid_from,
                      u.tokens_valid_from <= to_timestamp(a.issued_at) AND NOT EXISTS (
                          SELECT FROM revoked_tokens r WHERE r.user_id = a.user_id AND r.token_id = a.main_jti
                      ) AS is_current,
                      EXISTS (SELECT FROM spent s WHERE s.jti = a.jti) AS is_first_use,
                      a.api_token_id IS NULL
                          OR EXISTS (SELECT FROM api_tokens t WHERE t.id = a.api_token_id) AS is_kept
                 FROM asked a JOIN users u ON u.id = a.user_id""",
            [short.jti for short in shorts],
            # Each is believed until then and the leeway; a minute more for a database whose clock goes ahead.
            [short.claims.expires_at + self._settings.leeway + 60 for short in shorts],
            [int(short.claims.subject) for short in shorts],
            [short.claims.issued_at for short in shorts],
            [short.api_token_id for short in shorts],
            [short.main_jti for short in shorts],
        )
        found = {row["jti"]: row for row in rows}
        return [
            _answer(found.get(short.jti), short, is_first=first[short.jti] == place)
            for place, short in enumerate(shorts)
        ]

    async def redeem_stream(
        self, connection: asyncpg.Connection, token: str, address: str, *, comes_back: bool
    ) -> ShortGrant:
        """Spend a short token on a stream of server-sent events, which its client may open again.

        A browser comes back by itself, with the same URL. It may (`comes_back`: it says where it was) from the same
        `address`, as long as the main token behind it is good, at most for STREAM_LIFE, until `end_stream`. Otherwise
        as `redeem_short`; one that opened a WebSocket opens no stream, nor the other way round.
        """
        short = self._read_short(token, is_spent=comes_back)
        last = short.claims.issued_at + STREAM_LIFE
        if not comes_back:
            _require_fresh(short)
        elif last <= time.time():
            raise Unauthenticated("The short token has opened its stream for too long: get a new one.")
        row = await self._spend(connection, short, min(last, short.main_exp or last), address)
        if row is not None and row["is_first_use"]:
            _require_fresh(short)
        elif row is not None and not (comes_back and row["is_own_stream"]):
            raise Unauthenticated("The short token was used before: each opens one connection.")
        return _grant(row, short)

    async def end_stream(self, connection: asyncpg.Connection, jti: UUID) -> None:
        """Have the short token open its stream never again. Idempotent."""
        await connection.execute("UPDATE spent_short_tokens SET address = NULL WHERE jti = $1", jti)

    def _read_short(self, token: str, *, is_spent: bool = False) -> ShortClaims:
        _check_form(token)
        short = parse_short(self._decode(token, self._short_audience, may_be_expired=is_spent))
        if short.main_exp is not None and short.main_exp <= time.time() - self._settings.leeway:
            raise Unauthenticated("The main token behind this short token has expired.")
        return short

    async def _spend(
        self, connection: asyncpg.Connection, short: ShortClaims, until: float, address: str | None
    ) -> asyncpg.Record | None:
        return await connection.fetchrow(
            """WITH spent AS (
                   INSERT INTO spent_short_tokens (jti, expires_at, address) VALUES ($1, to_timestamp($2), $7)
                   ON CONFLICT DO NOTHING RETURNING jti)
               SELECT id, email, is_admin, is_disabled,
                      greatest(extract(epoch FROM tokens_valid_from), 0)::float8 AS valid_from,
                      tokens_valid_from <= to_timestamp($4) AND NOT EXISTS (
                          SELECT FROM revoked_tokens WHERE user_id = $3 AND token_id = $6) AS is_current,
                      EXISTS (SELECT FROM spent) AS is_first_use,
                      EXISTS (SELECT FROM spent_short_tokens WHERE jti = $1 AND address = $7) AS is_own_stream,
                      $5::bigint IS NULL OR EXISTS (SELECT FROM api_tokens WHERE id = $5) AS is_kept
                 FROM users WHERE id = $3""",
            short.jti,
            # It is believed until then and the leeway; a minute more for a database whose clock goes ahead.
            until + self._settings.leeway + 60,
            int(short.claims.subject),
            short.claims.issued_at,
            short.api_token_id,
            short.main_jti,
            address,
        )

    def _claims(self, audience: str, user_id: int, ttl: float) -> dict[str, Any]:
        now = time.time()
        return {
            "iss": self._settings.issuer,
            "aud": audience,
            "sub": str(user_id),
            # To the microsecond (RFC 7519 allows it): one issued right after all others were voided must be good.
            "iat": now,
            "nbf": int(now),
            "exp": math.ceil(now + ttl),
            "jti": _new_id(),
        }

    def _sign(self, claims: Mapping[str, Any]) -> str:
        try:
            payload = orjson.dumps(claims)
        except orjson.JSONEncodeError as error:
            raise Unacceptable("A channel's name must hold no lone surrogates.", field="channels") from error
        token = self._jws.encode(payload, self._signing_key, self._settings.algorithm)
        if len(token) > LONGEST_TOKEN:
            raise Unacceptable("A token cannot name so many channels.", field="channels")
        return token

    def _decode(self, token: str, audience: str, *, may_be_expired: bool = False) -> dict[str, Any]:
        try:
            return self._own.decode(
                token,
                self._key,
                algorithms=[self._settings.algorithm],
                options={"verify_exp": False} if may_be_expired else None,
                audience=audience,
                issuer=self._settings.issuer,
                leeway=self._settings.leeway,
            )
        except jwt.PyJWTError as error:
            raise _refusal(error) from error

    def _remember(self, digest: bytes, payload: dict[str, Any]) -> Claims:
        claims = parse_own(payload)
        if len(self._verified) >= _REMEMBERED:
            del self._verified[next(iter(self._verified))]
        self._verified[digest] = claims
        return claims

    async def _authenticate_outside(
        self, connection: asyncpg.Connection, token: str, keys: KeyCache[jwt.PyJWK]
    ) -> Identity:
        try:
            # The header's `kid` chooses among the issuer's keys; the key found says which algorithm it is for.
            key = await keys.find(jwt.get_unverified_header(token).get("kid"))
            payload = self._outside.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self._settings.oidc_audience,
                issuer=self._settings.oidc_issuer,
                leeway=self._settings.leeway,
            )
        except jwt.PyJWTError as error:
            raise _refusal(error) from error
        claims = parse_outside(payload)
        row = await connection.fetchrow(
            """SELECT id, email, is_admin, is_disabled,
                      tokens_valid_from <= to_timestamp($2) AND NOT EXISTS (
                          SELECT FROM revoked_tokens r WHERE r.user_id = users.id AND token_id = $3) AS is_current
                 FROM users WHERE external_id = $1""",
            claims.subject,
            claims.issued_at,
            claims.token_id,
        )
        if row is not None:
            return _identity(row, claims)
        user = await accounts.provision_oidc(
            connection,
            claims.subject,
            email=_text_or_none(payload.get("email")),
            email_verified=payload.get("email_verified") is True,
            name=_text_or_none(payload.get("name")),
            issued_at=claims.issued_at,
        )
        log.info("made or linked an account for an outside user", user_id=user.id)
        if user.is_disabled:
            raise Unauthenticated("This account is disabled: ask an administrator.")
        return Identity(
            user.id, user.email, user.is_admin, claims.scopes, claims.channels, claims.expires_at, claims.token_id
        )


async def purge(connection: asyncpg.Connection) -> int:
    """Forget the spent short tokens that nobody would believe any more; returns how many."""
    status: str = await connection.execute("DELETE FROM spent_short_tokens WHERE expires_at < now()")
    return int(status.rpartition(" ")[2])


def _new_id() -> str:
    # Read as a UUID; made without the detour over one, which takes twice as long.
    return secrets.token_hex(16)


def _load_keys(settings: TokenSettings) -> tuple[Any, jwt.PyJWK, Any]:
    """`(signing key, verification key bound to its algorithm, algorithm)`. Raises ValueError."""
    if settings.algorithm == "HS256":
        try:
            secret = HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(settings.secret)
        except jwt.InvalidKeyError:
            raise ValueError("the secret that signs tokens looks like a key: HS256 takes random characters") from None
        hmac = _PreparedHmac(HMACAlgorithm.SHA256)
        key = jwt.PyJWK.from_dict(HMACAlgorithm.to_jwk(secret, as_dict=True), "HS256")
        key.Algorithm = hmac
        return secret, key, hmac
    private, public = settings.load_keys()
    # The pair of keys goes with the algorithm, which the checker cannot see.
    algorithm: Any = OKPAlgorithm() if settings.algorithm == "EdDSA" else RSAAlgorithm(RSAAlgorithm.SHA256)
    jwk = algorithm.to_jwk(public, as_dict=True)
    return private, jwt.PyJWK.from_dict(jwk, settings.algorithm), algorithm


def _parse_keys(document: Mapping[str, Any]) -> dict[str, jwt.PyJWK]:
    """The keys of a JWK set that we can use, by id. Raises ValueError when there is none, others when it is no set."""
    keys: dict[str, jwt.PyJWK] = {}
    for number, entry in enumerate(document["keys"]):
        # A private or secret key has no business there, and one for encryption signs nothing.
        if not isinstance(entry, dict) or "d" in entry or "k" in entry or entry.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK.from_dict(entry)
        except jwt.PyJWTError as error:
            log.info("passed over a key of the outside issuer", number=number, error=type(error).__name__)
            continue
        if key.algorithm_name in _OUTSIDE_ALGORITHMS:
            keys[str(entry.get("kid", f"#{number}"))] = key
    if not keys:
        raise ValueError(f"it publishes no key for {', '.join(_OUTSIDE_ALGORITHMS)}")
    return keys


def _check_form(token: str) -> None:
    """Refuse what needs no parsing."""
    if not token:
        raise Unauthenticated("The token is missing.")
    if len(token) > LONGEST_TOKEN:
        raise Unauthenticated(f"The token is malformed: it is longer than {LONGEST_TOKEN} characters.")
    if not token.isascii():
        raise Unauthenticated("The token is malformed: it holds characters that no token has.")
    if token.startswith(refresh.PREFIX):
        raise Unauthenticated("This is a refresh token: swap it for a main token first.")


def _unverified_issuer(token: str) -> object:
    """What the token says its issuer is: which keys to check it by, and nothing more, is decided by this."""
    try:
        segment = token.split(".", 2)[1]
        payload = orjson.loads(urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    except (IndexError, binascii.Error, orjson.JSONDecodeError):
        return None
    return payload.get("iss") if isinstance(payload, dict) else None


def _refusal(error: jwt.PyJWTError) -> Unauthenticated:
    if isinstance(error, jwt.MissingRequiredClaimError):
        return Unauthenticated(f"The token is malformed: it lacks the claim {error.claim!r}.")
    return Unauthenticated(next(sentence for kind, sentence in _REFUSALS if isinstance(error, kind)))


def _require_fresh(short: ShortClaims) -> None:
    # No leeway here: its end is told to the second, and it is ours.
    if short.claims.expires_at <= time.time():
        raise Unauthenticated("The short token has expired: swap the main token for a new one.")


def _grant(row: asyncpg.Record | None, short: ShortClaims) -> ShortGrant:
    if row is not None and not row["is_kept"]:
        raise Unauthenticated("The API token behind this short token was revoked.")
    identity = replace(_identity(row, short.claims), token_id=short.main_jti, expires_at=short.main_exp)
    # A row that there is not has raised.
    valid_from = row["valid_from"] if row is not None else 0.0
    return ShortGrant(identity, short.only, short.main_exp, valid_from, short.jti)


def _answer(row: asyncpg.Record | None, short: ShortClaims, *, is_first: bool) -> ShortGrant | Unauthenticated:
    try:
        if row is not None and not (row["is_first_use"] and is_first):
            raise Unauthenticated("The short token was used before: each opens one connection.")
        return _grant(row, short)
    except Unauthenticated as error:
        return error


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _identity(row: asyncpg.Record | None, claims: Claims) -> Identity:
    """Who the token speaks for, by the row `(id, email, is_admin, is_disabled, is_current)`. Raises Unauthenticated."""
    if row is None:
        raise Unauthenticated("The token's user does not exist any more.")
    if row["is_disabled"]:
        raise Unauthenticated("This account is disabled: ask an administrator.")
    if not row["is_current"]:
        raise Unauthenticated("The token was revoked: sign in again.")
    return Identity(
        row["id"],
        row["email"],
        row["is_admin"],
        claims.scopes,
        claims.channels,
        claims.expires_at,
        claims.token_id,
    )
