"""Server-sent events at the edge of the whole gateway: headers, refusals, and what is counted."""

from __future__ import annotations

from tests.integration.gateway.conftest import Person, Serve

PAGE = "https://ide.example"


async def test_a_page_of_an_allowed_origin_may_read_the_stream(serve: Serve) -> None:
    api = await serve(cors_origins=[PAGE])
    ann: Person = await api.person()
    short = (await api.call("POST", "/api/v1/auth", ann)).json["short_token"]
    headers = {"Origin": PAGE, "Accept-Encoding": "gzip, br", "X-Request-ID": "mine"}
    async with api.client.get("/api/v1/events", params={"token": short}, headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        assert answer.headers["Vary"] == "Origin"
        assert answer.headers["X-Request-ID"] == "mine"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Connection"] == "close"
        assert "Content-Encoding" not in answer.headers
        assert "Transfer-Encoding" not in answer.headers
        assert (await answer.content.readline()).startswith(b"retry: ")
        metrics = (await api.call("GET", "/metrics")).body.decode()
    assert "\ncluster_code_event_streams 1.0\n" in metrics
    assert (
        'cluster_code_http_request_duration_seconds_count{method="GET",route="/api/v1/events",status="200"}' in metrics
    )
    assert not api.context.hub.actions


async def test_refusals_are_problem_documents(serve: Serve) -> None:
    api = await serve()
    ann: Person = await api.person()
    missing = await api.call("GET", "/api/v1/events")
    assert (missing.status, missing.json["status"]) == (401, 401)
    assert "?token=" in missing.json["detail"]
    assert (await api.call("GET", "/api/v1/events?channels=cluster", ann)).status == 403
    assert (await api.call("GET", "/api/v1/events?token=nonsense")).status == 401
    assert (await api.call("HEAD", "/api/v1/events", ann)).status == 405
    assert (await api.call("POST", "/api/v1/events", ann)).status == 405
    assert dict(api.context.hub.by_user) == {}
