"""What an orchestrator's own port answers: to probes, and to Prometheus."""

from __future__ import annotations

import json
import re
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from orchestrator import events
from orchestrator.errors import SettingsError
from orchestrator.eventlog import outbox
from orchestrator.events import Event
from orchestrator.probes import Probes
from orchestrator.settings import DatabaseSettings, ProbeSettings
from tests.integration.processes.conftest import Make
from tests.integration.processes.process import DEADLINE, Process
from tests.kubernetes import NAMESPACES, PODS, KubernetesApi, pod
from tests.proxy import TcpProxy


async def ready(process: Process) -> tuple[int, dict[str, Any]]:
    status, text = await process.get("/ready")
    return status, json.loads(text) if text else {}


def sample(text: str, name: str) -> float:
    """The value of the one sample of that name (and those labels)."""
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


async def test_it_is_ready_once_it_works_and_tells_of_each_part(make: Make, pool) -> None:
    worker = make("orchestrator")
    await worker.start()
    await worker.until_answer("/ready", 200)
    assert await worker.get("/health") == (200, '{"status":"ok"}')
    status, document = await ready(worker)
    assert (status, document["status"], document["providers"]) == (200, "ready", {})
    assert {document[part]["state"] for part in ("orchestrator", "database", "log")} == {"ready"}
    assert await worker.stop() == 0


async def test_a_provider_that_is_down_is_told_and_does_not_count(make: Make, pool) -> None:
    options = {"binary": "/nowhere/devpod"}
    await pool.execute("INSERT INTO providers (name, kind, options) VALUES ('away', 'devpod', $1)", options)
    worker = make("orchestrator")
    await worker.start()

    async def told() -> bool:
        return (await ready(worker))[1].get("providers", {}).get("away", {}).get("state") == "down"

    await worker.until_so(told)
    status, document = await ready(worker)
    assert (status, document["status"]) == (200, "ready")
    assert "There is no program '/nowhere/devpod'" in document["providers"]["away"]["message"]
    assert document["providers"]["away"]["checked_at"]
    metrics = (await worker.get("/metrics"))[1]
    assert sample(metrics, 'cluster_code_provider_up{kind="devpod",provider="away"}') == 0


async def test_an_engine_for_apps_that_is_away_is_told_and_does_not_count(make: Make, pool) -> None:
    worker = make("orchestrator", DOCKER_HOST="unix:///nowhere/docker.sock", DEPLOY_CONCURRENCY="2")
    other = make("orchestrator", DEPLOY_CONCURRENCY="0")
    for each in (worker, other):
        await each.start()
        await each.until_answer("/ready", 200)

    async def told() -> bool:
        return "unix:///nowhere/docker.sock" in (await ready(worker))[1]["apps"]["message"]

    await worker.until_so(told)
    status, document = await ready(worker)
    assert (status, document["status"], document["apps"]["state"]) == (200, "ready", "down")
    metrics = (await worker.get("/metrics"))[1]
    assert sample(metrics, "cluster_code_docker_up") == 0
    assert sample(metrics, "cluster_code_deployments_queued") == 0
    assert sample(metrics, "cluster_code_deployments_working_max") == 2
    assert sample(metrics, 'cluster_code_deployments_ended_total{status="live"}') == 0
    # Where no apps are deployed nothing is said of it.
    assert "apps" not in (await ready(other))[1]
    assert "cluster_code_docker_up" not in (await other.get("/metrics"))[1]
    for each in (worker, other):
        assert await each.stop() == 0


async def test_while_it_waits_at_the_start_it_lives_and_is_not_ready(
    make: Make, rabbitmq_server, amqp_url: str
) -> None:
    async with TcpProxy("127.0.0.1", rabbitmq_server.port) as proxy:
        await proxy.refuse()
        worker = make("orchestrator", AMQP_URL=amqp_url.replace(f":{rabbitmq_server.port}", f":{proxy.port}"))
        await worker.start()
        await worker.until_logged("waiting at the start")
        assert (await worker.get("/health"))[0] == 200
        status, document = await ready(worker)
        assert (status, document["status"]) == (503, "down")
        assert (document["database"]["state"], document["log"]["state"]) == ("ready", "down")
        assert sample((await worker.get("/metrics"))[1], "cluster_code_database_up") == 1
        await proxy.resume()
        await worker.until_answer("/ready", 200)
        # Later on it works without: what happens waits in the outbox.
        await proxy.refuse()
        proxy.cut()

        async def degraded() -> bool:
            status, document = await ready(worker)
            return (status, document["status"]) == (200, "degraded")

        await worker.until_so(degraded)
        await proxy.resume()

        async def whole() -> bool:
            return (await ready(worker))[1].get("status") == "ready"

        await worker.until_so(whole)
        assert await worker.stop() == 0


