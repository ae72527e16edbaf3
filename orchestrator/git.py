"""Repositories that users name, through git, which is made to ask nobody and run nothing but itself.

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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from orchestrator.children.output import Capture, Pipe, Stream, drain, open_pipe
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
    "BranchNotFound": r"remote branch .* not found|couldn't find remote ref",
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
    "BranchNotFound": "The branch {branch} does not exist in {url}: correct its name.",
    "SchemeRefused": "Repositories are not cloned over the scheme of {url}.",
    "DiskFull": "There is no room left for the clone of {url}.",
    "HostUnreachable": "The host of {url} cannot be reached ({last}): check the repository's URL.",
    "AuthenticationNeeded": "{url} does not exist, or wants credentials that were not given or are wrong ({last}).",
    "RepositoryNotFound": "There is no repository at {url}, or it may not be read ({last}).",
    "CloneFailed": "{url} cannot be cloned: {last}",
}
_NONE: Mapping[str, str] = {}
_UNLIMITED = Limits()


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
        raise ProviderFailure("InvalidRepository", "The repository's URL is not well-formed.")
    if "://" not in url:
        if not _SHORT_SSH.match(url):
            raise ProviderFailure(
                "InvalidRepository", "The repository must be given by a URL such as https://host/path."
            )
        _allow("ssh", schemes)
        return Repository(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ProviderFailure("InvalidRepository", "The repository's URL is not well-formed.") from error
    _allow(parts.scheme, schemes)
    if not _URL.match(url):
        raise ProviderFailure("InvalidRepository", "The repository's URL is not well-formed.")
    if parts.scheme != "file" and not _HOST.match(host):
        raise ProviderFailure("InvalidRepository", "The repository's URL has no host that may be used.")
    username, password = unquote(parts.username or ""), unquote(parts.password or "")
    if "\n" in username + password or "\0" in username + password or username.startswith("-"):
        raise ProviderFailure("InvalidRepository", "The user in the repository's URL may not be used.")
    place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")
    if parts.scheme == "ssh" and parts.username:
        # Not secret, and needed: `git@`.
        place = f"{parts.username}@{place}"
    return Repository(urlunsplit(parts._replace(netloc=place, fragment="")), username, password)


def _allow(scheme: str, schemes: Collection[str]) -> None:
    if scheme not in schemes:
        allowed = ", ".join(schemes)
        raise ProviderFailure("SchemeRefused", f"Repositories are cloned over {allowed} only: change its URL.")


def check_branch(branch: str) -> None:
    """Raise ProviderFailure (`InvalidBranch`) unless git allows the name for a branch or a tag."""
    if (
        not branch
        or branch.startswith(("-", "/", "."))
        or branch.endswith(("/", "."))
        or branch == "@"
        or _NOT_IN_BRANCH.search(branch)
    ):
        raise ProviderFailure("InvalidBranch", "The name of the branch is none that git allows.")


@dataclass(frozen=True, slots=True)
class Git:
    """git, as it runs for one repository: the remote `origin` of whatever it works in."""

    repository: Repository
    schemes: Collection[str]
    # What the processes are marked with, so that they are found again.
    markers: Mapping[str, str]
    home: Path
    # Where ssh keeps the keys of hosts: a host's first is believed.
    known_hosts: Path
    ssh_key: str | None = None
    limits: Limits = _UNLIMITED

    async def run(
        self, *arguments: str, cwd: Path, say: Callable[[str], None] | None = None, settings: Mapping[str, str] = _NONE
    ) -> str | None:
        """Run git once; None when it succeeded, else what it said (its last 50 lines).

        `say` takes each line of progress, `settings` go over ours. However it ends, cancelled too, no process of it is
        left. Raises ProviderFailure when git is not installed.
        """
        kept: deque[str] = deque(maxlen=50)
        progress = _Progress(say, asyncio.get_running_loop().time) if say else None

        def line(text: str) -> None:
            text = self.repository.hide(text).strip()
            if text and not text.startswith("Cloning into "):
                kept.append(text)
                if progress is not None:
                    progress(text)

        stream, write = await open_pipe(partial(Stream, line, lambda lines: None, separators=b"\n\r"))
        returncode = await self._spawn(arguments, cwd, settings, stream, write, write)
        if returncode == 0:
            return None
        return "\n".join(kept) or f"git {ending(returncode)}"

    async def read(self, *arguments: str, cwd: Path, limit: int = 1 << 20) -> bytes | None:
        """What git prints, its first `limit` bytes; None when it fails. Raises and ends like `run`."""
        output, write = await open_pipe(partial(Capture, limit))
        returncode = await self._spawn(arguments, cwd, _NONE, output, write, asyncio.subprocess.DEVNULL)
        return output.output if returncode == 0 else None

    async def _spawn(
        self, arguments: Sequence[str], cwd: Path, settings: Mapping[str, str], pipe: Pipe, stdout: int, stderr: int
    ) -> int:
        """Run git and read all that it writes to the pipe, whose end `stdout` is closed here."""
        try:
            git = shutil.which("git")
            if git is None:
                raise ProviderFailure("GitMissing", "git is not installed on the orchestrator: tell an operator.")
        except ProviderFailure:
            os.close(stdout)
            pipe.close()
            raise
        process = None
        try:
            try:
                process = await spawn(
                    [git, *self._settings(settings), *arguments],
                    cwd=cwd, env=self._environment(), stdout=stdout, stderr=stderr, limits=self.limits,
                )  # fmt: skip
            finally:
                os.close(stdout)
            return await process.wait()
        finally:
            await end(Selection(self.markers), grace=0)
            if process is not None:
                # It has ended: this is so that the loop knows it, too, before anybody closes that.
                await process.wait()
            await drain(pipe, timeout=1)

    def _settings(self, more: Mapping[str, str]) -> Iterator[str]:
        settings = {
            # Nothing of the repository's, the user's or the machine's runs.
            "core.hooksPath": "/dev/null",
            "core.fsmonitor": "false",
            "protocol.ext.allow": "never",
            "credential.helper": "",
            "advice.detachedHead": "false",
            "gc.auto": "0",
            **more,
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

    @property
    def _http_user(self) -> str:
        return self.repository.username if self.repository.url.startswith("http") else ""

    def _environment(self) -> dict[str, str]:
        ssh = [
            "ssh", "-F", "/dev/null", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15",
            "-o", "StrictHostKeyChecking=accept-new", "-o", f"UserKnownHostsFile={self.known_hosts}",
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
            # Not an argument: its query may be secret.
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "remote.origin.url",
            "GIT_CONFIG_VALUE_0": self.repository.url,
            **{name: os.environ[name] for name in _NETWORK if name in os.environ},
            **self.markers,
        }
        if self._http_user or self.repository.password:
            environment["CLONE_USER"] = self.repository.username
            environment["CLONE_PASSWORD"] = self.repository.password
        return environment

    def failure(self, said: str, *, branch: str | None, target: Path) -> ProviderFailure:
        """The classified cause, in a sentence. `target` is where the clone was to be, which is nobody's business."""
        reason, telling = classify(said.replace(str(target), "the workspace"))
        sentence = _SENTENCES[reason].format(branch=repr(branch), url=self.repository, last=telling[:300])
        return ProviderFailure(reason, sentence)


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
        git = Git(
            self.repository, self.schemes, self.markers, self.home, self.home / ".ssh-known-hosts", self.ssh_key,
            Limits(file_bytes=self.file_bytes),
        )  # fmt: skip
        try:
            async with asyncio.timeout(self.deadline):
                said = await git.run(*self._arguments(shallow=True), cwd=self.target.parent, say=say)
                if said and not_shallow(said):
                    await asyncio.to_thread(shutil.rmtree, self.target, ignore_errors=True)
                    said = await git.run(*self._arguments(shallow=False), cwd=self.target.parent, say=say)
        except TimeoutError as error:
            raise too_slow(self.repository, self.deadline) from error
        if said is not None:
            raise git.failure(said, branch=self.branch, target=self.target)

    def _arguments(self, *, shallow: bool) -> Iterator[str]:
        yield from ("clone", "--progress", "--template=", "--no-tags", "--single-branch")
        if shallow:
            yield from ("--depth", "1")
        if self.branch is not None:
            yield from ("--branch", self.branch)
        yield from ("--", self.repository.url, str(self.target))


def too_slow(repository: Repository, deadline: float) -> ProviderFailure:
    """The failure of a clone that took longer than `deadline` seconds."""
    return ProviderFailure(
        "CloneTimeout",
        f"{repository} could not be cloned within {deadline:g} s: it does not answer, or is too big.",
    )


def not_shallow(said: str) -> bool:
    """Whether git failed because the server cannot cut the history.

    One that only hands out files cannot (gitprotocol-http(5), "dumb").
    """
    return "does not support shallow" in said.lower()


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
