"""The workspace of a session at a Docker engine: a volume, filled with a clone that is made on our side.

No credentials and no git are needed where the session runs. What is half filled is told from what is the user's by two
marks, the first and the last file that are written:

    /workspace/.cluster-code/filling    /workspace/project/…    /workspace/.cluster-code/complete
"""

from __future__ import annotations

import asyncio
import os
import tarfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import structlog

from orchestrator import git
from orchestrator.children.processes import INSTANCE, SERVICE
from orchestrator.docker.engine import Engine
from orchestrator.providers.contract import Report, SessionSpec
from orchestrator.providers.docker_containers import CLONE, WORKSPACE, Names
from orchestrator.providers.docker_placing import put
from orchestrator.providers.operations import in_thread
from orchestrator.providers.options import DockerOptions
from orchestrator.providers.workspace import remove_tree

log = structlog.get_logger("provider.docker")

_MARKS = ".cluster-code"
_FILLING, _COMPLETE = "filling", "complete"
# Bytes that are sent at once, at least.
_PIECE = 256 << 10
_BLOCK = tarfile.BLOCKSIZE

# Takes a line of git's.
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Filling:
    """What the workspace of one session takes. `directory` is ours, and for this session alone."""

    engine: Engine
    spec: SessionSpec
    options: DockerOptions
    directory: Path

    def repository(self) -> git.Repository | None:
        """What is to be cloned. Raises ProviderFailure when it may not be."""
        if self.spec.branch is not None:
            git.check_branch(self.spec.branch)
        return None if self.spec.repo_url is None else git.parse(self.spec.repo_url, self.options.repo_schemes)

    async def make(self, image: str, report: Report, say: Say) -> None:
        """Make the workspace whole, unless it is; `image` is any that the engine has.

        Raises ProviderFailure, with what is wrong with the repository; EngineRefused; ProviderUnavailable. Killed or
        cancelled at any moment, it begins anew with the next call.
        """
        repository = self.repository()
        container = await self._container(image)
        try:
            state = await self._state(container)
            if state == _COMPLETE:
                return
            if state == _FILLING:
                await self._discard()
                container = await self._container(image)
            clone = None
            if repository is None:
                say("no repository is set: the workspace begins empty")
            else:
                clone = await self._clone(repository, report, say)
                await report("Copying", "Copying the repository into the workspace.")
            uid, gid = _owner(self.options, self.spec)
            parts = _Archive(clone, uid, gid).parts()
            await self.engine.containers.put_archive(container, "/", _read_in_threads(parts))
        finally:
            try:
                await self.engine.containers.remove(container, volumes=True)
            finally:
                await in_thread(lambda: remove_tree(self.directory))

    async def _container(self, image: str) -> str:
        """One that never runs, by which the volume is reached; one that a killed call has left goes first."""
        names, ref = Names(self.options.instance), self.spec.ref
        marks = names.of_project(ref) | names.of_session(ref)
        await self.engine.volumes.ensure(names.volume(ref), marks)
        # What the image has at that place is not copied into the volume.
        mount = {
            "Type": "volume",
            "Source": names.volume(ref),
            "Target": WORKSPACE,
            "VolumeOptions": {"NoCopy": True},
        }
        config = {"Image": image, "Entrypoint": ["never-run"], "Labels": marks, "HostConfig": {"Mounts": [mount]}}
        return await put(self.engine, names.container(ref, ""), config)

    async def _state(self, container: str) -> str:
        """`complete`; `filling`, which a killed call has left; or "": there is no clone."""
        if not await self.engine.containers.has(container, f"{WORKSPACE}/{CLONE}"):
            return ""
        for mark in (_COMPLETE, _FILLING):
            if await self.engine.containers.has(container, f"{WORKSPACE}/{_MARKS}/{mark}"):
                return mark
        # Whoever has removed the marks has not removed the work.
        return _COMPLETE

    async def _discard(self) -> None:
        """Remove a volume that a killed call has half filled: nothing has ever run with it."""
        names, ref = Names(self.options.instance), self.spec.ref
        for container in await self.engine.containers.list(names.of_session(ref)):
            await self.engine.containers.remove(container["Id"], volumes=True)
        await self.engine.volumes.remove(names.volume(ref))

    async def _clone(self, repository: git.Repository, report: Report, say: Say) -> Path:
        branch = f" (branch {self.spec.branch})" if self.spec.branch is not None else ""
        await report("Cloning", f"Cloning {repository}{branch}")
        home = self.directory / "home"
        await in_thread(lambda: remove_tree(self.directory))
        await in_thread(lambda: home.mkdir(mode=0o700, parents=True))
        clone = git.Clone(
            repository,
            self.spec.branch,
            self.directory / CLONE,
            self.options.repo_schemes,
            self.options.clone_deadline,
            {INSTANCE: uuid4().hex, SERVICE: "git"},
            home,
            self.options.ssh_key,
            self.spec.machine.disk_bytes,
        )
        await clone.make(say)
        return clone.target


