from __future__ import annotations

import pytest

from tests.integration.gateway.conftest import Api, Person, Serve


async def told(api: Api) -> list[int]:
    """The users whose permissions the outbox says have changed."""
    rows = await api.fetch(
        """SELECT (data::jsonb -> 'user_id')::bigint AS user_id FROM outbox
            WHERE event_type = 'gateway.permissions-changed' AND channel = 'gateway' ORDER BY id"""
    )
    return [row["user_id"] for row in rows]


async def test_people_read_and_change_their_own_account(api: Api, ann: Person) -> None:
    changed = await api.call("PUT", "/api/v1/users/me", ann, {"name": "Ann B.", "email": "ann@new.test"})
    assert (changed.status, changed.json["name"], changed.json["email"]) == (200, "Ann B.", "ann@new.test")
    me = await api.call("GET", "/api/v1/users/me", ann)
    assert me.json == changed.json


async def test_nobody_makes_themselves_an_administrator(api: Api, ann: Person) -> None:
    answer = await api.call("PUT", "/api/v1/users/me", ann, {"is_admin": True})
    assert answer.status == 422
    assert list(answer.errors) == ["is_admin"]


async def test_a_new_password_takes_the_current_one_and_voids_the_tokens(api: Api) -> None:
    ann = {"email": "ann@example.test", "password": "correct horse", "name": "Ann"}
    await api.call("POST", "/api/v1/auth/register", json=ann)
    login = {"email": ann["email"], "password": ann["password"]}
    token = (await api.call("POST", "/api/v1/auth/login", json=login)).json["access_token"]

    change = {"password": "battery staple", "current_password": "wrong"}
    refused = await api.call("PUT", "/api/v1/users/me", token, change)
    assert (refused.status, list(refused.errors)) == (422, ["current_password"])
    missing = await api.call("PUT", "/api/v1/users/me", token, {"password": "battery staple"})
    assert missing.status == 422

    change["current_password"] = "correct horse"
    changed = await api.call("PUT", "/api/v1/users/me", token, change)
    assert changed.status == 200
    assert (await api.call("GET", "/api/v1/users/me", token)).status == 401
    assert (await api.call("POST", "/api/v1/auth/login", json=login)).status == 401
    login["password"] = "battery staple"
    assert (await api.call("POST", "/api/v1/auth/login", json=login)).status == 200
    assert await told(api) == [changed.json["id"]]


async def test_administrators_list_accounts_page_by_page(api: Api, root: Person, ann: Person, bob: Person) -> None:
    first = await api.call("GET", "/api/v1/users?page=1&page_size=2", root)
    assert [user["id"] for user in first.json["items"]] == [bob.id, ann.id]
    assert first.json["pagination"] == {
        "page": 1, "page_size": 2, "total": 3, "total_pages": 2, "total_is_exact": True,
    }  # fmt: skip
    second = await api.call("GET", "/api/v1/users?page=2&page_size=2", root)
    assert [user["id"] for user in second.json["items"]] == [root.id]
    beyond = await api.call("GET", "/api/v1/users?page=9", root)
    assert (beyond.status, beyond.json["items"]) == (200, [])


async def test_administrators_find_accounts_by_a_part_of_the_address(api: Api, root: Person, ann: Person) -> None:
    found = await api.call("GET", "/api/v1/users", root, params={"q": ann.email[:-3].upper()})
    assert [user["id"] for user in found.json["items"]] == [ann.id]
    none = await api.call("GET", "/api/v1/users", root, params={"q": "%' OR '1'='1"})
    assert none.json["items"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/users"),
        ("GET", "/api/v1/users/{id}"),
        ("PUT", "/api/v1/users/{id}"),
        ("DELETE", "/api/v1/users/{id}"),
    ],
)
async def test_accounts_are_for_administrators(api: Api, ann: Person, bob: Person, method: str, path: str) -> None:
    answer = await api.call(method, path.format(id=bob.id), ann, {"name": "x"} if method == "PUT" else None)
    assert answer.status == 403


