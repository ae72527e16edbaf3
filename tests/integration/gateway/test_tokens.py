from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tests.integration.gateway.conftest import Answer, Api, Person


async def make(api: Api, who: Person | str, **changes: Any) -> Answer:
    return await api.call("POST", "/api/v1/tokens", who, {"name": "script", "scopes": ["write"], **changes})


async def test_a_token_is_shown_once_and_works(api: Api, ann: Person) -> None:
    made = await make(api, ann)
    assert made.status == 201
    assert (await api.call("GET", "/api/v1/users/me", made.json["token"])).json["id"] == ann.id
    listed = (await api.call("GET", "/api/v1/tokens", ann)).json["items"]
    assert [token["name"] for token in listed] == ["script"]
    assert "token" not in listed[0]
    assert made.json["token"] not in str(await api.fetch("SELECT * FROM api_tokens"))


async def test_a_revoked_token_ends_at_once(api: Api, ann: Person) -> None:
    made = (await make(api, ann)).json
    assert (await api.call("DELETE", f"/api/v1/tokens/{made['id']}", ann)).status == 204
    assert (await api.call("GET", "/api/v1/users/me", made["token"])).status == 401
    assert (await api.call("DELETE", f"/api/v1/tokens/{made['id']}", ann)).status == 404
    [event] = await api.fetch("SELECT data FROM outbox WHERE event_type = 'gateway.permissions-changed'")
    assert event["data"] == f'{{"user_id":{ann.id}}}'


async def test_anothers_token_is_not_there(api: Api, ann: Person, bob: Person) -> None:
    made = (await make(api, ann)).json
    assert (await api.call("DELETE", f"/api/v1/tokens/{made['id']}", bob)).status == 404
    assert (await api.call("GET", "/api/v1/tokens", bob)).json["items"] == []


async def test_a_scope_bounds_what_a_token_may_do(api: Api, ann: Person) -> None:
    token = (await make(api, ann, scopes=["read"])).json["token"]
    assert (await api.call("GET", "/api/v1/workspaces", token)).status == 200
    refused = await api.call("POST", "/api/v1/workspaces", token, {"name": "x"})
    assert (refused.status, "'write'" in refused.json["detail"]) == (403, True)


async def test_an_administrators_narrow_token_is_no_administrator(api: Api, root: Person) -> None:
    token = (await make(api, root)).json["token"]
    assert (await api.call("GET", "/api/v1/users", token)).status == 403


async def test_a_token_hands_out_no_more_than_it_holds(api: Api, ann: Person) -> None:
    token = (await make(api, ann)).json["token"]
    assert (await make(api, token, name="other", scopes=["admin"])).status == 403
    assert (await make(api, ann, name="other", channels=["app:*"])).status == 403


async def test_a_name_is_used_once(api: Api, ann: Person) -> None:
    await make(api, ann)
    again = await make(api, ann)
    assert (again.status, list(again.errors)) == (409, ["name"])


async def test_an_end_that_is_past_or_far_away_is_refused(api: Api, ann: Person) -> None:
    for expires_at in ("2001-01-01T00:00:00Z", "9999-12-31T23:59:59-12:00", "2400-01-01", "soon", 5):
        answer = await make(api, ann, expires_at=expires_at)
        assert (answer.status, list(answer.errors)) == (422, ["expires_at"]), expires_at


async def test_an_end_is_kept(api: Api, ann: Person) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    made = await make(api, ann, expires_at=end.isoformat())
    assert made.json["expires_at"] == end.isoformat().replace("+00:00", "Z")


async def test_scopes_are_some_of_those_there_are(api: Api, ann: Person) -> None:
    wrong: list[Any] = [[], ["root"], ["read"] * 4, "read", [1]]
    for scopes in wrong:
        assert (await make(api, ann, scopes=scopes)).status == 422, scopes


async def test_what_a_limited_token_makes_ends_with_it(api: Api, ann: Person) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=1)
    parent = (await make(api, ann, expires_at=end.isoformat())).json["token"]
    later = (end + timedelta(days=1)).isoformat()
    made = [await make(api, parent, name="a"), await make(api, parent, name="b", expires_at=later)]
    assert [datetime.fromisoformat(one.json["expires_at"]) for one in made] == [end, end]
    assert (await make(api, ann, name="c")).json["expires_at"] is None


async def test_an_administrators_narrow_token_gives_no_channels_away(api: Api, root: Person) -> None:
    narrow = (await make(api, root)).json["token"]
    assert (await make(api, narrow, name="other", channels=["app:*"])).status == 403
    assert (await make(api, root, name="other", channels=["app:*"])).status == 201
