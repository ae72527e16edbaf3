"""Cloning a repository that a user names, by git, which is made to ask nobody and run nothing but itself.

The URL and the branch are checked here whoever checked them before: git takes what begins with a dash for an option,
and `ext::…` for a command (gitremote-helpers(7), git-remote-ext(1)). Credentials in a URL are handed over in the
environment of git alone: command lines are for all to see, and `.git/config` would keep them.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from orchestrator.children.output import Stream, drain, open_pipe
from orchestrator.children.processes import Limits, Selection, end, ending, spawn
from orchestrator.errors import ProviderFailure

# What of our own environment git needs to get through the operator's network.
_NETWORK = (
    "http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_SSL_CAINFO",
)  # fmt: skip
# Two colons would name a transport helper.
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_HOST = re.compile(r"(?!-)[A-Za-z0-9._-]{1,253}\Z|[0-9A-Fa-f:.]+\Z")
# git's short form of ssh: `[user@]host:path`, the path not beginning with the second colon of `helper::address`.
_SHORT_SSH = re.compile(r"(?:(?!-)[^@/:\s]+@)?(?!-)[A-Za-z0-9._-]+:(?![:-])\S+\Z")
# git-check-ref-format(1), rules 1 and 3 to 10.
_NOT_IN_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(?:/|\Z)")
# Seconds between two lines about progress.
_PROGRESS_EVERY = 1.0

# What git and what it runs say in the C locale, and what it means; the first that is found counts.
_CAUSES = {
    "BranchNotFound": r"remote branch .* not found",
    "SchemeRefused": r"transport '.*' not allowed",
    "DiskFull": r"no space left on device|disk quota exceeded|file too large",
    "HostUnreachable": (
        r"could not resolve|unable to look up|name or service not known|no route to host|network is unreachable"
        r"|connection (?:refused|timed out|reset)|operation timed out|unable to connect|(?:failed to|couldn't) connect"
    ),
    "RepositoryNotFound": (
        r"repository .*not found|not found: did you run|returned error: 404|does not appear to be a git repository"
        r"|not exported|no such repository|does not exist"
    ),
    "AuthenticationNeeded": (
        r"auth(?:entication|orization) failed|could not read (?:username|password)|permission denied"
        r"|terminal prompts disabled|returned error: 40[13]|host key verification failed|access denied"
    ),
}
_SENTENCES = {
    "BranchNotFound": "The branch {branch} does not exist in {url}: correct the project's branch.",
    "SchemeRefused": "Repositories are not cloned over the scheme of {url}.",
    "DiskFull": "There is no room left for the clone of {url}.",
    "HostUnreachable": "The host of {url} cannot be reached ({last}): check the project's repository URL.",
    "AuthenticationNeeded": "{url} does not exist, or wants credentials that were not given or are wrong ({last}).",
    "RepositoryNotFound": "There is no repository at {url}, or it may not be read ({last}).",
    "CloneFailed": "{url} cannot be cloned: {last}",
}
# A server that only hands out files cannot cut the history (gitprotocol-http(5), "dumb").
_NOT_SHALLOW = re.compile(r"does not support shallow", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Repository:
    """Where to clone from: the URL without credentials, and those. `str` is fit to be shown."""

    url: str
    username: str = ""
    password: str = ""

    def __str__(self) -> str:
        return self.url.partition("?")[0]

    def hide(self, line: str) -> str:
        """A line of git's, without anything secret."""
        line = line.replace(self.url, str(self))
        query = self.url.partition("?")[2]
        if query:
            # A server that redirects, or quotes what it was asked, repeats it.
            line = line.replace(query, "***")
        for secret in (self.password, self.username if self.url.startswith("http") else ""):
            if len(secret) > 2:
                line = line.replace(secret, "***")
        return line


