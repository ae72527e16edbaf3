from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from auth import accounts, api_tokens
from auth import tokens as tokens_module
from auth.errors import Unacceptable, Unauthenticated
from auth.permissions import Identity, Scope
from auth.tokens import Tokens, TokenSettings
from orchestrator.database import Pool
from tests.integration.auth.conftest import SECRET, MakeUser

PKCS8 = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
SPKI = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
RSA_KEY = rsa.generate_private_key(65537, 2048)
RSA_PEM = RSA_KEY.private_bytes(*PKCS8).decode()
RSA_PUBLIC_PEM = RSA_KEY.public_key().public_bytes(*SPKI).decode()
ED_PEM = ed25519.Ed25519PrivateKey.generate().private_bytes(*PKCS8).decode()


def claims(**changes: object) -> dict[str, object]:
    now = int(time.time())
    made = {
        "iss": "cluster-code",
        "aud": "cluster-code",
        "sub": "1",
        "iat": now,
        "nbf": now,
        "exp": now + 60,
        "jti": str(uuid4()),
    } | changes
    return {name: value for name, value in made.items() if value is not ...}


def signed(key: object = SECRET, algorithm: str = "HS256", **changes: object) -> str:
    return jwt.encode(claims(**changes), key, algorithm)


def segment(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


# What is refused for its looks is refused before the database is asked: tests that pass this show it.
NO_DATABASE: Any = None


async def refusal(tokens: Tokens, connection: asyncpg.Connection, token: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await tokens.authenticate(connection, token)
    if token:
        assert token not in str(caught.value)
    return str(caught.value)


ISSUER = "https://issuer.example.org"
ALL_SETTINGS = [
    TokenSettings(secret=SECRET),
    TokenSettings(algorithm="EdDSA", private_key=ED_PEM),
    TokenSettings(algorithm="RS256", private_key=RSA_PEM, public_key=RSA_PUBLIC_PEM),
]


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=lambda settings: settings.algorithm)
async def test_a_main_token_says_who_its_user_is(
    settings: TokenSettings, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    tokens = Tokens(settings)
    user = await make_user(is_admin=True)
    before = time.time()
    token = tokens.issue_main(user.id, scopes=["write", "read"], channels=["app:*"], expires_in=120)
    for _ in range(2):
        identity = await tokens.authenticate(connection, token)
        assert identity == Identity(
            user_id=user.id,
            email="ann@example.org",
            is_admin=True,
            scopes=frozenset({"read", "write"}),
            channels=("app:*",),
            expires_at=identity.expires_at,
            token_id=identity.token_id,
        )
        assert identity.token_id
        assert identity.expires_at is not None
        assert before + 120 <= identity.expires_at <= time.time() + 121
    assert jwt.get_unverified_header(token)["alg"] == settings.algorithm
    assert tokens.settings is settings
    await tokens.close()


async def test_a_main_token_without_scopes_may_do_all_and_lives_an_hour(
    tokens: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    identity = await tokens.authenticate(connection, tokens.issue_main(user.id))
    assert identity.scopes is None
    assert identity.channels == ()
    assert identity.expires_at is not None
    assert 3599 < identity.expires_at - time.time() <= 3601


async def test_an_empty_scope_is_not_all(tokens: Tokens, connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    identity = await tokens.authenticate(connection, tokens.issue_main(user.id, scopes=[]))
    assert identity.scopes == frozenset()


async def test_a_main_token_costs_one_query(
    tokens: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    token = tokens.issue_main(user.id)
    queries: list[str] = []
    with connection.query_logger(lambda record: queries.append(record.query)):
        identity = await tokens.authenticate(connection, token)
        tokens.issue_short(identity)
        # The logger is called in the next turn of the loop.
        await asyncio.sleep(0)
    assert len(queries) == 1


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("", "The token is missing."),
        ("x" * 9000, "The token is malformed: it is longer than 8192 characters."),
        ("caf\u00e9", "The token is malformed: it holds characters that no token has."),
        ("\ud800.a.b", "The token is malformed: it holds characters that no token has."),
        ("garbage", "The token is malformed."),
        ("a.b.c", "The token is malformed."),
        ("ccr_" + "x" * 43, "This is a refresh token: swap it for a main token first."),
        ("cca_short", "The API token is malformed."),
    ],
)
async def test_what_is_no_token_is_refused_with_the_reason(tokens: Tokens, token: str, sentence: str) -> None:
    assert await refusal(tokens, NO_DATABASE, token) == sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"exp": int(time.time()) - 60}, "The token has expired."),
        ({"nbf": int(time.time()) + 3600}, "The token is not valid yet."),
        ({"iat": int(time.time()) + 3600}, "The token is not valid yet."),
        ({"aud": "someone-else"}, "The token is for another audience."),
        ({"aud": "cluster-code/ws"}, "The token is for another audience."),
        ({"aud": ["cluster-code", "someone-else"]}, "The token is for another audience."),
        ({"iss": "someone-else"}, "The token is from another issuer."),
        ({"sub": "0"}, "The token is malformed: its 'sub' is no user."),
        ({"sub": "-1"}, "The token is malformed: its 'sub' is no user."),
        ({"sub": "9223372036854775808"}, "The token is malformed: its 'sub' is no user."),
        ({"sub": "1; DROP TABLE users"}, "The token is malformed: its 'sub' is no user."),
        ({"sub": 1}, "The token is malformed."),
        ({"iat": -1e300}, "The token is malformed: its 'iat' is no moment."),
        ({"iat": True}, "The token is malformed: its 'iat' is no moment."),
        ({"iat": "12"}, "The token is malformed: its 'iat' is no moment."),
        ({"exp": 1e300}, "The token is malformed: its 'exp' is no moment."),
        ({"exp": 10**400}, "The token is malformed: its 'exp' is no moment."),
        ({"exp": "soon"}, "The token is malformed."),
        ({"jti": 7}, "The token is malformed."),
        ({"scope": ["read"]}, "The token is malformed: its 'scope' is no text."),
        ({"channels": "app:*"}, "The token is malformed: its 'channels' is no list of texts."),
        ({"channels": [1]}, "The token is malformed: its 'channels' is no list of texts."),
        *(
            ({name: ...}, f"The token is malformed: it lacks the claim {name!r}.")
            for name in ("iss", "aud", "sub", "iat", "exp", "jti")
        ),
    ],
)
async def test_wrong_claims_under_a_right_signature_are_refused_with_the_reason(
    tokens: Tokens, changes: dict[str, object], sentence: str
) -> None:
    assert await refusal(tokens, NO_DATABASE, signed(**changes)) == sentence


