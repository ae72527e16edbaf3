"""Which Git repositories and branches a project may name.

What passes here is handed to git as an argument later, so that nothing may look like an option or start a transport
helper (gitremote-helpers(7): `ext::` runs a command). No message repeats a URL, which may hold a password.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import unquote, urlsplit, urlunsplit

from orchestrator.errors import Invalid

_HOST = re.compile(r"(?!-)[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]+\]")
_USER = re.compile(r"(?!-)[^@/:\s]+")
# git's short form of ssh, `[user@]host:path` (gitprotocol docs: "scp-like syntax").
_SCP_LIKE = re.compile(r"(?:(?P<user>[^@/:]+)@)?(?P<host>[^@/:]+):(?P<path>.+)")
# A slip in a URL, or a trick, that the short form would take for a host.
_NO_HOSTS = frozenset({"file", "ext", "fd", "http", "https", "ssh", "git", "ftp", "ftps"})
# git-check-ref-format(1), rules 1 and 3 to 10.
_NOT_IN_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(/|$)")


def check_repo_url(url: str, schemes: Collection[str]) -> None:
    """Return when `url` is a repository that may be cloned over one of `schemes`; raises Invalid (`repo_url`)."""
    if wrong := _wrong_with(url, schemes):
        raise Invalid(f"repo_url {wrong}.", field="repo_url")


def without_secrets(url: str) -> str:
    """The URL for who may see where the code is, and not how it is had.

    Without password and query; over http without the user too, which is often a token. That of ssh (`git@`) is none.
    """
    if "://" not in url:
        return url
    parts = urlsplit(url)
    userinfo, _, host = parts.netloc.rpartition("@")
    user = "" if parts.scheme.startswith("http") else userinfo.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}@{host}" if user else host, query=""))


def _wrong_with(url: str, schemes: Collection[str]) -> str | None:
    if url.startswith("-"):
        return "must not begin with a dash"
    if not url.isprintable() or any(character.isspace() for character in url):
        return "must not contain blanks or control characters"
    if "\\" in url:
        return "must not contain a backslash"
    if "://" in url:
        return _wrong_with_url(url, schemes)
    short = _SCP_LIKE.fullmatch(url)
    if short is None or short["path"].startswith(":") or short["host"].lower() in _NO_HOSTS:
        return f"must be a URL such as https://host/path ({_listed(schemes)})"
    if "ssh" not in schemes:
        return f"has a scheme that is not allowed: use {_listed(schemes)}"
    if short["user"] is not None and not _USER.fullmatch(short["user"]):
        return "has a user that is not allowed"
    if not _HOST.fullmatch(short["host"]):
        return "has a host that is not allowed"
    if short["path"].startswith("-"):
        return "has a path that begins with a dash"
    return None


def _wrong_with_url(url: str, schemes: Collection[str]) -> str | None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is no well-formed URL"
    if parts.scheme not in schemes or not url.startswith(f"{parts.scheme}://"):
        return f"has a scheme that is not allowed: use {_listed(schemes)}"
    authority = parts.netloc.rpartition("@")
    userinfo = unquote(authority[0])
    if userinfo.startswith("-") or not userinfo.isprintable():
        return "has a user that is not allowed"
    # Not parts.hostname, which hides what it strips.
    host = authority[2]
    if port is not None or host.endswith(":"):
        host = host.rpartition(":")[0]
    if not _HOST.fullmatch(host):
        return "needs a host"
    if len(parts.path) < 2:
        return "needs the path of a repository"
    return None


def _listed(schemes: Collection[str]) -> str:
    return ", ".join(f"{scheme}://" for scheme in schemes)


def check_branch(branch: str) -> None:
    """Return when `branch` is a name that git allows (git-check-ref-format(1)); raises Invalid (`branch`)."""
    if (
        branch.startswith(("-", "/", "."))
        or branch.endswith(("/", "."))
        or branch == "@"
        or _NOT_IN_BRANCH.search(branch)
    ):
        raise Invalid("branch is no name that git allows for a branch.", field="branch")
