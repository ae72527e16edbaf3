"""The event log in a RabbitMQ stream, and the queues beside it. The only package that knows aiormq and pamqp."""

from orchestrator.eventlog.rabbitmq.log import Counters, DeadLetter, Delivery, RabbitLog, Undeliverable, declare
from orchestrator.eventlog.rabbitmq.topology import Declared

__all__ = ["Counters", "DeadLetter", "Declared", "Delivery", "RabbitLog", "Undeliverable", "declare"]
