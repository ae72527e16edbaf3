"""What a message in the stream is to those who read the log."""

from __future__ import annotations

from orchestrator.eventlog.contract import Entry
from orchestrator.eventlog.rabbitmq.topology import STREAM
from orchestrator.eventlog.rabbitmq.wire import MAX_BODY, Incoming, Properties
from orchestrator.events import InvalidEnvelope, parse


def entry(delivery: Incoming, found: Properties, epoch: str) -> Entry:
    """The entry that a message of the stream is; `found` are its properties, `epoch` the stream's."""
    key, body, offset = delivery.routing_key, delivery.body, found.offset + 1
    event_id = found.message_id or f"{epoch}-{offset}"
    invalid = ""
    if delivery.size > MAX_BODY:
        invalid = f"a body of {delivery.size} bytes is longer than {MAX_BODY}"
    elif key == "auth" or key.startswith("auth."):
        # For other queues than the log's.
        return Entry(offset, event_id, key, "", body)
    elif key == STREAM and not body:
        # The mark of another reader.
        return Entry(offset, event_id, key, "", body)
    elif found.encoding and found.encoding.lower() not in ("utf-8", "identity"):
        invalid = f"a body with the content encoding {found.encoding!r} is not read"
    else:
        try:
            event_type, channel = parse(body)
            return Entry(offset, event_id, event_type, channel, body)
        except InvalidEnvelope as error:
            invalid = str(error)
    return Entry(offset, event_id, key, "", body, invalid)
