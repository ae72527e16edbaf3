from __future__ import annotations

import asyncio
from typing import Any

import pytest

from auth.tokens import Tokens, TokenSettings
from tests.integration.gateway.conftest import SECRET, Api, Person, Serve

ANN: dict[str, Any] = {"email": "ann@example.test", "password": "correct horse", "name": "Ann"}
LOGIN = {"email": ANN["email"], "password": ANN["password"]}


async def registered(api: Api) -> dict[str, Any]:
    answer = await api.call("POST", "/api/v1/auth/register", json=ANN)
    assert answer.status == 201
    return dict(answer.json)


async def signed_in(api: Api) -> dict[str, Any]:
    await registered(api)
    answer = await api.call("POST", "/api/v1/auth/login", json=LOGIN)
    assert answer.status == 200
    return dict(answer.json)


async def test_who_registers_gets_an_account_and_a_personal_workspace(api: Api) -> None:
    user = await registered(api)
    assert {key: user[key] for key in ("email", "name", "is_admin", "is_disabled")} == {
        "email": "ann@example.test", "name": "Ann", "is_admin": False, "is_disabled": False,
    }  # fmt: skip
    assert "password" not in str(user)
    [workspace] = await api.fetch("SELECT name FROM workspaces WHERE personal_user_id = $1", user["id"])
    assert workspace["name"] == "Ann"


async def test_an_address_registers_once_whatever_its_case(api: Api) -> None:
    await registered(api)
    answer = await api.call("POST", "/api/v1/auth/register", json={**ANN, "email": "ANN@example.test"})
    assert answer.status == 409
    assert list(answer.errors) == ["email"]


async def test_concurrent_registrations_of_an_address_make_one_account(api: Api) -> None:
    answers = await asyncio.gather(*(api.call("POST", "/api/v1/auth/register", json=ANN) for _ in range(4)))
    assert sorted(answer.status for answer in answers) == [201, 409, 409, 409]


async def test_registration_can_be_closed(serve: Serve) -> None:
    api = await serve(registration=False)
    assert (await api.call("POST", "/api/v1/auth/register", json=ANN)).status == 403


async def test_a_sign_in_gives_a_main_token_and_a_refresh_token(api: Api) -> None:
    tokens = await signed_in(api)
    assert set(tokens) == {"access_token", "refresh_token", "token_type", "expires_in"}
    assert (tokens["token_type"], tokens["expires_in"]) == ("Bearer", 3600)
    me = await api.call("GET", "/api/v1/users/me", tokens["access_token"])
    assert me.json["email"] == "ann@example.test"


@pytest.mark.parametrize("wrong", [{"password": "incorrect horse"}, {"email": "bob@example.test"}])
async def test_a_wrong_password_and_an_unknown_address_are_answered_alike(api: Api, wrong: dict[str, str]) -> None:
    await registered(api)
    answer = await api.call("POST", "/api/v1/auth/login", json={**LOGIN, **wrong})
    assert answer.status == 401
    assert answer.json["detail"] == "The email or the password is wrong."
    assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_tokens_are_kept_by_no_cache(api: Api) -> None:
    await registered(api)
    answer = await api.call("POST", "/api/v1/auth/login", json=LOGIN)
    assert answer.headers["Cache-Control"] == "no-store"


async def test_a_refresh_rotates_and_its_reuse_revokes_the_family(api: Api) -> None:
    first = await signed_in(api)
    second = await api.call("POST", "/api/v1/auth/refresh", json={"refresh_token": first["refresh_token"]})
    assert second.status == 200
    assert second.json["refresh_token"] != first["refresh_token"]
    reuse = await api.call("POST", "/api/v1/auth/refresh", json={"refresh_token": first["refresh_token"]})
    assert reuse.status == 401
    after = await api.call("POST", "/api/v1/auth/refresh", json={"refresh_token": second.json["refresh_token"]})
    assert after.status == 401


async def test_a_logout_ends_the_refresh_token_and_may_be_repeated(api: Api) -> None:
    tokens = await signed_in(api)
    body = {"refresh_token": tokens["refresh_token"]}
    for _ in range(2):
        assert (await api.call("POST", "/api/v1/auth/logout", json=body)).status == 204
    assert (await api.call("POST", "/api/v1/auth/refresh", json=body)).status == 401


