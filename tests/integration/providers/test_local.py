"""The local provider with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import psutil
import pytest
import uvloop

from orchestrator.children.processes import Selection
from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.providers.contract import Observation, SessionRef, State
from orchestrator.providers.local import LocalProvider
from tests.integration.providers.conftest import (
    QUICK,
    SERVER,
    Heard,
    MakeProvider,
    living,
    python,
    shell,
    spec,
    until,
    url,
)

# A server that ends when it is asked for /crash.
CRASHING = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/crash":
            print("going down", flush=True)
            os._exit(3)
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
# Answers with the status that the file `status` in the workspace holds.
MOODY = """
import http.server, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(pathlib.Path("status").read_text())); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def status_of(address: str) -> int:
    async with aiohttp.request("GET", address) as answer:
        return answer.status


async def crash(address: str) -> None:
    with pytest.raises(aiohttp.ClientError):
        await status_of(f"{address}crash")


async def test_a_session_runs_and_stops_and_is_deleted(provider: LocalProvider, heard: Heard, data_dir: Path) -> None:
    asked = spec()
    assert (await provider.inspect(asked.ref)).state is State.ABSENT
    endpoints = await provider.start(asked, heard.report)
    assert endpoints.ip_address == "127.0.0.1"
    assert endpoints.chat is endpoints.vscode is None
    assert await status_of(url(endpoints.preview)) == 200
    assert await provider.inspect(asked.ref) == Observation(State.RUNNING, "Ready", "All services answer.", endpoints)
    await provider.stop(asked.ref)
    assert living(data_dir) == []
    assert (await provider.inspect(asked.ref)).state is State.STOPPED
    await provider.stop(asked.ref)
    await provider.delete(asked.ref)
    await provider.delete(asked.ref)
    assert (await provider.inspect(asked.ref)).state is State.ABSENT
    assert list((data_dir / "sessions").iterdir()) == []


async def test_what_runs_from_the_same_spec_is_left_alone(
    provider: LocalProvider, heard: Heard, data_dir: Path
) -> None:
    first = await provider.start(spec(), heard.report)
    before = living(data_dir)
    assert await provider.start(spec(), heard.report) == first
    assert living(data_dir) == before
    await provider.start(spec(env={"A": "changed"}), heard.report)
    assert not set(living(data_dir)) & set(before)


async def test_two_services_are_reached_each_at_its_own_path(provider: LocalProvider, heard: Heard) -> None:
    services = {
        "preview": python(SERVER, "hello from preview", ready="/", path="/app"),
        "chat": python(SERVER, "hello from chat"),
        "vscode": {"command": [["no-such-editor"], ["nor-this"]], "optional": True},
    }
    endpoints = await provider.start(spec(services), heard.report)
    assert endpoints.preview is not None
    assert endpoints.preview.path == "/app"
    assert endpoints.preview.url.endswith("/app")
    assert await status_of(url(endpoints.chat)) == 200
    assert endpoints.vscode is None
    await until(lambda: heard.of("chat", "stdout"))
    assert heard.of("preview", "stdout") == ["hello from preview"]
    assert heard.of("chat", "stdout") == ["hello from chat"]
    assert heard.of("vscode", "system") == ["vscode is left out: no-such-editor or nor-this is not installed here"]
    assert heard.reports[-1] == ("StartingServices", "Starting preview, chat.")


async def test_the_first_command_whose_program_is_there_is_taken(
    provider: LocalProvider, heard: Heard, data_dir: Path
) -> None:
    service = {"command": [["no-such-program"], ["./bin/serve", "{port}", "{unknown}"]], "env": {"WHERE": "at {port}"}}
    files = data_dir / "sessions/7/workspace/bin"
    files.mkdir(parents=True)
    (files / "serve").write_text('#!/bin/sh\necho "$2 $WHERE"; exec python3 -m http.server "$1" --bind 127.0.0.1\n')
    (files / "serve").chmod(0o755)
    endpoints = await provider.start(spec({"preview": service}), heard.report)
    port = url(endpoints.preview).split(":")[2].strip("/")
    assert heard.of("preview", "stdout")[0] == f"{{unknown}} at {port}"


