"""What Git hosts send: whether it is theirs, and what it asks for."""

from __future__ import annotations

import hmac
from typing import Any
from urllib.parse import urlencode

import orjson
import pytest
from multidict import CIMultiDict

from orchestrator.deployments import hooks
from orchestrator.deployments.hooks import Ignored, Kind, Malformed, Ping, Push

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ZEROS = "0" * 40
SECRET = b"it is a secret"


def signed(body: bytes, secret: bytes = SECRET) -> str:
    return "sha256=" + hmac.new(secret, body, "sha256").hexdigest()


def headers(**given: str) -> CIMultiDict[str]:
    return CIMultiDict({name.replace("_", "-"): value for name, value in given.items()})


def github(event: str = "push", **changes: Any) -> tuple[CIMultiDict[str], bytes]:
    document = {
        "ref": "refs/heads/main", "before": ZEROS, "after": COMMIT, "deleted": False,
        "repository": {"default_branch": "main"}, "head_commit": {"id": COMMIT, "message": "Add a cart\n\nWhy"},
    }  # fmt: skip
    document |= changes
    return headers(X_GitHub_Event=event, X_GitHub_Delivery="72d3162e-cc78"), orjson.dumps(document)


def gitlab(event: str = "Push Hook", **changes: Any) -> tuple[CIMultiDict[str], bytes]:
    document = {
        "object_kind": "push", "ref": "refs/heads/main", "before": ZEROS, "after": COMMIT, "checkout_sha": COMMIT,
        "project": {"default_branch": "main"}, "commits": [{"message": "first"}, {"message": "Add a cart\n"}],
    }  # fmt: skip
    document |= changes
    return headers(X_Gitlab_Event=event, X_Gitlab_Event_UUID="13792a34"), orjson.dumps(document)


@pytest.mark.parametrize(("kind", "name"), [(Kind.GITHUB, "X-Hub-Signature-256"), (Kind.GENERIC, "x-signature-256")])
def test_who_knows_the_secret_has_signed_the_body_byte_for_byte(kind: Kind, name: str) -> None:
    body = b'{"branch": "main"}'
    good = CIMultiDict({name: signed(body)})
    assert hooks.is_genuine(kind, good, body, SECRET)
    assert not hooks.is_genuine(kind, good, body + b" ", SECRET)
    assert not hooks.is_genuine(kind, good, body, b"another")
    assert not hooks.is_genuine(kind, good, body, None)
    for wrong in (
        "",
        "sha256=",
        signed(body)[:-1],
        signed(body).removeprefix("sha256="),
        "sha1=" + "0" * 40,
        "ü\udcff",
    ):
        assert not hooks.is_genuine(kind, CIMultiDict({name: wrong}), body, SECRET)
    assert not hooks.is_genuine(kind, CIMultiDict(), body, SECRET)
    # An empty secret, and none, are nobody's.
    assert not hooks.is_genuine(kind, CIMultiDict({name: signed(body, b"")}), body, None)


def test_gitlab_shows_the_secret_itself() -> None:
    assert hooks.is_genuine(Kind.GITLAB, headers(X_Gitlab_Token=SECRET.decode()), b"{}", SECRET)
    for wrong in ("", "it is a secre", "it is a secret!", "ü\udcff"):
        assert not hooks.is_genuine(Kind.GITLAB, headers(X_Gitlab_Token=wrong), b"{}", SECRET)
        assert not hooks.is_genuine(Kind.GITLAB, headers(X_Gitlab_Token=wrong), b"{}", None)


def test_a_push_says_branch_commit_and_subject() -> None:
    wanted = ("main", "main", COMMIT, "Add a cart")
    for kind, (given, body) in ((Kind.GITHUB, github()), (Kind.GITLAB, gitlab())):
        push = hooks.parse(kind, given, body)
        assert isinstance(push, Push)
        assert (push.branch, push.default_branch, push.commit_id, push.message) == wanted
    assert hooks.parse(Kind.GITHUB, *github(ref="refs/heads/a/b")).branch == "a/b"  # type: ignore[union-attr]


def test_github_may_send_a_form() -> None:
    given, body = github()
    form = urlencode({"payload": body}).encode()
    given["Content-Type"] = "application/x-www-form-urlencoded"
    assert hooks.parse(Kind.GITHUB, given, form) == hooks.parse(Kind.GITHUB, *github())
    for wrong in (b"", b"payload", b"other=1", b"\xff=1", b"payload=" + b"&a=1" * 100):
        with pytest.raises(Malformed, match="payload"):
            hooks.parse(Kind.GITHUB, given, wrong)