async def test_signing_in_and_out_leaves_a_trail(api: Api) -> None:
    tokens = await signed_in(api)
    await api.call("POST", "/api/v1/auth/logout", json={"refresh_token": tokens["refresh_token"]})
    trail = await api.fetch("SELECT action, address FROM audit_log ORDER BY id")
    assert [tuple(row) for row in trail] == [
        ("user.register", "127.0.0.1"), ("user.login", "127.0.0.1"), ("user.logout", "127.0.0.1"),
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["/auth", "/api/v1/auth"])
async def test_a_main_token_is_swapped_for_a_short_one(api: Api, ann: Person, path: str) -> None:
    answer = await api.call("POST", path, ann)
    assert answer.status == 200
    assert set(answer.json) == {"short_token", "expires_in"}
    assert answer.json["expires_in"] == 60
    async with api.pool.acquire() as connection:
        grant = await api.context.tokens.redeem_short(connection, answer.json["short_token"])
    assert (grant.identity.user_id, grant.channels) == (ann.id, None)


async def test_a_swap_can_narrow_the_channels(api: Api, ann: Person) -> None:
    answer = await api.call("POST", "/auth", ann, {"channels": ["session:42"]})
    async with api.pool.acquire() as connection:
        grant = await api.context.tokens.redeem_short(connection, answer.json["short_token"])
    assert grant.channels == ("session:42",)


async def test_an_empty_body_with_any_content_type_swaps_too(api: Api, ann: Person) -> None:
    answer = await api.call("POST", "/auth", ann, headers={"Content-Type": "text/plain"}, data=b"")
    assert answer.status == 200


async def test_a_short_token_is_no_main_token(api: Api, ann: Person) -> None:
    short = (await api.call("POST", "/auth", ann)).json["short_token"]
    assert (await api.call("GET", "/api/v1/users/me", short)).status == 401
    assert (await api.call("POST", "/auth", short)).status == 401


async def test_an_api_token_can_be_swapped(api: Api, ann: Person) -> None:
    made = await api.call("POST", "/api/v1/tokens", ann, {"name": "script", "scopes": ["read"]})
    assert (await api.call("POST", "/auth", made.json["token"])).status == 200


FORGED = [
    ("no header", None),
    ("other scheme", "Basic YTpi"),
    ("no token", "Bearer"),
    ("blank", "Bearer  x"),
    ("not ascii", "Bearer é"),
    ("no jwt", "Bearer abc"),
    ("too long", "Bearer " + "a" * 8000),
    ("unsigned", "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiIxIn0."),
]


async def test_what_is_no_token_is_401(api: Api) -> None:
    for name, header in FORGED:
        headers = {"Authorization": header} if header is not None else {}
        answer = await api.call("GET", "/api/v1/users/me", headers=headers)
        assert answer.status == 401, name
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("settings", "expires_in"),
    [
        (TokenSettings(secret="another-secret-of-32-bytes-4Jq8Zw1x"), 60.0),
        (TokenSettings(secret=SECRET, audience="others"), 60.0),
        (TokenSettings(secret=SECRET, issuer="others"), 60.0),
        (TokenSettings(secret=SECRET, leeway=0), 0.001),
    ],
    ids=["forged", "audience", "issuer", "expired"],
)
async def test_a_token_that_is_not_ours_or_no_longer_good_is_401(
    serve: Serve, settings: TokenSettings, expires_in: float
) -> None:
    api = await serve(TokenSettings(secret=SECRET, leeway=0))
    ann = await api.person()
    token = Tokens(settings).issue_main(ann.id, expires_in=expires_in)
    if expires_in < 1:
        # `exp` is in whole seconds, rounded up.
        await asyncio.sleep(1.1)
    assert (await api.call("GET", "/api/v1/users/me", token)).status == 401


async def test_the_scheme_of_the_header_has_no_case(api: Api, ann: Person) -> None:
    answer = await api.call("GET", "/api/v1/users/me", headers={"Authorization": f"bEARER {ann.token}"})
    assert answer.status == 200
