"""What is sent to a Docker engine of a repository, held against what the docker command itself sends."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.deployments import dockerignore
from orchestrator.deployments.context import pack
from orchestrator.deployments.contract import StepFailed

FILES = (
    "Dockerfile", "a.txt", "b.md", "c[1].txt", "x*y", "src/a.txt", "src/deep/a.txt", "src/deep/b.md", "src/main.py",
    "docs/a.txt", "docs/keep/a.txt", "docs/keep/b.md", "node_modules/m/index.js", "src/node_modules/n/a.txt", ".env",
    "src/.env", "build/out", "build/src/out", "abc", "abd", "foobar", "foo/x/bar",
)  # fmt: skip


def tree(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


async def packed(directory: Path, dockerfile: str = "Dockerfile", **options: object) -> dict[str, tarfile.TarInfo]:
    return {entry.name: entry for entry in await entries(directory, dockerfile, **options)}


async def entries(directory: Path, dockerfile: str = "Dockerfile", **options: object) -> list[tarfile.TarInfo]:
    content = b"".join([piece async for piece in pack(directory, dockerfile, **options)])  # type: ignore[arg-type]
    with tarfile.open(fileobj=io.BytesIO(content), errors="surrogateescape") as archive:
        return archive.getmembers()


async def sent(directory: Path, ignore: str, dockerfile: str = "Dockerfile") -> set[str]:
    """The files that are sent where `.dockerignore` says this."""
    (directory / ".dockerignore").write_text(ignore)
    return {name for name, entry in (await packed(directory, dockerfile)).items() if not entry.isdir()}


class Engine(BaseHTTPRequestHandler):
    """Takes what the docker command sends to be built."""

    protocol_version = "HTTP/1.1"
    contexts: list[bytes]

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"OK")

    def do_POST(self) -> None:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        self.contexts.append(body)
        self._answer(b'{"stream":"Successfully built 0123456789ab\\n"}\n')

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        for name, value in (("Api-Version", "1.41"), ("Builder-Version", "1"), ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Docker:
    """The docker command."""

    def __init__(self, port: int, contexts: list[bytes]) -> None:
        self._port = port
        self._contexts = contexts

    def sends(self, directory: Path, dockerfile: str = "Dockerfile") -> dict[str, tarfile.TarInfo]:
        """What it sends to be built."""
        self._contexts.clear()
        host = f"tcp://127.0.0.1:{self._port}"
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DOCKER_HOST": host, "DOCKER_BUILDKIT": "0"}
        run = subprocess.run(
            ["docker", "build", "-f", directory / dockerfile, directory],
            env=environment, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert self._contexts, run.stderr
        with tarfile.open(fileobj=io.BytesIO(self._contexts[0])) as archive:
            return {entry.name: entry for entry in archive.getmembers() if entry.name != "."}


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    if shutil.which("docker") is None:
        message = "the docker command is missing: apt install docker.io"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    contexts: list[bytes] = []
    handler = type("Handler", (Engine,), {"contexts": contexts})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Docker(server.server_port, contexts)
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "ignore",
    [
        "",
        "*\n!src\n!*.md",
        "# a comment\n\n  *.txt  \n/b.md\n",
        "**/*.txt\n!docs/**/a.txt\n",
        "**/a.txt\n!src/deep\nsrc/deep/b.md",
        "src/*\n!src/deep/a.txt\n",
        "docs/keep\n!docs/keep/b.md\ndocs/*/a.txt",
        "node_modules\n**/node_modules\n**/.env\n",
        "**\n!src/**",
        "Dockerfile\n.dockerignore\n*.md",
        "c[[]1].txt\nx\\*y\nab[a-c]\nfoo**bar\n",
        "ab[^c]\n?.md\n./src/../docs/\n",
        "src/**/b.md\n/src/deep/..//main.py\nbuild/**",
        "foo**\n**bar\n*/*/b.md",
    ],
)
async def test_it_is_what_docker_sends(docker: Docker, tmp_path: Path, ignore: str) -> None:
    tree(tmp_path, *FILES)
    ours = await sent(tmp_path, ignore)
    theirs = {name for name, entry in docker.sends(tmp_path).items() if not entry.isdir()}
    assert ours == theirs


async def test_it_is_what_docker_sends_for_drawn_patterns(docker: Docker, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    tree(tmp_path, *FILES)
    parts = ["*", "**", "src", "docs", "deep", "keep", "a.txt", "*.md", "?*", "[a-d]*", "node_modules", "b*", "*a*t"]
    for _ in range(40):
        lines = ["/".join(draw.choices(parts, k=draw.randint(1, 3))) for _ in range(draw.randint(1, 5))]
        # The docker command does not look into directories that are left out for exceptions that begin with a wildcard,
        # which BuildKit does, as we do.
        lines = [("!" if draw.random() < 0.4 and line[0] not in "*?[" else "") + line for line in lines]
        if any(line[0] == "!" and any(one in line for one in "*?[") for line in lines):
            continue
        ignore = "\n".join(lines)
        ours = await sent(tmp_path, ignore)
        theirs = {name for name, entry in docker.sends(tmp_path).items() if not entry.isdir()}
        assert ours == theirs, ignore


async def test_entries_are_those_of_docker(docker: Docker, tmp_path: Path) -> None:
    long = "/".join(["a-long-directory-name"] * 12)
    tree(tmp_path, "Dockerfile", "run.sh", f"{long}/x", "é", "docs/Dockerfile.prod")
    (tmp_path / "run.sh").chmod(0o755)
    (tmp_path / "link").symlink_to("../outside")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    ours, theirs = await packed(tmp_path, "docs/Dockerfile.prod"), docker.sends(tmp_path, "docs/Dockerfile.prod")
    for entry in theirs.values():
        name = entry.name.rstrip("/")
        if entry.isfifo():
            assert name not in ours
            continue
        mine = ours[name]
        assert (mine.type, mine.mode, mine.size, mine.linkname) == (entry.type, entry.mode, entry.size, entry.linkname)
        assert (mine.uid, mine.gid) == (0, 0)
    assert set(ours) == {name.rstrip("/") for name in theirs} - {"pipe"}


async def test_two_clones_of_a_commit_are_the_same_to_the_byte(tmp_path: Path) -> None:
    contents = []
    for number, name in enumerate(("one", "two")):
        directory = tree(tmp_path / name, *reversed(FILES) if number else FILES, ".git/index")
        (directory / ".git/index").write_text(name)
        (directory / "a.txt").chmod(0o664 if number else 0o600)
        os.utime(directory / "a.txt", (number, number))
        contents.append(b"".join([piece async for piece in pack(directory, "Dockerfile", mtime=1_700_000_000)]))
    assert contents[0] == contents[1]
    assert {entry.mtime for entry in await entries(tmp_path / "one", mtime=1_700_000_000)} == {1_700_000_000}
    # Archives such as zip know nothing before 1980.
    assert (await packed(tmp_path / "one"))["a.txt"].mtime == 315_619_200


async def test_git_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile", ".git/HEAD", "sub/.git/HEAD", ".gitignore")
    assert await sent(tmp_path, "") == {"Dockerfile", ".dockerignore", ".gitignore"}
    assert ".git/HEAD" in await sent(tmp_path, "!.git")


async def test_exceptions_with_wildcards_are_found_in_directories_that_are_left_out(tmp_path: Path) -> None:
    tree(tmp_path, *FILES)
    assert await sent(tmp_path, "*\n!**/b.md") == {
        "Dockerfile", ".dockerignore", "b.md", "docs/keep/b.md", "src/deep/b.md",
    }  # fmt: skip
    # Their directories come before them, and no others.
    names = [entry.name for entry in await entries(tmp_path)]
    assert names == [
        ".dockerignore", "Dockerfile", "b.md", "docs", "docs/keep", "docs/keep/b.md", "src", "src/deep",
        "src/deep/b.md",
    ]  # fmt: skip


async def test_a_dockerfile_may_have_a_list_of_its_own(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile", "api/Dockerfile", "a.txt", "b.md")
    (tmp_path / "api/Dockerfile.dockerignore").write_text("a.txt")
    found = await sent(tmp_path, "*", "api/Dockerfile")
    assert "a.txt" not in found
    assert "b.md" in found


async def test_a_dockerfile_of_ours_takes_the_place_of_any_other(tmp_path: Path) -> None:
    tree(tmp_path, "Ours", "a.txt", "b/.env", "b/.env.example")
    content = b"".join(
        [piece async for piece in pack(tmp_path, "Ours", text="FROM x", ignore="**/.env*\n!**/*.example")]
    )
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert archive.getnames() == ["Ours", "a.txt", "b", "b/.env.example"]
        assert archive.extractfile("Ours").read() == b"FROM x"  # type: ignore[union-attr]
    (tmp_path / ".dockerignore").write_text("!b/.env")
    assert "b/.env" in await packed(tmp_path, "Ours", text="FROM x", ignore="**/.env*")


async def test_large_files_come_piece_by_piece(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 << 20)
    (tmp_path / "large").write_bytes(content)
    pieces = [piece async for piece in pack(tmp_path, "Dockerfile")]
    assert max(map(len, pieces)) <= 1 << 20
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as archive:
        assert archive.extractfile("large").read() == content  # type: ignore[union-attr]


async def test_names_may_be_anything(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9\n")
    (tmp_path / odd).write_text("")
    deep = tmp_path
    for _ in range(700):
        deep /= "d"
        deep.mkdir()
    found = await packed(tmp_path)
    assert odd in found
    assert len(found) == 701


async def test_a_list_that_leads_elsewhere_or_is_none_is_refused(tmp_path: Path) -> None:
    outside = tree(tmp_path, "outside") / "outside"
    directory = tree(tmp_path / "repository", "Dockerfile")
    (directory / ".dockerignore").symlink_to(outside)
    with pytest.raises(StepFailed, match=r"^The repository's \.dockerignore is a link that leads out of the repos"):
        await packed(directory)
    (directory / ".dockerignore").unlink()
    for bad, told in (
        ("a\n[a-", r"'\[a-'"),
        ("!", "'!'"),
        ("x" * 2000, "'x+'"),
        ("a\n" * 1001, "more than 1000 lines"),
    ):
        with pytest.raises(StepFailed, match=f"a line that is no pattern: .*{told}") as refused:
            await sent(directory, bad)
        assert refused.value.reason == "InvalidDockerignore"


def test_no_pattern_takes_long() -> None:
    path = ["a"] * 2000
    name = ["a" * 255]
    begun = time.process_time()
    for pattern in ("**/a" * 100 + "/b", "*a" * 200 + "b", "*[a]" * 100 + "b", "**/" * 200 + "b", "?*" * 100 + "b"):
        parsed = dockerignore.parse(pattern)
        assert not parsed.matches(path)
        assert not parsed.matches(name)
    with pytest.raises(dockerignore.BadPattern):
        dockerignore.parse("a**" * 300)
    # To go back would take longer than the universe has existed; this takes a tenth of a second.
    assert time.process_time() - begun < 30
