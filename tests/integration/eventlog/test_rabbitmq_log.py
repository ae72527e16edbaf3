"""The log in a real RabbitMQ: what every log promises."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from orchestrator.eventlog.contract import EventLog
from orchestrator.eventlog.rabbitmq import RabbitLog
from orchestrator.events import Event
from orchestrator.settings import AmqpSettings
from tests.integration.eventlog.contract import EventLogContract


class TestRabbitLog(EventLogContract):
    @pytest_asyncio.fixture
    async def event_log(self, amqp_url: str) -> AsyncIterator[EventLog]:
        settings = AmqpSettings(url=amqp_url, timeout=20.0, max_bytes=4 << 20)
        log = await RabbitLog.open(settings, name="tests", segment_bytes=500_000)
        yield log
        await log.close()

    async def truncate(self, event_log: EventLog) -> int:
        """RabbitMQ drops whole segments, when it begins a new one."""
        after = await event_log.head()
        for _ in range(10):
            await event_log.publish([Event("test.event", "s:1", {"n": n, "text": "x" * 1_000}) for n in range(1_000)])
        return after