async def test_a_command_that_is_not_there_is_told(provider: LocalProvider, heard: Heard, data_dir: Path) -> None:
    with pytest.raises(ProviderFailure) as failed:
        await provider.start(spec({"preview": python(SERVER), "chat": {"command": ["no-such"]}}), heard.report)
    assert failed.value.reason == "CommandNotFound"
    assert str(failed.value) == "chat cannot be started: no-such is not installed here."
    assert living(data_dir) == []


async def test_a_machine_config_that_cannot_be_is_told(provider: LocalProvider, heard: Heard) -> None:
    with pytest.raises(ProviderFailure, match=r"'test': services.preview.command: Missing") as failed:
        await provider.start(spec({"preview": {"image": "x"}}), heard.report)
    assert failed.value.reason == "InvalidMachineConfig"


@pytest.mark.parametrize("env", [{"A=B": "x"}, {"": "x"}, {"A": "\0"}, {"A": "\ud800"}])
async def test_an_environment_that_cannot_be_is_told(
    provider: LocalProvider, heard: Heard, env: dict[str, str]
) -> None:
    with pytest.raises(ProviderFailure) as failed:
        await provider.start(spec(env=env), heard.report)
    assert failed.value.reason == "InvalidEnvironment"


async def test_processes_get_little_and_nothing_secret_of_ours(
    make: MakeProvider, heard: Heard, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:secret@host/db")
    provider = make(env={"PROXY": "p"})
    env = {"MINE": "1", "PORT": "1", "CLUSTER_CODE_SESSION": "8"}
    service = {"command": ["sh", "-c", f"env; exec {{python}} -c '{SERVER}' $PORT".replace("{python}", "python3")]}
    await provider.start(spec({"preview": {**service, "env": {"OWN": "{host}"}}}, env=env), heard.report)
    got = dict(line.split("=", 1) for line in heard.of("preview", "stdout") if "=" in line)
    assert set(got) - {"PWD", "OLDPWD", "SHLVL", "_"} == {
        "PATH", "HOME", "TMPDIR", "USER", "LANG", "TERM", "PORT", "HOST", "PROXY", "MINE", "OWN",
        "CLUSTER_CODE_INSTANCE", "CLUSTER_CODE_SESSION", "CLUSTER_CODE_SERVICE",
    }  # fmt: skip
    assert got["HOME"] == str(data_dir / "sessions/7/home")
    assert got["PORT"] != "1"
    assert got["OWN"] == got["HOST"] == "127.0.0.1"
    assert (got["CLUSTER_CODE_SESSION"], got["CLUSTER_CODE_SERVICE"]) == ("7", "preview")


async def test_limits_are_those_of_the_machine_config(provider: LocalProvider, heard: Heard) -> None:
    show = (
        "import os, resource as r\n"
        "print(r.getrlimit(r.RLIMIT_DATA)[0], r.getrlimit(r.RLIMIT_CPU)[0], len(os.sched_getaffinity(0)))"
    )
    services = {
        "preview": python(f"{show}\n{SERVER}"),
        "chat": python(f"{show}\n{SERVER}", limit_memory=False),
    }
    asked = spec(services, cpu=0.5, memory_bytes=1 << 30, options={"cpu_seconds": 77})
    await provider.start(asked, heard.report)
    await until(lambda: heard.of("preview") and heard.of("chat"))
    assert heard.of("preview", "stdout")[0] == f"{1 << 30} 77 1"
    assert heard.of("chat", "stdout")[0].split()[0] == "-1"


async def test_a_crash_is_told_and_mended(provider: LocalProvider, heard: Heard) -> None:
    changes = provider.watch()
    asked = spec({"preview": python(CRASHING, ready="/")})
    endpoints = await provider.start(asked, heard.report)
    await crash(url(endpoints.preview))
    async with asyncio.timeout(10):
        seen = [await anext(changes)]
        while seen[-1][1].state is not State.RUNNING:
            seen.append(await anext(changes))
    assert seen[0][0] == asked.ref
    assert seen[-1][1].endpoints == endpoints
    assert await status_of(url(endpoints.preview)) == 200
    assert "preview exited with code 3; it is started again in 0.01 s" in heard.of("preview", "system")


async def test_while_it_is_being_mended_it_is_starting(make: MakeProvider, heard: Heard) -> None:
    provider = make(restart_delay=60)
    changes = provider.watch()
    asked = spec({"preview": python(CRASHING, ready="/")})
    endpoints = await provider.start(asked, heard.report)
    await crash(url(endpoints.preview))
    async with asyncio.timeout(10):
        ref, seen = await anext(changes)
    assert (ref, seen) == (asked.ref, await provider.inspect(asked.ref))
    assert seen == Observation(State.STARTING, "Restarting", "preview exited with code 3. It is being started again.")


async def test_crashes_in_a_row_fail_the_session_with_its_last_lines(
    provider: LocalProvider, heard: Heard, data_dir: Path
) -> None:
    services = {
        "preview": shell("echo starting; echo broken pipe dream >&2; exit 4"),
        "chat": python(SERVER),
    }
    asked = spec(services)
    with pytest.raises(ProviderFailure) as failed:
        await provider.start(asked, heard.report)
    assert failed.value.reason == "CrashLoop"
    told = str(failed.value)
    assert told.startswith("preview exited with code 4, 5 times in a row. Its last lines:\n")
    assert "broken pipe dream" in told
    assert len(heard.of("preview", "stderr")) == 5
    assert living(data_dir) == []
    assert await provider.inspect(asked.ref) == Observation(State.FAILED, "CrashLoop", told)


async def test_crashes_in_a_row_fail_a_session_that_ran(make: MakeProvider, heard: Heard, data_dir: Path) -> None:
    provider = make(crashes=2, restart_delay=0.01)
    changes = provider.watch()
    script = "test -e ran && kill -SEGV $$; touch ran; exec python3 -m http.server $PORT --bind 127.0.0.1"
    asked = spec({"preview": shell(script, ready="/"), "chat": python(SERVER)})
    await provider.start(asked, heard.report)
    [process] = [one for one in living(data_dir) if "http.server" in psutil.Process(one).cmdline()]
    os.kill(process, signal.SIGTERM)
    async with asyncio.timeout(10):
        async for _, seen in changes:
            if seen.state is State.FAILED:
                break
    assert seen.reason == "CrashLoop"
    assert seen.message.startswith("preview was killed by SIGSEGV, 2 times in a row.")
    await until(lambda: living(data_dir) == [])
    assert await provider.inspect(asked.ref) == seen
    (data_dir / "sessions/7/workspace/ran").unlink()
    await provider.start(asked, heard.report)
    assert (await provider.inspect(asked.ref)).state is State.RUNNING


async def test_a_process_that_was_up_long_enough_has_recovered(make: MakeProvider, heard: Heard) -> None:
    provider = make(crashes=2, restart_delay=0.01, stable_after=0.001)
    endpoints = await provider.start(spec({"preview": python(CRASHING, ready="/")}), heard.report)
    for _ in range(3):
        await crash(url(endpoints.preview))
        async with asyncio.timeout(10):
            while (await provider.inspect(spec().ref)).state is not State.RUNNING:
                await asyncio.sleep(0.01)


async def test_what_a_crashed_process_left_behind_is_ended(
    provider: LocalProvider, heard: Heard, data_dir: Path
) -> None:
    script = (
        "test -e ran || { touch ran; setsid sleep 1000 & exit 1; }; exec python3 -m http.server $PORT --bind 127.0.0.1"
    )
    await provider.start(spec({"preview": shell(script, ready="/")}), heard.report)
    assert not [one for one in living(data_dir) if "sleep" in psutil.Process(one).name()]


async def test_what_is_not_ready_in_time_is_told(make: MakeProvider, heard: Heard, data_dir: Path) -> None:
    provider = make(ready_deadline=0.7)
    with pytest.raises(ProviderFailure) as failed:
        await provider.start(spec({"preview": shell("echo waiting; exec sleep 1000")}), heard.report)
    assert failed.value.reason == "NotReady"
    told = str(failed.value)
    assert told.startswith("preview was not ready within 0.7 s: nothing answers on its port ")
    assert told.endswith("Its last lines:\nwaiting")
    assert living(data_dir) == []


async def test_ready_is_any_answer_but_the_servers_own_error(make: MakeProvider, heard: Heard, data_dir: Path) -> None:
    provider = make(ready_deadline=1.0)
    workspace = data_dir / "sessions/7/workspace"
    workspace.mkdir(parents=True)
    (workspace / "status").write_text("503")
    asked = spec({"preview": python(MOODY, ready="/healthz")})
    with pytest.raises(ProviderFailure, match="preview was not ready within 1 s: /healthz answers 503"):
        await provider.start(asked, heard.report)
    (workspace / "status").write_text("404")
    await provider.start(asked, heard.report)


async def test_what_is_not_ready_again_in_time_counts_as_a_crash(
    make: MakeProvider, heard: Heard, data_dir: Path
) -> None:
    provider = make(ready_deadline=5.0, crashes=2, restart_delay=0.01)
    script = "test -e ran && exec sleep 1000; touch ran; exec python3 -m http.server $PORT --bind 127.0.0.1"
    asked = spec({"preview": shell(script, ready="/")})
    await provider.start(asked, heard.report)
    os.kill(living(data_dir)[0], signal.SIGKILL)
    async with asyncio.timeout(40):
        async for _, seen in provider.watch():
            if seen.state is State.FAILED:
                break
    assert seen.message.startswith("preview was not ready within 5 s (nothing answers on its port")


async def test_a_fixed_port_that_is_taken_is_told(provider: LocalProvider, heard: Heard) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ProviderFailure) as failed:
            await provider.start(spec({"preview": python(SERVER, port=port)}), heard.report)
        assert failed.value.reason == "PortTaken"
        assert str(failed.value) == f"preview cannot be started: the port {port} is taken."
    endpoints = await provider.start(spec({"preview": python(SERVER, port=port)}), heard.report)
    assert url(endpoints.preview) == f"http://127.0.0.1:{port}/"


