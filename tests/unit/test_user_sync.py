"""What a message about a user says, and whether to obey it after what was heard before."""

from __future__ import annotations

import orjson
import pytest

from orchestrator.eventlog.contract import Undeliverable
from orchestrator.user_sync import Heard, SyncedUser, Verdict, judge, parse

ADA = {"id": 7, "email": "ada@example.org", "name": "Ada"}
OBEY, PASS, REFUSE = Verdict.OBEY, Verdict.PASS_OVER, Verdict.REFUSE


@pytest.mark.parametrize("envelope", [True, False])
def test_a_user_comes_in_an_envelope_or_alone(envelope: bool) -> None:
    body = {"event_type": "auth.user.created", "channel": "users", "data": ADA} if envelope else ADA
    told = parse("auth.user.created", orjson.dumps(body))
    assert told == SyncedUser("7", "ada@example.org", "Ada", created=True)


def test_of_a_deleted_user_the_id_is_enough_and_what_is_not_known_is_left_out() -> None:
    assert parse("auth.user.deleted", b'{"id": "x", "role": 3}') == SyncedUser("x", deleted=True)


@pytest.mark.parametrize(
    ("given", "version"),
    [
        ({}, None),
        ({"version": 12}, 12),
        ({"version": 12, "updated_at": "2026-01-01T00:00:00Z"}, 12),
        ({"updated_at": "1970-01-01T00:00:02.5Z"}, 2_500_000),
        ({"updated_at": "1970-01-01T02:00:02+02:00"}, 2_000_000),
        ({"updated_at": "1970-01-01 00:00:02"}, 2_000_000),
        ({"updated_at": 2.5}, 2_500_000),
        ({"updated_at": None, "version": None}, None),
    ],
)
def test_the_version_is_a_number_or_the_moment_of_the_change(given: dict[str, object], version: int | None) -> None:
    assert parse("auth.user.updated", orjson.dumps({**ADA, **given})).version == version


@pytest.mark.parametrize(
    ("key", "body", "reason"),
    [
        ("auth.user.renamed", orjson.dumps(ADA), "the routing key 'auth.user.renamed' is none of"),
        ("auth.user.created", b"{", "not JSON"),
        ("auth.user.created", b"[]", "not a JSON object"),
        ("auth.user.created", b'{"id": 7}', "email: Missing data for required field."),
        ("auth.user.updated", orjson.dumps({**ADA, "id": True}), "id: Not a valid string."),
        ("auth.user.updated", orjson.dumps({**ADA, "version": -1}), "version: "),
        ("auth.user.updated", orjson.dumps({**ADA, "version": "3"}), "version: "),
        ("auth.user.updated", orjson.dumps({**ADA, "updated_at": "yesterday"}), "updated_at: Not a moment"),
        ("auth.user.updated", orjson.dumps({**ADA, "updated_at": 1e300}), "updated_at: Not a moment"),
        ("auth.user.deleted", b'{"email": "ada@example.org"}', "id: Missing data"),
    ],
)
def test_a_broken_message_is_told_with_the_reason(key: str, body: bytes, reason: str) -> None:
    with pytest.raises(Undeliverable) as caught:
        parse(key, body)
    assert reason in str(caught.value)


def created(version: int | None = None) -> SyncedUser:
    return SyncedUser("7", created=True, version=version)


def updated(version: int | None = None) -> SyncedUser:
    return SyncedUser("7", version=version)


def deleted(version: int | None = None) -> SyncedUser:
    return SyncedUser("7", deleted=True, version=version)


@pytest.mark.parametrize(
    ("heard", "user", "verdict"),
    [
        (None, created(), OBEY),
        (None, deleted(), OBEY),
        # In the order of arrival.
        (Heard(None, deleted=False), created(), OBEY),
        (Heard(None, deleted=False), updated(), OBEY),
        (Heard(None, deleted=False), deleted(), OBEY),
        # A deletion is final.
        (Heard(None, deleted=True), deleted(), OBEY),
        (Heard(None, deleted=True), updated(), PASS),
        (Heard(None, deleted=True), updated(3), PASS),
        (Heard(None, deleted=True), created(), REFUSE),
        (Heard(None, deleted=True), created(3), REFUSE),
        (Heard(5, deleted=True), created(), REFUSE),
        # By their versions.
        (Heard(5, deleted=False), updated(4), PASS),
        (Heard(5, deleted=False), updated(5), OBEY),
        (Heard(5, deleted=False), updated(6), OBEY),
        (Heard(5, deleted=False), deleted(4), PASS),
        (Heard(5, deleted=False), deleted(5), OBEY),
        (Heard(5, deleted=True), created(4), PASS),
        (Heard(5, deleted=True), created(5), PASS),
        (Heard(5, deleted=True), updated(6), OBEY),
        (Heard(5, deleted=True), deleted(5), OBEY),
        # One that has none counts by its arrival.
        (Heard(5, deleted=False), updated(), OBEY),
        (Heard(5, deleted=False), deleted(), OBEY),
        (Heard(5, deleted=True), updated(), PASS),
    ],
)
def test_whether_to_obey(heard: Heard | None, user: SyncedUser, verdict: Verdict) -> None:
    assert judge(heard, user) is verdict
