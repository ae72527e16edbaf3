"""The least between RabbitMQ and the floor: reads the stream, and hands each body on as it is.

    python -m tests.benchmarks.peers.consumer CONTROL_PORT

`AMQP_URL` names the virtual host, in which it declares what it reads.
"""

from __future__ import annotations

import asyncio
import os
import sys

import aiormq
import uvloop
from aiormq.abc import DeliveredMessage

from orchestrator.events import EXCHANGE
from tests.benchmarks import control

STREAM = "cluster-code.events"
# Deliveries between acknowledgements, of those that may be on their way at once.
_ACKNOWLEDGE, _PREFETCH = 500, 2000


async def _main() -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    connection = await aiormq.connect(os.environ["AMQP_URL"])
    channel = await connection.channel()
    await channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
    await channel.queue_declare(STREAM, durable=True, arguments={"x-queue-type": "stream"})
    await channel.queue_bind(STREAM, EXCHANGE, "#")
    await channel.basic_qos(prefetch_count=_PREFETCH)
    taken = 0

    async def take(message: DeliveredMessage) -> None:
        nonlocal taken
        writer.write(control.publication(b"bench:0", message.body))
        taken += 1
        if taken % _ACKNOWLEDGE == 0:
            await channel.basic_ack(message.delivery_tag or 0, multiple=True)

    await channel.basic_consume(STREAM, take, arguments={"x-stream-offset": "next"})
    print("reading", flush=True)
    await connection.closing


if __name__ == "__main__":
    uvloop.run(_main())
