"""Reading files of a repository, which may be anything: a link that leads elsewhere, a device, a gigabyte."""

from __future__ import annotations

import os
from pathlib import Path


class Escapes(Exception):
    """A file that is not to be read. The message goes on after its name: "is a link that leads nowhere"."""


def locate(directory: Path, name: str) -> str | None:
    """The path in the repository that a file really has, links followed; None when there is none.

    Raises Escapes when a link leads out of the repository or nowhere, and for what is no file.
    """
    path = directory / name
    try:
        root, real = directory.resolve(), path.resolve(strict=True)
    except FileNotFoundError:
        if path.is_symlink():
            raise Escapes("is a link that leads nowhere") from None
        return None
    except (NotADirectoryError, ValueError):
        return None
    except (OSError, RuntimeError) as error:
        raise Escapes("is a link that leads to itself") from error
    if not real.is_relative_to(root):
        raise Escapes("is a link that leads out of the repository")
    if ".git" in real.relative_to(root).parts:
        raise Escapes("is a link that leads into git's own files")
    if not real.is_file():
        raise Escapes("is no file")
    return real.relative_to(root).as_posix()


def read_text(directory: Path, name: str, most: int) -> str | None:
    """The text of a file of at most `most` bytes; None when there is none. Raises Escapes."""
    real = locate(directory, name)
    if real is None:
        return None
    with os.fdopen(os.open(directory / real, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise Escapes(f"is larger than {most >> 10} KiB")
    return content.decode(errors="surrogateescape")
