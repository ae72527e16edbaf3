from __future__ import annotations

import random

import pytest
from aiohttp.test_utils import make_mocked_request

from gateway.problems import Problem
from gateway.ratelimit import Limit, Limits, client_address, limited_address
from gateway.settings import GatewaySettings
from orchestrator.errors import SettingsError


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limit(rate: str, clock: Clock | None = None) -> Limit:
    return Limit(rate, variable="RATE", clock=clock or Clock())


def taken(limit: Limit, who: str = "a", times: int = 1000) -> int:
    """How many of so many requests are let through."""
    count = 0
    for _ in range(times):
        try:
            limit.take(who)
        except Problem:
            continue
        count += 1
    return count


def test_requests_above_the_limit_are_refused_and_told_when_to_come_back() -> None:
    limited = limit("3/hour")
    assert [limited.take("a")["RateLimit-Remaining"] for _ in range(3)] == ["2", "1", "0"]
    with pytest.raises(Problem) as refusal:
        limited.take("a")
    assert refusal.value.status == 429
    assert refusal.value.headers["Retry-After"] == refusal.value.headers["RateLimit-Reset"] == "2600"
    assert refusal.value.headers["RateLimit-Limit"] == "3"
    assert refusal.value.headers["RateLimit-Remaining"] == "0"


def test_the_window_slides() -> None:
    clock = Clock()
    clock.now = 1200.0  # The begin of a minute.
    limited = limit("60/minute", clock)
    assert taken(limited) == 60
    clock.now += 60
    # The whole window before still counts, then half of it, then none.
    assert taken(limited) == 0
    clock.now += 30
    assert taken(limited) == 30
    clock.now += 120
    assert taken(limited) == 60


@pytest.mark.random
def test_in_no_window_are_more_requests_let_through_than_the_counter_promises() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    clock = Clock()
    limited = limit("10/minute", clock)
    let_through: list[float] = []
    for _ in range(2000):
        clock.now += draw.expovariate(1.0)
        let_through += [clock.now] * taken(limited, times=draw.randint(1, 3))
    # It takes the window before for evenly spread, which makes at most twice the rate of a burst across the edge.
    assert all(let_through[index + 20] - let_through[index] >= 60 for index in range(len(let_through) - 20))
    assert len(let_through) >= 2000 * 0.9 / 60 * 10


def test_each_who_and_each_limit_is_counted_alone() -> None:
    limits = Limits(GatewaySettings(rate_limit_address="1/hour", rate_limit_login="1/hour"))
    limits.address.take("a")
    limits.address.take("b")
    limits.login.take("a")
    with pytest.raises(Problem):
        limits.login.take("a")


@pytest.mark.parametrize("rate", ["", "off"])
def test_a_limit_can_be_none(rate: str) -> None:
    assert limit(rate).take("1") == {}


@pytest.mark.parametrize("rate", ["many", "10", "10/fortnight", "-1/minute"])
def test_a_rate_that_cannot_be_read_names_its_variable(rate: str) -> None:
    with pytest.raises(SettingsError, match="RATE_LIMIT_LOGIN"):
        Limits(GatewaySettings(rate_limit_login=rate))


def test_who_stays_away_is_forgotten() -> None:
    clock = Clock()
    limited = limit("10/minute", clock)
    for number in range(100):
        limited.take(str(number))
    clock.now += 200
    limited.take("new")
    assert len(limited) == 1


@pytest.mark.parametrize(
    ("forwarded", "proxies", "expected"),
    [
        (["1.1.1.1"], 0, "10.0.0.9"),
        (["1.1.1.1"], 1, "1.1.1.1"),
        (["6.6.6.6, 1.1.1.1"], 1, "1.1.1.1"),
        (["6.6.6.6, 1.1.1.1, 2.2.2.2"], 2, "1.1.1.1"),
        (["6.6.6.6", "1.1.1.1"], 1, "1.1.1.1"),
        (["1.1.1.1"], 2, "10.0.0.9"),
        ([], 1, "10.0.0.9"),
        (["evil"], 1, "10.0.0.9"),
        (["2001:DB8::1"], 1, "2001:db8::1"),
    ],
)
def test_only_what_trusted_proxies_appended_is_believed(forwarded: list[str], proxies: int, expected: str) -> None:
    request = make_mocked_request("GET", "/", headers=[("X-Forwarded-For", hop) for hop in forwarded])
    request = request.clone(remote="10.0.0.9")
    assert client_address(request, proxies) == expected


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("unknown", "unknown"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_an_ipv6_client_is_its_network(address: str, counted: str) -> None:
    assert limited_address(address) == counted
