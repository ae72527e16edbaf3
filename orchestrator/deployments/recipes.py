"""The Dockerfiles of projects that have none.

Each runs as nobody in particular, listens on `$PORT`, and copies what its dependencies are known from before the rest,
so that they are installed again only when they change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

# Lines over those of `.dockerignore`: what was made elsewhere, and what nobody is to see.
_IGNORE = "**/.env\n**/.env.*\n!**/.env.example\n"
STATIC_IGNORE = "**/.*\n!**/.well-known\nDockerfile*\n"
NODE_IGNORE = _IGNORE + "**/node_modules\n"
PYTHON_IGNORE = _IGNORE + "**/__pycache__\n**/*.pyc\n**/.venv\n**/venv\n"

# What the installation of a Node project is told by, the first that is there.
LOCK_FILES = {
    "pnpm-lock.yaml": "pnpm",
    "yarn.lock": "yarn",
    "package-lock.json": "npm",
    "npm-shrinkwrap.json": "npm",
}
# By tool: what installs all, what builds, and what leaves only what is needed to run.
_NODE = {
    "npm": ("npm ci", "npm run build", "npm prune --omit=dev"),
    "npm, no lock file": ("npm install --no-audit --no-fund", "npm run build", "npm prune --omit=dev"),
    "pnpm": ("corepack enable && pnpm install --frozen-lockfile", "pnpm run build", "CI=true pnpm prune --prod"),
    "yarn": ("corepack enable && yarn install --frozen-lockfile", "yarn run build", ""),
    # Version 2 and later.
    "yarn berry": ("corepack enable && yarn install --immutable", "yarn run build", ""),
}
# Types that busybox does not know by itself.
_TYPES = {
    ".avif": "image/avif", ".ico": "image/x-icon", ".js": "text/javascript; charset=utf-8",
    ".json": "application/json", ".map": "application/json", ".mjs": "text/javascript; charset=utf-8",
    ".mp4": "video/mp4", ".pdf": "application/pdf", ".svg": "image/svg+xml", ".ttf": "font/ttf",
    ".txt": "text/plain; charset=utf-8", ".wasm": "application/wasm", ".webm": "video/webm",
    ".webmanifest": "application/manifest+json", ".webp": "image/webp", ".woff": "font/woff", ".woff2": "font/woff2",
    ".xml": "text/xml",
}  # fmt: skip


def static(root: str, image: str, port: int) -> str:
    """A Dockerfile that serves the directory `root`."""
    return f"""\
ARG BASE_IMAGE={image}
FROM $BASE_IMAGE
{_serve(port)}
COPY {json.dumps([root, "/site/"])}
"""


def _serve(port: int) -> str:
    types = "\\n".join(["E404:/site/404.html", *(f"{name}:{kind}" for name, kind in _TYPES.items())])
    return f"""\
RUN mkdir -p /etc && printf '{types}\\n' > /etc/httpd.conf
ENV PORT={port}
EXPOSE {port}
USER 65534:65534
CMD ["/bin/sh", "-c", "trap 'exit 0' TERM INT; httpd -f -p $PORT -h /site -c /etc/httpd.conf & wait"]"""


@dataclass(frozen=True, slots=True)
class NodeProject:
    """What a Node project is built by."""

    # Of `_NODE`.
    tool: str
    # Whether there is a build script.
    builds: bool
    # Whether dependencies are to be installed only when all files are there.
    whole: bool


def node_project(package: dict[str, Any], files: Container[str]) -> NodeProject:
    """What `package.json` and the files beside it tell."""
    scripts = package.get("scripts")
    scripts = scripts if isinstance(scripts, dict) else {}
    tool = next((tool for lock, tool in LOCK_FILES.items() if lock in files), "npm, no lock file")
    if tool == "yarn" and ".yarnrc.yml" in files:
        tool = "yarn berry"
    dependencies = json.dumps([package.get(kind) for kind in ("dependencies", "devDependencies")])
    whole = (
        tool == "yarn berry"
        or "workspaces" in package
        or "pnpm-workspace.yaml" in files
        or any(name in scripts for name in ("preinstall", "install", "postinstall", "prepare"))
        or re.search(r'"(?:file|link|portal|patch):', dependencies) is not None
    )
    return NodeProject(tool, "build" in scripts, whole)


def node(project: NodeProject, image: str, port: int) -> str:
    """A Dockerfile of a Node project with a start script."""
    return f"""\
