"""Tokens of an outside issuer, with real keys and a real JWK set; only the fetch over HTTP is the test's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import asyncpg
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from auth import accounts, api_tokens, passwords, refresh, tenants
from auth.errors import IssuerUnavailable, Unauthenticated
from auth.permissions import Role
from auth.tokens import Tokens, TokenSettings
from orchestrator.database import Pool
from tests.integration.auth.conftest import SECRET, MakeUser

ISSUER = "https://issuer.example.org"
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()
WEAK_KEY = rsa.generate_private_key(65537, 1024)  # noqa: S505  It must be refused.
KEYS = {"rsa": (RSA_KEY, "RS256"), "ec": (EC_KEY, "ES256"), "ed": (ED_KEY, "EdDSA")}


def jwk(algorithm: Any, key: Any, **more: str) -> dict[str, Any]:
    return algorithm.to_jwk(key, as_dict=True) | more


# What is refused for its looks is refused before the database is asked.
NO_DATABASE: Any = None


class Issuer:
    def __init__(self) -> None:
        self.urls: list[str] = []
        self.error: Exception | None = None
        self.document: Any = {
            "keys": [
                jwk(RSAAlgorithm, RSA_KEY.public_key(), kid="rsa", use="sig"),
                jwk(ECAlgorithm, EC_KEY.public_key(), kid="ec"),
                jwk(OKPAlgorithm, ED_KEY.public_key(), kid="ed", alg="EdDSA"),
                jwk(RSAAlgorithm, WEAK_KEY.public_key(), kid="weak"),
                jwk(RSAAlgorithm, RSA_KEY.public_key(), kid="encryption", use="enc"),
                jwk(RSAAlgorithm, RSA_KEY, kid="private"),
                jwk(HMACAlgorithm, SECRET, kid="secret"),
                jwk(RSAAlgorithm, RSA_KEY.public_key(), kid="pss", alg="PS256"),
                {"kid": "strange", "kty": "XYZ"},
                "nonsense",
            ]
        }

    async def fetch_json(self, url: str) -> Mapping[str, Any]:
        self.urls.append(url)
        if self.error is not None:
            raise self.error
        return self.document

    def token(self, kid: str = "rsa", key: Any = None, algorithm: str | None = None, **changes: object) -> str:
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": "us", "sub": "sub-1", "iat": now, "exp": now + 60, "email": "ann@example.org"}
        claims = {name: value for name, value in (claims | changes).items() if value is not None}
        default_key, default_algorithm = KEYS.get(kid, KEYS["rsa"])
        return jwt.encode(claims, key or default_key, algorithm or default_algorithm, {"kid": kid} if kid else None)


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
async def outside(issuer: Issuer) -> AsyncIterator[Tokens]:
    settings = TokenSettings(secret=SECRET, oidc_issuer=ISSUER, oidc_jwks_url=f"{ISSUER}/jwks", oidc_audience="us")
    tokens = Tokens(settings, issuer.fetch_json)
    yield tokens
    await tokens.close()


async def test_an_unknown_outside_user_gets_an_account_with_a_workspace(
    issuer: Issuer, outside: Tokens, connection: asyncpg.Connection
) -> None:
    token = issuer.token(name="Ann", jti="j1", scope="openid profile")
    made = await outside.authenticate(connection, token)
    known = await outside.authenticate(connection, token)
    assert made == known
    assert (made.email, made.is_admin, made.scopes, made.channels, made.token_id) == (
        "ann@example.org", False, None, (), "j1",
    )  # fmt: skip
    user = await accounts.get(connection, made.user_id)
    assert (user.external_id, user.name) == ("sub-1", "Ann")
    (workspace,), total = await tenants.list_for(connection, made, 1, 10)
    assert (total, workspace.personal_user_id, workspace.role) == (1, user.id, Role.OWNER)
    assert issuer.urls == [f"{ISSUER}/jwks"]


async def test_each_kind_of_key_that_an_issuer_may_use_is_believed(
    issuer: Issuer, outside: Tokens, connection: asyncpg.Connection
) -> None:
    users = {(await outside.authenticate(connection, issuer.token(kid))).user_id for kid in KEYS}
    assert len(users) == 1
    assert len(issuer.urls) == 1


async def test_concurrent_first_tokens_make_one_account(issuer: Issuer, outside: Tokens, pool: Pool) -> None:
    async def sign_in() -> int:
        async with pool.acquire() as connection:
            return (await outside.authenticate(connection, issuer.token())).user_id

    assert len(set(await asyncio.gather(*(sign_in() for _ in range(8))))) == 1
    async with pool.acquire() as connection:
        assert await connection.fetchval("SELECT count(*) FROM workspaces") == 1
    assert len(issuer.urls) == 1


async def test_our_own_tokens_do_not_ask_the_issuer(
    issuer: Issuer, outside: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    assert (await outside.authenticate(connection, outside.issue_main(user.id))).user_id == user.id
    assert issuer.urls == []


async def test_our_scopes_and_channels_narrow_and_widen_an_outside_token(
    issuer: Issuer, outside: Tokens, connection: asyncpg.Connection
) -> None:
    identity = await outside.authenticate(connection, issuer.token(scope="openid read", channels=["app:*"]))
    assert identity.scopes == frozenset({"read"})
    assert identity.channels == ("app:*",)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"aud": "someone-else"}, "The token is for another audience."),
        ({"aud": None}, "The token is malformed: it lacks the claim 'aud'."),
        ({"exp": int(time.time()) - 60}, "The token has expired."),
        ({"exp": None}, "The token is malformed: it lacks the claim 'exp'."),
        ({"sub": None}, "The token is malformed: it lacks the claim 'sub'."),
        ({"sub": ""}, "The token is malformed: its 'sub' must be 1 to 255 printable characters."),
        ({"sub": "a\x00b"}, "The token is malformed: its 'sub' must be 1 to 255 printable characters."),
        ({"sub": "x" * 256}, "The token is malformed: its 'sub' must be 1 to 255 printable characters."),
        ({"key": EC_KEY, "algorithm": "ES256"}, "The token is signed by an algorithm that is not accepted here."),
        (
            {"key": SECRET, "algorithm": "HS256"},
            "The token is signed by an algorithm that is not accepted here.",
        ),
        ({"key": rsa.generate_private_key(65537, 2048)}, "The token's signature is wrong."),
        ({"kid": "unknown"}, "The token is signed by a key that its issuer does not publish."),
        ({"kid": "secret", "key": SECRET, "algorithm": "HS256"},
         "The token is signed by a key that its issuer does not publish."),
        ({"kid": "private"}, "The token is signed by a key that its issuer does not publish."),
        ({"kid": "encryption"}, "The token is signed by a key that its issuer does not publish."),
        ({"kid": "pss", "algorithm": "PS256"}, "The token is signed by a key that its issuer does not publish."),
        ({"kid": ""}, "The token does not say which of its issuer's keys (kid) signed it."),
    ],
)  # fmt: skip
async def test_wrong_outside_tokens_are_refused_with_the_reason(
    issuer: Issuer, outside: Tokens, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await outside.authenticate(NO_DATABASE, issuer.token(**arguments))
    assert str(caught.value) == sentence


async def test_an_address_that_is_none_makes_no_account(
    issuer: Issuer, outside: Tokens, connection: asyncpg.Connection
) -> None:
    with pytest.raises(Unauthenticated, match="email is malformed"):
        await outside.authenticate(connection, issuer.token(email="no address"))
    assert await connection.fetchval("SELECT count(*) FROM users") == 0


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
async def test_a_weak_key_of_the_issuer_is_not_believed(issuer: Issuer, outside: Tokens) -> None:
    with pytest.raises(Unauthenticated, match="too weak"):
        await outside.authenticate(NO_DATABASE, issuer.token("weak", WEAK_KEY, "RS256"))


async def test_an_issuer_that_cannot_be_reached_is_said_to_be_so(issuer: Issuer, outside: Tokens) -> None:
    issuer.error = ConnectionRefusedError()
    with pytest.raises(IssuerUnavailable):
        await outside.authenticate(NO_DATABASE, issuer.token())


@pytest.mark.parametrize("document", [{}, {"keys": []}, {"keys": [{"kty": "XYZ"}]}, {"keys": 7}, [], None])
async def test_a_document_that_is_no_key_set_is_said_to_be_an_outage(
    issuer: Issuer, outside: Tokens, document: object
) -> None:
    issuer.document = document
    with pytest.raises(IssuerUnavailable):
        await outside.authenticate(NO_DATABASE, issuer.token())


async def test_withdrawn_and_disabled_outside_users_are_refused(
    issuer: Issuer, outside: Tokens, connection: asyncpg.Connection
) -> None:
    identity = await outside.authenticate(connection, issuer.token())
    await accounts.update(connection, identity.user_id, is_disabled=True)
    with pytest.raises(Unauthenticated, match="disabled"):
        await outside.authenticate(connection, issuer.token())
    await accounts.update(connection, identity.user_id, is_disabled=False)
    with pytest.raises(Unauthenticated, match="revoked"):
        await outside.authenticate(connection, issuer.token(iat=int(time.time()) - 5))
    with pytest.raises(Unauthenticated, match="revoked"):
        await outside.authenticate(connection, issuer.token(iat=None))


# Accounts that exist already


async def test_a_verified_address_links_the_local_account_and_ends_every_way_in_that_it_had(
    issuer: Issuer, outside: Tokens, pool: Pool, connection: asyncpg.Connection
) -> None:
    squatter = await accounts.register(connection, "Ann@Example.org", await passwords.hash("squatter's"), "Squatter")
    main = outside.issue_main(squatter.id)
    spare = await refresh.open_family(connection, squatter.id, 60)
    _, api_token = await api_tokens.create(connection, squatter.id, "spare", ["write"])
    await connection.execute("SELECT pg_sleep(1.1)")

    token = issuer.token(email_verified=True)
    identity = await outside.authenticate(connection, token)
    assert identity.user_id == squatter.id
    assert (await outside.authenticate(connection, token)).user_id == squatter.id
    with pytest.raises(Unauthenticated, match="revoked"):
        await outside.authenticate(connection, main)
    with pytest.raises(Unauthenticated, match="revoked"):
        await refresh.rotate(connection, spare, 60)
    with pytest.raises(Unauthenticated, match="not known"):
        await outside.authenticate(connection, api_token)
    with pytest.raises(Unauthenticated, match="email or the password"):
        await accounts.verify_login(pool, "ann@example.org", "squatter's")


async def test_an_administrator_keeps_the_password_when_linked(
    issuer: Issuer, outside: Tokens, pool: Pool, connection: asyncpg.Connection
) -> None:
    admin = await accounts.register(
        connection, "ann@example.org", await passwords.hash("long enough"), "Ann", is_admin=True
    )
    identity = await outside.authenticate(connection, issuer.token(email_verified=True))
    assert (identity.user_id, identity.is_admin) == (admin.id, True)
    assert (await accounts.verify_login(pool, "ann@example.org", "long enough")).external_id == "sub-1"


async def test_an_address_that_is_not_said_to_be_verified_links_nothing(
    issuer: Issuer, outside: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    for verified in (None, False, "true", 1):
        with pytest.raises(Unauthenticated, match="belongs to another account"):
            await outside.authenticate(connection, issuer.token(email_verified=verified))
    assert (await accounts.get(connection, user.id)).external_id is None


async def test_a_linked_account_is_not_linked_again(
    issuer: Issuer, outside: Tokens, connection: asyncpg.Connection
) -> None:
    await outside.authenticate(connection, issuer.token())
    with pytest.raises(Unauthenticated, match="belongs to another account"):
        await outside.authenticate(connection, issuer.token(sub="sub-2", email_verified=True))


async def test_a_disabled_account_stays_disabled_when_linked(
    issuer: Issuer, outside: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    await accounts.update(connection, user.id, is_disabled=True)
    with pytest.raises(Unauthenticated, match="disabled"):
        await outside.authenticate(connection, issuer.token(email_verified=True))


async def test_without_an_address_the_account_gets_one_that_cannot_exist(
    issuer: Issuer, outside: Tokens, connection: asyncpg.Connection
) -> None:
    for number, email in enumerate((None, "", 7)):
        token = issuer.token(email=email, sub="sub|" + "1" * 200 + str(number))
        assert (await outside.authenticate(connection, token)).email.endswith("@oidc.invalid")