async def test_a_disabled_account_is_shut_out_at_once(api: Api, root: Person, ann: Person) -> None:
    changed = await api.call("PUT", f"/api/v1/users/{ann.id}", root, {"is_disabled": True})
    assert changed.json["is_disabled"] is True
    assert (await api.call("GET", "/api/v1/users/me", ann)).status == 401
    assert await told(api) == [ann.id]
    await api.call("PUT", f"/api/v1/users/{ann.id}", root, {"is_disabled": False})
    fresh = api.context.tokens.issue_main(ann.id)
    assert (await api.call("GET", "/api/v1/users/me", fresh)).status == 200


async def test_an_administrator_can_set_a_password(api: Api, root: Person, ann: Person) -> None:
    await api.call("PUT", f"/api/v1/users/{ann.id}", root, {"password": "correct horse"})
    login = await api.call("POST", "/api/v1/auth/login", json={"email": ann.email, "password": "correct horse"})
    assert login.status == 200
    [row] = await api.fetch("SELECT details FROM audit_log WHERE action = 'user.update'")
    assert row["details"] == {"fields": ["password"]}


async def test_a_new_administrator_is_one_at_the_next_request(api: Api, root: Person, ann: Person) -> None:
    assert (await api.call("PUT", f"/api/v1/users/{ann.id}", root, {"is_admin": True})).status == 200
    assert (await api.call("GET", "/api/v1/users", ann)).status == 200


async def test_the_last_administrator_stays(api: Api, root: Person) -> None:
    for change in ({"is_admin": False}, {"is_disabled": True}):
        assert (await api.call("PUT", f"/api/v1/users/{root.id}", root, change)).status == 422
    assert (await api.call("DELETE", f"/api/v1/users/{root.id}", root)).status == 422


async def test_a_deleted_account_is_gone(api: Api, root: Person, ann: Person) -> None:
    assert (await api.call("DELETE", f"/api/v1/users/{ann.id}", root)).status == 204
    assert (await api.call("GET", f"/api/v1/users/{ann.id}", root)).status == 404
    assert (await api.call("GET", "/api/v1/users/me", ann)).status == 401
    assert (await api.call("DELETE", f"/api/v1/users/{ann.id}", root)).status == 404
    assert await told(api) == [ann.id]


async def test_an_account_that_owns_what_others_need_is_not_deleted(api: Api, root: Person, ann: Person) -> None:
    await api.project(ann.workspace_id)
    answer = await api.call("DELETE", f"/api/v1/users/{ann.id}", root)
    assert (answer.status, list(answer.errors)) == (409, ["projects"])


async def test_an_address_that_is_taken_is_409(api: Api, root: Person, ann: Person, bob: Person) -> None:
    answer = await api.call("PUT", f"/api/v1/users/{ann.id}", root, {"email": bob.email})
    assert (answer.status, list(answer.errors)) == (409, ["email"])


async def test_the_current_password_cannot_be_guessed_without_limit(serve: Serve) -> None:
    api = await serve(rate_limit_login="3/minute")
    ann = await api.person()
    guess = {"password": "battery staple", "current_password": "wrong"}
    answers = [await api.call("PUT", "/api/v1/users/me", ann, guess) for _ in range(4)]
    assert [answer.status for answer in answers] == [422, 422, 422, 429]
    assert (await api.call("PUT", "/api/v1/users/me", ann, {"name": "Ann"})).status == 200


async def test_a_limited_token_does_not_change_the_address(api: Api, ann: Person) -> None:
    made = await api.call("POST", "/api/v1/tokens", ann, {"name": "script", "scopes": ["write"]})
    change = {"email": "other@example.test"}
    assert (await api.call("PUT", "/api/v1/users/me", made.json["token"], change)).status == 403
    assert (await api.call("PUT", "/api/v1/users/me", ann, change)).status == 200
