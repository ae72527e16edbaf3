"""What Git hosts send when something is pushed: whether it is theirs, and what it asks for. Pure.

GitHub signs the body (https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries), GitLab shows
the secret itself (https://docs.gitlab.com/user/project/integrations/webhooks/), and whoever else sends signs like
GitHub. Headers are looked up without regard to case.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs

import orjson

from orchestrator.errors import ClusterCodeError

# Stands in for the secret of an app that has none, so that its absence takes as long to find out as a wrong signature.
_NOBODYS = os.urandom(32)
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_BRANCH = "refs/heads/"
_DELIVERY = re.compile(r"[!-~]{1,200}")
_GENERIC_KEYS = frozenset({"branch", "default_branch", "commit_id", "message"})


class Kind(StrEnum):
    """Who sends."""

    GITHUB = "github"
    GITLAB = "gitlab"
    GENERIC = "generic"


_SIGNATURES = {
    Kind.GITHUB: "X-Hub-Signature-256",
    Kind.GITLAB: "X-Gitlab-Token",
    Kind.GENERIC: "X-Signature-256",
}
# The first that is there counts. GitLab's own UUID of an event came before the keys that repetitions share.
_DELIVERIES = {
    Kind.GITHUB: ("X-GitHub-Delivery",),
    Kind.GITLAB: ("Idempotency-Key", "webhook-id", "X-Gitlab-Event-UUID"),
    Kind.GENERIC: ("X-Delivery-Id",),
}
_EVENTS = {Kind.GITHUB: "X-GitHub-Event", Kind.GITLAB: "X-Gitlab-Event"}
HEADERS = {
    kind: (_SIGNATURES[kind], *_DELIVERIES[kind], *([_EVENTS[kind]] if kind in _EVENTS else ())) for kind in Kind
}


class Malformed(ClusterCodeError):
    """It is signed, and yet nothing that the sender is known to send. The message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Push:
    """Something new in a branch."""

    # What a repetition of it has too.
    delivery: str
    # None: the app's own.
    branch: str | None
    # None: the sender does not say.
    default_branch: str | None
    # None: the newest of the branch.
    commit_id: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """Nothing to do, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Ping:
    """The sender tries whether it reaches anybody."""


def is_genuine(kind: Kind, headers: Mapping[str, str], body: bytes, secret: bytes | None) -> bool:
    """Whether the sender knows the secret. Takes the same time whatever is wrong, and for no secret (None) too."""
    given = headers.get(_SIGNATURES[kind], "").encode(errors="surrogateescape")
    key = _NOBODYS if secret is None else secret
    if kind is Kind.GITLAB:
        # Digests, since a comparison ends at once for another length.
        same = hmac.compare_digest(sha256(given).digest(), sha256(key).digest())
    else:
        same = hmac.compare_digest(given, b"sha256=" + hmac.new(key, body, sha256).hexdigest().encode())
    return same and secret is not None


def parse(kind: Kind, headers: Mapping[str, str], body: bytes) -> Push | Ignored | Ping:
    """What a genuine delivery asks for. Raises Malformed."""
    event = headers.get(_EVENTS.get(kind, ""), "")
    if kind is Kind.GENERIC:
        return _generic(_object(body), _delivery(kind, headers))
    if kind is Kind.GITHUB:
        if event == "ping":
            return Ping()
        if event != "push":
            return Ignored(f"{_quoted(event)} is no push.")
        if headers.get("Content-Type", "").partition(";")[0].strip().lower() == "application/x-www-form-urlencoded":
            body = _form(body)
        return _github(_object(body), _delivery(kind, headers))
    if event != "Push Hook":
        return Ignored(f"{_quoted(event)} is no push to a branch.")
    return _gitlab(_object(body), _delivery(kind, headers))


def ignored(push: Push, branch: str | None, *, auto_deploy: bool) -> str | None:
    """Why an app that follows `branch` (None: the repository's default one) has nothing to do; None: it has."""
    if not auto_deploy:
        return "auto_deploy of the app is off."
    if push.branch is None:
        return None
    followed = branch or push.default_branch
    if followed is None:
        return (
            "The app follows the repository's default branch, and which one that is was not said: send default_branch, "
            "or no branch."
        )
    if push.branch != followed:
        return f"The app follows the branch {_quoted(followed)}, not {_quoted(push.branch)}."
    return None


def _github(document: Mapping[str, Any], delivery: str) -> Push | Ignored:
    # https://docs.github.com/en/webhooks/webhook-events-and-payloads#push
    head = _mapping(document, "head_commit")
    default_branch = _text(_mapping(document, "repository"), "default_branch")
    return _pushed(document, delivery, default_branch, _text(head, "message") or "")


def _gitlab(document: Mapping[str, Any], delivery: str) -> Push | Ignored:
    # https://docs.gitlab.com/user/project/integrations/webhook_events/#push-events
    commits = document.get("commits")
    newest = commits[-1] if isinstance(commits, list) and commits and isinstance(commits[-1], dict) else {}
    default_branch = _text(_mapping(document, "project"), "default_branch")
    return _pushed(document, delivery, default_branch, _text(newest, "message") or "")


def _pushed(document: Mapping[str, Any], delivery: str, default_branch: str | None, message: str) -> Push | Ignored:
    """`ref` and `after` are the same at both."""
    ref, after = _text(document, "ref"), _text(document, "after")
    if not ref or not after or not _COMMIT.fullmatch(after):
        raise Malformed("A push has a ref and, in after, a commit.")
    if not ref.startswith(_BRANCH):
        return Ignored(f"{_quoted(ref)} is no branch.")
    if not after.strip("0"):
        return Ignored(f"The branch {_quoted(ref.removeprefix(_BRANCH))} was deleted.")
    return Push(delivery, ref.removeprefix(_BRANCH), default_branch, after, _subject(message))


def _generic(document: Mapping[str, Any], delivery: str) -> Push:
    if unknown := document.keys() - _GENERIC_KEYS:
        raise Malformed(f"Unknown: {_quoted(min(unknown))}. Known are {', '.join(sorted(_GENERIC_KEYS))}.")
    commit_id = _text(document, "commit_id")
    if commit_id is not None and not (_COMMIT.fullmatch(commit_id) and commit_id.strip("0")):
        raise Malformed("commit_id must be a whole commit: 40 (or 64) digits of 0-9a-f.")
    message = _subject(_text(document, "message") or "")
    return Push(delivery, _text(document, "branch"), _text(document, "default_branch"), commit_id, message)


def _delivery(kind: Kind, headers: Mapping[str, str]) -> str:
    """The delivery's id, that no id of another sender is like. Raises Malformed: without it, nothing is done once."""
    for name in _DELIVERIES[kind]:
        if (given := headers.get(name)) is not None:
            if not _DELIVERY.fullmatch(given):
                raise Malformed(f"{name} must be 1 to 200 visible ASCII characters.")
            return f"{kind.value}:{given}"
    raise Malformed(f"The header {' or '.join(_DELIVERIES[kind])} is missing: it says which deliveries are the same.")


def _form(body: bytes) -> bytes:
    """GitHub's other content type: the JSON is in the field `payload`."""
    try:
        fields = parse_qs(body.decode("ascii"), strict_parsing=True, max_num_fields=10)
        return fields["payload"][0].encode()
    except (ValueError, KeyError) as error:
        raise Malformed("The form has no field payload.") from error


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"The body is no JSON: {error}.") from error
    if not isinstance(document, dict):
        raise Malformed("The body must be a JSON object.")
    return document


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _text(document: Mapping[str, Any], key: str) -> str | None:
    value = document.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise Malformed(f"{key} must be text.")
    return value


def _subject(message: str) -> str:
    return message.strip().partition("\n")[0].strip()[:500]


def _quoted(text: str) -> str:
    """Others' text in an answer."""
    return repr(text[:200])
