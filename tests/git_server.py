"""Git repositories made on the spot, and a server on loopback that serves them over HTTP with git's smart protocol.

    async with GitServer(tmp_path / "repositories") as server:
        repository = server.repository("site")
        commit = repository.commit({"index.html": "<h1>hello</h1>"}, "Say hello")
        await checkout(server.url("site"))          # http://127.0.0.1:49152/site.git

The server is `git http-backend` behind a few lines of HTTP, in the test's own loop. It can ask for a password, speak
the old protocol, send elsewhere, say nothing, or never end.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from aiohttp import hdrs, web

_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    **{f"GIT_{who}_NAME": "Ada" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "ada@example.org" for who in ("AUTHOR", "COMMITTER")},
}


@dataclass(frozen=True)
class Link:
    """A file that is a symbolic link, in what is committed."""

    target: str


@dataclass(frozen=True)
class Submodule:
    """A commit of another repository, in what is committed. Git is not asked whether it likes the URL."""

    url: str
    commit_id: str


class Repository:
    """A repository with one work tree: what is committed can be cloned at once."""

    def __init__(self, path: Path, *, branch: str = "main") -> None:
        self.path = path
        path.mkdir(parents=True)
        self.git("init", "--quiet", "--template=", f"--initial-branch={branch}")

    def git(self, *arguments: str, given: bytes | None = None) -> str:
        """What git prints, without the last line end."""
        run = subprocess.run(
            ["git", *arguments], cwd=self.path, env={**os.environ, **_ENVIRONMENT}, input=given, capture_output=True,
            timeout=60,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr.decode()
        return run.stdout.decode().strip()

    def commit(
        self,
        files: Mapping[str, str | bytes | Link | Submodule | None],
        message: str = "Change something",
        *,
        executable: bool = False,
    ) -> str:
        """Write (None: remove) the files and commit them on the branch that is checked out; the commit's id."""
        for name, content in files.items():
            path = self.path / name
            if isinstance(content, Submodule):
                self._add_submodule(name, content)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if isinstance(content, Link):
                path.symlink_to(content.target)
            elif content is not None:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
                path.chmod(0o755 if executable else 0o644)
            self.git("add", "--all", "--force", "--", name)
        self.git("-c", "core.hooksPath=/dev/null", "commit", "--quiet", "--allow-empty", "-m", message)
        return self.head

    @property
    def head(self) -> str:
        """The commit that is checked out."""
        return self.git("rev-parse", "HEAD")

    def switch(self, branch: str) -> None:
        """Check the branch out, a new one where there is none."""
        exists = self.git("branch", "--list", branch)
        self.git("switch", "--quiet", *([] if exists else ["--create"]), branch)

    def _add_submodule(self, name: str, submodule: Submodule) -> None:
        (self.path / name).mkdir(parents=True, exist_ok=True)
        self.git("update-index", "--add", "--cacheinfo", f"160000,{submodule.commit_id},{name}")
        modules = self.path / ".gitmodules"
        with modules.open("a") as file:
            file.write(f'[submodule "{name}"]\n\tpath = {name}\n\turl = "{submodule.url}"\n')
        self.git("add", ".gitmodules")