async def test_a_port_that_was_taken_meanwhile_is_replaced(make: MakeProvider, heard: Heard) -> None:
    provider = make(restart_delay=0.3)
    endpoints = await provider.start(spec({"preview": python(CRASHING, ready="/")}), heard.report)
    changes = provider.watch()
    await crash(url(endpoints.preview))
    async with asyncio.timeout(10):
        await anext(changes)
        with socket.create_server(("127.0.0.1", int(url(endpoints.preview).split(":")[2].strip("/")))):
            _, seen = await anext(changes)
            while seen.state is not State.RUNNING:
                _, seen = await anext(changes)
    assert seen.endpoints is not None
    assert url(seen.endpoints.preview) != url(endpoints.preview)
    assert await status_of(url(seen.endpoints.preview)) == 200


async def test_a_stubborn_process_is_killed_after_the_grace(make: MakeProvider, heard: Heard, data_dir: Path) -> None:
    provider = make(stop_grace=0.3)
    stubborn = f"import signal; signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True))\n{SERVER}"
    asked = spec({"preview": python(stubborn)})
    await provider.start(asked, heard.report)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await provider.stop(asked.ref)
    assert 0.3 <= loop.time() - began < 3
    assert living(data_dir) == []
    assert heard.of("preview", "stdout")[-1] == "no"


