"""The event log in a RabbitMQ stream, and the queues beside it. The only package that knows aiormq and pamqp."""

from orchestrator.eventlog.contract import DeadLetter, Delivery, Undeliverable
from orchestrator.eventlog.rabbitmq.log import Counters, RabbitLog, declare
from orchestrator.eventlog.rabbitmq.topology import Declared

__all__ = ["Counters", "DeadLetter", "Declared", "Delivery", "RabbitLog", "Undeliverable", "declare"]