@pytest.mark.parametrize(
    ("kind", "sent", "why"),
    [
        (Kind.GITHUB, github("issues"), "'issues' is no push"),
        (Kind.GITHUB, github(ref="refs/tags/v1"), "'refs/tags/v1' is no branch"),
        (Kind.GITHUB, github(after=ZEROS, deleted=True, head_commit=None), "'main' was deleted"),
        (Kind.GITLAB, gitlab("Tag Push Hook", ref="refs/tags/v1"), "'Tag Push Hook' is no push to a branch"),
        (Kind.GITLAB, gitlab("Merge Request Hook"), "no push"),
        (Kind.GITLAB, gitlab(after=ZEROS, checkout_sha=None, commits=[]), "'main' was deleted"),
    ],
)
def test_what_is_no_new_commit_in_a_branch_is_ignored(kind: Kind, sent: Any, why: str) -> None:
    found = hooks.parse(kind, *sent)
    assert isinstance(found, Ignored)
    assert why in found.why


def test_a_ping_is_a_ping_whatever_it_says() -> None:
    assert hooks.parse(Kind.GITHUB, headers(X_GitHub_Event="ping"), b"nonsense") == Ping()


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"[]", b"null", b"{}", b'{"ref": 1}', b'{"ref": "refs/heads/main"}', b"[" * 5000]
)
def test_what_no_host_sends_is_malformed(body: bytes) -> None:
    for kind, (given, _) in ((Kind.GITHUB, github()), (Kind.GITLAB, gitlab())):
        with pytest.raises(Malformed):
            hooks.parse(kind, given, body)


@pytest.mark.parametrize("after", ["--upload-pack=x", "main", COMMIT[:7], COMMIT.upper(), COMMIT + "\n", 7, None])
def test_a_commit_is_a_whole_one(after: Any) -> None:
    with pytest.raises(Malformed):
        hooks.parse(Kind.GITHUB, *github(after=after))
    with pytest.raises(Malformed):
        hooks.parse(Kind.GENERIC, headers(X_Delivery_Id="1"), orjson.dumps({"commit_id": after or ""}))


def test_anybody_else_says_what_they_want() -> None:
    given = headers(X_Delivery_Id="1")
    assert hooks.parse(Kind.GENERIC, given, b"{}") == Push("generic:1", None, None, None, "")
    document = {"branch": "main", "default_branch": "main", "commit_id": COMMIT, "message": "Why"}
    push = hooks.parse(Kind.GENERIC, given, orjson.dumps(document))
    assert push == Push("generic:1", "main", "main", COMMIT, "Why")
    with pytest.raises(Malformed, match="'branhc'"):
        hooks.parse(Kind.GENERIC, given, b'{"branhc": "main"}')


def test_a_delivery_has_an_id_that_its_repetitions_share() -> None:
    given, body = gitlab()
    assert hooks.parse(Kind.GITLAB, given, body).delivery == "gitlab:13792a34"  # type: ignore[union-attr]
    given["webhook-id"] = "w"
    assert hooks.parse(Kind.GITLAB, given, body).delivery == "gitlab:w"  # type: ignore[union-attr]
    given["Idempotency-Key"] = "i"
    assert hooks.parse(Kind.GITLAB, given, body).delivery == "gitlab:i"  # type: ignore[union-attr]
    for wrong in ("", "a b", "x" * 201, "é"):
        with pytest.raises(Malformed, match="X-Delivery-Id"):
            hooks.parse(Kind.GENERIC, headers(X_Delivery_Id=wrong), b"{}")
    with pytest.raises(Malformed, match="X-Delivery-Id is missing"):
        hooks.parse(Kind.GENERIC, headers(), b"{}")


@pytest.mark.parametrize(
    ("pushed", "default", "followed", "auto_deploy", "why"),
    [
        ("main", "main", "main", True, None),
        ("main", "main", None, True, None),
        ("topic", "main", "topic", True, None),
        ("topic", "main", None, True, "follows the branch 'main', not 'topic'"),
        ("topic", None, None, True, "send default_branch"),
        (None, None, None, True, None),
        (None, None, "main", True, None),
        ("main", "main", "main", False, "auto_deploy of the app is off"),
        (None, None, None, False, "auto_deploy of the app is off"),
    ],
)
def test_an_app_deploys_what_it_follows(
    pushed: str | None, default: str | None, followed: str | None, auto_deploy: bool, why: str | None
) -> None:
    found = hooks.ignored(Push("g:1", pushed, default, COMMIT, ""), followed, auto_deploy=auto_deploy)
    assert found is None if why is None else why in str(found)
