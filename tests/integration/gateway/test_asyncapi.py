"""What a gateway really sends is what docs/asyncapi.yaml describes, to the last key."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import aiohttp
import msgspec
import orjson

from gateway.realtime.protocol import CloseCode
from orchestrator.bridge import visible
from orchestrator.cluster.objects import Deployment, Ingress, Namespace, Pod
from orchestrator.cluster.objects import Event as KubernetesEvent
from orchestrator.deployments import apps, leases, record
from orchestrator.deployments.logs import DeploymentLog
from orchestrator.eventlog import outbox
from orchestrator.events import Event, deployment_channel, session_channel
from orchestrator.logs import _event, _Line
from tests import asyncapi
from tests.integration.gateway.conftest import Api, Person


async def short_token(api: Api, who: Person) -> str:
    return (await api.call("POST", "/api/v1/auth", who)).json["short_token"]


async def carry(api: Api) -> None:
    """Do the work of the orchestrator's relay."""
    async with api.pool.acquire() as connection:
        while await outbox.relay_batch(connection, api.context.log):
            pass


async def make_everything_happen(api: Api, owner: Person, other: Person) -> int:
    """Everything that is told on a workspace's channel, in a new workspace; its session."""
    workspace = (await api.call("POST", "/api/v1/workspaces", owner, {"name": "team"})).json["id"]
    at = f"/api/v1/workspaces/{workspace}"
    await api.call("PUT", at, owner, {"name": "crew"})
    await api.call("POST", f"{at}/members", owner, {"user_id": other.id, "role": "viewer"})
    await api.call("PUT", f"{at}/members/{other.id}", owner, {"role": "member"})
    await api.call("DELETE", f"{at}/members/{other.id}", owner)
    for _ in range(2):
        made = (await api.call("POST", "/api/v1/projects", owner, {"name": "site", "workspace_id": workspace})).json
        await api.call("PUT", f"/api/v1/projects/{made['id']}", owner, {"name": "app"})
    session = await api.session(owner, made)
    gone = (await api.call("POST", "/api/v1/workspaces", owner, {"name": "gone"})).json["id"]
    spare = (await api.call("POST", "/api/v1/projects", owner, {"name": "site", "workspace_id": gone})).json["id"]
    assert (await api.call("DELETE", f"/api/v1/projects/{spare}", owner)).status == 204
    assert (await api.call("DELETE", f"/api/v1/workspaces/{gone}", owner)).status == 204
    return int(session["id"])


async def deploy(api: Api, owner: Person) -> str:
    """Everything that is told of apps and their deployments; the channel of one that has said something."""
    body = {"workspace_id": owner.workspace_id, "repo_url": "https://git.test/shop", "cpu": 0.5}
    gone = (await api.call("POST", "/api/v1/apps", owner, {**body, "name": "gone"})).json["id"]
    assert (await api.call("DELETE", f"/api/v1/apps/{gone}", owner)).status == 202
    app = (await api.call("POST", "/api/v1/apps", owner, {**body, "name": "shop"})).json["id"]
    await api.call("PUT", f"/api/v1/apps/{app}", owner, {"memory": "64Mi", "domains": ["shop.test"]})
    async with api.pool.acquire() as connection, connection.transaction():
        # A worker's part.
        await apps.remove(connection, gone)
        (claimed,) = await leases.claim(connection, 30.0, 1)
        steps = record.ended(record.begun(record.begun([], "clone"), "build"), "failed", 0.5)
        claimed = await record.write(connection, claimed, step="build", steps=steps, branch="main")
    assert claimed.lease_owner is not None
    written = DeploymentLog(
        api.pool, deployment_id=claimed.id, app_id=app, owner=claimed.lease_owner, secrets=(), limit=1 << 20,
        on_stored=lambda _: None,
    )  # fmt: skip
    written.begin("build")
    written.say("Step 1/3 : FROM …\n")
    await written.close()
    return deployment_channel(claimed.id)


def notice(session_id: int) -> Event:
    """A line of output, as the orchestrator tells it."""
    return _event(_Line(session_id, datetime(2026, 3, 1, tzinfo=UTC), "preview", "stdout", "listening"))


# Objects of a cluster, with and without what may be missing in them.
_META = {"name": "session-1", "namespace": "0b9f", "uid": "3a1c", "resourceVersion": "48123"}
_ENDED = {"exitCode": 1, "reason": "Error", "finishedAt": "2026-03-01T11:02:03Z"}
_STATUSES = [
    {"name": "preview", "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "…"}},
     "lastState": {"terminated": _ENDED}},
    {"name": "chat", "ready": True, "state": {"running": {"startedAt": "2026-03-01T11:02:03Z"}}},
    {"name": "vscode", "state": {"terminated": _ENDED}},
    {"name": "shell"},
]  # fmt: skip
_POD = {"spec": {"nodeName": "worker"}, "status": {"phase": "Running", "containerStatuses": _STATUSES}}
_CONDITION = {"type": "Available", "status": "True", "reason": "x", "message": "y"}
_DEPLOYMENT = {"spec": {"replicas": 1}, "status": {"readyReplicas": 1, "conditions": [_CONDITION]}}
_EVENT = {
    "involvedObject": {"kind": "Pod", "name": "session-1-x", "fieldPath": "spec.containers{preview}"}, "count": 3,
    "type": "Warning", "reason": "BackOff", "message": "…", "firstTimestamp": "2026-03-01T11:02:03Z",
    "lastTimestamp": "2026-03-01T11:02:03Z",
}  # fmt: skip
_INGRESS = {
    "spec": {"rules": [{"host": "a.example.com"}]},
    "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}, {"hostname": "b.example.com"}]}},
}
_SEEN = [
    (visible.POD, Pod, _POD),
    (visible.EVENT, KubernetesEvent, _EVENT),
    (visible.DEPLOYMENT, Deployment, _DEPLOYMENT),
    (visible.NAMESPACE, Namespace, {"status": {"phase": "Terminating"}}),
    (visible.INGRESS, Ingress, _INGRESS),
]