class GitServer:
    """Serves the repositories of a folder. All that may be changed may be changed at any time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._runner: web.AppRunner | None = None
        self._port = 0
        # Asked of every request when set, as `user:password`.
        self.credentials = ""
        # Whether clients that offer protocol version 2 hear version 0, which gives out only what branches point to.
        self.old_protocol = False
        # By name of a repository: the URL that its clients are sent to.
        self.redirects: dict[str, str] = {}
        # Names of repositories about which nothing is ever answered, and whose packs never end.
        self.silent: set[str] = set()
        self.endless: set[str] = set()
        # Names of those whose files are handed out as they are (gitprotocol-http(5), "dumb").
        self.plain: set[str] = set()
        # Requests so far as (method, path, Authorization), and whether one is being kept waiting.
        self.requests: list[tuple[str, str, str]] = []
        self.waiting = asyncio.Event()
        # Bytes of endless packs that were sent.
        self.sent = 0
        self._large: dict[str, bytes] = {}

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/lfs/{oid}", self._large_file)
        app.router.add_post("/{name}.git/info/lfs/objects/batch", self._large_batch)
        app.router.add_route("*", "/{name}.git/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def repository(self, name: str, *, branch: str = "main") -> Repository:
        """Make an empty repository, served as `{name}.git`."""
        return Repository(self._folder / name, branch=branch)

    def url(self, name: str, *, credentials: str = "") -> str:
        """Where a repository is cloned from."""
        return f"http://{credentials and credentials + '@'}127.0.0.1:{self._port}/{name}.git"

    def keep_large(self, data: bytes) -> str:
        """Keep a file as Git LFS does; the text of its pointer, to be committed in its place."""
        oid = hashlib.sha256(data).hexdigest()
        self._large[oid] = data
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n"

    def _refuses(self, request: web.Request) -> web.Response | None:
        given = request.headers.get(hdrs.AUTHORIZATION, "")
        self.requests.append((request.method, request.path, given))
        if self.credentials and given != "Basic " + base64.b64encode(self.credentials.encode()).decode():
            return web.Response(status=401, headers={hdrs.WWW_AUTHENTICATE: 'Basic realm="git"'})
        return None

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name in self.silent:
            self.requests.append((request.method, request.path, ""))
            self.waiting.set()
            await asyncio.Event().wait()
        if name in self.redirects:
            self.requests.append((request.method, request.path, request.headers.get(hdrs.AUTHORIZATION, "")))
            return web.Response(status=301, headers={hdrs.LOCATION: self.redirects[name] + _rest(request)})
        if refusal := self._refuses(request):
            return refusal
        if not (self._folder / name).is_dir():
            return web.Response(status=404)
        if name in self.plain:
            file = self._folder / name / ".git" / request.match_info["path"]
            return web.FileResponse(file) if file.is_file() else web.Response(status=404)
        body = await request.read()
        if name in self.endless and (b"command=fetch" in body or b"want " in body):
            return await self._never_end(request)
        return await self._backend(request, body)

    async def _backend(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """Hand the request to `git http-backend`, as a CGI program (RFC 3875)."""
        environment = {
            **os.environ,
            **_ENVIRONMENT,
            "GIT_PROJECT_ROOT": str(self._folder),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": request.path.replace(".git/", "/", 1),
            "REQUEST_METHOD": request.method,
            "QUERY_STRING": request.query_string,
            "CONTENT_TYPE": request.headers.get(hdrs.CONTENT_TYPE, ""),
            "CONTENT_LENGTH": str(len(body)),
            "GIT_PROTOCOL": "" if self.old_protocol else request.headers.get("Git-Protocol", ""),
        }
        backend = await asyncio.create_subprocess_exec(
            "git", "http-backend",
            env=environment, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert backend.stdin is not None
        assert backend.stdout is not None
        try:
            with suppress(ConnectionError):
                backend.stdin.write(body)
                await backend.stdin.drain()
            backend.stdin.close()
            response = web.StreamResponse()
            while (line := await backend.stdout.readline()).strip():
                field, _, value = line.decode().strip().partition(": ")
                if field == "Status":
                    response.set_status(int(value.split()[0]))
                else:
                    response.headers[field] = value
            await response.prepare(request)
            with suppress(ConnectionError):
                async for piece in _pieces(backend.stdout):
                    await response.write(piece)
            return response
        finally:
            with suppress(ProcessLookupError):
                os.killpg(backend.pid, 9)
            await backend.wait()

    async def _never_end(self, request: web.Request) -> web.StreamResponse:
        """A pack of one object that does not stop: stored blocks of deflate (RFC 1951, 3.2.4), none the last."""
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "application/x-git-upload-pack-result"})
        await response.prepare(request)
        # One blob of 2^40 bytes: its type and the length, 4 and then 7 bits at a time, lowest first.
        header = bytes([0xB0, *[0x80] * 5, 0x02])
        block = b"\x00\xff\x7f\x00\x80" + os.urandom(0x7FFF)
        with suppress(ConnectionError):
            await response.write(_packet(b"packfile\n"))
            await response.write(_packet(b"\x01PACK\0\0\0\2\0\0\0\1" + header + b"\x78\x01"))
            while True:
                await response.write(_packet(b"\x01" + block))
                self.sent += len(block)
        return response

    async def _large_batch(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._refuses(request):
            return refusal
        wanted = json.loads(await request.read())["objects"]
        answer = [
            {
                **one,
                "actions": {"download": {"href": f"http://127.0.0.1:{self._port}/lfs/{one['oid']}"}},
            }
            if one["oid"] in self._large
            else {**one, "error": {"code": 404, "message": "there is no such object"}}
            for one in wanted
        ]
        return web.json_response({"transfer": "basic", "objects": answer}, content_type="application/vnd.git-lfs+json")

    async def _large_file(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self._large[request.match_info["oid"]])


def _packet(data: bytes) -> bytes:
    """A pkt-line (gitprotocol-common(5))."""
    return b"%04x" % (len(data) + 4) + data


def _rest(request: web.Request) -> str:
    query = f"?{request.query_string}" if request.query_string else ""
    return f"/{request.match_info['path']}{query}"


async def _pieces(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await stream.read(1 << 16):
        yield piece
