"""The first step: the commit that is to be built, with its submodules and large files, in a directory of its own.

The repository, and whoever serves it, are strangers: nothing of theirs runs here (`orchestrator.git`), every URL that
they name is checked like that of the app, and what they send is watched while it arrives.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from orchestrator import git
from orchestrator.children.processes import Limits, Selection, end
from orchestrator.deployments.contract import Source, StepFailed, Task
from orchestrator.errors import ProviderFailure
from orchestrator.git import Git, Repository
from orchestrator.settings import DeploySettings

# Marks the processes of a deployment with its directory.
MARKER = "CLUSTER_CODE_DEPLOYMENT"
# Files, directories and links that a clone may have.
_MOST_FILES = 200_000
_MOST_SUBMODULES = 100
_DEEPEST_SUBMODULE = 8
# Bytes that one git process may allocate.
_MEMORY = 2 << 30
# Bytes of what git and its server say that go into the log.
_MOST_SAID = 64 << 10
# Seconds between looks at the size, and how many times as long as a look itself.
_LOOK_EVERY = 0.1
_LOOK_SHARE = 4
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
# Commits of a branch that are looked through for one that its server does not give out by name.
_DEEPER = ("--depth=50", "--unshallow")
_SETTINGS = {
    # Objects go to the disk, where they are watched, and not to memory.
    "fetch.unpackLimit": "1",
    "core.bigFileThreshold": "16m",
    "core.logAllRefUpdates": "false",
    "submodule.recurse": "false",
}
# Without these it fetches, but puts nothing in its place.
_LFS_SETTINGS = {
    **_SETTINGS,
    "filter.lfs.smudge": "git-lfs smudge -- %f",
    "filter.lfs.clean": "git-lfs clean -- %f",
    "filter.lfs.process": "git-lfs filter-process",
}
T = TypeVar("T")


async def checkout(task: Task, settings: DeploySettings) -> Source:
    """Clone what the task names into `task.directory / "source"`, which is made anew.

    Raises StepFailed with a classified reason: those of `orchestrator.git`, and `RepositoryTooLarge`, `CommitNotFound`,
    `EmptyRepository`, `InvalidSubmodule`, `LargeFilesMissing`. Cancelling ends all processes of it.
    """
    try:
        repository = _repository(task, settings)
        await end(Selection(_markers(task)), grace=0)
        async with _key(task) as key, asyncio.timeout(settings.clone_deadline):
            checkout = _Checkout(task, settings, key)
            return await _watched(checkout.make(repository), checkout.directory, settings.clone_bytes)
    except TimeoutError as error:
        failure = git.too_slow(repository, settings.clone_deadline)
        raise StepFailed(failure.reason, str(failure)) from error
    except ProviderFailure as error:
        raise StepFailed(error.reason, str(error)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StepFailed("DiskFull", f"There is no room left for the clone of {repository}.") from error
        raise


def _markers(task: Task) -> dict[str, str]:
    return {MARKER: str(task.directory)}


def _repository(task: Task, settings: DeploySettings) -> Repository:
    """Where to clone from, with the credentials that the app has for it. Raises ProviderFailure."""
    repository = git.parse(task.repo_url, settings.repo_schemes)
    if task.branch is not None:
        git.check_branch(task.branch)
    if task.commit_id is not None and not _COMMIT.fullmatch(task.commit_id):
        raise ProviderFailure("CommitNotFound", "The commit is not given by its whole id, in hexadecimal.")
    if task.secrets.deploy_token and repository.url.startswith("http"):
        # Hosts that tell users apart by the token take any name.
        user = task.secrets.deploy_user or repository.username or "git"
        repository = replace(repository, username=user, password=task.secrets.deploy_token)
    return repository


@asynccontextmanager
async def _key(task: Task) -> AsyncIterator[Path | None]:
    """The deploy key as a file that only ssh reads, for as long as that may be needed."""
    if not task.secrets.deploy_key:
        yield None
        return
    path = task.directory / "deploy-key"
    path.unlink(missing_ok=True)
    try:
        # ssh refuses a key whose last line does not end.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(task.secrets.deploy_key.replace("\r\n", "\n").rstrip("\n") + "\n")
        yield path
    finally:
        path.unlink(missing_ok=True)


@dataclass(slots=True)
class _Checkout:
    """One clone under way."""

    task: Task
    settings: DeploySettings
    key: Path | None
    directory: Path = field(init=False)
    _submodules: int = 0
    _said: int = 0

    def __post_init__(self) -> None:
        self.directory = self.task.directory / "source"

    async def make(self, repository: Repository) -> Source:
        """All of it. Raises StepFailed, ProviderFailure."""
        task = self.task
        branch = f" (branch {task.branch})" if task.branch is not None else ""
        task.say(f"Cloning {repository}{branch}\n")
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)
        runner = self._git(repository)
        await self._fetch(runner, self.directory, task.branch, task.commit_id)
        await self._complete(runner, self.directory, "", depth=0)
        about = await runner.read("log", "-1", "--no-show-signature", "--format=%H%n%ct%n%s", cwd=self.directory)
        if about is None:
            raise StepFailed("CloneFailed", f"The commit that was fetched from {repository} cannot be read.")
        commit_id, time, subject = about.decode(errors="replace").replace("\0", "").split("\n", 2)
        subject = subject.strip()[:500]
        task.say(f"At {commit_id[:12]}: {subject}\n")
        return Source(self.directory, commit_id, subject, int(time))

    def _git(self, repository: Repository) -> Git:
        return Git(
            repository,
            self.settings.repo_schemes,
            _markers(self.task),
            self.task.directory,
            # Those of all deployments, so that a host which has changed is noticed.
            self.settings.directory.absolute() / ".ssh-known-hosts",
            str(self.key) if self.key else None,
            Limits(memory=_MEMORY),
        )

    def _say(self, line: str) -> None:
        """Put a line of git's into the log, unless that has had enough of them."""
        if self._said < _MOST_SAID:
            self._said += len(line) + 1
            self.task.say(line + "\n" if self._said < _MOST_SAID else "git says more than is kept here.\n")

    async def _run(self, runner: Git, directory: Path, *arguments: str) -> str | None:
        return await runner.run(*arguments, cwd=directory, say=self._say, settings=_SETTINGS)

    async def _fetch(self, runner: Git, directory: Path, branch: str | None, commit_id: str | None) -> None:
        """Check out a commit, or the newest of a branch, or of the repository's own, in a directory that is made."""
        await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
        said = await self._run(runner, directory, "init", "--quiet", "--template=")
        if said is None:
            said = await self._fetch_one(runner, directory, branch, commit_id)
        if said is None:
            said = await self._run(
                runner, directory, "checkout", "--quiet", "--force", "--detach", commit_id or "FETCH_HEAD"
            )
        if said is not None:
            raise self._failure(runner, said, branch, commit_id)

    async def _fetch_one(self, runner: Git, directory: Path, branch: str | None, commit_id: str | None) -> str | None:
        """Fetch nothing but the commit if the server lets us; what git said when nothing led to it."""
        head = f"refs/heads/{branch}" if branch is not None else "HEAD"
        if commit_id is None:
            said = await self._fetch_ref(runner, directory, "--depth=1", head)
            if said is not None and branch is not None and "find remote ref" in said:
                said = await self._fetch_ref(runner, directory, "--depth=1", f"refs/tags/{branch}")
            return said
        said = await self._fetch_ref(runner, directory, "--depth=1", commit_id)
        if said is None or "unadvertised object" not in said.lower():
            return said
        for depth in _DEEPER:
            said = await self._fetch_ref(runner, directory, depth, head)
            if said is not None and "--unshallow" not in said:
                return said
            if await self._run(runner, directory, "cat-file", "-e", f"{commit_id}^{{commit}}") is None:
                return None
        return f"not our ref {commit_id}"

    async def _fetch_ref(self, runner: Git, directory: Path, depth: str, ref: str) -> str | None:
        arguments = ("fetch", "--progress", "--no-tags", "--no-recurse-submodules")
        said = await self._run(runner, directory, *arguments, depth, "origin", ref)
        if said is not None and git.not_shallow(said):
            # Nor does such a server give out a commit that no branch points to.
            said = await self._run(runner, directory, *arguments, "origin", ref)
        return said

    def _failure(self, runner: Git, said: str, branch: str | None, commit_id: str | None) -> StepFailed:
        repository = runner.repository
        if re.search(
            r"not our ref|find remote ref [0-9a-f]{40}|reference is not a tree|unadvertised object", said, re.IGNORECASE
        ):
            return StepFailed(
                "CommitNotFound", f"The commit {commit_id} is not in {repository}, or no longer: deploy another one."
            )
        if "find remote ref HEAD" in said:
            return StepFailed("EmptyRepository", f"{repository} has no commit yet: push one.")
        failure = runner.failure(said, branch=branch, target=self.directory)
        return StepFailed(failure.reason, str(failure))

    async def _complete(self, runner: Git, directory: Path, place: str, *, depth: int) -> None:
        """Add what a commit only refers to: large files, and submodules with theirs."""
        listed = await runner.read(
            "ls-files", "-z", "-s", "--", ":(top,literal).gitmodules", ":(top,attr:filter=lfs)",
            cwd=directory, limit=16 << 20,
        )  # fmt: skip
        entries = [entry.partition(b"\t") for entry in (listed or b"").split(b"\0") if entry]
        if large := sum(name != b".gitmodules" for _, _, name in entries):
            await self._fetch_large(runner, directory, large)
        if any(name == b".gitmodules" for _, _, name in entries):
            await self._fetch_submodules(runner, directory, place, depth)

    async def _fetch_large(self, runner: Git, directory: Path, count: int) -> None:
        """Replace the pointers of Git LFS by what they point to."""
        if shutil.which("git-lfs") is None:
            raise StepFailed(
                "LargeFilesMissing",
                f"{runner.repository} keeps files in Git LFS, which is not installed where apps are built:"
                " tell an operator.",
            )
        await self._check_large(runner, directory)
        self.task.say(f"Fetching {count} file{'s' if count > 1 else ''} of Git LFS\n")
        said = await runner.run("lfs", "pull", cwd=directory, say=self._say, settings=_LFS_SETTINGS)
        if said is not None:
            failure = runner.failure(said, branch=None, target=self.directory)
            raise StepFailed("LargeFilesMissing", f"The files of Git LFS cannot be fetched. {failure}")

    async def _check_large(self, runner: Git, directory: Path) -> None:
        """Raise ProviderFailure when `.lfsconfig` names a server that is not to be asked."""
        told = await runner.read(
            "config", "-z", "--blob", "HEAD:.lfsconfig", "--get-regexp", r"^(lfs|remote\..*)\.(lfs)?(push)?url$",
            cwd=directory,
        )  # fmt: skip
        for _, _, url in (entry.decode(errors="replace").partition("\n") for entry in (told or b"").split(b"\0")):
            if url:
                git.parse(url, self.settings.repo_schemes)

    async def _fetch_submodules(self, runner: Git, directory: Path, place: str, depth: int) -> None:
        for name, url, commit_id in await self._submodules_of(runner, directory):
            shown = f"{place}{name}"
            self._submodules += 1
            if depth >= _DEEPEST_SUBMODULE or self._submodules > _MOST_SUBMODULES:
                raise StepFailed(
                    "InvalidSubmodule",
                    f"The repository has more than {_MOST_SUBMODULES} submodules, or they are nested more than"
                    f" {_DEEPEST_SUBMODULE} deep.",
                )
            try:
                repository = _with_credentials(
                    git.parse(_resolve(runner.repository.url, url), self.settings.repo_schemes), runner.repository
                )
            except ProviderFailure as error:
                raise StepFailed(
                    "InvalidSubmodule", f"The submodule {shown!r} of the repository is not cloned. {error}"
                ) from error
            self.task.say(f"Cloning the submodule {shown} from {repository}\n")
            if not await asyncio.to_thread(_usable, directory, name):
                raise StepFailed("InvalidSubmodule", f"The submodule {shown!r} has a path that may not be used.")
            target = directory / name
            below = self._git(repository)
            await self._fetch(below, target, None, commit_id)
            await self._complete(below, target, f"{shown}/", depth=depth + 1)

    async def _submodules_of(self, runner: Git, directory: Path) -> list[tuple[str, str, str]]:
        """The path, URL and commit of each submodule that `.gitmodules` and the commit agree on."""
        told = await runner.read(
            "config", "-z", "--blob", "HEAD:.gitmodules", "--get-regexp", r"^submodule\..*\.(path|url|update)$",
            cwd=directory,
        )  # fmt: skip
        modules: dict[str, dict[str, str]] = {}
        for entry in (told or b"").split(b"\0"):
            key, _, value = os.fsdecode(entry).partition("\n")
            name, _, option = key.rpartition(".")
            modules.setdefault(name, {})[option] = value
        wanted = {
            module["path"]: module["url"]
            for module in modules.values()
            if module.get("path") and "url" in module and module.get("update") != "none"
        }
        if not wanted:
            return []
        paths = [f":(top,literal){path}" for path in [*wanted][: _MOST_SUBMODULES + 1]]
        listed = await runner.read("ls-files", "-z", "-s", "--", *paths, cwd=directory)
        entries = (os.fsdecode(entry).partition("\t") for entry in (listed or b"").split(b"\0"))
        return [
            (path, wanted[path], about.split(" ")[1])
            for about, _, path in entries
            if about.startswith("160000 ") and path in wanted
        ]


