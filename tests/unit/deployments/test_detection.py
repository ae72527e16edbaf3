"""What a repository is found to be, and what it is built by."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from orchestrator.deployments.contract import AppSettings, StepFailed
from orchestrator.deployments.detection import OURS, Recipe, detect
from orchestrator.settings import DeploySettings

Files = Mapping[str, str]
START = json.dumps({"scripts": {"start": "node server.js"}})


def found(directory: Path, files: Files, **app: object) -> Recipe:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    return detect(directory, AppSettings(**app), DeploySettings())  # type: ignore[arg-type]


def refused(directory: Path, files: Files, **app: object) -> tuple[str, str]:
    with pytest.raises(StepFailed) as failed:
        found(directory, files, **app)
    return failed.value.reason, str(failed.value)


def lines(recipe: Recipe) -> list[str]:
    assert (recipe.dockerfile, recipe.text is None) == (OURS, False)
    return (recipe.text or "").splitlines()


def test_a_dockerfile_counts_before_anything_else(tmp_path: Path) -> None:
    recipe = found(tmp_path, {"Dockerfile": "FROM x", "package.json": START, "index.html": ""})
    assert recipe == Recipe("Dockerfile", "Building the repository's Dockerfile.")
    recipe = found(tmp_path, {"deploy/api.Dockerfile": "FROM y"}, dockerfile="./deploy//api.Dockerfile")
    assert recipe == Recipe("deploy/api.Dockerfile", "Building deploy/api.Dockerfile.")


def test_a_dockerfile_that_is_missing_is_told_with_what_is_there(tmp_path: Path) -> None:
    files = {f"docker/{name}": "x" for name in "abcdefghijkl"} | {".git/x": "", "README": ""}
    assert refused(tmp_path, files, dockerfile="docker/Dockerfile") == (
        "DockerfileMissing",
        "There is no docker/Dockerfile in the repository; docker holds a, b, c, d, e, f, g, h, i, j and 2 more.",
    )
    assert refused(tmp_path, {}, dockerfile="no/such/Dockerfile") == (
        "DockerfileMissing",
        "There is no no/such/Dockerfile in the repository; the repository holds README, docker/.",
    )
    assert refused(tmp_path, {}, dockerfile="README/Dockerfile")[0] == "DockerfileMissing"


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../outside", "a\nb", "a\\b", "docker", "empty"])
def test_a_dockerfile_is_a_file_in_the_repository(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("FROM x")
    files = {"docker/Dockerfile": "FROM x", "empty": ""}
    assert refused(tmp_path / "repository", files, dockerfile=name)[0] == "InvalidDockerfile"


def test_links_are_followed_within_the_repository_only(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("FROM secret")
    directory = tmp_path / "repository"
    (directory / "docker").mkdir(parents=True)
    (directory / "docker/Dockerfile").write_text("FROM x")
    dockerfile = directory / "Dockerfile"
    dockerfile.symlink_to("docker/Dockerfile")
    assert detect(directory, AppSettings(), DeploySettings()).dockerfile == "docker/Dockerfile"
    for target, told in (
        ("../outside", "is a link that leads out of the repository"),
        ("/etc/passwd", "is a link that leads out of the repository"),
        ("nowhere", "is a link that leads nowhere"),
        ("Dockerfile", "is a link that leads to itself"),
        (".git/config", "is a link that leads into git's own files"),
        ("docker", "is no file"),
        ("/dev/zero", "is a link that leads out of the repository"),
    ):
        (directory / ".git").mkdir(exist_ok=True)
        (directory / ".git/config").write_text("x")
        dockerfile.unlink()
        dockerfile.symlink_to(target)
        for app in ({}, {"dockerfile": "Dockerfile"}):
            assert refused(directory, {}, **app) == ("InvalidDockerfile", f"The repository's Dockerfile {told}.")
    dockerfile.unlink()
    (directory / "up").symlink_to("..")
    assert refused(directory, {}, dockerfile="up/outside")[0] == "InvalidDockerfile"
    # What is in a directory elsewhere is not told.
    reason, told = refused(directory, {}, dockerfile="up/Dockerfile")
    assert (reason, "outside" in told) == ("InvalidDockerfile", False)
    (directory / "package.json").symlink_to("../outside")
    assert refused(directory, {})[0] == "InvalidProject"


def test_a_dockerfile_has_at_most_a_mebibyte(tmp_path: Path) -> None:
    told = refused(tmp_path, {"Dockerfile": "#" * (1 << 20) + "x"})
    assert told == ("InvalidDockerfile", "The repository's Dockerfile is larger than 1024 KiB.")


def test_what_is_of_no_kind_is_told_with_what_was_looked_for(tmp_path: Path) -> None:
    reason, told = refused(tmp_path, {"README.md": "", "src/x.go": "", "package.json": "{}", "pyproject.toml": ""})
    assert reason == "NoDockerfile"
    assert told.startswith("There is no Dockerfile in the repository, and it is of no kind that is built without one")
    assert "It holds README.md, package.json, pyproject.toml, src/. Add a Dockerfile" in told
    assert refused(tmp_path / "src/none", {"../none/.gitkeep": ""})[0] == "NoDockerfile"


@pytest.mark.parametrize(
    ("name", "root"), [("index.html", "."), ("public/index.html", "public"), ("dist/index.html", "dist")]
)
def test_a_static_site_is_served(tmp_path: Path, name: str, root: str) -> None:
    recipe = found(tmp_path, {name: "<h1>"}, port=3000)
    assert lines(recipe)[:2] == ["ARG BASE_IMAGE=docker.io/library/busybox:1.37", "FROM $BASE_IMAGE"]
    assert lines(recipe)[-1] == f'COPY ["{root}", "/site/"]'
    assert "ENV PORT=3000" in lines(recipe)
    assert "USER 65534:65534" in lines(recipe)
    assert "**/.*" in recipe.ignore


@pytest.mark.parametrize(
    ("files", "tool", "install"),
    [
        ({}, "npm, no lock file", "RUN npm install --no-audit --no-fund"),
        ({"package-lock.json": "{}"}, "npm", "RUN npm ci"),
        ({"npm-shrinkwrap.json": "{}"}, "npm", "RUN npm ci"),
        ({"yarn.lock": ""}, "yarn", "RUN corepack enable && yarn install --frozen-lockfile"),
        ({"yarn.lock": "", ".yarnrc.yml": ""}, "yarn berry", "RUN corepack enable && yarn install --immutable"),
        ({"pnpm-lock.yaml": ""}, "pnpm", "RUN corepack enable && pnpm install --frozen-lockfile"),
    ],
)
def test_a_node_project_is_installed_by_its_lock_file(tmp_path: Path, files: Files, tool: str, install: str) -> None:
    recipe = found(tmp_path, {"package.json": START, **files})
    assert f"({tool})" in recipe.found
    assert install in lines(recipe)
    assert 'CMD ["npm", "start"]' in lines(recipe)
    assert not any("run build" in line for line in lines(recipe))
    # What changes seldom comes before what changes often.
    first = lines(recipe)[lines(recipe).index(install) - 1]
    assert first.startswith("COPY . ." if tool == "yarn berry" else "COPY package.json ")


@pytest.mark.parametrize(
    "package",
    [
        {"workspaces": ["a"]},
        {"scripts": {"postinstall": "prisma generate"}},
        {"dependencies": {"ours": "file:lib"}},
    ],
)
def test_a_node_project_whose_installation_needs_its_files_gets_them(
    tmp_path: Path, package: dict[str, object]
) -> None:
    package = {**package, "scripts": {"start": "x", "build": "y", **package.get("scripts", {})}}  # type: ignore[dict-item]
    text = lines(found(tmp_path, {"package.json": json.dumps(package), "package-lock.json": "{}"}))
    assert text.index("COPY . .") < text.index("RUN npm ci") < text.index("RUN npm run build")
    assert text.count("COPY . .") == 1


def test_a_node_project_that_only_builds_is_a_static_site(tmp_path: Path) -> None:
    recipe = found(tmp_path, {"package.json": json.dumps({"scripts": {"build": "vite build"}}), "index.html": ""})
    assert "serving the site that it makes" in recipe.found
    assert [line for line in lines(recipe) if line.startswith(("ARG", "FROM"))] == [
        "ARG BASE_IMAGE=docker.io/library/node:24-slim",
        "ARG SERVER_IMAGE=docker.io/library/busybox:1.37",
        "FROM $BASE_IMAGE AS build",
        "FROM $SERVER_IMAGE",
    ]


@pytest.mark.parametrize(
    ("files", "command"),
    [
        ({"Procfile": "worker: x\nweb: gunicorn -w 4 shop:app\n"}, "gunicorn -w 4 shop:app"),
        ({"main.py": "print('hello')"}, "exec python main.py"),
        ({"app.py": "app = Flask(__name__)\napp.run()"}, "exec python app.py"),
        ({"app.py": "app = flask.Flask(__name__)"}, "exec gunicorn --bind 0.0.0.0:$PORT app:app"),
        ({"main.py": "api: FastAPI = FastAPI()\n"}, "exec uvicorn --host 0.0.0.0 --port $PORT main:api"),
        ({"main.py": "def make():\n    app = FastAPI()\n"}, "exec python main.py"),
        ({"asgi.py": "application = get()\n"}, "exec uvicorn --host 0.0.0.0 --port $PORT asgi:application"),
        ({"wsgi.py": "x = 1\napp = make()"}, "exec gunicorn --bind 0.0.0.0:$PORT wsgi:app"),
        (
            {
                "manage.py": 'os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")',
                "shop/wsgi.py": "application = x",
            },
            "exec gunicorn --bind 0.0.0.0:$PORT shop.wsgi:application",
        ),
    ],
)
def test_a_python_project_is_run_by_what_it_has(tmp_path: Path, files: Files, command: str) -> None:
    recipe = found(tmp_path, {"requirements.txt": "x\n", **files})
    assert f"to be run as `{command.removeprefix('exec ')}`" in recipe.found
    text = lines(recipe)
    assert text[-1] == f'CMD ["/bin/sh", "-c", "{command}"]'
    assert text[0] == "ARG BASE_IMAGE=docker.io/library/python:3.13-slim"
    server = next((name for name in ("gunicorn", "uvicorn") if command.startswith(f"exec {name}")), None)
    assert [line for line in text if line in ("RUN pip install gunicorn", "RUN pip install uvicorn")] == (
        [f"RUN pip install {server}"] if server else []
    )


@pytest.mark.parametrize(
    ("requirements", "copied"),
    [
        ("flask\n-r requirements-base.txt", "COPY requirements*.txt constraints*.tx[t] ./"),
        ("flask\n-e .", "COPY . ./"),
        ("./lib/ours", "COPY . ./"),
        ("-r requirements/base.txt", "COPY . ./"),
        ("shop @ git+https://host/x", "COPY requirements*.txt constraints*.tx[t] ./"),
    ],
)
def test_requirements_are_installed_before_the_rest_is_there(tmp_path: Path, requirements: str, copied: str) -> None:
    text = lines(found(tmp_path, {"requirements.txt": requirements, "main.py": ""}))
    assert text[text.index("RUN pip install -r requirements.txt") - 1] == copied


@pytest.mark.parametrize(
    ("project", "runs"),
    [
        ('[project]\ndependencies = ["flask"]', ["pip install -r /requirements.txt"]),
        (
            "[project]\ndependencies = []\n[build-system]\nrequires = []",
            ["pip install -r /requirements.txt", "pip install ."],
        ),
        ("[tool.poetry]\nname = 'x'\n[build-system]\nrequires = ['poetry-core']", ["pip install ."]),
    ],
)
def test_a_pyproject_is_installed_by_what_it_says(tmp_path: Path, project: str, runs: list[str]) -> None:
    text = lines(found(tmp_path, {"pyproject.toml": project, "main.py": ""}))
    installs = [line for line in text if line.startswith("RUN") and "pip install" in line]
    assert [line.endswith(run) for line, run in zip(installs, runs, strict=True)] == [True] * len(runs)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    reason, told = refused(tmp_path, {"package.json": "{"})
    assert (reason, told.startswith("The repository's package.json is no JSON: ")) == ("InvalidProject", True)
    assert refused(tmp_path, {"package.json": "[" * 100_000})[0] == "InvalidProject"
    (tmp_path / "package.json").write_text("[]")
    reason, told = refused(tmp_path, {"pyproject.toml": "[", "main.py": ""})
    assert (reason, told.startswith("The repository's pyproject.toml is no TOML: ")) == ("InvalidProject", True)


@pytest.mark.parametrize(
    "files",
    [
        {"Procfile": "web: a" + " " * (1 << 20) + "b"},
        {"requirements.txt": "\n" * (1 << 20) + "x", "main.py": ""},
        {"requirements.txt": "-r" + "=" * (1 << 20), "main.py": ""},
        {"wsgi.py": ("a:" + " " * (1 << 20) + "\n") * 2 + "a" * (1 << 20)},
        {"pyproject.toml": "a." * (100 << 10) + "a=1", "main.py": ""},
    ],
    ids=["procfile", "lines", "options", "module", "key"],
)
def test_a_hostile_project_takes_no_time(tmp_path: Path, files: Files) -> None:
    kept = {} if "pyproject.toml" in files else {"requirements.txt": "x"}
    began = time.process_time()
    with contextlib.suppress(StepFailed):
        found(tmp_path, {**kept, **files})
    # To try everything would take hours, in which nobody else has a turn.
    assert time.process_time() - began < 20


def test_an_operator_says_what_they_are_built_on(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("")
    recipe = detect(tmp_path, AppSettings(), DeploySettings(static_image="mirror.test/busybox@sha256:00"))
    assert lines(recipe)[0] == "ARG BASE_IMAGE=mirror.test/busybox@sha256:00"
