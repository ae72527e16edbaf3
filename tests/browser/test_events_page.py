"""The page of live events, as a person uses it."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import asyncpg
import orjson
import pytest
from playwright.async_api import Page, expect

from orchestrator.eventlog import outbox
from orchestrator.events import CLUSTER, SESSION_EVENT, SESSION_POD, Event, session_channel
from tests.browser.conftest import Stage
from tests.integration.endtoend.server import DEADLINE, PASSWORD

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]
expect.set_options(timeout=DEADLINE * 1000)


async def opened(stage: Stage) -> tuple[Page, list[str]]:
    """The page, and what its console complains of: the page's policy, above all."""
    page = await stage.context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    await page.goto(f"{stage.url}/")
    await page.get_by_role("link", name="Live events").click()
    return page, complaints


async def test_signed_in_by_password_one_sees_events_live_and_through_a_cut(stage: Stage) -> None:
    page, complaints = await opened(stage)
    await page.get_by_label("E-mail").fill("admin@localhost")
    await page.get_by_label("Password").fill("wrong")
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("alert")).to_be_visible()
    assert complaints.pop().endswith("401 (Unauthorized)")
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.locator("#state")).to_have_text("connected")
    await expect(page.get_by_role("alert")).to_be_hidden()
    await stage.publish(2)
    await expect(page.locator("tr.event")).to_have_count(2)

    stage.proxy.cut()
    await stage.publish(2)
    await expect(page.locator("tr.event")).to_have_count(4)
    rows = await page.locator("tr.event").all_inner_texts()
    assert [name for row in rows for name in stage.published if f'"{name}"' in row] == stage.published[::-1]
    await expect(page.locator("#reconnects")).to_have_text("1")
    await expect(page.locator("#count")).to_have_text("4")
    await expect(page.get_by_text("connected again, resuming after")).to_be_visible()

    await page.get_by_role("button", name="Disconnect").click()
    await expect(page.locator("#state")).to_have_text("disconnected")
    await page.get_by_role("button", name="Connect", exact=True).click()
    await expect(page.locator("#state")).to_have_text("connected")
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_label("Password")).to_be_visible()
    # Cut connections are told on the console by the browser itself.
    assert [text for text in complaints if "Content Security Policy" in text or "Error:" in text] == []
    await page.close()


async def test_with_a_token_one_chooses_channels_and_is_told_what_is_refused(stage: Stage) -> None:
    token = (await stage.client.call("POST", "/tokens", {"name": "page", "scopes": ["read"]}))["token"]
    page, complaints = await opened(stage)
    await page.get_by_label("Main or API token").fill(token)
    await page.get_by_role("button", name="Use the token").click()
    await expect(page.locator("#state")).to_have_text("connected")
    workspaces = await stage.client.call("GET", "/workspaces")
    channel = f"workspace:{workspaces['items'][0]['id']}"
    for name in (channel, "session:99"):
        await page.get_by_label("Channel", exact=True).fill(name)
        await page.get_by_role("button", name="Add").click()
    await expect(page.get_by_role("alert")).to_have_text("There is no such session.")
    await expect(page.get_by_text(f"subscribed to {channel}")).to_be_visible()
    await expect(page.locator("#channels li")).to_have_count(3)
    await page.get_by_role("button", name=f"Leave {channel}").click()
    await expect(page.locator("#channels li")).to_have_count(2)
    assert token not in await page.content()
    assert complaints == []
    await page.close()