def _usable(directory: Path, path: str) -> bool:
    """Whether a path leads from one real directory to the next. Git checks the same, and more, when it reads a tree."""
    here = directory
    for part in path.split("/"):
        here /= part
        if part in ("", ".", "..", ".git") or path.startswith("-") or here.is_symlink():
            return False
    return True


def _resolve(base: str, url: str) -> str:
    """The URL of a submodule, which may be relative to that of its repository (gitmodules(5))."""
    if not url.startswith(("./", "../")):
        return url
    # What comes before the path: `https://host/`, and in the short form of ssh `user@host:`.
    before = re.match(r"[^/]+://[^/]*/|[^/:]+:", base)
    start = before[0] if before else ""
    parts = base[len(start) :].partition("?")[0].rstrip("/").split("/")
    while url.startswith(("./", "../")):
        first, _, url = url.partition("/")
        if first == "..":
            if not parts:
                # Above the host: that is no URL, and taken for none.
                return ""
            parts.pop()
    return start + "/".join([*parts, url])


def _with_credentials(repository: Repository, parent: Repository) -> Repository:
    """A submodule on the host of its repository is opened with the same credentials, unless it names its own."""
    ours, theirs = urlsplit(repository.url), urlsplit(parent.url)
    same = (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc)
    if not same or repository.username or repository.password:
        return repository
    return replace(repository, username=parent.username, password=parent.password)


