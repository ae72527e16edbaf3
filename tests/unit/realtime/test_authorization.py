from __future__ import annotations

import pytest

from auth.errors import AuthError, Forbidden
from auth.permissions import Identity
from gateway.realtime.authorization import Channel, UnknownChannel, decide_alone, parse_channel

USER = Identity(7, "u@example.org", is_admin=False)
ADMIN = Identity(1, "a@example.org", is_admin=True)


@pytest.mark.parametrize(
    ("name", "channel"),
    [
        ("session:42", Channel("session:42", "session", 42)),
        ("workspace:9223372036854775807", Channel("workspace:9223372036854775807", "workspace", 2**63 - 1)),
        ("user:7", Channel("user:7", "user", 7)),
        ("deployment:1", Channel("deployment:1", "deployment", 1)),
        ("broadcast", Channel("broadcast", "broadcast")),
        ("cluster", Channel("cluster", "cluster")),
        ("app:7:logs", Channel("app:7:logs", "foreign")),
        ("app:\0\n", Channel("app:\0\n", "foreign")),
    ],
)
def test_channels_are_known_by_their_names(name: str, channel: Channel) -> None:
    assert parse_channel(name) == channel


@pytest.mark.parametrize(
    "name",
    [
        "",
        "session",
        "session:",
        "session:0",
        "session:007",
        "session:-1",
        "session:4x",
        "session:\u0664",
        "session:9223372036854775808",
        "session:" + "9" * 30,
        "session:42 ",
        "session:42\n",
        "user:me",
        "gateway",
        "gateway:1",
        "broadcast:1",
        "cluster:x",
        ":7",
        "app:",
        "plain",
        "a:" + "x" * 199,
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(UnknownChannel):
        parse_channel(name)


def holder(**fields: object) -> Identity:
    return Identity(7, "u@example.org", is_admin=False, **fields)  # type: ignore[arg-type]


READER = Identity(1, "a@example.org", is_admin=True, scopes=frozenset({"read"}))


@pytest.mark.parametrize(
    ("identity", "name", "narrowed", "outcome"),
    [
        (USER, "user:7", None, None),
        (USER, "user:7", (), None),
        (USER, "user:8", None, Forbidden),
        (ADMIN, "user:8", None, None),
        (READER, "user:8", None, Forbidden),
        (USER, "broadcast", None, None),
        (USER, "broadcast", ("session:1",), Forbidden),
        (USER, "broadcast", ("broadcast",), None),
        (USER, "cluster", None, Forbidden),
        (ADMIN, "cluster", None, None),
        (READER, "cluster", None, Forbidden),
        (USER, "deployment:3", None, Channel("deployment:3", "deployment", 3)),
        (USER, "gateway", None, UnknownChannel),
        (ADMIN, "gateway", None, UnknownChannel),
        (USER, "app:3", None, Forbidden),
        (ADMIN, "app:3", None, None),
        (READER, "app:3", None, Forbidden),
        (holder(channels=("app:*",)), "app:3", None, None),
        (holder(channels=("app:*",)), "apple:3", None, Forbidden),
        (holder(channels=("app:3",)), "app:3", None, None),
        (holder(channels=("app:3",)), "app:33", None, Forbidden),
        (holder(channels=("app:*",)), "app:3", ("app:4",), Forbidden),
        (holder(channels=("app:3",)), "app:4", ("app:*",), Forbidden),
        # Patterns are for other services' channels: they open none of ours.
        (holder(channels=("*", "user:*", "cluster")), "user:8", None, Forbidden),
        (holder(channels=("*", "cluster")), "cluster", None, Forbidden),
        (holder(scopes=frozenset()), "broadcast", None, Forbidden),
        (holder(scopes=frozenset({"write"})), "broadcast", None, None),
        (USER, "session:5", None, Channel("session:5", "session", 5)),
        (USER, "session:5", ("session:5",), Channel("session:5", "session", 5)),
        (USER, "session:5", ("session:6",), Forbidden),
        (USER, "workspace:5", None, Channel("workspace:5", "workspace", 5)),
    ],
)
def test_what_needs_no_database_is_decided_without_it(
    identity: Identity, name: str, narrowed: tuple[str, ...] | None, outcome: type[AuthError] | Channel | None
) -> None:
    if isinstance(outcome, type):
        with pytest.raises(outcome) as caught:
            decide_alone(identity, name, narrowed)
        assert caught.type is outcome
    else:
        assert decide_alone(identity, name, narrowed) == outcome