def pod(session: int, version: int, name: str, *containers: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The data of `session.pod`."""
    usual = {"phase": "Pending", "ready": False, "node": "worker", "reason": "", "message": "", "change": "modified"}
    return {
        "session_id": session, "provider": "k8s", "namespace": "n", "uid": name, "resource_version": str(version),
        "pod": name, "containers": list(containers), **usual, **more,
    }  # fmt: skip


def container(name: str, state: str, **more: Any) -> dict[str, Any]:
    usual = {"init": False, "ready": False, "reason": "", "message": "", "restarts": 0, "exit_code": None}
    return {"name": name, "state": state, **usual, **more}


class Cluster:
    """What an orchestrator that watches a cluster would write."""

    def __init__(self, connection: asyncpg.Connection, session: int) -> None:
        self._connection = connection
        self.session = session

    @classmethod
    async def begin(cls, connection: asyncpg.Connection) -> Cluster:
        """With a session that is stopped, so that nobody works on it."""
        provider = await connection.fetchval(
            "INSERT INTO providers (name, kind, enabled) VALUES ('k8s', 'kubernetes', false) RETURNING id"
        )
        session = await connection.fetchval(
            """WITH p AS (INSERT INTO projects (workspace_id, name) SELECT min(id), 'p' FROM workspaces RETURNING *)
               INSERT INTO sessions (project_id, project_uuid, workspace_id, provider_id, provider, machine_config,
                                     machine, namespace, container_name, expires_at, desired, status,
                                     observed_generation)
               SELECT id, uuid, workspace_id, $1, 'k8s', 'm', '{}', uuid::text, 's', now() + interval '1 day',
                      'stopped', 'stopped', 1 FROM p RETURNING id""",
            provider,
        )
        return cls(connection, session)

    async def hold(self, data: dict[str, Any]) -> None:
        """Note what was told of a pod before anybody looked."""
        await self._connection.execute(
            """INSERT INTO cluster_objects (provider_id, uid, kind, session_id, version, digest, told)
               SELECT id, $1, 'pod', $2, $3, 0, $4 FROM providers WHERE name = 'k8s'""",
            data["uid"], self.session, int(data["resource_version"]), orjson.dumps(data).decode(),
        )  # fmt: skip

    async def tell(self, event_type: str, data: dict[str, Any]) -> None:
        """On both channels."""
        channels = (session_channel(self.session), CLUSTER)
        await outbox.add(self._connection, *(Event(event_type, channel, data) for channel in channels))


async def test_the_pods_of_a_session_are_shown_as_they_are_and_as_they_become(stage: Stage) -> None:
    connection = await asyncpg.connect(stage.server._announced()["database_url"])
    cluster = await Cluster.begin(connection)
    number, name = cluster.session, f"session-x-{uuid4().hex[:5]}"
    await cluster.hold(pod(number, 5, name, container("preview", "waiting", reason="ContainerCreating")))
    page, complaints = await opened(stage)
    token = (await stage.client.call("POST", "/tokens", {"name": "pods", "scopes": ["read", "admin"]}))["token"]
    await page.get_by_label("Main or API token").fill(token)
    await page.get_by_role("button", name="Use the token").click()
    await expect(page.locator("#state")).to_have_text("connected")
    await expect(page.locator("#pods-section")).to_be_hidden()
    await page.get_by_label("Channel", exact=True).fill(f"session:{number}")
    await page.get_by_role("button", name="Add").click()

    shown = page.locator(f'#pods > li[data-pod="{name}"]')
    line = shown.locator("li")
    await expect(shown.locator("p").first).to_have_text(f"{name}Pending · session {number} · on worker")
    await expect(line).to_have_text("previewContainerCreating")
    await expect(shown).to_have_attribute("data-tone", "busy")

    crashed = container("preview", "waiting", reason="CrashLoopBackOff", message="Ended.", restarts=2, exit_code=1)
    await cluster.tell(SESSION_POD, pod(number, 6, name, crashed, container("chat", "running", ready=True)))
    await expect(line).to_have_text(["previewCrashLoopBackOff, exit code 1, 2 restarts Ended.", "chatready"])
    await expect(shown).to_have_attribute("data-tone", "bad")
    colours = await line.locator(".tone").evaluate_all("all => all.map((one) => getComputedStyle(one).color)")
    assert colours[0] != colours[1]
    warning = {
        "namespace": "n", "type": "Warning", "reason": "BackOff", "message": "Back-off.", "count": 3,
        "object": f"Pod/{name}", "container": "preview",
    }  # fmt: skip
    await cluster.tell(SESSION_EVENT, warning)
    await expect(shown.locator("p").last).to_have_text("BackOff: Back-off. (3 times)")
    await expect(page.get_by_text(f"Pod/{name} [preview] (3 times) Back-off.")).to_have_count(1)

    # What comes late, and is older, changes nothing; through the other channel nothing comes twice.
    await page.get_by_label("Channel", exact=True).fill("cluster")
    await page.get_by_role("button", name="Add").click()
    await expect(page.get_by_text("subscribed to cluster")).to_be_visible()
    ready = container("preview", "running", ready=True, restarts=3, exit_code=1)
    await cluster.tell(SESSION_POD, pod(number, 9, name, ready, phase="Running", ready=True))
    await cluster.tell(SESSION_POD, pod(number, 7, name, crashed))
    await cluster.tell(SESSION_POD, pod(number, 10, "other", phase="Running", ready=True, change="added"))
    await expect(page.locator("#pods > li")).to_have_count(2)
    await expect(line).to_have_text("previewready, 3 restarts")
    await expect(shown).to_have_attribute("data-tone", "good")
    await cluster.tell(SESSION_POD, pod(number, 11, "other", change="deleted"))
    await expect(page.locator("#pods > li")).to_have_count(1)

    for channel in (f"session:{number}", "cluster"):
        await expect(shown).to_be_visible()
        await page.get_by_role("button", name=f"Leave {channel}").click()
    await expect(page.locator("#pods-section")).to_be_hidden()
    assert complaints == []
    await page.close()
    await connection.close()