async def test_a_process_that_ends_when_asked_says_its_last_words(provider: LocalProvider, heard: Heard) -> None:
    polite = (
        "import signal, sys\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit()))\n{SERVER}"
    )
    asked = spec({"preview": python(polite)})
    await provider.start(asked, heard.report)
    await provider.stop(asked.ref)
    assert heard.of("preview", "stdout")[-1] == "bye"
    assert not any("started again" in line for line in heard.of("preview"))


async def test_processes_that_hide_are_ended_too(provider: LocalProvider, heard: Heard, data_dir: Path) -> None:
    mine = [f"{number}{os.getpid()}" for number in (1, 2, 3)]
    script = (
        f"setsid sh -c 'trap \"\" TERM HUP; sleep {mine[0]} & sleep {mine[1]} & wait' >/dev/null 2>&1 & "
        f"env -i sleep {mine[2]} & exec python3 -m http.server $PORT --bind 127.0.0.1"
    )
    await provider.start(spec({"preview": shell(script, ready="/")}), heard.report)

    def sleeping() -> set[str]:
        commands = [one.info["cmdline"] or [] for one in psutil.process_iter(["cmdline"])]
        return {words[1] for words in commands if words[:1] == ["sleep"]} & set(mine)

    await until(lambda: sleeping() == set(mine))
    await provider.stop(spec().ref)
    assert sleeping() == set()


