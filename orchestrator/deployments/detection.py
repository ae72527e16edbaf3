"""What a repository is built by: its Dockerfile, or one of ours when it is a site or a project of a kind that we know.

Ours read the build argument `BASE_IMAGE`, so that an app can be built on an image of its own; an operator sets what
they are built on by default.
"""

from __future__ import annotations

import json
import posixpath
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.deployments import recipes
from orchestrator.deployments.contract import AppSettings, StepFailed
from orchestrator.deployments.files import Escapes, locate, read_text
from orchestrator.settings import DeploySettings

# Bytes of a Dockerfile, and of other files that are looked into.
_MOST_DOCKERFILE = 1 << 20
_MOST_TEXT = 4 << 20
# A key of TOML takes time by the square of its parts: bytes of such a file, and dots in one of its lines.
_MOST_TOML = 256 << 10
_MOST_DOTS = 1000
# What is told of a directory that lacks what was looked for.
_MOST_NAMES = 10
# Where ours lies in the build context: no repository has it.
OURS = ".cluster-code.Dockerfile"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a repository becomes an image."""

    # A path in the build context.
    dockerfile: str
    # A sentence for the log: what was found.
    found: str
    # The Dockerfile itself, and lines over those of `.dockerignore`, when it is one of ours.
    text: str | None = None
    ignore: str = ""


def detect(directory: Path, app: AppSettings, settings: DeploySettings) -> Recipe:
    """How the repository in `directory` is built. Reads some small files of it, which blocks for milliseconds.

    Raises StepFailed: `DockerfileMissing`, `InvalidDockerfile`, `NoDockerfile`, and `InvalidProject` for a file that
    cannot be read.
    """
    if app.dockerfile is not None:
        return _given(directory, app.dockerfile)
    if (path := _dockerfile(directory, "Dockerfile")) is not None:
        return Recipe(path, "Building the repository's Dockerfile.")
    for look in (_node, _python, _static):
        if (recipe := look(directory, app, settings)) is not None:
            return recipe
    raise StepFailed(
        "NoDockerfile",
        "There is no Dockerfile in the repository, and it is of no kind that is built without one: looked for"
        " Dockerfile, package.json with a start or build script, requirements.txt or pyproject.toml with Procfile,"
        " main.py, app.py, wsgi.py, asgi.py or manage.py, and index.html at the top, in public or in dist."
        f" It holds {_names(directory)}. Add a Dockerfile, or say where it is.",
    )


def _given(directory: Path, name: str) -> Recipe:
    if not name.isprintable() or "\\" in name or name.startswith("/") or ".." in name.split("/"):
        raise StepFailed("InvalidDockerfile", "The path of the Dockerfile must be one in the repository.")
    name = posixpath.normpath(name)
    path = _dockerfile(directory, name)
    if path is None:
        above = posixpath.dirname(name)
        while above and not (directory / above).is_dir():
            above = posixpath.dirname(above)
        try:
            (directory / above).resolve().relative_to(directory.resolve())
        except ValueError:
            raise StepFailed("InvalidDockerfile", f"{above} is a link that leads out of the repository.") from None
        where = above or "the repository"
        raise StepFailed(
            "DockerfileMissing", f"There is no {name} in the repository; {where} holds {_names(directory / above)}."
        )
    return Recipe(path, f"Building {name}.")


def _dockerfile(directory: Path, name: str) -> str | None:
    """The path of a Dockerfile, links followed: not every engine does. None when there is none."""
    try:
        path = locate(directory, name)
        if path is not None and not read_text(directory, path, _MOST_DOCKERFILE):
            raise Escapes("is empty")
    except Escapes as error:
        raise StepFailed("InvalidDockerfile", f"The repository's {name} {error}.") from error
    return path


def _names(directory: Path) -> str:
    """What is in a directory, in words."""
    names = sorted(
        path.name + ("/" if path.is_dir() and not path.is_symlink() else "")
        for path in directory.iterdir()
        if path.name != ".git"
    )
    shown = [name if name.isprintable() else ascii(name) for name in names[:_MOST_NAMES]]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(shown) + more if shown else "nothing"


def _text(directory: Path, name: str, most: int = _MOST_TEXT) -> str | None:
    try:
        return read_text(directory, name, most)
    except Escapes as error:
        raise StepFailed("InvalidProject", f"The repository's {name} {error}.") from error


def _has(directory: Path, name: str) -> bool:
    try:
        return locate(directory, name) is not None
    except Escapes as error:
        raise StepFailed("InvalidProject", f"The repository's {name} {error}.") from error


def _static(directory: Path, app: AppSettings, settings: DeploySettings) -> Recipe | None:
    for root in (".", "public", "dist"):
        if _has(directory, f"{root}/index.html"):
            where = "" if root == "." else f" in {root}"
            return Recipe(
                OURS,
                f"There is no Dockerfile: serving the static site{where}.",
                recipes.static(root, settings.static_image, app.port),
                recipes.STATIC_IGNORE,
            )
    return None


def _node(directory: Path, app: AppSettings, settings: DeploySettings) -> Recipe | None:
    text = _text(directory, "package.json")
    if text is None:
        return None
    try:
        package = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StepFailed("InvalidProject", f"The repository's package.json is no JSON: {error}.") from error
    if not isinstance(package, dict) or not isinstance(scripts := package.get("scripts"), dict):
        return None
    beside = {name for name in (*recipes.LOCK_FILES, ".yarnrc.yml", "pnpm-workspace.yaml") if _has(directory, name)}
    project = recipes.node_project(package, beside)
    if "start" in scripts:
        return Recipe(
            OURS,
            f"There is no Dockerfile: building a Node project ({project.tool}), to be run by its start script.",
            recipes.node(project, settings.node_image, app.port),
            recipes.NODE_IGNORE,
        )
    if project.builds:
        return Recipe(
            OURS,
            f"There is no Dockerfile: building a Node project ({project.tool}), and serving the site that it makes.",
            recipes.node_site(project, settings.node_image, settings.static_image, app.port),
            recipes.NODE_IGNORE,
        )
    return None


def _python(directory: Path, app: AppSettings, settings: DeploySettings) -> Recipe | None:
    requirements = _text(directory, "requirements.txt")
    project = _text(directory, "pyproject.toml", _MOST_TOML)
    if requirements is None and project is None:
        return None
    entry = _python_entry(directory)
    if entry is None:
        return None
    command, server = entry
    install = recipes.requirements(requirements) if requirements is not None else recipes.project(_toml(project or ""))
    return Recipe(
        OURS,
        f"There is no Dockerfile: building a Python project, to be run as `{command.removeprefix('exec ')}`.",
        recipes.python(install, server, command, settings.python_image, app.port),
        recipes.PYTHON_IGNORE,
    )


def _toml(text: str) -> dict[str, Any]:
    try:
        if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
            raise ValueError(f"a line of it has more than {_MOST_DOTS} dots")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise StepFailed("InvalidProject", f"The repository's pyproject.toml is no TOML: {error}.") from error


def _python_entry(directory: Path) -> tuple[str, str] | None:
    """The command that runs a project, and the server that it needs beside what it asks for itself."""
    procfile = _text(directory, "Procfile") or ""
    if web := re.search(r"^web:[ \t]*+(\S.*)", procfile, re.MULTILINE):
        return web[1].rstrip(), ""
    for name in ("main", "app"):
        text = _text(directory, f"{name}.py")
        if text is not None:
            return _module(name, text)
    if (text := _text(directory, "asgi.py")) is not None:
        return recipes.uvicorn("asgi", _made(text, r"\S") or "app")
    if (text := _text(directory, "wsgi.py")) is not None:
        return recipes.gunicorn("wsgi", _made(text, r"\S") or "app")
    if (text := _text(directory, "manage.py")) is not None:
        package = re.search(r"DJANGO_SETTINGS_MODULE[\"'],\s*[\"']([\w.]+)\.settings", text)
        if package and _has(directory, package[1].replace(".", "/") + "/wsgi.py"):
            return recipes.gunicorn(f"{package[1]}.wsgi", "application")
    return None


def _module(name: str, text: str) -> tuple[str, str]:
    """A module that makes an application and does not run it is run by a server; any other runs itself."""
    if not re.search(r"__name__\s*==|\.run\(", text):
        if variable := _made(text, r"(?:\w+\.)?(?:FastAPI|Starlette|Quart|Litestar)\("):
            return recipes.uvicorn(name, variable)
        if variable := _made(text, r"(?:\w+\.)?(?:Flask|Bottle)\("):
            return recipes.gunicorn(name, variable)
    return f"exec python {name}.py", ""


def _made(text: str, value: str) -> str | None:
    """The variable of a module that holds the application; None when there is none."""
    # Nothing is tried twice: the text is a stranger's, and nobody else has a turn meanwhile.
    names = re.findall(rf"^(\w++)[ \t]*+(?::[^=\n]++)?+=[ \t]*+{value}", text, re.MULTILINE)
    preferred = [name for name in ("app", "application") if name in names]
    return next(iter([*preferred, *names]), None)