async def test_tokens_of_nobody_are_refused(tokens: Tokens, connection: asyncpg.Connection) -> None:
    for sub in ("7", "9223372036854775807"):
        assert await refusal(tokens, connection, signed(sub=sub)) == "The token's user does not exist any more."
    assert await refusal(tokens, connection, "cca_" + "x" * 43) == (
        "The API token is not known: it was revoked, or never issued."
    )


async def test_within_the_leeway_a_clock_may_differ(
    tokens: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    now = int(time.time())
    for changes in ({"exp": now - 3}, {"nbf": now + 5, "iat": now + 5}):
        identity = await tokens.authenticate(connection, signed(sub=str(user.id), **changes))
        assert identity.user_id == user.id


async def test_a_token_that_was_believed_before_expires_all_the_same(
    connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    tokens = Tokens(TokenSettings(secret=SECRET, leeway=0))
    token = signed(sub=str(user.id), exp=int(time.time()) + 2)
    ends_at = (await tokens.authenticate(connection, token)).expires_at
    assert ends_at is not None
    async with asyncio.timeout(5):
        while time.time() <= ends_at:
            await connection.execute("SELECT pg_sleep(0.05)")
    assert await refusal(tokens, connection, token) == "The token has expired."
    assert await refusal(tokens, connection, token) == "The token has expired."


async def test_forged_tokens_are_refused(tokens: Tokens) -> None:
    good = tokens.issue_main(1)
    header, payload, signature = good.split(".")
    unsigned = segment({"typ": "JWT", "alg": "none"})
    wrong_algorithm = "The token is signed by an algorithm that is not accepted here."
    assert await refusal(tokens, NO_DATABASE, f"{unsigned}.{payload}.") == wrong_algorithm
    assert await refusal(tokens, NO_DATABASE, f"{unsigned}.{payload}.{signature}") == wrong_algorithm
    assert await refusal(tokens, NO_DATABASE, signed(SECRET * 2, "HS384")) == wrong_algorithm
    assert await refusal(tokens, NO_DATABASE, signed(RSA_PEM, "RS256")) == wrong_algorithm
    assert await refusal(tokens, NO_DATABASE, signed("another-secret-of-32-bytes-or-more")) == (
        "The token's signature is wrong."
    )
    other = segment(claims(exp=int(time.time()) + 10**6))
    assert await refusal(tokens, NO_DATABASE, f"{header}.{other}.{signature}") == "The token's signature is wrong."
    for strange in ([], {}, ["HS256"], 7, None):
        assert (
            await refusal(tokens, NO_DATABASE, f"{segment({'alg': strange})}.{payload}.{signature}") == wrong_algorithm
        )


async def test_a_public_key_is_no_secret() -> None:
    tokens = Tokens(TokenSettings(algorithm="RS256", private_key=RSA_PEM))
    unsigned = f"{segment({'typ': 'JWT', 'alg': 'HS256'})}.{segment(claims())}"
    hmac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    signature = base64.urlsafe_b64encode(hmac.sign(unsigned.encode(), RSA_PUBLIC_PEM.encode())).rstrip(b"=").decode()
    assert await refusal(tokens, NO_DATABASE, f"{unsigned}.{signature}") == (
        "The token is signed by an algorithm that is not accepted here."
    )


async def test_a_token_ends_with_its_user_and_with_the_users_rights(
    tokens: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    token = tokens.issue_main(user.id)
    await accounts.update(connection, user.id, is_disabled=True)
    assert await refusal(tokens, connection, token) == "This account is disabled: ask an administrator."
    await accounts.update(connection, user.id, is_disabled=False)
    assert await refusal(tokens, connection, token) == "The token was revoked: sign in again."
    token = tokens.issue_main(user.id)
    assert (await tokens.authenticate(connection, token)).user_id == user.id
    await accounts.delete(connection, user.id)
    assert await refusal(tokens, connection, token) == "The token's user does not exist any more."


async def test_the_tokens_whose_signature_was_checked_are_bounded(
    tokens: Tokens, connection: asyncpg.Connection, make_user: MakeUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "_REMEMBERED", 3)
    user = await make_user()
    for _ in range(10):
        await tokens.authenticate(connection, tokens.issue_main(user.id))
    assert len(tokens._verified) == 3


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"expires_in": 0}, "expires"),
        ({"expires_in": 1e300}, "expires"),
        ({"expires_in": float("nan")}, "expires"),
        ({"scopes": ["read", "root"]}, "scopes"),
        ({"channels": ["app"]}, "channels"),
        ({"channels": ["app:*x"]}, "channels"),
        ({"channels": ["app:\ud800"]}, "channels"),
        ({"channels": ["a:b"] * 200}, "channels"),
        ({"channels": ["app:" + "x" * 130] * 128}, "channels"),
    ],
)
def test_a_main_token_with_nonsense_is_not_issued(tokens: Tokens, arguments: dict[str, object], field: str) -> None:
    with pytest.raises(Unacceptable) as caught:
        tokens.issue_main(1, **arguments)
    assert caught.value.field == field


