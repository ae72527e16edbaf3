"""`python -m orchestrator`: a worker process, which shares the event log with gateways in other processes."""

from __future__ import annotations

import sys

from orchestrator.errors import SettingsError
from orchestrator.settings import environment


def main() -> int:
    """Run a worker; the exit code. 2: a setting is missing or wrong, which one line on stderr says."""
    try:
        _require_shared_log()
    except SettingsError as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        return 2
    return 0


def _require_shared_log() -> None:
    """A worker without a log that its gateways read would work unseen."""
    if not environment().str("AMQP_URL", ""):
        raise SettingsError(
            "AMQP_URL is not set: amqp://user:password@host:port/vhost of the RabbitMQ that all processes share. "
            "To run everything in one process without RabbitMQ: cluster-code dev"
        )
    raise SettingsError(
        "AMQP_URL is set, but this version has no RabbitMQ event log yet. "
        "To run everything in one process without RabbitMQ: cluster-code dev"
    )


if __name__ == "__main__":
    sys.exit(main())