ARG BASE_IMAGE={image}
{_built(project, prune=True)}

FROM $BASE_IMAGE
ENV NODE_ENV=production HOME=/tmp npm_config_update_notifier=false PORT={port}
WORKDIR /app
COPY --from=build --chown=1000:1000 /app .
EXPOSE {port}
USER 1000:1000
CMD ["npm", "start"]
"""


def node_site(project: NodeProject, image: str, server: str, port: int) -> str:
    """A Dockerfile of a Node project whose build script makes a static site."""
    return f"""\
ARG BASE_IMAGE={image}
ARG SERVER_IMAGE={server}
{_built(project, prune=False)}
RUN for made in dist build out public; do \\
      if [ -f $made/index.html ]; then mv $made /site; exit; fi; \\
    done; \\
    echo "The build script made no index.html in dist, build, out or public." >&2; exit 1

FROM $SERVER_IMAGE
{_serve(port)}
COPY --from=build /site /site
"""


def _built(project: NodeProject, *, prune: bool) -> str:
    install, build, pruned = _NODE[project.tool]
    manifests = "package.json *-lock.json npm-shrinkwrap.jso[n] yarn.loc[k] pnpm-lock.yam[l] .npmr[c]"
    lines = ["FROM $BASE_IMAGE AS build", "WORKDIR /app"]
    lines += ["COPY . ."] if project.whole else [f"COPY {manifests} ./"]
    lines += [f"RUN {install}"]
    lines += [] if project.whole else ["COPY . ."]
    lines += [f"RUN {build}"] if project.builds else []
    lines += [f"RUN {pruned}"] if prune and pruned else []
    return "\n".join(lines)


def requirements(text: str) -> str:
    """Instructions that install what `requirements.txt` names."""
    # What is named by a path must be there.
    named = r"(?:-r|-c|--requirement|--constraint)[ =]*+[^\s/]*+/"
    local = re.search(rf"(?m)^[ \t]*+(?:-e\b|--editable\b|\.|file:|{named})", text)
    return f"COPY {'.' if local else 'requirements*.txt constraints*.tx[t]'} ./\nRUN pip install -r requirements.txt"


def project(toml: dict[str, Any]) -> str:
    """Instructions that install what `pyproject.toml` names, and the project itself where that can be built."""
    lines = []
    table = toml.get("project")
    if isinstance(table, dict) and isinstance(table.get("dependencies"), list):
        read = (
            "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\\n')"
        )
        lines += [
            "COPY pyproject.toml ./",
            f'RUN python -c "{read}" > /requirements.txt && pip install -r /requirements.txt',
        ]
    if "build-system" in toml or not lines:
        lines += ["COPY . ./", "RUN pip install ."]
    return "\n".join(lines)


def gunicorn(module: str, variable: str) -> tuple[str, str]:
    """The command that serves a WSGI application, and what it needs."""
    return f"exec gunicorn --bind 0.0.0.0:$PORT {module}:{variable}", "gunicorn"


def uvicorn(module: str, variable: str) -> tuple[str, str]:
    """The command that serves an ASGI application, and what it needs."""
    return f"exec uvicorn --host 0.0.0.0 --port $PORT {module}:{variable}", "uvicorn"


def python(install: str, server: str, command: str, image: str, port: int) -> str:
    """A Dockerfile of a Python project. `server` is what it needs beside what it names itself."""
    if server:
        install = f"RUN pip install {server}\n{install}"
    return f"""\
ARG BASE_IMAGE={image}
FROM $BASE_IMAGE AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /app
{install}

FROM $BASE_IMAGE
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp PORT={port}
COPY --from=build /venv /venv
WORKDIR /app
COPY . .
EXPOSE {port}
USER 1000:1000
CMD {json.dumps(["/bin/sh", "-c", command])}
"""
