"""What every handler of the gateway can reach: made once by the composition root, closed by it too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

from auth.redemptions import Redemptions
from orchestrator.deployments.secrets import Keyring

if TYPE_CHECKING:
    from auth.tokens import Tokens
    from gateway.realtime.archive import Archive
    from gateway.realtime.feed import Feed
    from gateway.realtime.history import History
    from gateway.realtime.hub import Hub
    from gateway.realtime.replicas import Replicas
    from gateway.realtime.sse import Encoder
    from gateway.settings import GatewaySettings
    from orchestrator.database import Pool
    from orchestrator.eventlog.contract import EventLog


@dataclass(frozen=True, slots=True)
class Context:
    """The gateway's parts, for its handlers."""

    settings: GatewaySettings
    pool: Pool
    tokens: Tokens
    log: EventLog
    history: History
    archive: Archive
    hub: Hub
    feed: Feed
    replicas: Replicas
    encoder: Encoder
    # Seconds that a request waits for a connection of the pool before it is told 503.
    database_timeout: float = 5.0
    redemptions: Redemptions = field(init=False)
    # What apps keep secret is encrypted with these.
    keys: Keyring = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", Keyring(self.settings.secrets_key))
        object.__setattr__(self, "redemptions", Redemptions(self.pool, self.tokens, self.database_timeout))


CONTEXT = web.AppKey("context", Context)