async def _watched(work: Coroutine[None, None, T], directory: Path, most: int) -> T:
    """Do the work for as long as the directory does not grow too large. However it ends, so does the work."""
    working = asyncio.create_task(work, name="clone")
    watching = asyncio.create_task(_watch(directory, most), name="size of a clone")
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        result = await working
        await _check(directory, most)
        return result
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _watch(directory: Path, most: int) -> None:
    loop = asyncio.get_running_loop()
    while True:
        begun = loop.time()
        await _check(directory, most)
        await asyncio.sleep(max(_LOOK_EVERY, _LOOK_SHARE * (loop.time() - begun)))


async def _check(directory: Path, most: int) -> None:
    """Raise StepFailed when the directory holds too many bytes or files."""
    size, files = await asyncio.to_thread(measure, directory, most, _MOST_FILES)
    if size > most:
        raise StepFailed(
            "RepositoryTooLarge", f"The repository is larger than {most >> 20} MiB, which is the most that is cloned."
        )
    if files > _MOST_FILES:
        raise StepFailed("RepositoryTooLarge", f"The repository has more than {_MOST_FILES} files.")


def measure(directory: Path, most_bytes: int, most_files: int) -> tuple[int, int]:
    """Bytes and files of a directory that may change meanwhile; stops counting when there are more than the most."""
    size = files = 0
    waiting = [str(directory)]
    while waiting and size <= most_bytes and files <= most_files:
        # What is gone meanwhile does not count.
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                files += 1
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    with suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_size
    return size, files
