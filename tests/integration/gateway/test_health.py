from __future__ import annotations

from unittest.mock import AsyncMock

import pytest

from orchestrator.errors import LogUnavailable
from tests.integration.gateway.conftest import Api, Person, Serve


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
async def test_a_live_process_says_so(api: Api, path: str) -> None:
    answer = await api.call("GET", path)
    assert (answer.status, answer.json) == (200, {"status": "ok"})


async def test_readiness_names_every_part(api: Api) -> None:
    await api.fetch("UPDATE providers SET state = 'down', message = 'no answer', checked_at = '2030-01-01Z'")
    await api.fetch("INSERT INTO providers (name, kind, enabled) VALUES ('off', 'docker', false)")
    answer = await api.call("GET", "/ready")
    part = {"state": "ready", "message": ""}
    assert answer.status == 200
    assert answer.json == {
        "status": "ready",
        "database": part,
        "log": part,
        "feed": part,
        # A provider that is down is told, and is no reason to take this gateway out of service.
        "providers": {"here": {"state": "down", "message": "no answer", "checked_at": "2030-01-01T00:00:00Z"}},
    }


async def test_why_something_is_down_is_told_to_who_may_know(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = await serve(metrics_token="scrape")
    await api.fetch("INSERT INTO providers (name, kind, state, message) VALUES ('a', 'docker', 'down', 'db.internal')")
    monkeypatch.setattr(type(api.context.log), "check", AsyncMock(side_effect=LogUnavailable("mq.internal is away.")))
    for who in (None, "wrong", "wr\u00f6ng"):
        answer = await api.call("GET", "/ready", who)
        assert (answer.status, answer.json["providers"]["a"]["state"]) == (200, "down")
        assert b"internal" not in answer.body
    told = (await api.call("GET", "/ready", "scrape")).json
    assert (told["log"]["message"], told["providers"]["a"]["message"]) == ("mq.internal is away.", "db.internal")


async def test_a_log_that_goes_away_later_takes_no_gateway_out_of_service(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(api.context.log), "check", AsyncMock(side_effect=LogUnavailable("The log is away.")))
    answer = await api.call("GET", "/ready")
    assert (answer.status, answer.json["status"]) == (200, "degraded")
    assert answer.json["log"] == {"state": "down", "message": "The log is away."}
    monkeypatch.setattr(type(api.context.log), "check", AsyncMock(side_effect=TimeoutError))
    assert (await api.call("GET", "/ready")).json["log"]["state"] == "down"
    api.context.feed.ready = False
    answer = await api.call("GET", "/ready")
    assert (answer.status, answer.json["status"]) == (503, "down")


async def test_a_feed_that_lags_is_not_ready(api: Api) -> None:
    api.context.feed.ready = False
    answer = await api.call("GET", "/ready")
    assert (answer.status, answer.json["feed"]["state"]) == (503, "down")


async def test_a_draining_gateway_is_not_ready(api: Api) -> None:
    await api.context.hub.drain()
    answer = await api.call("GET", "/ready")
    assert (answer.status, answer.json["status"]) == (503, "draining")


def value(body: bytes, line: str) -> float:
    """The value of one metric, labels included."""
    [found] = [one for one in body.decode().splitlines() if one.startswith(line + " ")]
    return float(found.rpartition(" ")[2])


async def test_metrics_count_what_happens(api: Api, ann: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    for _ in range(2):
        await api.call("GET", f"/api/v1/sessions/{session['id']}", ann)
    await api.call("GET", "/api/v1/sessions/999", ann)
    await api.call("GET", "/nope/at/all")
    await api.call("PROPFIND", "/health")
    short = (await api.call("POST", "/auth", ann)).json["short_token"]
    async with api.client.ws_connect(f"/ws?token={short}") as socket:
        await socket.receive()
        body = (await api.call("GET", "/metrics")).body
    requests = "cluster_code_http_request_duration_seconds_count"
    one = 'method="GET",route="/api/v1/sessions/{session_id}"'
    assert value(body, f'{requests}{{{one},status="200"}}') == 2
    assert value(body, f'{requests}{{{one},status="404"}}') == 1
    assert value(body, f'{requests}{{method="GET",route="unmatched",status="404"}}') == 1
    assert value(body, f'{requests}{{method="other",route="unmatched",status="405"}}') == 1
    assert value(body, "cluster_code_connections") == 1
    assert value(body, "cluster_code_connected_users") == 1
    assert value(body, "cluster_code_event_streams") == 0
    assert value(body, "cluster_code_drain_seconds") == pytest.approx(5.002)
    assert value(body, "cluster_code_replicas") == 1
    assert value(body, "cluster_code_questions_total") == 0
    assert value(body, "cluster_code_questions_incomplete_total") == 0
    assert value(body, 'cluster_code_sessions{status="pending"}') == 1
    assert value(body, 'cluster_code_sessions{status="running"}') == 0
    assert value(body, "cluster_code_outbox_events") == 3
    assert value(body, "cluster_code_outbox_oldest_seconds") >= 0
    assert value(body, "cluster_code_database_pool_max_connections") == 10
    assert value(body, "cluster_code_database_up") == 1
    assert value(body, "cluster_code_feed_ready") == 1
    assert b"cluster_code_deliveries_total" in body
    assert b'cluster_code_http_request_duration_seconds_count{method="GET",route="/ws"' not in body


async def test_close_codes_and_recoveries_are_counted(api: Api) -> None:
    api.context.hub.closes[4008] += 2
    api.context.hub.recoveries["lost"] += 1
    body = (await api.call("GET", "/metrics")).body
    assert value(body, 'cluster_code_closes_total{code="4008"}') == 2
    assert value(body, 'cluster_code_recoveries_total{outcome="lost"}') == 1


async def test_the_database_is_not_asked_at_every_scrape(api: Api, ann: Person) -> None:
    await api.call("GET", "/metrics")
    await api.session(ann, await api.project(ann.workspace_id))
    body = (await api.call("GET", "/metrics")).body
    assert value(body, 'cluster_code_sessions{status="pending"}') == 0


async def test_metrics_can_ask_for_a_token(serve: Serve) -> None:
    api = await serve(metrics_token="scrape")
    assert (await api.call("GET", "/metrics")).status == 401
    assert (await api.call("GET", "/metrics", "wrong")).status == 401
    assert (await api.call("GET", "/metrics", "scrape")).status == 200