def parse(url: str, schemes: Collection[str]) -> Repository:
    """A repository that may be cloned. Raises ProviderFailure, which does not repeat the URL."""
    if not url or url.startswith("-") or not url.isprintable() or " " in url or "\\" in url:
        raise ProviderFailure("InvalidRepository", "The project's repository URL is not well-formed.")
    if "://" not in url:
        if not _SHORT_SSH.match(url):
            raise ProviderFailure(
                "InvalidRepository", "The project's repository must be a URL such as https://host/path."
            )
        _allow("ssh", schemes)
        return Repository(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ProviderFailure("InvalidRepository", "The project's repository URL is not well-formed.") from error
    _allow(parts.scheme, schemes)
    if not _URL.match(url):
        raise ProviderFailure("InvalidRepository", "The project's repository URL is not well-formed.")
    if parts.scheme != "file" and not _HOST.match(host):
        raise ProviderFailure("InvalidRepository", "The project's repository URL has no host that may be used.")
    username, password = unquote(parts.username or ""), unquote(parts.password or "")
    if "\n" in username + password or "\0" in username + password or username.startswith("-"):
        raise ProviderFailure("InvalidRepository", "The user in the project's repository URL may not be used.")
    place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")
    if parts.scheme == "ssh" and parts.username:
        # Not secret, and needed: `git@`.
        place = f"{parts.username}@{place}"
    return Repository(urlunsplit(parts._replace(netloc=place, fragment="")), username, password)


def _allow(scheme: str, schemes: Collection[str]) -> None:
    if scheme not in schemes:
        allowed = ", ".join(schemes)
        raise ProviderFailure(
            "SchemeRefused", f"Repositories are cloned over {allowed} only: change the project's URL."
        )


def check_branch(branch: str) -> None:
    """Raise ProviderFailure (`InvalidBranch`) unless git allows the name for a branch or a tag."""
    if (
        not branch
        or branch.startswith(("-", "/", "."))
        or branch.endswith(("/", "."))
        or branch == "@"
        or _NOT_IN_BRANCH.search(branch)
    ):
        raise ProviderFailure("InvalidBranch", "The project's branch is no name that git allows for a branch.")


@dataclass(frozen=True, slots=True)
class Clone:
    """A clone to be made, and how."""

    repository: Repository
    branch: str | None
    target: Path
    schemes: Collection[str]
    # Seconds for all of it.
    deadline: float
    # What the processes are marked with, so that they are found again.
    markers: Mapping[str, str]
    home: Path
    ssh_key: str | None = None
    file_bytes: int | None = None

    async def make(self, say: Callable[[str], None]) -> None:
        """Clone into `target`, a directory that is not there yet; `say` takes each line of progress.

        Raises ProviderFailure with the classified cause. However it ends, cancelled too, no process of it is left;
        `target` may be left, unfinished, by all but success.
        """
        git = shutil.which("git")
        if git is None:
            raise ProviderFailure("GitMissing", "git is not installed where the sessions run: tell an operator.")
        try:
            async with asyncio.timeout(self.deadline):
                said = await self._run(git, say, shallow=True)
                if said and _NOT_SHALLOW.search(said):
                    await asyncio.to_thread(shutil.rmtree, self.target, ignore_errors=True)
                    said = await self._run(git, say, shallow=False)
        except TimeoutError as error:
            raise ProviderFailure(
                "CloneTimeout",
                f"{self.repository} could not be cloned within {self.deadline:g} s: it does not answer, or is too big.",
            ) from error
        if said is not None:
            raise self._failure(said)

    async def _run(self, git: str, say: Callable[[str], None], *, shallow: bool) -> str | None:
        """Run git once; None when it succeeded, else what it said."""
        kept: deque[str] = deque(maxlen=50)
        progress = _Progress(say, asyncio.get_running_loop().time)

        def line(text: str) -> None:
            text = self.repository.hide(text).strip()
            if text and not text.startswith("Cloning into "):
                kept.append(text)
                progress(text)

        stream, write = await open_pipe(partial(Stream, line, lambda lines: None, separators=b"\n\r"))
        try:
            try:
                process = await spawn(
                    [git, *self._arguments(shallow=shallow)],
                    cwd=self.target.parent, env=self._environment(), stdout=write, stderr=write,
                    limits=Limits(file_bytes=self.file_bytes),
                )  # fmt: skip
            finally:
                os.close(write)
            returncode = await process.wait()
        finally:
            await end(Selection(self.markers), grace=0)
            await drain(stream, timeout=1)
        if returncode == 0:
            return None
        return "\n".join(kept) or f"git {ending(returncode)}"

    def _arguments(self, *, shallow: bool) -> Iterator[str]:
        settings = {
            # Nothing of the repository's, the user's or the machine's runs.
            "core.hooksPath": "/dev/null",
            "core.fsmonitor": "false",
            "protocol.ext.allow": "never",
            "credential.helper": "",
            "advice.detachedHead": "false",
        }
        if self.repository.password or self._http_user:
            # Only for the host that was named, not for one that it redirects to.
            parts = urlsplit(self.repository.url)
            settings[f"credential.{parts.scheme}://{parts.netloc}.helper"] = (
                '!f() { test "$1" = get && printf "username=%s\\npassword=%s\\n" "$CLONE_USER" "$CLONE_PASSWORD"; }; f'
            )
        for name, value in settings.items():
            yield "-c"
            yield f"{name}={value}"
        yield from ("clone", "--progress", "--template=", "--no-tags", "--single-branch")
        if shallow:
            yield from ("--depth", "1")
        if self.branch is not None:
            yield from ("--branch", self.branch)
        yield from ("--", self.repository.url, str(self.target))

    @property
    def _http_user(self) -> str:
        return self.repository.username if self.repository.url.startswith("http") else ""

    def _environment(self) -> dict[str, str]:
        ssh = [
            "ssh", "-F", "/dev/null", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15",
            "-o", "StrictHostKeyChecking=accept-new", "-o", f"UserKnownHostsFile={self.home / '.ssh-known-hosts'}",
            "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none",
            "-o", f"IdentityFile={self.ssh_key or '/dev/null'}",
        ]  # fmt: skip
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.home),
            "LC_ALL": "C",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ALLOW_PROTOCOL": ":".join(self.schemes),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_LFS_SKIP_SMUDGE": "1",
            "GIT_SSH_COMMAND": " ".join(f"'{word}'" if "=" in word else word for word in ssh),
            "GIT_SSH_VARIANT": "ssh",
            **{name: os.environ[name] for name in _NETWORK if name in os.environ},
            **self.markers,
        }
        if self._http_user or self.repository.password:
            environment["CLONE_USER"] = self.repository.username
            environment["CLONE_PASSWORD"] = self.repository.password
        return environment

    def _failure(self, said: str) -> ProviderFailure:
        # git names the directory that it writes to, which is nobody's business.
        reason, telling = classify(said.replace(str(self.target), "the workspace"))
        sentence = _SENTENCES[reason].format(branch=repr(self.branch), url=self.repository, last=telling[:300])
        return ProviderFailure(reason, sentence)


def classify(said: str) -> tuple[str, str]:
    """Why a clone failed, from what git said: a reason of `_SENTENCES`, and the words that tell most."""
    lines = said.splitlines()
    for reason, pattern in _CAUSES.items():
        for place, line in enumerate(lines):
            if re.search(pattern, line, re.IGNORECASE):
                # After a colon the reason itself stands on the next line.
                more = lines[place + 1 : place + 2] if line.endswith(":") else []
                return reason, " ".join([_bare(line), *more])
    telling = [line for line in lines if line.startswith(("fatal:", "error:"))] or lines
    return "CloneFailed", " ".join(_bare(line) for line in telling[-3:])


def _bare(line: str) -> str:
    return re.sub(r"\A(?:fatal|error): ", "", line)


class _Progress:
    """Passes on what git says, of its running percentages one a second."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._say = say
        self._clock = clock
        self._next = 0.0

    def __call__(self, line: str) -> None:
        if re.search(r"\d+% \(", line) and not line.endswith("done."):
            if self._clock() < self._next:
                return
            self._next = self._clock() + _PROGRESS_EVERY
        self._say(line)
