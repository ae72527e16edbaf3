"""What an orchestrator's own port answers: to probes, and to Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import aiohttp
import pytest

from orchestrator import events
from orchestrator.eventlog import outbox
from orchestrator.events import Event
from orchestrator.probes import Probes
from orchestrator.settings import DatabaseSettings, ProbeSettings
from tests.integration.processes.conftest import Make
from tests.integration.processes.process import Process
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
    await pool.execute("INSERT INTO providers (name, kind, options) VALUES ('away', 'devpod', '{}')")
    worker = make("orchestrator")
    await worker.start()

    async def told() -> bool:
        return (await ready(worker))[1].get("providers", {}).get("away", {}).get("state") == "down"

    await worker.until_so(told)
    status, document = await ready(worker)
    assert (status, document["status"]) == (200, "ready")
    assert "this version cannot run" in document["providers"]["away"]["message"]
    assert document["providers"]["away"]["checked_at"]
    metrics = (await worker.get("/metrics"))[1]
    assert sample(metrics, 'cluster_code_provider_up{kind="devpod",provider="away"}') == 0


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


async def test_metrics_are_for_who_has_the_token(make: Make) -> None:
    worker = make("orchestrator", METRICS_TOKEN="sesame")
    await worker.start()
    await worker.until_answer("/health", 200)
    async with aiohttp.ClientSession() as http:
        for given, status in ((None, 401), ("Bearer wrong", 401), ("Basic sesame", 401), ("Bearer sesame", 200)):
            headers = {"Authorization": given} if given else {}
            async with http.get(worker.url + "/metrics", headers=headers) as answer:
                assert answer.status == status, given
                assert "sesame" not in await answer.text()
    assert await worker.stop() == 0


async def test_a_port_in_use_is_one_line(make: Make) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        worker = make("orchestrator", ORCHESTRATOR_PORT=str(port))
        await worker.start()
        assert await worker.ended() == 2
        said = [line for line in worker.output.read_text().splitlines() if not line.startswith("{")]
        assert len(said) == 1
        assert said[0].startswith(f"orchestrator: ORCHESTRATOR_PORT: 127.0.0.1:{port} is in use by another process: ")


async def test_any_free_port_will_do_or_none(make: Make) -> None:
    anywhere, nowhere = make("orchestrator", ORCHESTRATOR_PORT="0"), make("orchestrator", ORCHESTRATOR_PORT="off")
    for worker in (anywhere, nowhere):
        await worker.start()
        await worker.until_logged("orchestrator runs")
    (told,) = anywhere.logged("probes are answered")
    anywhere.environment["PORT"] = str(told["port"])
    await anywhere.until_answer("/ready", 200)
    assert nowhere.logged("probes are answered") == []
    for worker in (anywhere, nowhere):
        assert await worker.stop() == 0


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


@pytest.mark.parametrize("value", ["65536", "-1", "web"])
async def test_a_wrong_port_is_one_line(made: Make, value: str) -> None:
    worker = made(
        "orchestrator", ORCHESTRATOR_PORT=value, DATABASE_URL="postgresql://x@127.0.0.1/x", AMQP_URL="amqp://x"
    )
    await worker.start()
    assert await worker.ended() == 2
    assert f"ORCHESTRATOR_PORT must be 0 to 65535, or off, not {value!r}" in worker.output.read_text()
