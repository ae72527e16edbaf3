"""The files of a repository as the stream that a Docker engine builds from: a tar archive, made as it is read.

What is sent is what `docker build` would send, by the same `.dockerignore`, with two differences. `.git` is left out
unless `.dockerignore` has a `!.git`: it differs between two clones of one commit, so that `COPY . .` would never be
found in the cache (builds by URL leave it out, too). And owners, times and modes are the same for each clone of a
commit. Symbolic links are sent as such and never followed, and what is no file, directory or link is left out.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.deployments.contract import StepFailed
from orchestrator.deployments.dockerignore import BadPattern, Ignored, Matched, lines_of
from orchestrator.deployments.files import Escapes, read_text

# Bytes that are read of a file at once, and handed on at once at least.
_PIECE = 256 << 10
_MOST_IGNORE_BYTES = 1 << 20
# 1980-01-02: archives such as zip know nothing earlier.
_EARLIEST = 315_619_200
_MODES = {tarfile.REGTYPE: 0o644, tarfile.DIRTYPE: 0o755, tarfile.SYMTYPE: 0o777}


async def pack(
    directory: Path, dockerfile: str, *, text: str | None = None, ignore: str = "", mtime: int = 0
) -> AsyncIterator[bytes]:
    """The build context, piece by piece (256 KiB or a little more each).

    `dockerfile` is its path in the repository; with `text` it is put there, instead of what is. `ignore` are lines
    that count before those of `.dockerignore`. `mtime` is the time of all files, in seconds of the epoch. Raises
    StepFailed (`InvalidDockerignore`, `ContextUnreadable`). Cancelling ends it after the piece that is being read.
    """
    pieces = _Context(directory, dockerfile, text, ignore, max(mtime, _EARLIEST)).pieces()
    while piece := await asyncio.to_thread(next, pieces, b""):
        yield piece


@dataclass(slots=True)
class _Level:
    """A directory that is being walked."""

    path: tuple[str, ...]
    entries: Iterator[os.DirEntry[str]]
    # Which patterns match it.
    matched: Matched
    # Its own entry of the archive while that is not sent: a directory that is left out is sent for what is in it.
    unsent: bytes = b""


class _Context:
    def __init__(self, directory: Path, dockerfile: str, text: str | None, ignore: str, mtime: int) -> None:
        self._directory = directory
        self._dockerfile = dockerfile
        self._text = text
        self._ignore = ignore
        self._mtime = mtime
        # The engine reads them.
        self._always = {dockerfile, ".dockerignore"}

    def pieces(self) -> Iterator[bytes]:
        """The archive. What is asked of the disk is asked while it is read."""
        held = bytearray()
        try:
            for piece in self._archive():
                held += piece
                if len(held) >= _PIECE:
                    yield bytes(held)
                    held.clear()
        except OSError as error:
            name = Path(os.fsdecode(error.filename or "")).name
            raise StepFailed("ContextUnreadable", f"The file {name!r} cannot be read: {error.strerror}.") from error
        # Two blocks of zeros end an archive.
        yield bytes(held) + bytes(2 * tarfile.BLOCKSIZE)

    def _archive(self) -> Iterator[bytes]:
        ignored = self._read_ignored()
        if self._text is not None:
            content = self._text.encode(errors="surrogateescape")
            yield self._header(self._dockerfile, tarfile.REGTYPE, size=len(content))
            yield content + _padding(len(content))
        # No recursion: a repository may be deeper than Python's stack.
        levels = [_Level((), self._scan(()), ignored.root)]
        while levels:
            if (entry := next(levels[-1].entries, None)) is None:
                levels.pop()
                continue
            path = (*levels[-1].path, entry.name)
            name = "/".join(path)
            left_out, matched = ignored.match(path, levels[-1].matched)
            sent = b""
            if entry.is_dir(follow_symlinks=False):
                header = self._header(name + "/", tarfile.DIRTYPE)
                if left_out and not self._may_hold(ignored, path):
                    continue
                levels.append(_Level(path, self._scan(path), matched, header))
                if left_out:
                    continue
            elif (left_out and name not in self._always) or not (sent := self._entry(entry, name)):
                continue
            for level in levels:
                yield level.unsent
                level.unsent = b""
            yield sent
            if entry.is_file(follow_symlinks=False):
                yield from _content(entry)

    def _read_ignored(self) -> Ignored:
        name = f"{self._dockerfile}.dockerignore"
        try:
            text = read_text(self._directory, name, _MOST_IGNORE_BYTES)
            if text is None:
                name = ".dockerignore"
                text = read_text(self._directory, name, _MOST_IGNORE_BYTES) or ""
            # Ours first, so that a line of theirs can take it back.
            return Ignored(["**/.git", *lines_of(self._ignore), *lines_of(text)])
        except Escapes as error:
            raise StepFailed("InvalidDockerignore", f"The repository's {name} {error}.") from error
        except BadPattern as error:
            raise StepFailed(
                "InvalidDockerignore", f"The repository's {name} has a line that is no pattern: {error}."
            ) from error

    def _may_hold(self, ignored: Ignored, path: tuple[str, ...]) -> bool:
        """Whether something in a directory that is left out may have to be sent."""
        name = "/".join(path) + "/"
        return ignored.may_hold_exceptions(path) or any(file.startswith(name) for file in self._always)

    def _scan(self, path: tuple[str, ...]) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self._directory.joinpath(*path)) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))

    def _entry(self, entry: os.DirEntry[str], name: str) -> bytes:
        """The header of a file or a link; nothing for what is neither."""
        if self._text is not None and name == self._dockerfile:
            return b""
        if entry.is_symlink():
            target = os.readlink(entry.path)  # noqa: PTH115  A Path would change how it is written.
            return self._header(name, tarfile.SYMTYPE, link=target)
        if not entry.is_file(follow_symlinks=False):
            return b""
        status = entry.stat(follow_symlinks=False)
        return self._header(name, tarfile.REGTYPE, size=status.st_size, executable=bool(status.st_mode & 0o100))

    def _header(self, name: str, kind: bytes, *, size: int = 0, link: str = "", executable: bool = False) -> bytes:
        """The archive's entry before the content, as git knows a file: only whether it can be executed."""
        info = tarfile.TarInfo(name)
        info.type = kind
        info.mode = 0o755 if executable else _MODES[kind]
        info.size = size
        info.linkname = link
        info.mtime = self._mtime
        # Names that are no UTF-8 go as the bytes that they are.
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _content(entry: os.DirEntry[str]) -> Iterator[bytes]:
    """A file's bytes, as many as were announced."""
    size = left = entry.stat(follow_symlinks=False).st_size
    with os.fdopen(os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        while left:
            piece = file.read(min(_PIECE, left))
            if not piece:
                raise OSError(errno.EIO, "it became shorter while it was read", entry.path)
            left -= len(piece)
            yield piece
    yield _padding(size)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