async def test_output_without_end_or_line_end_is_bounded(provider: LocalProvider, heard: Heard) -> None:
    services = {
        "preview": shell("yes & exec python3 -m http.server $PORT --bind 127.0.0.1", ready="/"),
        "chat": shell("tr '\\0' x </dev/zero & exec python3 -m http.server $PORT --bind 127.0.0.1", ready="/"),
    }
    before = psutil.Process().memory_info().rss
    await provider.start(spec(services), heard.report)
    await until(lambda: len(heard.of("preview", "stdout")) > 5000)
    await until(lambda: any("lines were left out" in line for line in heard.of("preview", "system")))
    await provider.stop(spec().ref)
    assert len(heard.of("preview", "stdout")) < 20000
    assert len(heard.of("chat", "stdout")[0]) < 9000
    assert psutil.Process().memory_info().rss - before < 64 << 20


async def test_a_command_runs_in_the_workspace(provider: LocalProvider, heard: Heard, data_dir: Path) -> None:
    asked = spec(env={"WHO": "me"})
    with pytest.raises(ProviderFailure, match="does not run"):
        await provider.exec(asked.ref, ["true"])
    await provider.start(asked, heard.report)
    workspace = data_dir / "sessions/7/workspace"
    assert await provider.exec(asked.ref, ["sh", "-c", "pwd; echo $WHO >&2; exit 3"]) == (
        3,
        f"{workspace}\nme\n".encode(),
    )
    assert await provider.exec(asked.ref, ["no-such"]) == (127, b"no-such: not found\n")
    assert (await provider.exec(asked.ref, []))[0] == 127
    assert (await provider.exec(asked.ref, ["sh", "-c", "kill -9 $$"]))[0] == 128 + 9
    code, output = await provider.exec(asked.ref, ["head", "-c", "3000000", "/dev/zero"])
    assert (code, len(output)) == (0, 1 << 20)


async def test_a_command_that_leaves_something_in_the_background_returns(
    provider: LocalProvider, heard: Heard, data_dir: Path
) -> None:
    asked = spec()
    await provider.start(asked, heard.report)
    before = len(living(data_dir))
    async with asyncio.timeout(5):
        assert await provider.exec(asked.ref, ["sh", "-c", "echo a; sleep 1000 &"]) == (0, b"a\n")
    assert len(living(data_dir)) == before + 1
    await provider.stop(asked.ref)
    assert living(data_dir) == []


async def test_a_command_without_end_is_ended(make: MakeProvider, heard: Heard, data_dir: Path) -> None:
    provider = make(exec_deadline=0.3)
    asked = spec()
    await provider.start(asked, heard.report)
    before = living(data_dir)
    with pytest.raises(ProviderFailure, match=r"did not end within 0\.3 s"):
        await provider.exec(asked.ref, ["sleep", "1000"])
    assert living(data_dir) == before


