"""How the log is found and declared in RabbitMQ: URLs, hosts, TLS, arguments, epochs."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import pytest

from orchestrator.errors import SettingsError
from orchestrator.eventlog.rabbitmq import Declared, RabbitLog, declare
from orchestrator.events import EXCHANGE
from tests.integration.eventlog.contract import numbered, numbers_of, read
from tests.integration.eventlog.rabbit import opened, plainly, reading, settings
from tests.rabbitmq import Server

STREAM = "cluster-code.events"


async def test_declaring_says_what_was_there_and_changes_nothing(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    parts = [
        ("exchange", EXCHANGE),
        ("stream", STREAM),
        ("stream", "cluster-code.epochs"),
        ("queue", "cluster-code.dead-letter"),
        ("queue", "cluster-code.users"),
    ]
    given = settings(amqp_url, max_age="2D", max_bytes=10_000_000)
    assert await declare(given) == [Declared(kind, name, existed=False) for kind, name in parts]
    async with opened(amqp_url, max_age="2D", max_bytes=10_000_000) as log:
        epoch = log.epoch
        await log.publish(numbered([1]))
        assert await declare(given) == [Declared(kind, name, existed=True) for kind, name in parts]
        assert await declare(given) == [Declared(kind, name, existed=True) for kind, name in parts]
        assert numbers_of(await read(log, 0, 1)) == [1]
    async with opened(amqp_url, max_age="2D", max_bytes=10_000_000) as log:
        assert log.epoch == epoch
    (stream,) = [queue for queue in await rabbitmq_server.queues(vhost) if queue["name"] == STREAM]
    assert stream["arguments"] == {"x-queue-type": "stream", "x-max-age": "2D", "x-max-length-bytes": 10_000_000}
    bindings = await rabbitmq_server.call("GET", f"bindings/{vhost}/e/{EXCHANGE}/q/{STREAM}")
    assert [binding["routing_key"] for binding in bindings] == ["#"]


async def test_ten_that_open_at_once_agree_on_the_epoch(amqp_url: str) -> None:
    logs = await asyncio.gather(*(RabbitLog.open(settings(amqp_url), name=f"{n}") for n in range(10)))
    try:
        assert len({log.epoch for log in logs}) == 1
        await logs[0].publish(numbered([1]))
        for log in logs:
            assert numbers_of(await read(log, 0, 1)) == [1]
    finally:
        await asyncio.gather(*(log.close() for log in logs))


async def test_other_arguments_are_told_with_both_values(amqp_url: str) -> None:
    async with opened(amqp_url, max_age="1D"):
        pass
    for ask in (lambda given: RabbitLog.open(given, name="tests"), declare):
        with pytest.raises(SettingsError) as caught:
            await ask(settings(amqp_url, max_age="3D"))
        assert str(caught.value) == (
            f"RabbitMQ has the queue '{STREAM}' with x-max-age '1D', where '3D' is wanted: "
            "set EVENTS_MAX_AGE to what is there, or delete it (which loses what it holds)"
        )
    with pytest.raises(SettingsError, match=r"x-max-length-bytes '10737418240', where '5000000' .* EVENTS_MAX_BYTES"):
        await RabbitLog.open(settings(amqp_url, max_bytes=5_000_000), name="tests")


async def test_an_exchange_or_a_queue_of_another_kind_is_told(amqp_url: str) -> None:
    async with plainly(amqp_url) as channel:
        await channel.exchange_declare(EXCHANGE, exchange_type="fanout", durable=True)
    with pytest.raises(SettingsError, match=f"the exchange '{EXCHANGE}' with type 'fanout', where 'topic' is wanted"):
        await RabbitLog.open(settings(amqp_url), name="tests")
    async with plainly(amqp_url) as channel:
        await channel.exchange_delete(EXCHANGE)
        await channel.queue_declare(STREAM, durable=True)
    with pytest.raises(SettingsError, match=f"has the queue '{STREAM}' with .* none, where .* is wanted: delete it"):
        await RabbitLog.open(settings(amqp_url), name="tests")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda url: url.replace("tests%20only", "wrong-secret"), r"ACCESS_REFUSED"),
        (lambda url: url + "-none", r"vhost .*-none.* not found"),
        (lambda url: url.replace("@127.0.0.1:", "@127.0.0.1:1"), r"AMQP_URL"),
        (lambda url: "amqp://u:wrong-secret@127.0.0.1:1/", r"RabbitMQ at 127.0.0.1:1: .*[Cc]onnect"),
        (lambda url: "http://u:wrong-secret@127.0.0.1/", r"is not like amqp://"),
        (lambda url: "wrong-secret", r"is not like amqp://"),
        (lambda url: "amqps://u:wrong-secret@127.0.0.1:1/?cafile=/nowhere", r"a certificate or key .* cannot be read"),
    ],
)
async def test_a_wrong_url_is_told_in_one_line_without_the_password(amqp_url: str, change, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        await RabbitLog.open(settings(change(amqp_url), timeout=10.0), name="tests")
    text = str(caught.value)
    assert text.startswith("AMQP_URL")
    assert "\n" not in text
    assert "secret" not in text
    assert "tests%20only" not in text
    assert "tests only" not in text


async def test_a_user_who_may_not_declare_is_told(amqp_url: str, rabbitmq_server: Server, vhost: str) -> None:
    user = f"reader-{vhost}"
    await rabbitmq_server.call("PUT", f"users/{user}", {"password": "p", "tags": ""})
    try:
        allowed = {"configure": "^$", "write": ".*", "read": ".*"}
        await rabbitmq_server.call("PUT", f"permissions/{vhost}/{user}", allowed)
        url = f"amqp://{user}:p@{rabbitmq_server.host}:{rabbitmq_server.port}/{vhost}"
        with pytest.raises(SettingsError, match=r"AMQP_URL: the user may not declare what is needed: .*ACCESS_REFUSED"):
            await RabbitLog.open(settings(url), name="tests")
    finally:
        await rabbitmq_server.call("DELETE", f"users/{user}")


async def test_the_first_host_that_answers_is_taken(amqp_url: str) -> None:
    dead = "amqp://tests:nobody@127.0.0.1:1/x"
    async with opened(f"{dead}, {amqp_url},{dead}") as log, opened(amqp_url) as other, reading(other) as found:
        assert log.epoch == other.epoch
        await log.publish(numbered([1]))
        await found.until(lambda: len(found.ids()) == 1)


async def test_it_works_over_tls_and_trusts_only_who_is_certified(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    if not rabbitmq_server.tls_port:
        pytest.skip("the RabbitMQ of AMQP_URL is not asked for TLS")
    url = rabbitmq_server.amqps_url(vhost)
    with pytest.raises(SettingsError, match="its certificate is not trusted") as caught:
        await RabbitLog.open(settings(url), name="tests")
    assert "tests only" not in str(caught.value)
    ca = quote(rabbitmq_server.ca, safe="")
    async with opened(f"{url}?cafile={ca}") as log, opened(amqp_url) as plain:
        assert log.epoch == plain.epoch
        await log.publish(numbered(range(1_000)))
        assert numbers_of(await read(log, 0, 1_000)) == list(range(1_000))
        await log.check()


async def test_the_name_is_shown_of_our_connections(amqp_url: str, rabbitmq_server: Server, vhost: str) -> None:
    async with opened(amqp_url, name="gateway one") as log, reading(log) as found:
        await log.publish(numbered([1]))
        await found.until(lambda: found.ids())
        async with asyncio.timeout(30):
            names: list[str] = []
            while names != ["gateway one"] * 2:
                connections = await rabbitmq_server.connections(vhost)
                names = [each.get("client_properties", {}).get("connection_name") for each in connections]
                await asyncio.sleep(0.05)


async def test_nothing_is_left_behind(amqp_url: str) -> None:
    before = asyncio.all_tasks()
    async with opened(amqp_url) as log, reading(log) as found:
        await log.publish(numbered([1]))
        await found.until(lambda: found.ids())
        await log.head()
    async with asyncio.timeout(5):
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.01)
    assert len(log._links) == 0
