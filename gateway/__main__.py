"""`python -m gateway`: one replica of the gateway, which reads the event log that all replicas share."""

from __future__ import annotations

import sys

from environs import Env

from gateway.settings import GatewaySettings, RealtimeSettings
from gateway.token_settings import token_settings
from orchestrator.errors import SettingsError
from orchestrator.settings import DatabaseSettings, environment, load


def main() -> int:
    """Check the settings and serve. Returns the exit code: 2, with one line, when a setting is missing or wrong."""
    try:
        check(environment())
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    return 0


def check(env: Env) -> None:
    """Raise SettingsError when this environment cannot run a replica."""
    load(GatewaySettings, env, realtime=load(RealtimeSettings, env))
    load(DatabaseSettings, env)
    token_settings(env)
    if not env.str("AMQP_URL", ""):
        raise SettingsError(
            "AMQP_URL is not set: replicas share the event log in RabbitMQ. For one machine, run `cluster-code dev`"
        )
    raise SettingsError("AMQP_URL: the event log in RabbitMQ is not part of this version. Run `cluster-code dev`")


if __name__ == "__main__":
    sys.exit(main())