async def test_a_cancelled_command_is_ended(provider: LocalProvider, heard: Heard, data_dir: Path) -> None:
    asked = spec()
    await provider.start(asked, heard.report)
    before = living(data_dir)
    command = asyncio.create_task(provider.exec(asked.ref, ["sleep", "1000"]))
    await until(lambda: len(living(data_dir)) > len(before))
    command.cancel()
    with pytest.raises(asyncio.CancelledError):
        await command
    assert living(data_dir) == before


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.01, 0.05, 0.1, 0.15])
async def test_a_start_that_is_cancelled_at_any_moment_leaves_nothing_running(
    provider: LocalProvider, heard: Heard, data_dir: Path, delay: float
) -> None:
    asked = spec({"preview": shell("sleep 1000 & exec sleep 1000"), "chat": python(SERVER)})
    start = asyncio.create_task(provider.start(asked, heard.report))
    await asyncio.sleep(delay)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await provider.check()
    assert living(data_dir) == []
    assert (await provider.inspect(asked.ref)).state in (State.STOPPED, State.ABSENT)
    await provider.start(spec(), heard.report)


async def test_a_report_that_fails_undoes_the_start(provider: LocalProvider, heard: Heard, data_dir: Path) -> None:
    async def broken(reason: str, message: str) -> None:
        raise RuntimeError("the database is away")

    with pytest.raises(RuntimeError):
        await provider.start(spec(), broken)
    assert living(data_dir) == []
    assert (await provider.inspect(spec().ref)).state is State.STOPPED


async def test_closing_ends_everything_and_refuses_what_comes_after(
    make: MakeProvider, heard: Heard, data_dir: Path
) -> None:
    provider = make()
    await provider.start(spec(), heard.report)
    hanging = spec({"preview": shell("exec sleep 1000")}, session_id=8)
    start = asyncio.create_task(provider.start(hanging, heard.report))
    watcher = asyncio.ensure_future(anext(provider.watch(), None))
    await until(lambda: len(living(data_dir)) == 2)
    await provider.close()
    with pytest.raises(ProviderUnavailable, match="being closed"):
        await start
    assert living(data_dir) == []
    assert await watcher is None
    with pytest.raises(ProviderUnavailable, match="is closed"):
        await provider.check()
    await provider.close()
    again = make()
    assert (await again.inspect(spec().ref)).state is State.STOPPED


async def test_a_directory_has_one_provider_at_a_time(make: MakeProvider, heard: Heard, data_dir: Path) -> None:
    first, second = make(), make()
    await first.check()
    for call in (second.check(), second.inspect(spec().ref), second.start(spec(), heard.report)):
        with pytest.raises(ProviderUnavailable, match=f"Another process runs local sessions in {data_dir}"):
            await call
    await first.close()
    await second.check()


async def test_a_directory_can_be_an_option(make: MakeProvider, heard: Heard, tmp_path: Path) -> None:
    provider = make(directory=str(tmp_path / "elsewhere"))
    await provider.start(spec({}), heard.report)
    assert (tmp_path / "elsewhere/sessions/7/workspace").is_dir()


async def test_a_delete_follows_no_link_and_minds_no_mode(
    provider: LocalProvider, heard: Heard, data_dir: Path, tmp_path: Path
) -> None:
    asked = spec({})
    await provider.start(asked, heard.report)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    (precious / "file").chmod(0o640)
    workspace = data_dir / "sessions/7/workspace"
    (workspace / "out").symlink_to(precious)
    (workspace / "dangling").symlink_to("nowhere")
    await asyncio.to_thread(_make_deep, workspace, 1500)
    (workspace / "-rf").write_text("")
    (workspace / "a\nb\udcff").write_text("")
    os.mkfifo(workspace / "fifo")
    (workspace / "closed").mkdir()
    (workspace / "closed/file").write_text("")
    (workspace / "closed/file").chmod(0)
    (workspace / "closed").chmod(0)
    await provider.delete(asked.ref)
    assert list((data_dir / "sessions").iterdir()) == []
    assert (precious / "file").read_text() == "keep"
    assert (precious / "file").stat().st_mode & 0o777 == 0o640


