"""The services that tests stand on, themselves."""

from __future__ import annotations

import asyncio

import aiormq
import pytest

from tests import rabbitmq
from tests.proxy import TcpProxy


async def queues(url: str) -> None:
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    await channel.queue_declare("one", durable=True)
    await connection.close()


async def test_each_test_has_a_virtual_host_of_its_own(
    rabbitmq_server: rabbitmq.Server, amqp_url: str, vhost: str
) -> None:
    assert await rabbitmq_server.queues(vhost) == []
    await queues(amqp_url)
    assert [queue["name"] for queue in await rabbitmq_server.queues(vhost)] == ["one"]
    await rabbitmq_server.delete_queue(vhost, "one")
    assert await rabbitmq_server.queues(vhost) == []


async def test_a_killed_broker_starts_again_with_its_data(broker: rabbitmq.Broker) -> None:
    await queues(broker.server.amqp_url())
    await broker.kill()
    with pytest.raises(aiormq.AMQPConnectionError):
        await aiormq.connect(broker.server.amqp_url())
    await broker.start()
    assert [queue["name"] for queue in await broker.server.queues("/")] == ["one"]
    await broker.server.delete_queue("/", "one")


async def test_connections_can_be_closed_and_are_told(
    rabbitmq_server: rabbitmq.Server, amqp_url: str, vhost: str
) -> None:
    connection = await aiormq.connect(amqp_url)

    async def closed() -> bool:
        await rabbitmq_server.close_connections(vhost)
        return connection.is_closed

    await rabbitmq.eventually(closed)


async def test_a_proxy_forwards_freezes_and_cuts() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, TcpProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        proxy.freeze()
        writer.write(b"two")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(answer := asyncio.ensure_future(reader.readexactly(3))), 0.1)
        await proxy.resume()
        assert await answer == b"two"
        assert (proxy.accepted, proxy.connections) == (1, 1)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
        await proxy.resume()
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.close()
        await writer.wait_closed()
