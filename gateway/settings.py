"""What can be set about the gateway."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.settings import base_domain, metrics_token, positive, repo_schemes, secrets_key, variable


@dataclass(frozen=True, slots=True)
class RealtimeSettings:
    """Limits of the WebSocket, as `docs/protocol.md` gives them."""

    # Seconds between pings, and how long a pong may take: together the time until a dead peer is noticed.
    ping_interval: float = variable(
        "WS_PING_INTERVAL", "float", 25.0, help="Seconds between WebSocket pings.", check=positive
    )
    pong_timeout: float = variable(
        "WS_PONG_TIMEOUT", "float", 10.0, help="Seconds that a pong may take; then close code 4012.", check=positive
    )
    channels_per_connection: int = variable(
        "WS_MAX_CHANNELS", "int", 128, help="Channels that one connection may subscribe to.", check=positive
    )
    connections_per_user: int = variable(
        "WS_MAX_CONNECTIONS_PER_USER",
        "int",
        32,
        help="Connections that one user may have at one gateway.",
        check=positive,
    )
    # Bytes. What a browser has not read when this much waits for it is dropped with the connection; it resumes.
    unsent_bytes: int = variable(
        "WS_MAX_UNSENT_BYTES",
        "int",
        1 << 20,
        help="Unsent bytes at which a slow connection is dropped (4008).",
        check=positive,
    )
    frame_bytes: int = variable(
        "WS_MAX_FRAME_BYTES", "int", 64 << 10, help="Size of the largest frame that a client may send.", check=positive
    )
    malformed_per_minute: int = variable(
        "WS_MAX_MALFORMED_PER_MINUTE",
        "int",
        10,
        help="Malformed frames in a minute that close a connection.",
        check=positive,
    )
    # Seconds. `expiring` is sent this long before the authorisation ends.
    expiry_notice: float = variable(
        "WS_EXPIRY_NOTICE",
        "float",
        30.0,
        help="Seconds of warning before a connection's authorisation expires.",
        check=positive,
    )
    history_seconds: float = variable(
        "HISTORY_SECONDS", "float", 600.0, help="Seconds of events kept for clients that resume.", check=positive
    )
    history_bytes: int = variable(
        "HISTORY_BYTES", "int", 64 << 20, help="Bytes of events kept for clients that resume.", check=positive
    )
    # Each costs this process about ten deliveries an event, whoever the event is for.
    replay_readers: int = variable(
        "REPLAY_READERS",
        "int",
        2,
        help="Clients at once that get what is older than the history from the log itself.",
        check=positive,
    )
    replay_events: int = variable(
        "REPLAY_EVENTS", "int", 500_000, help="How many events before the history may be replayed so.", check=positive
    )
    # Connections a second. A drain that is spread evenly spares the replicas that the clients go to.
    drain_rate: int = variable(
        "WS_DRAIN_RATE", "int", 500, help="Connections closed a second while draining.", check=positive
    )


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The HTTP edge."""

    host: str = variable("HOST", "str", "127.0.0.1", help="Address to listen on.")
    port: int = variable(
        "PORT",
        "int",
        8080,
        help="Port to listen on.",
        check=lambda port: None if 0 <= port <= 65535 else f"must be 0 to 65535, not {port}",
    )
    cors_origins: list[str] = variable(
        "CORS_ORIGINS", "list", [], help="Origins that may call from a browser, comma-separated; `*` for any."
    )
    body_limit: int = variable("BODY_LIMIT", "int", 1 << 20, help="Bytes of the largest request body.", check=positive)
    rate_limit_address: str = variable(
        "RATE_LIMIT_ADDRESS",
        "str",
        "1200/minute",
        help="Requests per client address, as N/second|minute|hour; off: no limit.",
    )
    rate_limit_user: str = variable("RATE_LIMIT_USER", "str", "6000/minute", help="Requests per user; off: no limit.")
    # Password guesses and registrations cost us an argon2 hash each.
    rate_limit_login: str = variable(
        "RATE_LIMIT_LOGIN", "str", "30/minute", help="Sign-ins and registrations per client address; off: no limit."
    )
    # A host that pushes to a hundred repositories at once sends as many deliveries.
    rate_limit_hooks: str = variable(
        "RATE_LIMIT_HOOKS", "str", "600/minute", help="Webhook deliveries per client address; off: no limit."
    )
    # Hops that append to X-Forwarded-For in front of us; 0: the header is not believed.
    trusted_proxies: int = variable(
        "TRUSTED_PROXIES", "int", 0, help="Reverse proxies in front, whose X-Forwarded-For is believed."
    )
    registration: bool = variable("REGISTRATION", "bool", True, help="Whether anybody may register an account.")
    adopt_projects: bool = variable(
        "ADOPT_PROJECTS", "bool", True, help="Whether an unknown project UUID becomes a project of the caller's."
    )
    repo_schemes: list[str] = repo_schemes()
    secrets_key: list[str] = secrets_key()
    base_domain: str = base_domain()
    metrics_token: str = metrics_token()
    # Seconds after the first signal until what still runs is cancelled.
    shutdown_grace: float = variable(
        "SHUTDOWN_GRACE", "float", 10.0, help="Seconds that requests and connections get to end.", check=positive
    )
    realtime: RealtimeSettings = field(default_factory=RealtimeSettings)