def _owner(options: DockerOptions, spec: SessionSpec) -> tuple[int, int]:
    user, _, group = (spec.machine.options.get("user", options.user) or "0").partition(":")
    return int(user), int(group or 0)


@dataclass(frozen=True, slots=True)
class _Archive:
    """A tar archive of the whole workspace, in which everything belongs to one user."""

    clone: Path | None
    uid: int
    gid: int

    def parts(self) -> Iterator[bytes]:
        """Its bytes, in pieces; each takes some reading from the disk."""
        buffer = bytearray()
        for part in self._all():
            buffer += part
            if len(buffer) >= _PIECE:
                yield bytes(buffer)
                buffer.clear()
        yield bytes(buffer)

    def _all(self) -> Iterator[bytes]:
        # An archive is unpacked into the parent's directory, so that the volume's own belongs to the user, too.
        root = WORKSPACE.removeprefix("/")
        yield self._directory(root)
        yield self._directory(f"{root}/{_MARKS}")
        yield self._head(f"{root}/{_MARKS}/{_FILLING}")
        yield self._directory(f"{root}/{CLONE}")
        if self.clone is not None:
            yield from self._tree(self.clone, f"{root}/{CLONE}")
        yield self._head(f"{root}/{_MARKS}/{_COMPLETE}")
        yield bytes(2 * _BLOCK)

    def _tree(self, clone: Path, root: str) -> Iterator[bytes]:
        # No recursion: a repository may be deeper than Python's stack.
        directories = [(str(clone), root)]
        while directories:
            directory, name = directories.pop()
            with os.scandir(directory) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            for entry in entries:
                inner = f"{name}/{entry.name}"
                if entry.is_symlink():
                    target = os.readlink(entry.path)  # noqa: PTH115  A Path would change how it is written.
                    yield self._head(inner, type=tarfile.SYMTYPE, linkname=target)
                elif entry.is_dir():
                    yield self._directory(inner)
                    directories.append((entry.path, inner))
                elif entry.is_file():
                    yield from self._file(entry, inner)

    def _file(self, entry: os.DirEntry[str], name: str) -> Iterator[bytes]:
        stat = entry.stat()
        yield self._head(name, size=stat.st_size, mode=stat.st_mode & 0o777, mtime=int(stat.st_mtime))
        left = stat.st_size
        with Path(entry.path).open("rb") as file:
            while left:
                if not (part := file.read(min(left, _PIECE))):
                    raise OSError(f"{name} became shorter while it was read")
                left -= len(part)
                yield part
        yield bytes(-stat.st_size % _BLOCK)

    def _directory(self, name: str) -> bytes:
        return self._head(name, type=tarfile.DIRTYPE, mode=0o755)

    def _head(self, name: str, **fields: object) -> bytes:
        info = tarfile.TarInfo(name)
        info.uid, info.gid, info.mtime = self.uid, self.gid, int(time.time())
        for key, value in fields.items():
            setattr(info, key, value)
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


async def _read_in_threads(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part
