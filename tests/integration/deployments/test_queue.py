"""What is put into the queue of deployments, and taken back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from auth.errors import NotVisible, Taken
from orchestrator.database import Pool
from orchestrator.deployments import apps, queue, record
from orchestrator.deployments.contract import AppSecrets, AppSettings
from orchestrator.deployments.record import Deployment
from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import Conflict, Invalid, NotFound, SecretsUnreadable
from tests.integration.deployments.conftest import KEYS, Place

COMMIT = "0123456789abcdef0123456789abcdef01234567"


async def test_deployments_of_an_app_are_numbered_without_gaps_however_many_are_made_at_once(place: Place) -> None:
    app, other = await place.app(), await place.app("blog")
    made = await asyncio.gather(*(place.enqueue(one) for one in [app, other] * 8))
    for one in (app, other):
        assert sorted(d.number for d in made if d.app_id == one.id) == list(range(1, 9))
    assert {d.status for d in made} == {"queued"}


async def test_a_deployment_is_made_with_what_the_app_is_then(pool: Pool, place: Place) -> None:
    app = await place.app(port=3000, secrets=AppSecrets(env={"A": "old"}))
    first = await place.enqueue(app, cause="create")
    async with pool.acquire() as connection, connection.transaction():
        await apps.update(
            connection, KEYS, app.id,
            columns={"branch": "main", "repo_url": "https://git.test/new"},
            settings={"port": 4000},
            secrets={"env": {"A": "new", "B": "b"}, "deploy_token": "t"},
        )  # fmt: skip
    second = await place.enqueue(app)
    third = await place.enqueue(app, branch="topic", commit_id=COMMIT, commit_message="Why\0")
    async with pool.acquire() as connection:
        recipes = [await record.recipe(connection, one, KEYS) for one in (first, second, third)]
    assert [settings.port for settings, _ in recipes] == [3000, 4000, 4000]
    assert [secrets.env for _, secrets in recipes] == [{"A": "old"}, {"A": "new", "B": "b"}, {"A": "new", "B": "b"}]
    assert [secrets.deploy_token for _, secrets in recipes] == ["", "t", "t"]
    assert [d.repo_url for d in (first, second)] == ["https://git.test/shop", "https://git.test/new"]
    assert [(d.branch, d.commit_id, d.commit_message) for d in (first, second, third)] == [
        (None, None, ""), ("main", None, ""), ("topic", COMMIT, "Why�")
    ]  # fmt: skip
    assert [(d.cause, d.number) for d in (first, second, third)] == [("create", 1), ("manual", 2), ("manual", 3)]


async def test_what_is_queued_is_told_and_announced_to_workers(pool: Pool, place: Place) -> None:
    app = await place.app()
    await place.told()
    hints: asyncio.Queue[str] = asyncio.Queue()
    async with pool.acquire() as listener:
        hint: Any = lambda *args: hints.put_nowait(args[2])  # noqa: E731
        await listener.add_listener("deployments", hint)
        deployment = await place.enqueue(app)
        async with asyncio.timeout(10):
            assert await hints.get() == "deployments"
        async with pool.acquire() as connection, connection.transaction():
            await queue.cancel(connection, deployment.id)
        async with asyncio.timeout(10):
            assert await hints.get() == "deployments"
        await listener.remove_listener("deployments", hint)
    told = await place.told()
    assert [data["status"] for _, channel, data in told if channel == f"deployment:{deployment.id}"] == [
        "queued", "cancelled"
    ]  # fmt: skip


async def _cancel(place: Place, deployment: Deployment) -> Deployment:
    async with place.pool.acquire() as connection, connection.transaction():
        return await queue.cancel(connection, deployment.id)


async def test_what_waits_is_cancelled_at_once_and_what_is_worked_on_by_its_worker(place: Place) -> None:
    app = await place.app()
    waiting, running = await place.enqueue(app), await place.enqueue(app)
    await place.set(running, status="deploying")
    cancelled = await _cancel(place, waiting)
    assert (cancelled.status, cancelled.reason, cancelled.finished) == ("cancelled", "Cancelled", True)
    for _ in range(2):
        asked = await _cancel(place, running)
        assert (asked.status, asked.cancel_requested, asked.finished) == ("deploying", True, False)
    seen = [data for _, channel, data in await place.told() if channel == f"deployment:{running.id}"]
    assert [data["cancel_requested"] for data in seen] == [False, True], "asked twice is told once"


@pytest.mark.parametrize("status", ["live", "retired", "failed", "cancelled", "superseded"])
async def test_what_has_ended_is_not_cancelled(place: Place, status: str) -> None:
    deployment = await place.enqueue(await place.app())
    await place.set(deployment, status=status)
    with pytest.raises(Conflict, match=f"has ended: it is {status}"):
        await _cancel(place, deployment)


async def _roll_back(place: Place, deployment: Deployment) -> Deployment:
    async with place.pool.acquire() as connection, connection.transaction():
        return await queue.roll_back(connection, deployment.id, user_id=None)


async def test_a_rollback_has_the_image_settings_and_secrets_of_what_served(pool: Pool, place: Place) -> None:
    app = await place.app(port=3000, domains=("old.test",), secrets=AppSecrets(env={"A": "old"}))
    old = await place.enqueue(app)
    image = {"image": "cluster-code-shop:1", "image_id": "sha256:1", "commit_id": COMMIT, "commit_message": "Why"}
    await place.set(old, status="retired", **image)
    async with pool.acquire() as connection, connection.transaction():
        await apps.update(
            connection, KEYS, app.id, columns={}, secrets={"env": {"A": None}},
            settings={"port": 1, "domains": ("new.test",), "keep_images": 7},
        )  # fmt: skip
    back = await _roll_back(place, old)
    assert (back.cause, back.rollback_of, back.number, back.status) == ("rollback", old.id, 2, "queued")
    assert {name: getattr(back, name) for name in image} == image
    async with pool.acquire() as connection:
        settings, secrets = await record.recipe(connection, back, KEYS)
    assert (settings.port, secrets.env) == (3000, {"A": "old"})
    assert (settings.domains, settings.keep_images) == (("new.test",), 7), "the old one may be another app's by now"


async def test_there_is_no_way_back_to_what_never_served_or_whose_image_is_gone(place: Place) -> None:
    deployment = await place.enqueue(await place.app(keep_images=1))
    with pytest.raises(Conflict, match="never served: it is queued"):
        await _roll_back(place, deployment)
    await place.set(deployment, status="retired")
    with pytest.raises(Conflict, match="keeps the images of 1 deployments"):
        await _roll_back(place, deployment)
    with pytest.raises(NotFound):
        async with place.pool.acquire() as connection:
            await queue.roll_back(connection, 99, user_id=None)


async def test_deleting_an_app_ends_what_is_under_way_and_takes_nothing_more(pool: Pool, place: Place) -> None:
    app = await place.app()
    first, running, waiting = [await place.enqueue(app) for _ in range(3)]
    await place.set(first, status="live", url="http://shop.localhost", image="i", image_id="sha256:1")
    await place.set(running, status="deploying")
    for _ in range(2):
        async with pool.acquire() as connection, connection.transaction():
            deleted = await queue.delete_app(connection, app.id)
        assert (deleted.deleting, deleted.live_deployment, deleted.url) == (True, first.id, "http://shop.localhost")
    async with pool.acquire() as connection:
        states = [await record.get(connection, one.id) for one in (first, running, waiting)]
    assert [(one.status, one.cancel_requested) for one in states if one] == [
        ("live", False), ("deploying", True), ("cancelled", True)
    ]  # fmt: skip
    for refused in (place.enqueue(app), _roll_back(place, first), _update(place, app.id, settings={"port": 1})):
        with pytest.raises(Conflict, match="is being deleted"):
            await refused
    with pytest.raises(Taken):
        await place.app()
    await place.told()
    async with pool.acquire() as connection, connection.transaction():
        await apps.tell_waiting(connection, app.id, "Docker does not answer.")
        await apps.tell_waiting(connection, app.id, "Docker does not answer.")
        await apps.remove(connection, app.id)
    assert [(event_type, channel, data["message"]) for event_type, channel, data in await place.told()] == [
        (event_type, channel, "Docker does not answer.")
        for event_type in ("app.updated", "app.deleted")
        for channel in (f"user:{place.user_id}", f"workspace:{place.workspace_id}")
    ]
    assert (await place.app()).id != app.id, "the name is free again"
    async with pool.acquire() as connection:
        assert await record.get(connection, first.id) is None


async def _update(place: Place, app_id: int, keys: Keyring = KEYS, **changes: Any) -> apps.App:
    async with place.pool.acquire() as connection, connection.transaction():
        return await apps.update(
            connection, keys, app_id, **{"columns": {}, "settings": {}, "secrets": {}, **changes}
        )  # fmt: skip


async def test_a_domain_is_of_one_app_however_many_want_it_at_once(place: Place) -> None:
    made = await asyncio.gather(
        *(place.app(f"app{number}", domains=("shop.test",)) for number in range(4)), return_exceptions=True
    )
    assert sum(isinstance(one, apps.App) for one in made) == 1
    refused = [one for one in made if isinstance(one, BaseException)]
    assert {(type(one), str(one)) for one in refused} == {(Taken, "Another app has the domain shop.test.")}
    other = await place.app("other", domains=("other.test",))
    with pytest.raises(Taken):
        await _update(place, other.id, settings={"domains": ("other.test", "shop.test")})
    changed = await _update(place, other.id, settings={"domains": ("other.test", "third.test")})
    assert changed.settings.domains == ("other.test", "third.test")


@pytest.mark.parametrize("status", ["queued", "deploying", "live"])
async def test_a_domain_that_an_app_gave_up_is_free_when_it_is_not_routed_there_any_more(
    place: Place, status: str
) -> None:
    app = await place.app(domains=("shop.test",))
    deployment = await place.enqueue(app)
    await place.set(deployment, status=status)
    await _update(place, app.id, settings={"domains": ()})
    with pytest.raises(Taken, match=r"^Another app serves the domain shop\.test until it is deployed again\.$"):
        await place.app("other", domains=("shop.test",))
    await place.set(deployment, status="retired")
    assert (await place.app("other", domains=("shop.test",))).settings.domains == ("shop.test",)


async def test_secrets_are_merged_by_name(place: Place) -> None:
    app = await place.app(secrets=AppSecrets(env={"A": "a", "B": "b"}, deploy_key="key", deploy_user="ann"))
    changed = await _update(place, app.id, secrets={"env": {"A": None, "C": "c"}, "deploy_user": None})
    assert KEYS.decrypt_secrets(changed.secrets, app.id) == AppSecrets(env={"B": "b", "C": "c"}, deploy_key="key")
    many = {f"N{number}": "x" for number in range(254)}
    await _update(place, app.id, secrets={"env": many})
    for more in ({"D": "d"}, {"N1": "x" * (256 << 10)}):
        with pytest.raises(Invalid, match=r"^An app has 256 secrets of 262144 bytes in all at most") as refused:
            await _update(place, app.id, secrets={"env": more})
        assert refused.value.field == "secrets"
    changed = await _update(place, app.id, secrets={"env": None, "deploy_key": None})
    assert changed.secrets is None


async def test_a_token_is_not_sent_to_another_host(place: Place) -> None:
    app = await place.app(secrets=AppSecrets(deploy_token="t0ken"))
    same = await _update(place, app.id, columns={"repo_url": "https://git.test/other"})
    assert same.repo_url == "https://git.test/other"
    for url in ("https://evil.test/x", "http://git.test/x", "https://git.test:444/x", "git@git.test:x"):
        with pytest.raises(Invalid, match=r"^The deploy_token is for git\.test: ") as refused:
            await _update(place, app.id, columns={"repo_url": url}, secrets={"env": {"A": "a"}})
        assert refused.value.field == "deploy_token"
    await _update(place, app.id, columns={"repo_url": "https://evil.test/x"}, secrets={"deploy_token": None})
    await _update(place, app.id, columns={"repo_url": "https://other.test/x"})


async def test_secrets_whose_key_is_lost_can_only_be_removed(place: Place) -> None:
    app = await place.app(secrets=AppSecrets(env={"A": "a"}))
    keys = Keyring(["x" * 42 + "A"])
    with pytest.raises(SecretsUnreadable, match="SECRETS_KEY"):
        await _update(place, app.id, keys, secrets={"env": {"B": "b"}})
    await _update(place, app.id, keys, settings={"port": 1})
    everything = {"env": None, "deploy_key": None, "deploy_user": None, "deploy_token": "t"}
    changed = await _update(place, app.id, keys, secrets=everything)
    assert keys.decrypt_secrets(changed.secrets, app.id) == AppSecrets(deploy_token="t")


async def test_without_a_key_there_are_apps_but_neither_secrets_nor_webhooks(pool: Pool, place: Place) -> None:
    values: dict[str, Any] = {
        "workspace_id": place.workspace_id, "created_by": place.user_id, "repo_url": "https://git.test/shop",
        "branch": None, "auto_deploy": True, "settings": AppSettings(),
    }  # fmt: skip
    async with pool.acquire() as connection:
        app, hook_secret = await apps.create(connection, Keyring([]), name="a", secrets=AppSecrets(), **values)
        assert (hook_secret, app.hook_secret, app.secrets) == (None, None, None)
        with pytest.raises(Invalid, match="SECRETS_KEY"):
            await apps.renew_hook_secret(connection, Keyring([]), app.id)
        with pytest.raises(Invalid, match="SECRETS_KEY"):
            await apps.create(connection, Keyring([]), name="b", secrets=AppSecrets(env={"A": "a"}), **values)
        with pytest.raises(NotVisible):
            await apps.create(connection, KEYS, name="c", secrets=AppSecrets(), **values | {"workspace_id": 99})


async def test_a_delivery_is_obeyed_once_however_often_it_comes(pool: Pool, place: Place) -> None:
    app, other = await place.app(), await place.app("other")

    async def deliver(app_id: int, delivery: str) -> tuple[int | None, bool]:
        async with pool.acquire() as connection, connection.transaction():
            known, made = await queue.deliver(connection, app_id, delivery, {"branch": "main", "commit_id": COMMIT})
            return known, made is not None

    answers = await asyncio.gather(*(deliver(app.id, "github:1") for _ in range(6)))
    assert len({known for known, _ in answers}) == 1
    assert sum(made for _, made in answers) == 1
    assert (await deliver(app.id, "github:2"))[1]
    assert (await deliver(other.id, "github:1"))[1]
    async with pool.acquire() as connection:
        assert [(d.number, d.cause, d.user_id) for d in (await _all(connection, app.id))] == [
            (2, "push", None), (1, "push", None)
        ]  # fmt: skip
        await connection.execute(
            "UPDATE hook_deliveries SET at = now() - interval '8 days' WHERE delivery = 'github:1'"
        )
        assert await queue.forget_deliveries(connection) == 2
        assert await connection.fetchval("SELECT count(*) FROM hook_deliveries") == 1


async def _all(connection: Any, app_id: int) -> list[Deployment]:
    found, total = await queue.list_page(connection, app_id, status="queued", page=1, page_size=10)
    assert total == len(found)
    assert await queue.list_page(connection, app_id, status="live", page=1, page_size=10) == ([], 0)
    return found
