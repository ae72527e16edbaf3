"""`docs/protocol.md` says what the code does: codes, names and numbers."""

from __future__ import annotations

import re
from pathlib import Path

from auth.tokens import STREAM_LIFE
from gateway.realtime import inquiries, protocol, replicas, sse
from gateway.realtime.protocol import REASONS, CloseCode
from gateway.routes import routes
from gateway.settings import RealtimeSettings
from orchestrator.deployments import contract as deployments
from orchestrator.events import EXCHANGE, MAX_NAME_LENGTH
from orchestrator.sessions.state import Status

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
FLAT = " ".join(DOCUMENT.split())


def section(title: str) -> str:
    return DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_close_code_is_listed_with_its_reason_and_no_other() -> None:
    listed = dict(re.findall(r"(4\d{3}) \| ([^|]+?) \|", section("Close codes")))
    assert {int(code): reason for code, reason in listed.items()} == {
        code.value: REASONS[code] for code in CloseCode if code.value >= 4000
    }


def test_every_code_of_an_error_is_listed() -> None:
    source = (Path(protocol.__file__).parent / "actions.py").read_text().split("def _explain")[1]
    explained = set(re.findall(r'return "([a-z_]+)"', source))
    rejected = set(re.findall(r'Rejected\(\s*"([a-z_]+)"', Path(protocol.__file__).read_text()))
    assert explained
    listed = re.findall(r"^\| `([a-z_]+)` \| (?!Meaning)", section("Errors"), re.MULTILINE)
    assert set(listed) == explained | rejected


def test_the_defaults_are_those_of_the_settings() -> None:
    settings = RealtimeSettings()
    for sentence in (
        f"ping every {settings.ping_interval:g} s ⚙",
        f"pong within {settings.pong_timeout:g} s ⚙",
        f"{settings.expiry_notice:g} s ⚙ before `expires_at`",
        f"channels of a connection | {settings.channels_per_connection} ⚙",
        f"connections of a user at one gateway | {settings.connections_per_user} ⚙",
        f"unsent bytes of a connection | {settings.unsent_bytes >> 20} MiB ⚙",
        f"one frame from a client | {settings.frame_bytes >> 10} KiB ⚙",
        f"malformed frames in a minute | {settings.malformed_per_minute} ⚙",
        f"at most {settings.drain_rate} ⚙ a second",
        f"{settings.history_seconds / 60:g} minutes ⚙, {settings.history_bytes >> 20} MiB ⚙",
        f"strings of 1 to {MAX_NAME_LENGTH} characters",
    ):
        assert sentence in FLAT


def test_names_on_the_wire_are_those_of_the_code() -> None:
    for name in (
        protocol.SUBPROTOCOL,
        protocol.BEARER + "{short token}",
        EXCHANGE,
        *(f"`{one}`" for one in (*Status, *deployments.Status)),
    ):
        assert name in FLAT
    for message in ("connected", "subscribed", "unsubscribed", "pong", "expiring", "error", "closing"):
        assert f"`{message}`" in FLAT
    for action in ("subscribe", "unsubscribe", "ping", "refresh"):
        assert f'{{"action": "{action}"' in FLAT


def test_what_is_said_of_server_sent_events_is_what_is_done() -> None:
    words = " ".join(section("Server-sent events").split())
    settings = RealtimeSettings()
    for sentence in (
        f"drawn from {sse._RETRY[0] // 1000} to {sse._RETRY[1] // 1000} s",
        f"comes every {settings.ping_interval:g} s ⚙",
        f"nothing for {settings.ping_interval + settings.pong_timeout:g} s",
        f"{STREAM_LIFE / 3600:g} hours at most",
        f"from {sse._FINAL} on",
        REASONS[CloseCode.DRAINING],
    ):
        assert sentence in words


def test_addresses_are_those_of_the_url_table() -> None:
    described = set(re.findall(r"(?:GET|POST) (/[a-z0-9/{}-]+)", DOCUMENT)) - {"/api/v1/sessions/{id}"}
    served = {re.sub(r"\{(session|deployment)_id:\[0-9\]\+\}", "{id}", route.path) for route in routes()}
    assert described
    assert described <= served


def test_the_figures_of_presence_and_drain_are_true() -> None:
    assert f"at most {inquiries.MOST_USERS:,} users" in FLAT
    assert f"20,000 connections {20_000 / RealtimeSettings().drain_rate:g} s" in FLAT
    assert replicas.DEADLINE == 1.0
    # Reserved: nothing of ours sends it.
    sources = Path(protocol.__file__).parent.parent.rglob("*.py")
    assert sum(source.read_text().count("CONNECTION_LIMIT") for source in sources) == 2
