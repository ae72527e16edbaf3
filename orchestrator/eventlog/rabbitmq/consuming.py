"""Working through a queue of ours, one message at a time, in order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog

from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import DeadLetter, Delivery, Undeliverable
from orchestrator.eventlog.rabbitmq.links import Links
from orchestrator.eventlog.rabbitmq.subscription import Subscription
from orchestrator.eventlog.rabbitmq.topology import Topology
from orchestrator.eventlog.rabbitmq.wire import MAX_BODY, Incoming, Lost, properties

log = structlog.get_logger("rabbitmq")


class Consumer:
    """Hands the messages of a queue to a handler; `put_away` takes those that will never do."""

    def __init__(
        self, links: Links, topology: Topology, put_away: Callable[[Sequence[DeadLetter]], Awaitable[None]]
    ) -> None:
        self._links = links
        self._topology = topology
        self._put_away = put_away

    async def run(self, queue: str, bindings: Sequence[str], handler: Callable[[Delivery], Awaitable[None]]) -> None:
        """As `RabbitLog.consume` says."""
        failures = 0
        while True:
            link = None
            try:
                link = await self._links.open()
                await self._topology.declare_queue(link, queue, bindings)
                subscription = await Subscription.open(link, queue, 1)
                while True:
                    for delivery in await subscription.take():
                        failures = 0
                        if not await self._handled(subscription, delivery, handler):
                            break
                        subscription.acknowledge(delivery.tag, at_once=True)
            except Lost as error:
                self._links.require_open()
                failures += 1
                log.warning("consuming was interrupted", queue=queue, error=str(error))
            finally:
                if link:
                    await self._links.give_back(link)
            await self._links.pause(failures)

    async def _handled(
        self, subscription: Subscription, delivery: Incoming, handler: Callable[[Delivery], Awaitable[None]]
    ) -> bool:
        """Handle one message, again and again if need be; False when its connection was lost meanwhile."""
        found = properties(delivery.properties)
        given = Delivery(delivery.routing_key, found.message_id, delivery.body)
        failures = 0
        while not subscription.ended:
            try:
                if delivery.size > MAX_BODY:
                    raise Undeliverable(f"a body of {delivery.size} bytes is longer than {MAX_BODY}")
                await handler(given)
                return True
            except Undeliverable as error:
                reason = str(error)
            except Exception as error:
                failures += 1
                log.warning(
                    "a message could not be handled",
                    error=str(error) or type(error).__name__,
                    key=given.routing_key,
                    failures=failures,
                    # Once, and not again every few seconds.
                    exc_info=failures == 1,
                )
                await self._links.pause(failures)
                continue
            try:
                await self._put_away([DeadLetter(given.body, reason, given.routing_key, 0, given.message_id)])
                return True
            except LogUnavailable as error:
                failures += 1
                log.warning("a dead letter could not be put away", error=str(error), failures=failures)
                await self._links.pause(failures)
        return False