def cluster_notices(session_id: int) -> list[Event]:
    """What happens in a cluster, as its watch tells it."""
    told = []
    for kind, struct, full in _SEEN:
        for session, content, change in ((session_id, full, "added"), (None, {}, "modified"), (None, {}, "deleted")):
            thing = msgspec.convert({"metadata": _META, **content}, struct)
            body, _ = visible.look(kind, thing)
            data = orjson.loads(visible.told(kind, b'"k8s"', session, change, thing.metadata, body))
            channels = ["cluster", session_channel(session_id)] if kind.to_session and session else ["cluster"]
            told += [Event(kind.event_type, channel, data) for channel in channels]
    return told


async def test_everything_that_is_sent_is_described(api: Api, root: Person, ann: Person, bob: Person) -> None:
    sent: list[dict[str, Any]] = []
    async with AsyncExitStack() as stack:
        query = {"token": await short_token(api, root), "channels": "app:1,broadcast", "batch": "1"}
        websocket = await stack.enter_async_context(api.client.ws_connect("/ws", params=query))
        query = {"token": await short_token(api, root), "channels": "app:1"}
        stream = await stack.enter_async_context(api.client.get("/api/v1/events", params=query))
        session = await make_everything_happen(api, root, bob)
        deployment = await deploy(api, root)
        await carry(api)
        since = f"{api.context.log.epoch}:0"
        workspaces = [row["id"] for row in await api.fetch("SELECT id FROM workspaces")]
        actions: list[Any] = [
            {"action": "ping", "id": "a"},
            {"action": "subscribe", "channel": f"session:{session}", "since": since, "id": "b"},
            {"action": "subscribe", "channel": "cluster", "since": since},
            {"action": "subscribe", "channel": deployment, "since": since},
            *({"action": "subscribe", "channel": f"workspace:{number}", "since": since} for number in workspaces),
            {"action": "unsubscribe", "channel": "broadcast"},
            {"action": "subscribe", "channel": "nonsense"},
            {"action": "subscribe", "channel": "session:999", "id": "c"},
            {"action": "unsubscribe", "channel": f"user:{root.id}"},
            {"action": "refresh", "token": "nonsense"},
            {"action": "refresh", "token": await short_token(api, root)},
            {"action": "dance"},
            [1],
        ]
        for action in actions:
            await websocket.send_str(orjson.dumps(action).decode())
        await api.context.log.publish([notice(session), Event("build.done", "app:1", {"image": "x"})])
        await api.context.log.publish(cluster_notices(session))
        # Of another service, which may send anything: only the envelope is sure.
        await api.context.log.publish([Event("build.log", "app:1", "text")])  # type: ignore[arg-type]
        await websocket.send_str('{"action":"ping","id":"last"}')
        while not (sent and sent[-1]["data"] == {"id": "last"}):
            read = orjson.loads(await websocket.receive_str(timeout=20))
            sent += read if isinstance(read, list) else [read]
        assert {session_channel(session), deployment} <= {message["channel"] for message in sent}

        for one in tuple(api.context.hub.connections.values()):
            one.expires_at = time.time() + 20
            one.due = 0.0
        assert (await websocket.receive_json(timeout=20))["event_type"] == "expiring"
        api.context.hub.close_all(CloseCode.RECONNECT)
        assert (await websocket.receive(timeout=20)).type is aiohttp.WSMsgType.CLOSE
        body = await stream.read()
    told = [orjson.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: ")]
    assert [message["event_type"] for message in told][:1] == ["connected"]
    assert [message["event_type"] for message in told][-2:] == ["expiring", "closing"]
    described = {asyncapi.check_sent(message) for message in sent + told}
    schemas = asyncapi.document()["components"]["schemas"].items()
    assert described == {name for name, one in schemas if "event_type" in one.get("properties", {})} - {"Publication"}
    codes = {message["data"]["code"] for message in sent if message["event_type"] == "error"}
    assert codes == {"unknown_channel", "not_found", "forbidden", "token_invalid", "unknown_action", "malformed"}
    for action in actions[:-2]:
        if action.get("channel") != "nonsense":
            asyncapi.validator(action["action"].capitalize()).validate(action)
