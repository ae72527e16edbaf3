"""`python -m gateway`: how it begins, waits, listens and ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from urllib.parse import urlsplit

import pytest

from orchestrator.settings import DatabaseSettings
from tests.integration.processes.conftest import Make
from tests.integration.processes.process import living
from tests.proxy import TcpProxy


async def test_a_replica_serves_until_a_signal_and_ends_with_0(make: Make) -> None:
    gateway = make("gateway")
    await gateway.start()
    await gateway.until_answer("/ready", 200)
    assert json.loads((await gateway.get("/ready"))[1])["status"] == "ready"
    assert await gateway.stop() == 0
    assert len(gateway.logged("gateway ended")) == 1
    assert "Traceback" not in gateway.output.read_text()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("AMQP_URL", "amqp://nobody:secret@127.0.0.1:{amqp}/", "AMQP_URL: "),
        ("DATABASE_URL", "{database}", "does not exist"),
    ],
)
async def test_a_wrong_setting_is_one_line_and_ends_it_with_2(
    make: Make, database_settings: DatabaseSettings, rabbitmq_server, name: str, value: str, told: str
) -> None:
    parts = urlsplit(database_settings.url)
    value = value.format(database=parts._replace(path="/not_there").geturl(), amqp=rabbitmq_server.port)
    gateway = make("gateway", **{name: value})
    await gateway.start()
    assert await gateway.ended() == 2
    said = [line for line in gateway.output.read_text().splitlines() if not line.startswith("{")]
    assert len(said) == 1, said
    assert said[0].startswith("gateway: ")
    assert told in said[0]
    assert "secret" not in said[0]


async def test_it_waits_for_what_is_away_at_the_start_and_says_so(
    make: Make, database_settings: DatabaseSettings, rabbitmq_server, amqp_url: str
) -> None:
    async with TcpProxy("127.0.0.1", rabbitmq_server.port) as proxy:
        await proxy.refuse()
        url = amqp_url.replace(f":{rabbitmq_server.port}", f":{proxy.port}")
        gateway = make("gateway", AMQP_URL=url)
        await gateway.start()
        await gateway.until_logged("waiting at the start")
        assert (await gateway.get("/health"))[0] == 200
        status, body = await gateway.get("/ready")
        assert (status, json.loads(body)["title"]) == (503, "Service Unavailable")
        assert (await gateway.get("/api/v1/users/me"))[0] == 503
        await proxy.resume()
        await gateway.until_answer("/ready", 200)
        assert await gateway.stop() == 0
    assert {line["what"] for line in gateway.logged("waiting at the start")} == {"event log"}


async def test_while_it_waits_a_signal_ends_it_at_once(make: Make) -> None:
    gateway = make("gateway", DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    await gateway.start()
    await gateway.until_logged("waiting at the start")
    assert await gateway.stop() == 0


async def test_an_older_schema_ends_it_with_2(make: Make, pool) -> None:
    await pool.execute("DELETE FROM _yoyo_migration WHERE migration_id LIKE '0003%'")
    gateway = make("gateway")
    await gateway.start()
    assert await gateway.ended() == 2
    assert "run `cluster-code migrate:up`" in gateway.output.read_text()


# Workers. ------------------------------------------------------------------------------------------------------------


def samples(text: str, name: str) -> dict[str, float]:
    """The values of a metric by its worker."""
    found = {}
    for line in text.splitlines():
        if line.startswith(f"{name}{{") and 'worker="' in line:
            found[line.partition('worker="')[2].partition('"')[0]] = float(line.rpartition(" ")[2])
    return found


async def test_workers_share_a_port_and_one_that_is_killed_is_started_again(make: Make) -> None:
    gateway = make("gateway", "--workers", "2")
    await gateway.start()
    await gateway.until_logged("gateway listens", 2)
    assert {line["worker"] for line in gateway.logged("gateway listens")} == {1, 2}
    await gateway.until_answer("/ready", 200)

    async def whole() -> bool:
        status, text = await gateway.get("/metrics")
        return status == 200 and samples(text, "cluster_code_worker_up") == {"1": 1.0, "2": 1.0}

    await gateway.until_so(whole)
    # Whoever answers, the figures are of both, and none is another's.
    for _ in range(8):
        text = (await gateway.get("/metrics"))[1]
        assert samples(text, "cluster_code_feed_ready") == {"1": 1.0, "2": 1.0}
        assert text.count("# TYPE cluster_code_closes_total counter") <= 1

    killed = gateway.workers()[1]
    os.kill(killed, signal.SIGKILL)
    await gateway.until(lambda: gateway.workers()[1] != killed)
    (told,) = gateway.logged("a worker has ended; it is started again")
    assert (told["worker"], told["code"]) == (1, -signal.SIGKILL)
    # The other one serves meanwhile.
    await gateway.until_answer("/ready", 200)
    await gateway.until_logged("gateway listens", 3)
    await gateway.until_so(whole)
    assert await gateway.stop() == 0
    assert not any(living(pid) for pid in gateway.workers().values())
    assert len(gateway.logged("gateway ended")) == 2


async def test_no_worker_outlives_a_supervisor_that_is_killed(make: Make) -> None:
    gateway = make("gateway", "--workers", "2")
    await gateway.start()
    await gateway.until_logged("gateway listens", 2)
    workers = gateway.workers().values()
    await gateway.kill()
    await gateway.until(lambda: not any(living(pid) for pid in workers))
    # The port is free for the next one.
    await gateway.start()
    await gateway.until_answer("/ready", 200)
    assert await gateway.stop() == 0


async def test_more_signals_hurry_even_a_worker_that_hangs(make: Make) -> None:
    gateway = make("gateway", "--workers", "2")
    await gateway.start()
    await gateway.until_logged("gateway listens", 2)
    workers = gateway.workers()
    os.kill(workers[1], signal.SIGSTOP)
    gateway.signal(signal.SIGTERM)
    await gateway.until(lambda: not living(workers[2]))
    for count in (1, 2):
        gateway.signal(signal.SIGTERM)
        await gateway.until_logged("hurrying the workers", count)
    assert await gateway.ended() == 130
    assert not living(workers[1])


async def test_workers_that_cannot_begin_end_with_2_and_their_supervisor_too(make: Make) -> None:
    gateway = make("gateway", "--workers", "2", JWT_SECRET="short")
    await gateway.start()
    assert await gateway.ended() == 2
    assert gateway.workers() == {}
    # What only a worker finds out.
    gateway = make("gateway", "--workers", "2", AMQP_URL="amqp://x:99999999/")
    await gateway.start()
    assert await gateway.ended() == 2
    assert not any(living(pid) for pid in gateway.workers().values())


async def test_a_port_in_use_is_told_by_the_supervisor(make: Make) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        for arguments in ((), ("--workers", "2")):
            gateway = make("gateway", *arguments, PORT=str(port))
            await gateway.start()
            assert await gateway.ended() == 2
            assert f"PORT: 127.0.0.1:{port} is in use by another process" in gateway.output.read_text()