# Short tokens


async def test_a_short_token_opens_one_connection_and_carries_the_main_token(
    tokens: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    main = tokens.issue_main(user.id, scopes=[Scope.READ], channels=["app:*"])
    identity = await tokens.authenticate(connection, main)
    short = tokens.issue_short(identity, ["session:1"])
    assert await refusal(tokens, connection, short) == "The token is for another audience."
    grant = await tokens.redeem_short(connection, short)
    assert grant.identity == identity
    assert grant.channels == ("session:1",)
    assert grant.expires_at == identity.expires_at
    with pytest.raises(Unauthenticated, match="used before"):
        await tokens.redeem_short(connection, short)
    with pytest.raises(Unauthenticated, match="another audience"):
        await tokens.redeem_short(connection, main)
    with pytest.raises(Unauthenticated, match="missing"):
        await tokens.redeem_short(connection, "")
    assert (await tokens.redeem_short(connection, tokens.issue_short(identity))).channels is None
    assert (await tokens.redeem_short(connection, tokens.issue_short(identity, []))).channels == ()


async def test_of_concurrent_uses_of_a_short_token_at_two_gateways_one_wins(
    settings: TokenSettings, pool: Pool, make_user: MakeUser
) -> None:
    user = await make_user()
    gateways = [Tokens(settings), Tokens(settings)]
    short = gateways[0].issue_short(Identity(user.id, user.email, is_admin=False))

    async def use(number: int) -> object:
        async with pool.acquire() as connection:
            return await gateways[number % 2].redeem_short(connection, short)

    results = await asyncio.gather(*(use(number) for number in range(8)), return_exceptions=True)
    assert sum(not isinstance(result, Exception) for result in results) == 1
    assert sum(isinstance(result, Unauthenticated) for result in results) == 7


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"exp": int(time.time()) - 60}, "The token has expired."),
        ({"main_exp": int(time.time()) - 60}, "The main token behind this short token has expired."),
        ({"main_exp": "never"}, "The token is malformed: its 'main_exp' is no moment."),
        ({"main_jti": 7}, "The token is malformed: its 'main_jti' is no text."),
        ({"main_jti": "api:x"}, "The token is malformed: its 'main_jti' is no API token."),
        ({"main_jti": "api:99999999999999999999"}, "The token is malformed: its 'main_jti' is no API token."),
        ({"jti": "x"}, "The token is malformed: its 'jti' is no UUID."),
        ({"only": "session:1"}, "The token is malformed: its 'only' is no list of texts."),
    ],
)
async def test_a_wrong_short_token_is_refused_with_the_reason(
    tokens: Tokens, changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await tokens.redeem_short(NO_DATABASE, signed(**({"aud": "cluster-code/ws"} | changes)))
    assert str(caught.value) == sentence


async def test_a_short_token_ends_without_leeway(tokens: Tokens) -> None:
    with pytest.raises(Unauthenticated, match=r"The short token has expired: swap the main token for a new one\."):
        await tokens.redeem_short(NO_DATABASE, signed(aud="cluster-code/ws", exp=int(time.time()) - 1))


async def test_a_short_token_of_nobody_is_refused(tokens: Tokens, connection: asyncpg.Connection) -> None:
    with pytest.raises(Unauthenticated, match="user does not exist"):
        await tokens.redeem_short(connection, signed(aud="cluster-code/ws"))


async def test_a_short_token_ends_with_the_user_and_with_the_api_token_behind_it(
    tokens: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    api_token, secret = await api_tokens.create(connection, user.id, "ci", ["read"])
    identity = await tokens.authenticate(connection, secret)
    grant = await tokens.redeem_short(connection, tokens.issue_short(identity))
    assert grant.identity == identity
    assert grant.expires_at is None
    of_main = tokens.issue_short(await tokens.authenticate(connection, tokens.issue_main(user.id)))
    of_api = tokens.issue_short(identity)
    await api_tokens.delete(connection, user.id, api_token.id)
    with pytest.raises(Unauthenticated, match="API token behind"):
        await tokens.redeem_short(connection, of_api)
    await accounts.update(connection, user.id, is_disabled=True)
    with pytest.raises(Unauthenticated, match="disabled"):
        await tokens.redeem_short(connection, of_main)


def test_a_short_token_does_not_grow_beyond_what_is_believed(tokens: Tokens) -> None:
    identity = Identity(1, "ann@example.org", is_admin=False)
    with pytest.raises(Unacceptable):
        tokens.issue_short(identity, ["session:" + "1" * 90] * 128)
    with pytest.raises(Unacceptable):
        tokens.issue_short(identity, ["session:\ud800"])


async def test_purge_forgets_short_tokens_only_when_nobody_believes_them_any_more(
    tokens: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    await tokens.redeem_short(connection, tokens.issue_short(Identity(user.id, user.email, is_admin=False)))
    await connection.execute("INSERT INTO spent_short_tokens VALUES ($1, now() - interval '1 second')", uuid4())
    assert await tokens_module.purge(connection) == 1
    kept = await connection.fetchval("SELECT expires_at FROM spent_short_tokens")
    assert kept > datetime.now(UTC) + timedelta(seconds=60 + 10)


# Garbage

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = ["iss", "aud", "sub", "iat", "nbf", "exp", "jti", "scope", "channels", "only", "main_jti", "main_exp"]
SEGMENTS = (
    st.text(max_size=40)
    | JSON.map(segment)
    | st.dictionaries(st.sampled_from(["alg", "kid", "crit", "b64"]), JSON).map(segment)
)
GARBAGE = st.one_of(
    st.text(max_size=200),
    st.lists(SEGMENTS, min_size=1, max_size=5).map(".".join),
    st.text(max_size=60).map("cca_".__add__),
    st.text(alphabet="abc-_", min_size=43, max_size=43).map("cca_".__add__),
    st.dictionaries(st.sampled_from(NAMES), JSON).map(
        lambda changes: f"{segment({'alg': 'HS256'})}.{segment(claims(**changes))}.AAAA"
    ),
)


@pytest.fixture
async def both(tokens: Tokens) -> AsyncIterator[list[Tokens]]:
    """One that knows an outside issuer, and one that does not."""

    async def fetch_json(url: str) -> dict[str, object]:
        return {"keys": [jwt.algorithms.RSAAlgorithm.to_jwk(RSA_KEY.public_key(), as_dict=True) | {"kid": "1"}]}

    outside = Tokens(
        TokenSettings(secret=SECRET, oidc_issuer=ISSUER, oidc_jwks_url="https://issuer", oidc_audience="us"), fetch_json
    )
    yield [tokens, outside]
    await outside.close()


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(token=GARBAGE)
async def test_garbage_never_raises_anything_but_unauthenticated(
    both: list[Tokens], connection: asyncpg.Connection, token: str
) -> None:
    for tokens in both:
        for use in (tokens.authenticate, tokens.redeem_short):
            with pytest.raises(Unauthenticated):
                await use(connection, token)


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1), audience=st.sampled_from(["", "/ws"]))
async def test_signed_garbage_never_raises_anything_but_unauthenticated(
    both: list[Tokens], connection: asyncpg.Connection, changes: dict[str, object], audience: str
) -> None:
    made = claims(**({"aud": f"cluster-code{audience}", "sub": "77"} | changes))
    jws = jwt.PyJWS()
    mine = jws.encode(json.dumps(made).encode(), SECRET, "HS256")
    theirs = jws.encode(
        json.dumps({**made, "iss": ISSUER, "aud": "us"} | changes).encode(), RSA_KEY, "RS256", {"kid": "1"}
    )
    for tokens in both:
        for token in (mine, theirs):
            for use in (tokens.authenticate, tokens.redeem_short):
                try:
                    await use(connection, token)
                except Unauthenticated:
                    continue
                # Whole and well-signed after all: only an outside user is made at the first token.
                assert token == theirs