def _make_deep(folder: Path, depth: int) -> None:
    """More folders in one another than a recursive function or a path can take."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("deeper", dir_fd=here)
        there = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = there
    os.close(here)


async def test_a_session_that_is_a_link_is_unlinked_and_what_it_leads_to_stays(
    provider: LocalProvider, data_dir: Path, tmp_path: Path
) -> None:
    await provider.check()
    (tmp_path / "precious").mkdir()
    (data_dir / "sessions/7").symlink_to(tmp_path / "precious")
    await provider.delete(spec().ref)
    assert (tmp_path / "precious").is_dir()
    assert not (data_dir / "sessions/7").is_symlink()


async def test_a_delete_that_was_interrupted_is_finished(provider: LocalProvider, data_dir: Path) -> None:
    await provider.check()
    (data_dir / "sessions/.gone-7-x/workspace").mkdir(parents=True)
    (data_dir / "sessions/.gone-70-x").mkdir()
    await provider.delete(spec().ref)
    assert [one.name for one in (data_dir / "sessions").iterdir()] == [".gone-70-x"]


@pytest.mark.parametrize("session_id", ["../../precious", 0, -7])
async def test_an_id_that_leads_elsewhere_is_refused(
    provider: LocalProvider, data_dir: Path, tmp_path: Path, session_id: int
) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match="positive number"):
        await provider.delete(SessionRef(session_id, "n", "c"))
    assert (tmp_path / "precious").is_dir()


async def test_sessions_do_not_hinder_one_another(provider: LocalProvider, heard: Heard, data_dir: Path) -> None:
    asked = [spec(session_id=number) for number in range(1, 6)]
    endpoints = await asyncio.gather(*(provider.start(one, heard.report) for one in asked))
    assert len({url(one.preview) for one in endpoints}) == 5
    await provider.stop(asked[0].ref)
    assert await status_of(url(endpoints[1].preview)) == 200
    await asyncio.gather(*(provider.delete(one.ref) for one in asked))
    assert list((data_dir / "sessions").iterdir()) == []


async def test_a_process_that_does_not_end_is_told(
    provider: LocalProvider, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spec()
    await provider.start(asked, heard.report)
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.children.processes._KILL_DEADLINE", -1.0)
        patched.setattr("orchestrator.children.processes._signal", lambda processes, number: None)
        with pytest.raises(ProviderUnavailable, match="does not end, even when killed"):
            await LocalProvider.stop(provider, asked.ref)
    await provider.stop(asked.ref)


async def test_a_process_of_ours_is_never_in_a_selection() -> None:
    ours = Selection({}, {os.getsid(0)})
    assert os.getpid() not in [process.pid for process in ours.find()]


def run_asyncio(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(main(), debug=True)  # type: ignore[arg-type]


def run_uvloop(main: Callable[[], Awaitable[None]]) -> None:
    uvloop.run(main(), debug=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("run", [run_asyncio, run_uvloop])
def test_both_event_loops_run_it(run: Callable[[Callable[[], Awaitable[None]]], None], data_dir: Path) -> None:
    heard = Heard()

    async def main() -> None:
        provider = LocalProvider(data_dir, heard.lines.append, QUICK)
        asked = spec({"preview": python(CRASHING, ready="/"), "chat": python(SERVER, "hello")})
        endpoints = await provider.start(asked, heard.report)
        await crash(url(endpoints.preview))
        async with asyncio.timeout(10):
            async for _, seen in provider.watch():
                if seen.state is State.RUNNING:
                    break
        assert await provider.exec(asked.ref, ["echo", "x"]) == (0, b"x\n")
        cancelled = asyncio.create_task(provider.start(spec(session_id=8), heard.report))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        await provider.stop(asked.ref)
        await provider.delete(asked.ref)
        await provider.close()

    run(main)
    assert heard.of("chat", "stdout")[0] == "hello"
    assert living(data_dir) == []
