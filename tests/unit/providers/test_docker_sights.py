"""What a session's containers show, as their engine tells it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orchestrator.providers import docker_containers
from orchestrator.providers.contract import Observation, State
from orchestrator.providers.docker_sights import (
    Memory,
    Rules,
    Scene,
    Sight,
    diagnose,
    endpoints_of,
    moment,
    read,
    remember,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NEVER = "0001-01-01T00:00:00Z"


def inspected(**state: Any) -> dict[str, Any]:
    """What Docker 20.10 says of a container that runs."""
    marks = {
        docker_containers.SERVICE: "preview",
        docker_containers.ALL: "preview",
        docker_containers.PORT: "3000",
        docker_containers.PATH: "/app",
    }
    return {
        "Id": "c0ffee",
        "RestartCount": 0,
        "Config": {"Labels": marks},
        "HostConfig": {
            "RestartPolicy": {"Name": "unless-stopped", "MaximumRetryCount": 0},
            "PortBindings": {"3000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "20001"}]},
        },
        "NetworkSettings": {
            "Ports": {"3000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "20001"}]},
            "Networks": {"n": {"IPAddress": "172.18.0.2"}},
        },
        "State": {
            "Status": "running", "ExitCode": 0, "OOMKilled": False, "StartedAt": "2025-12-31T23:50:00.123456789Z",
            "FinishedAt": NEVER,
        } | state,
    }  # fmt: skip


def sight(**changes: Any) -> Sight:
    return replace(read(inspected(), url_host=None), **changes)


def seen(*sights: Sight, **scene: Any) -> Observation:
    return diagnose(Scene(sights, **scene), Rules(crashes=5, stable_after=60.0), NOW)


def test_times_are_read_as_the_engine_writes_them() -> None:
    assert moment("2025-12-31T23:50:00.123456789Z") == datetime(2025, 12, 31, 23, 50, 0, 123456, tzinfo=UTC)
    assert moment("2025-12-31T23:50:00Z") == datetime(2025, 12, 31, 23, 50, tzinfo=UTC)
    assert moment("2025-12-31T23:50:00.5Z") == datetime(2025, 12, 31, 23, 50, 0, 500000, tzinfo=UTC)
    assert moment(NEVER) is None


def test_a_service_is_reached_where_it_is_published_or_else_at_its_container() -> None:
    assert endpoints_of([sight()]).preview == read(inspected(), url_host="127.0.0.1").endpoint
    found = read(inspected(), url_host="box.example.com").endpoint
    assert found is not None
    assert (found.url, found.path) == ("http://box.example.com:20001/app", "/app")
    inside = inspected()
    inside["HostConfig"]["PortBindings"] = None
    found = read(inside, url_host="box.example.com").endpoint
    assert found is not None
    assert found.url == "http://172.18.0.2:3000/app"
    ended = inspected()
    ended["NetworkSettings"] = {"Ports": {}, "Networks": {"n": {"IPAddress": ""}}}
    assert read(ended, url_host=None).endpoint is None


def test_what_runs_and_answers_runs() -> None:
    assert seen(sight()).state is State.RUNNING
    assert seen(sight(health="healthy")).state is State.RUNNING
    waiting = seen(sight(), unready={"c0ffee": "/ answers 503"})
    assert (waiting.state, waiting.message) == (State.STARTING, "preview is not ready yet: / answers 503.")
    assert seen(sight(health="starting")).reason == "NotReady"
    assert seen(sight(health="unhealthy", health_said="no way")).message == "The health check of preview fails: no way."


@pytest.mark.parametrize("status", ["created", "exited", "dead", "removing"])
def test_what_does_not_run_is_stopped_or_incomplete(status: str) -> None:
    assert seen(sight(status=status)).state is State.STOPPED
    both = frozenset({"preview", "chat"})
    lost = seen(sight(status=status, services=both), sight(id="b", service="chat", services=both))
    assert (lost.state, lost.message) == (State.ABSENT, "preview was stopped or removed by hand.")


def test_without_containers_the_volume_tells_whether_there_is_anything() -> None:
    assert seen(volume=True).state is State.STOPPED
    assert seen().state is State.ABSENT


def test_a_crash_is_told_with_the_exit_code_and_the_last_line() -> None:
    crashed = sight(status="restarting", exit_code=1, restarts=1)
    told = seen(crashed, words={"c0ffee": ["Traceback", "KeyError: 'x'", ""]})
    assert told.state is State.STARTING
    assert told.message == ("preview ended with exit code 1; its last line: KeyError: 'x'. It is being started again.")
    assert "(signal 11)" in seen(sight(status="restarting", exit_code=139, restarts=1)).message
    assert "more memory" in seen(sight(status="restarting", out_of_memory=True, exit_code=137, restarts=1)).message


def test_crashes_in_a_row_fail_it_until_it_was_up_for_long() -> None:
    began = NOW - timedelta(seconds=2)
    loop = sight(status="restarting", exit_code=1, restarts=5, began=began, ended=NOW)
    assert (seen(loop).state, seen(loop).reason) == (State.FAILED, "CrashLoop")
    killed = replace(loop, out_of_memory=True)
    assert seen(killed).reason == "OOMKilled"
    # It runs again for a moment: what it died of is remembered.
    running = replace(loop, status="running", exit_code=0)
    memories = {"c0ffee": Memory(exit=(1, False))}
    assert seen(running, memories=memories).message == "preview ended with exit code 1, 5 times in a row."
    # Who has not seen it die waits until it does again.
    assert seen(running).state is State.STARTING
    assert seen(replace(running, began=NOW - timedelta(seconds=61))).state is State.RUNNING


def test_crashes_long_ago_are_forgiven() -> None:
    rules, memory = Rules(crashes=5, stable_after=60.0), Memory(exit=(1, False))
    remember(memory, sight(restarts=5), rules, NOW)
    assert memory == Memory(forgiven=5)
    again = sight(status="restarting", exit_code=1, restarts=6, began=NOW - timedelta(seconds=1), ended=NOW)
    assert seen(again, memories={"c0ffee": memory}).state is State.STARTING
    # As one whose last run was long is, whoever sees it first.
    long = replace(again, began=NOW - timedelta(hours=1))
    assert seen(long).state is State.STARTING
