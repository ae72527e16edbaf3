"""Apps and their deployments by REST."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from orchestrator.deployments import apps
from tests.integration.gateway.conftest import Answer, Api, Person, Serve

KEY = "k" * 42 + "A"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {"secrets": {"TOKEN": "s3cret-value"}, "deploy_user": "bot", "deploy_token": "t0ken-value"}


@pytest_asyncio.fixture
async def api(serve: Serve) -> Api:
    api: Api = await serve(secrets_key=[KEY], base_domain="apps.test")
    return api


async def make(api: Api, who: Person, name: str = "shop", **more: Any) -> Answer:
    body = {"name": name, "workspace_id": who.workspace_id, "repo_url": "https://git.test/shop.git", **more}
    return await api.call("POST", "/api/v1/apps", who, body)


async def made(api: Api, who: Person, name: str = "shop", **more: Any) -> Any:
    answer = await make(api, who, name, **more)
    assert answer.status == 201, answer.json
    return answer.json


async def everything_that_is_kept(api: Api) -> str:
    """All that the database says, but for what is encrypted."""
    tables = ("apps", "deployments", "outbox", "audit_log", "idempotency_keys")
    return "".join([str(await api.fetch(f"SELECT t::text FROM {table} t")) for table in tables])  # noqa: S608  Ours.


async def test_an_app_is_made_with_its_first_deployment(api: Api, ann: Person) -> None:
    answer = await make(api, ann, health_path="/health", port=3000, cpu="500m", memory="256Mi", env={"A": "a"})
    app = answer.json
    assert (answer.status, answer.headers["Location"]) == (201, f"/api/v1/apps/{app['id']}")
    wanted = {
        "name": "shop", "workspace_id": ann.workspace_id, "created_by": ann.id, "branch": None, "dockerfile": None,
        "port": 3000, "health_path": "/health", "cpu": 0.5, "memory": 256 << 20, "domains": [], "keep_images": 3,
        "auto_deploy": True, "deleting": False, "live_deployment": None, "url": None, "env": {"A": "a"},
        "build_args": {}, "secret_names": [], "has_deploy_key": False, "has_deploy_token": False,
    }  # fmt: skip
    assert {name: app[name] for name in wanted} == wanted
    assert app["hooks"]["gitlab"] == f"/api/v1/hooks/{app['id']}/gitlab"
    assert len(app["hook_secret"]) >= 40
    listed = (await api.call("GET", f"/api/v1/apps/{app['id']}/deployments", ann)).json
    (deployment,) = listed["items"]
    assert (deployment["number"], deployment["cause"], deployment["status"]) == (1, "create", "queued")
    assert (deployment["app_name"], deployment["user_id"], deployment["steps"]) == ("shop", ann.id, [])
    assert (await api.call("GET", f"/api/v1/deployments/{deployment['id']}", ann)).json == deployment
    read = (await api.call("GET", f"/api/v1/apps/{app['id']}", ann)).json
    assert read == {name: value for name, value in app.items() if name != "hook_secret"}
    told = await api.fetch("SELECT event_type, channel FROM outbox ORDER BY id")
    assert [tuple(row) for row in told] == [
        ("app.created", f"user:{ann.id}"), ("app.created", f"workspace:{ann.workspace_id}"),
        *(("deployment.status", f"{kind}:{number}") for kind, number in (
            ("deployment", deployment["id"]), ("user", ann.id), ("workspace", ann.workspace_id))),
    ]  # fmt: skip


async def test_a_refused_app_leaves_nothing(api: Api, ann: Person, bob: Person) -> None:
    await made(api, bob, domains=["shop.test"])
    assert (await make(api, ann)).errors == {"name": ["There is an app with the name shop already."]}
    answer = await make(api, ann, "other", domains=["Shop.Test"])
    assert (answer.status, answer.errors) == (409, {"domains": ["Another app has the domain shop.test."]})
    assert (await make(api, ann, "other", workspace_id=bob.workspace_id)).status == 404
    assert len(await api.fetch("SELECT FROM apps")) == len(await api.fetch("SELECT FROM deployments")) == 1


async def test_of_those_who_want_a_name_at_once_one_gets_it(api: Api, ann: Person) -> None:
    answers = await asyncio.gather(*(make(api, ann) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [201, 409, 409, 409, 409]


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("name", ["", "Shop", "-a", "a-", "a.b", "a" * 41, "a`) || Host(`b", "a\n", "ä", 7, None]),
        ("repo_url", ["", "--upload-pack=x", "ext::sh -c id", "file:///etc", "/srv/x", "https://git.test", None,
                      "https://ann:t0ken@git.test/x", "https://t0ken@git.test/x", "https://git.test/x?token=t0ken",
                      "ssh://git:t0ken@git.test/x"]),
        ("branch", ["", "--upload-pack=x", "a..b", "a b", "a\0", "refs~1", 7]),
        ("dockerfile", ["", "/etc/passwd", "../Dockerfile", "a/../../b", "a/", ".", "a\0b", ".git/config", "a\\b", 7]),
        ("build_args", [{"A=B": "x"}, {"1A": "x"}, {"A": 1}, {"A": None}, {"A": "\0"}, {"A": "x" * 40000}, [], "A=B"]),
        ("env", [{"": "x"}, {"A-B": "x"}, {"A": {}}, {"A": "\0"}, {f"A{n}": "x" for n in range(257)}, None]),
        ("secrets", [{"A B": "x"}, {"A": 1}, {"A": "\0"}, []]),
        ("port", [0, 65536, -1, "80", 80.5, True, None]),
        ("health_path", ["", "health", "/a b", "/a\n", "/a#b", "/ä", "/" + "a" * 500, 7]),
        ("cpu", [0, -1, 0.001, 2000, "1x", "-1", "", True, [], "1e3"]),
        ("memory", [0, 1024, "1Ki", "1GB", "-1Mi", "", 1.5, True, "2000Ti", "9" * 400]),
        ("domains", [["a"], ["*.a.test"], ["a.test`) || Host(`b.test"], ["a_b.test"], ["1.2.3.4"], ["a.test."], [""],
                     ["-a.test"], ["a..test"], ["shop.apps.test.evil"] * 21, ["apps.test"], ["other.apps.test"],
                     ["x.shop.apps.test"], ["a" * 64 + ".test"], ["https://a.test"], "a.test", [7], None]),
        ("keep_images", [0, 21, "3", None]),
        ("auto_deploy", ["yes", 1, None]),
        ("deploy_key", ["", "nonsense", "a\0", 7]),
        ("deploy_user", ["", "a:b", "a b", "a\n"]),
        ("deploy_token", ["", "a b", "a\n", "ä", "x" * 5000]),
        ("workspace_id", [0, "1", None]),
        ("status", ["live"]),
    ],
)  # fmt: skip
async def test_values_that_no_app_can_have_are_refused_and_not_repeated(
    api: Api, ann: Person, field: str, wrong: list[Any]
) -> None:
    for value in wrong:
        answer = await make(api, ann, **{field: value})
        assert answer.status == 422, (value, answer.json)
        assert {name.partition(".")[0] for name in answer.errors} == {field}, (value, answer.json)
        assert b"t0ken" not in answer.body
    assert await api.fetch("SELECT FROM apps") == []


async def test_values_are_kept_in_one_form(api: Api, ann: Person) -> None:
    app = await made(
        api, ann, dockerfile="./docker//Dockerfile", domains=["B.Test", "b.test", "shop.apps.test", "a.b.test"]
    )  # fmt: skip
    assert (app["dockerfile"], app["domains"]) == ("docker/Dockerfile", ["b.test", "a.b.test"])
    for url in ("git@git.test:shop.git", "ssh://git@git.test/shop.git", "http://git.test:3000/shop"):
        assert (await api.call("PUT", f"/api/v1/apps/{app['id']}", ann, {"repo_url": url})).json["repo_url"] == url


async def test_nothing_secret_is_ever_shown_again(api: Api, ann: Person) -> None:
    key = ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    headers = {"Idempotency-Key": "k"}
    body = {
        "name": "shop", "workspace_id": ann.workspace_id, "repo_url": "https://git.test/shop", **SECRETS,
        "deploy_key": key.decode(),
    }  # fmt: skip
    app = (await api.call("POST", "/api/v1/apps", ann, body, headers=headers)).json
    again = await api.call("POST", "/api/v1/apps", ann, body, headers=headers)
    assert (again.status, again.headers["Location"]) == (201, f"/api/v1/apps/{app['id']}")
    assert again.json == app | {"hook_secret": None}
    assert (app["secret_names"], app["has_deploy_key"], app["has_deploy_token"]) == (["TOKEN"], True, True)
    at = f"/api/v1/apps/{app['id']}"
    shown = [
        await api.call("GET", "/api/v1/apps", ann),
        await api.call("GET", at, ann),
        await api.call("PUT", at, ann, {"secrets": {"OTHER": "an0ther-value"}}),
        await api.call("PUT", at, ann, {"secrets": {"TOKEN": "s3cret-value", "BAD NAME": "x"}}),
        await api.call("GET", f"{at}/deployments", ann),
        await api.call("DELETE", at, ann),
    ]
    assert [answer.status for answer in shown] == [200, 200, 200, 422, 200, 202]
    assert shown[2].json["secret_names"] == ["OTHER", "TOKEN"]
    seen = "".join(answer.body.decode() for answer in shown) + await everything_that_is_kept(api)
    line = key.decode().splitlines()[1]
    for secret in ("s3cret-value", "t0ken-value", "an0ther-value", line, app["hook_secret"]):
        assert secret not in seen
        assert secret.encode().hex() not in seen


async def test_what_changes_is_what_was_given_and_nothing_is_deployed_by_it(api: Api, ann: Person) -> None:
    app = await made(api, ann, env={"A": "a"}, **SECRETS)
    at = f"/api/v1/apps/{app['id']}"
    changes = {"env": {"B": "b"}, "branch": "main", "cpu": 2, "memory": None, "auto_deploy": False, "keep_images": 1}
    changed = (await api.call("PUT", at, ann, {**changes, "secrets": {"TOKEN": None}, "deploy_token": None})).json
    assert {name: changed[name] for name in changes} == changes
    assert (changed["secret_names"], changed["has_deploy_token"]) == ([], False)
    assert changed["updated_at"] > app["updated_at"]
    assert (await api.call("PUT", at, ann, {})).json["env"] == {"B": "b"}
    for fixed in ({"name": "other"}, {"workspace_id": 1}, {"hook_secret": "x"}):
        assert (await api.call("PUT", at, ann, fixed)).status == 422
    assert len(await api.fetch("SELECT FROM deployments")) == 1
    (event,) = await api.fetch(
        "SELECT data::text AS data FROM outbox WHERE event_type = 'app.updated' ORDER BY id DESC LIMIT 1"
    )
    assert '"branch":"main"' in event["data"]
    assert "env" not in event["data"]


async def test_viewers_and_lists_see_no_environment(api: Api, ann: Person, bob: Person) -> None:
    workspace = await api.workspace(ann, viewer=bob)
    app = await made(api, ann, workspace_id=workspace, env={"A": "a"}, build_args={"B": "b"}, **SECRETS)
    await made(api, ann, "own")
    seen = (await api.call("GET", f"/api/v1/apps/{app['id']}", bob)).json
    assert (seen["env"], seen["build_args"], seen["secret_names"]) == (None, None, ["TOKEN"])
    listed = (await api.call("GET", "/api/v1/apps", bob)).json
    assert [(one["name"], "env" in one) for one in listed["items"]] == [("shop", False)]
    listed = (await api.call("GET", "/api/v1/apps?page_size=1", ann)).json
    assert ([one["name"] for one in listed["items"]], listed["pagination"]["total"]) == (["own"], 2)
    listed = (await api.call("GET", f"/api/v1/apps?workspace_id={workspace}", ann)).json
    assert [one["name"] for one in listed["items"]] == ["shop"]
    assert (await api.call("GET", f"/api/v1/apps?workspace_id={ann.workspace_id}", bob)).json["items"] == []


async def test_secrets_whose_key_is_lost_are_said_to_be_unknown_and_can_be_removed(
    serve: Serve, api: Api, ann: Person
) -> None:
    app = await made(api, ann, **SECRETS)
    at = f"/api/v1/apps/{app['id']}"
    other: Api = await serve(secrets_key=["x" * 42 + "A"])
    seen = (await other.call("GET", at, ann)).json
    assert (seen["secret_names"], seen["has_deploy_key"], seen["has_deploy_token"]) == (None, None, None)
    refused = await other.call("PUT", at, ann, {"secrets": {"A": "a"}})
    assert (refused.status, "SECRETS_KEY" in refused.json["detail"]) == (409, True)
    everything = {"secrets": None, "deploy_key": None, "deploy_user": None, "deploy_token": None}
    assert (await other.call("PUT", at, ann, everything)).json["secret_names"] == []
    assert (await other.call("PUT", at, ann, {"secrets": {"A": "a"}})).json["secret_names"] == ["A"]
    rotated: Api = await serve(secrets_key=[KEY, "x" * 42 + "A"])
    assert (await rotated.call("GET", at, ann)).json["secret_names"] == ["A"]


async def test_without_a_key_an_app_can_have_no_secrets_and_no_webhooks(serve: Serve) -> None:
    api: Api = await serve()
    ann = await api.person()
    for secret in ({"secrets": {"A": "a"}}, {"deploy_token": "t"}):
        answer = await make(api, ann, **secret)
        assert (answer.status, "SECRETS_KEY" in answer.json["detail"]) == (422, True)
    app = await made(api, ann)
    assert app["hook_secret"] is None
    answer = await api.call("POST", f"/api/v1/apps/{app['id']}/hook-secret", ann)
    assert (answer.status, "SECRETS_KEY" in answer.json["detail"]) == (422, True)


async def test_a_deleted_app_goes_when_a_worker_has_removed_it(api: Api, ann: Person) -> None:
    app = await made(api, ann)
    at = f"/api/v1/apps/{app['id']}"
    (first,) = (await api.call("GET", f"{at}/deployments", ann)).json["items"]
    for _ in range(2):
        answer = await api.call("DELETE", at, ann)
        assert (answer.status, answer.json["deleting"]) == (202, True)
    assert (await api.call("GET", f"/api/v1/deployments/{first['id']}", ann)).json["status"] == "cancelled"
    requests = (("PUT", at), ("POST", f"{at}/deployments"), ("POST", f"{at}/hook-secret"))
    assert [(await api.call(method, path, ann, {})).status for method, path in requests] == [409, 409, 409]
    assert (await make(api, ann)).status == 409
    async with api.pool.acquire() as connection, connection.transaction():
        await apps.remove(connection, app["id"])
    assert (await api.call("GET", at, ann)).status == 404
    assert (await api.call("GET", f"/api/v1/deployments/{first['id']}", ann)).status == 404
    assert (await make(api, ann)).status == 201


async def test_what_has_apps_is_not_deleted_and_apps_outlive_who_made_them(
    api: Api, ann: Person, bob: Person, root: Person
) -> None:
    workspace = await api.workspace(ann, member=bob)
    app = await made(api, bob, workspace_id=workspace)
    answer = await api.call("DELETE", f"/api/v1/workspaces/{workspace}", ann)
    assert (answer.status, list(answer.errors)) == (409, ["apps"])
    assert (await api.call("DELETE", f"/api/v1/users/{bob.id}", root)).status == 204
    kept = (await api.call("GET", f"/api/v1/apps/{app['id']}", ann)).json
    assert (kept["name"], kept["created_by"]) == ("shop", None)
    await made(api, ann, "own")
    answer = await api.call("DELETE", f"/api/v1/users/{ann.id}", root)
    assert (answer.status, list(answer.errors)) == (409, ["apps"])


# Deployments


async def deploy(api: Api, who: Person, app: Any, body: Any = None, **options: Any) -> Answer:
    return await api.call("POST", f"/api/v1/apps/{app['id']}/deployments", who, body, **options)


async def test_a_deployment_may_be_of_another_branch_or_of_one_commit(api: Api, ann: Person) -> None:
    app = await made(api, ann, branch="main")
    for body, branch, commit in (
        (None, "main", None),
        ({}, "main", None),
        ({"branch": "topic"}, "topic", None),
        ({"branch": None, "commit_id": COMMIT}, "main", COMMIT),
    ):
        answer = await deploy(api, ann, app, body)
        assert answer.status == 201
        assert (answer.json["branch"], answer.json["commit_id"], answer.json["cause"]) == (branch, commit, "manual")
        assert answer.headers["Location"] == f"/api/v1/deployments/{answer.json['id']}"
    for wrong in ({"branch": "--x"}, {"commit_id": "main"}, {"commit_id": COMMIT[:7]}, {"commit_id": COMMIT + "\n"}):
        answer = await deploy(api, ann, app, wrong)
        assert (answer.status, list(answer.errors)) == (422, list(wrong))
    listed = (await api.call("GET", f"/api/v1/apps/{app['id']}/deployments?page_size=2", ann)).json
    assert ([one["number"] for one in listed["items"]], listed["pagination"]["total"]) == ([5, 4], 5)
    listed = (await api.call("GET", f"/api/v1/apps/{app['id']}/deployments?status=live", ann)).json
    assert listed["items"] == []


async def test_a_repeated_request_deploys_once(api: Api, ann: Person) -> None:
    app = await made(api, ann)
    headers = {"Idempotency-Key": "k"}
    answers = await asyncio.gather(*(deploy(api, ann, app, {}, headers=headers) for _ in range(4)))
    assert {answer.json["number"] for answer in answers} == {2}
    assert {answer.headers["Location"] for answer in answers} == {f"/api/v1/deployments/{answers[0].json['id']}"}


async def test_deployments_are_cancelled_and_gone_back_to(api: Api, ann: Person) -> None:
    app = await made(api, ann)
    deployment = (await deploy(api, ann, app)).json
    at = f"/api/v1/deployments/{deployment['id']}"
    await api.fetch("UPDATE deployments SET status = 'deploying' WHERE id = $1", deployment["id"])
    assert [(await api.call("POST", f"{at}/cancel", ann)).status for _ in range(2)] == [202, 202]
    refused = await api.call("POST", f"{at}/rollback", ann)
    assert (refused.status, refused.json["detail"]) == (409, "Deployment 2 of shop never served: it is deploying.")
    await api.fetch(
        """UPDATE deployments SET status = 'live', finished_at = now(), image = 'i', image_id = 'sha256:1',
                  url = 'http://shop.apps.test' WHERE id = $1""",
        deployment["id"],
    )
    assert (await api.call("POST", f"{at}/cancel", ann)).status == 409
    shown = (await api.call("GET", f"/api/v1/apps/{app['id']}", ann)).json
    assert (shown["live_deployment"], shown["url"]) == (deployment["id"], "http://shop.apps.test")
    headers = {"Idempotency-Key": "r"}
    back, again = [await api.call("POST", f"{at}/rollback", ann, headers=headers) for _ in range(2)]
    assert (back.status, back.json["cause"], back.json["rollback_of"]) == (201, "rollback", deployment["id"])
    assert (back.json["number"], back.headers["Location"]) == (3, f"/api/v1/deployments/{back.json['id']}")
    assert (again.body, again.headers["Location"]) == (back.body, back.headers["Location"])
    cancelled = await api.call("POST", f"/api/v1/deployments/{back.json['id']}/cancel", ann)
    assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
    deeds = [row["action"] for row in await api.fetch("SELECT action FROM audit_log ORDER BY id")]
    assert deeds == [
        "app.create", "deployment.create", "deployment.cancel", "deployment.cancel", "deployment.rollback",
        "deployment.cancel",
    ]  # fmt: skip