async def test_without_its_database_it_is_not_ready_and_lives(
    make: Make, database_settings: DatabaseSettings, tmp_path
) -> None:
    worker = make("orchestrator", DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    await worker.start()
    await worker.until_logged("waiting at the start")
    assert (await worker.get("/health"))[0] == 200
    status, document = await ready(worker)
    assert (status, document["database"]["state"]) == (503, "down")
    assert sample((await worker.get("/metrics"))[1], "cluster_code_database_up") == 0
    assert await worker.stop() == 0


async def test_it_counts_what_it_carries_and_who_leads(make: Make, pool) -> None:
    workers = [make("orchestrator"), make("orchestrator")]
    for worker in workers:
        await worker.start()
        await worker.until_answer("/ready", 200)
    async with pool.acquire() as connection, connection.transaction():
        await outbox.add(connection, *(Event("note", events.session_channel(1), {"n": n}) for n in range(3)))
        await connection.execute("SELECT pg_notify('outbox', '')")

    async def carried() -> bool:
        texts = [(await worker.get("/metrics"))[1] for worker in workers]
        return sum(sample(text, 'cluster_code_relayed_total{relay="outbox"}') for text in texts) >= 3

    await workers[0].until_so(carried)
    texts = [(await worker.get("/metrics"))[1] for worker in workers]
    for relay in ("outbox", "dead letters"):
        assert sorted(sample(text, f'cluster_code_relay_leads{{relay="{relay}"}}') for text in texts) == [0, 1]
    for text in texts:
        assert sample(text, "cluster_code_outbox_events") == 0
        assert sample(text, "cluster_code_sessions_working_max") == 8
        assert sample(text, "process_resident_memory_bytes") > 0
    for worker in workers:
        assert await worker.stop() == 0


async def test_it_counts_what_it_watches_and_says_which_of_them_watches(make: Make, pool, tmp_path) -> None:
    async with KubernetesApi() as api:
        options = {"kubeconfig": str(api.write_kubeconfig(tmp_path / "kubeconfig")), "instance": "here"}
        namespace = str(uuid4())
        labels = {"cluster-code.io/instance": "here", "cluster-code.io/project": namespace}
        api.put(NAMESPACES, {"metadata": {"name": namespace, "labels": labels}})
        api.put(PODS, pod("session-1-a", namespace, labels=labels))
        await pool.execute("INSERT INTO providers (name, kind, options) VALUES ('staged', 'kubernetes', $1)", options)
        workers = [make("orchestrator"), make("orchestrator")]
        for worker in workers:
            await worker.start()
            await worker.until_answer("/ready", 200)

        async def watched() -> bool:
            texts = [(await worker.get("/metrics"))[1] for worker in workers]
            return (
                sum('cluster_code_watch_objects{provider="staged",resource="pod"} 1.0' in text for text in texts) == 1
            )

        await workers[0].until_so(watched)
        texts = [(await worker.get("/metrics"))[1] for worker in workers]
        name = 'cluster_code_watch_leads{provider="staged"}'
        texts.sort(key=lambda text: sample(text, name))
        assert [sample(text, name) for text in texts] == [0, 1]
        # Only the one that leads has anything to say of the resources.
        assert 'resource="pod"' not in texts[0]
        for resource in ("pod", "namespace", "deployment", "event", "ingress"):
            of = f'{{provider="staged",resource="{resource}"}}'
            assert sample(texts[1], f"cluster_code_watch_up{of}") == 1
            assert 0 <= sample(texts[1], f"cluster_code_watch_last_list_age_seconds{of}") < DEADLINE
            assert sample(texts[1], f"cluster_code_watch_restarts_total{of}") == 0

        api.put(PODS, pod("session-1-b", namespace, labels=labels))

        async def told() -> bool:
            text = max([(await worker.get("/metrics"))[1] for worker in workers], key=lambda text: sample(text, name))
            count = sample(text, 'cluster_code_watch_lag_seconds_count{provider="staged"}')
            return sample(text, 'cluster_code_watch_told_total{provider="staged"}') >= 3 and count > 0

        await workers[0].until_so(told)
        for worker in workers:
            assert await worker.stop() == 0


async def test_metrics_are_for_who_has_the_token() -> None:
    probes = Probes(ProbeSettings(port="0", metrics_token="sesame"))
    async with probes.listening() as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
        for given, status in ((None, 401), ("Bearer wrong", 401), ("Basic sesame", 401), ("Bearer sesame", 200)):
            async with http.get("/metrics", headers={"Authorization": given} if given else {}) as answer:
                assert answer.status == status, given
                assert "sesame" not in await answer.text()
            # So is what may name a host.
            async with http.get("/ready", headers={"Authorization": given} if given else {}) as answer:
                assert bool((await answer.json())["log"]["message"]) == (status == 200), given


async def test_a_port_in_use_is_told() -> None:
    taken = Probes(ProbeSettings(port="0"))
    async with taken.listening() as port:
        with pytest.raises(SettingsError, match=f"^ORCHESTRATOR_PORT: 127.0.0.1:{port} is in use by another process: "):
            async with Probes(ProbeSettings(port=str(port))).listening():
                pass
    with pytest.raises(SettingsError, match=r"^ORCHESTRATOR_HOST: cannot listen on 192\.0\.2\.1:0: "):
        async with Probes(ProbeSettings(host="192.0.2.1", port="0")).listening():
            pass


async def test_there_need_be_no_port() -> None:
    async with Probes(ProbeSettings(port="off")).listening() as port:
        assert port is None


class Hanging:
    """An orchestrator whose loops do as they are told."""

    def __init__(self, *loops: str) -> None:
        self.loops = list(loops)

    def stalled(self) -> list[str]:
        return self.loops


async def test_a_loop_that_hangs_is_a_reason_to_start_anew() -> None:
    probes = Probes(ProbeSettings(port="0"))
    async with probes.listening() as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
        for loops, status in (((), 200), (("reconcile",), 503)):
            probes.orchestrator = Hanging(*loops)
            async with http.get("/health") as answer:
                assert answer.status == status
                assert (await answer.json()).get("loops", []) == list(loops)
