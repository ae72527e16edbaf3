"""Webhooks: who has the secret deploys, once for each delivery; nobody else learns anything."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from types import MappingProxyType
from typing import Any

import orjson
import pytest
import pytest_asyncio

from tests.integration.gateway.conftest import Answer, Api, Person, Serve

KEY = "k" * 42 + "A"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PUSH = {
    "ref": "refs/heads/main", "after": COMMIT, "repository": {"default_branch": "main"},
    "project": {"default_branch": "main"}, "head_commit": {"message": "Add a cart\n\nWhy"},
}  # fmt: skip


@dataclass
class Stage:
    """An app, and who sends to it."""

    api: Api
    ann: Person
    app: Any

    async def send(
        self,
        kind: str,
        document: Any = PUSH,
        *,
        delivery: str = "1",
        event: str = "",
        secret: str | None = None,
        app_id: int | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Answer:
        """Send a delivery as that host does."""
        secret = self.app["hook_secret"] if secret is None else secret
        body = document if isinstance(document, bytes) else orjson.dumps(document)
        signature = "sha256=" + hmac.new(secret.encode(), body, "sha256").hexdigest()
        given = {
            "github": ("X-Hub-Signature-256", signature, "X-GitHub-Delivery", "X-GitHub-Event", event or "push"),
            "gitlab": ("X-Gitlab-Token", secret, "X-Gitlab-Event-UUID", "X-Gitlab-Event", event or "Push Hook"),
            "generic": ("X-Signature-256", signature, "X-Delivery-Id", "X-Nothing", ""),
        }[kind]
        sent = {given[0]: given[1], given[2]: delivery, given[3]: given[4], "Content-Type": "application/json"}
        path = f"/api/v1/hooks/{app_id or self.app['id']}/{kind}"
        return await self.api.call("POST", path, data=BytesIO(body), headers={**sent, **headers})

    async def deployments(self) -> list[dict[str, Any]]:
        """Those that pushes have made, the newest first."""
        found = await self.api.call("GET", f"/api/v1/apps/{self.app['id']}/deployments", self.ann)
        return [one for one in found.json["items"] if one["cause"] == "push"]


async def staged(api: Api, **app: Any) -> Stage:
    ann = await api.person()
    body = {"name": "shop", "workspace_id": ann.workspace_id, "repo_url": "https://git.test/shop", **app}
    return Stage(api, ann, (await api.call("POST", "/api/v1/apps", ann, body)).json)


@pytest_asyncio.fixture
async def api(serve: Serve) -> Api:
    api: Api = await serve(secrets_key=[KEY])
    return api


@pytest_asyncio.fixture
async def stage(api: Api) -> Stage:
    return await staged(api)


@pytest.mark.parametrize("kind", ["github", "gitlab"])
async def test_a_push_is_deployed(stage: Stage, kind: str) -> None:
    answer = await stage.send(kind)
    (deployment,) = await stage.deployments()
    assert (answer.status, answer.json["status"]) == (202, "queued")
    assert answer.json["deployment_id"] == deployment["id"]
    assert (deployment["branch"], deployment["commit_id"]) == ("main", COMMIT)
    assert (deployment["number"], deployment["user_id"]) == (2, None)
    assert deployment["commit_message"] == ("Add a cart" if kind == "github" else "")
    (audited,) = await stage.api.fetch("SELECT * FROM audit_log WHERE action = 'deployment.push'")
    assert (audited["actor_id"], audited["object"]) == (None, f"deployment:{deployment['id']}")
    assert audited["details"] == {"app": stage.app["id"], "number": 2, "delivery": f"{kind}:1"}


async def test_anybody_else_deploys_a_branch_or_a_commit(stage: Stage) -> None:
    assert (await stage.send("generic", {}, delivery="1")).status == 202
    assert (await stage.send("generic", {"commit_id": COMMIT, "message": "Why"}, delivery="2")).status == 202
    assert [(one["branch"], one["commit_id"], one["commit_message"]) for one in await stage.deployments()] == [
        (None, COMMIT, "Why"), (None, None, "")
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["github", "gitlab", "generic"])
async def test_a_delivery_is_obeyed_once_however_often_and_at_once_it_comes(stage: Stage, kind: str) -> None:
    document = {} if kind == "generic" else PUSH
    answers = await asyncio.gather(*(stage.send(kind, document) for _ in range(6)))
    (deployment,) = await stage.deployments()
    assert sorted(answer.status for answer in answers) == [200] * 5 + [202]
    assert {answer.json["deployment_id"] for answer in answers} == {deployment["id"]}
    again = await stage.send(kind, document)
    assert (again.status, again.json["status"]) == (200, "repeated")
    assert (await stage.send(kind, document, delivery="2")).status == 202


async def test_two_pushes_within_a_second_both_wait(stage: Stage) -> None:
    answers = await asyncio.gather(*(stage.send("github", delivery=str(number)) for number in range(2)))
    assert [answer.status for answer in answers] == [202, 202]
    assert [one["status"] for one in await stage.deployments()] == ["queued", "queued"]


async def test_github_tries_whether_it_reaches_anybody(stage: Stage) -> None:
    answer = await stage.send("github", {"zen": "Keep it logically awesome."}, event="ping")
    assert (answer.status, answer.json["status"]) == (200, "pong")


async def test_what_the_app_does_not_follow_is_ignored_and_said_to_be(api: Api) -> None:
    stage = await staged(api, branch="topic")
    for kind, document, event, why in (
        ("github", PUSH, "", "follows the branch 'topic', not 'main'"),
        ("gitlab", PUSH, "", "follows the branch 'topic', not 'main'"),
        ("generic", {"branch": "main"}, "", "follows the branch 'topic', not 'main'"),
        ("github", PUSH | {"ref": "refs/tags/v1"}, "", "is no branch"),
        ("github", PUSH | {"ref": "refs/heads/topic", "after": "0" * 40}, "", "was deleted"),
        ("github", PUSH, "issues", "is no push"),
        ("gitlab", PUSH, "Tag Push Hook", "is no push to a branch"),
    ):
        answer = await stage.send(kind, document, event=event)
        assert (answer.status, answer.json["status"], answer.json["deployment_id"]) == (200, "ignored", None)
        assert why in answer.json["message"]
    assert (await stage.send("github", PUSH | {"ref": "refs/heads/topic"})).status == 202
    await api.call("PUT", f"/api/v1/apps/{stage.app['id']}", stage.ann, {"auto_deploy": False})
    answer = await stage.send("github", PUSH | {"ref": "refs/heads/topic"}, delivery="2")
    assert (answer.status, answer.json["message"]) == (200, "auto_deploy of the app is off.")
    assert len(await stage.deployments()) == 1


@pytest.mark.parametrize("kind", ["github", "gitlab", "generic"])
async def test_who_does_not_have_the_secret_learns_nothing(api: Api, kind: str) -> None:
    stage = await staged(api)
    keyless = await staged(api, name="keyless")
    await api.fetch("UPDATE apps SET hook_secret = NULL WHERE id = $1", keyless.app["id"])
    gone = await staged(api, name="gone")
    await api.call("DELETE", f"/api/v1/apps/{gone.app['id']}", gone.ann)
    broken = await staged(api, name="broken")
    await api.fetch("UPDATE apps SET hook_secret = 'nonsense' WHERE id = $1", broken.app["id"])
    signature = {"github": "X-Hub-Signature-256", "gitlab": "X-Gitlab-Token", "generic": "X-Signature-256"}[kind]
    answers = [
        await stage.send(kind, secret="wrong"),
        await stage.send(kind, secret=keyless.app["hook_secret"]),
        await stage.send(kind, headers={signature: ""}),
        await stage.send(kind, headers={signature: "sha256="}),
        await stage.send(kind, b"nonsense", secret="wrong"),
        await stage.send(kind, b"", secret="wrong"),
        await stage.send(kind, event="ping", secret="wrong"),
        await stage.send(kind, app_id=999_999),
        await stage.send(kind, app_id=2**63 - 1),
        await keyless.send(kind),
        await gone.send(kind),
        await broken.send(kind),
    ]
    assert {answer.status for answer in answers} == {401}
    assert len({answer.json["detail"] for answer in answers}) == 1
    assert len({answer.headers["WWW-Authenticate"] for answer in answers}) == 1
    for one in (stage, keyless, gone, broken):
        assert await api.fetch("SELECT FROM hook_deliveries WHERE app_id = $1", one.app["id"]) == []
    assert await api.fetch("SELECT FROM deployments WHERE cause = 'push'") == []


async def test_a_new_secret_voids_the_old_one_at_once(stage: Stage) -> None:
    answer = await stage.api.call("POST", f"/api/v1/apps/{stage.app['id']}/hook-secret", stage.ann)
    assert (answer.status, answer.json["hooks"]) == (200, stage.app["hooks"])
    assert (await stage.send("github")).status == 401
    assert (await stage.send("github", secret=answer.json["hook_secret"])).status == 202


@pytest.mark.parametrize(
    ("kind", "document", "headers"),
    [
        ("github", b"nonsense", {}),
        ("github", b"[]", {}),
        ("github", {}, {}),
        ("github", PUSH | {"ref": "refs/heads/--upload-pack=x"}, {}),
        ("github", PUSH | {"after": "main"}, {}),
        ("github", PUSH, {"X-GitHub-Delivery": ""}),
        ("gitlab", PUSH | {"ref": "refs/heads/a..b"}, {}),
        ("generic", {"branch": "a\0b"}, {}),
        ("generic", {"commit_id": "--x"}, {}),
        ("generic", {"script": "x"}, {}),
        ("generic", {}, {"X-Delivery-Id": "x" * 300}),
    ],
)
async def test_what_is_signed_and_malformed_is_refused(stage: Stage, kind: str, document: Any, headers: Any) -> None:
    answer = await stage.send(kind, document, headers=headers)
    assert answer.status == 400
    assert answer.json["detail"]
    assert await stage.deployments() == []


async def test_a_large_push_is_taken_and_a_larger_one_refused_before_it_is_read(stage: Stage) -> None:
    filled = PUSH | {"commits": [{"message": "x" * 1000}] * 3500}
    assert 3 << 20 < len(orjson.dumps(filled)) < 4 << 20
    assert (await stage.send("github", filled)).status == 202
    read = 0

    async def body(size: int) -> Any:
        nonlocal read
        for _ in range(size >> 16):
            read += 1 << 16
            yield b"x" * (1 << 16)
            # The server's turn.
            await asyncio.sleep(0)

    path = f"/api/v1/hooks/{stage.app['id']}/github"
    # With a length, and without one.
    for headers in ({"Content-Length": str(25 << 20), "Expect": "100-continue"}, {}):
        read = 0
        answer = await stage.api.call("POST", path, data=body(25 << 20), headers=headers)
        assert (answer.status, answer.headers["Connection"]) == (413, "close")
        assert read < 25 << 20
    assert len(await stage.deployments()) == 1


async def test_deliveries_of_an_address_have_a_limit_of_their_own(serve: Serve) -> None:
    stage = await staged(await serve(secrets_key=[KEY], rate_limit_hooks="3/minute"))
    answers = [await stage.send("github", delivery=str(number)) for number in range(5)]
    assert [answer.status for answer in answers] == [202, 202, 202, 429, 429]
    assert int(answers[-1].headers["Retry-After"]) > 0
    assert (await stage.api.call("GET", "/api/v1/apps", stage.ann)).status == 200


async def test_without_a_key_there_are_no_webhooks_and_that_is_said(serve: Serve) -> None:
    stage = await staged(await serve())
    stage.app["hook_secret"] = ""
    answer = await stage.send("github")
    assert (answer.status, "SECRETS_KEY" in answer.json["detail"]) == (404, True)


async def test_a_key_that_was_replaced_still_opens_what_was_encrypted_with_it(serve: Serve, stage: Stage) -> None:
    stage.api = await serve(secrets_key=["x" * 42 + "A", KEY])
    assert (await stage.send("gitlab")).status == 202
