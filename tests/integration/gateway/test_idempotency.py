from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from tests.integration.gateway.conftest import Answer, Api, Person


async def post(api: Api, who: Person, key: str, uuid: str | None = None) -> Answer:
    body = {"project_uuid": uuid or str(uuid4())}
    return await api.call("POST", "/api/v1/sessions", who, body, headers={"Idempotency-Key": key})


async def test_the_same_request_gets_the_same_answer(api: Api, ann: Person) -> None:
    uuid = str(uuid4())
    first, second = await post(api, ann, "k", uuid), await post(api, ann, "k", uuid)
    assert (first.status, second.status) == (201, 201)
    assert second.body == first.body
    assert second.headers["Idempotency-Replayed"] == "true"
    assert second.headers["Location"] == first.headers["Location"]
    assert "Idempotency-Replayed" not in first.headers


async def test_another_request_with_the_key_is_refused(api: Api, ann: Person) -> None:
    await post(api, ann, "k")
    answer = await post(api, ann, "k")
    assert (answer.status, list(answer.errors)) == (422, ["Idempotency-Key"])
    assert len(await api.fetch("SELECT 1 FROM sessions")) == 1


async def test_a_key_is_its_users_own(api: Api, ann: Person, bob: Person) -> None:
    assert (await post(api, ann, "k")).status == 201
    assert (await post(api, bob, "k")).status == 201


async def test_concurrent_requests_with_a_key_are_carried_out_once(api: Api, ann: Person) -> None:
    uuid = str(uuid4())
    answers = await asyncio.gather(*(post(api, ann, "k", uuid) for _ in range(8)))
    assert {answer.status for answer in answers} == {201}
    assert len({answer.body for answer in answers}) == 1
    assert sum("Idempotency-Replayed" not in answer.headers for answer in answers) == 1


async def test_a_refused_request_leaves_the_key_free(api: Api, ann: Person) -> None:
    project = await api.project(ann.workspace_id)
    wrong = {"project_uuid": project["uuid"], "provider": "nowhere"}
    headers = {"Idempotency-Key": "k"}
    assert (await api.call("POST", "/api/v1/sessions", ann, wrong, headers=headers)).status == 422
    assert (await post(api, ann, "k", project["uuid"])).status == 201


async def test_a_key_is_free_again_after_a_day(api: Api, ann: Person) -> None:
    await post(api, ann, "k")
    await api.fetch("UPDATE idempotency_keys SET created_at = now() - interval '25 hours'")
    assert (await post(api, ann, "k")).status == 201
    assert len(await api.fetch("SELECT 1 FROM idempotency_keys")) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "é", "a\tb", "a b"])
async def test_a_malformed_key_is_refused(api: Api, ann: Person, key: str) -> None:
    assert (await post(api, ann, key)).status == 400
    assert await api.fetch("SELECT 1 FROM sessions") == []
