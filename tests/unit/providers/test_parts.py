"""The small parts of the local provider that need no process."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.children import launch
from orchestrator.children.processes import Limits, Selection, _options, ending
from orchestrator.errors import ProviderUnavailable, SettingsError
from orchestrator.providers.changes import Changes
from orchestrator.providers.contract import LogLine, Observation, SessionRef, State
from orchestrator.providers.kubernetes import KubernetesProvider
from orchestrator.providers.local import LocalProvider
from orchestrator.providers.operations import Operations, finish
from orchestrator.providers.options import LocalOptions
from orchestrator.providers.registry import open_provider
from orchestrator.providers.supervise import HOST, Ports
from orchestrator.providers.workspace import Directory, remove_tree


def ignore(line: LogLine) -> None:
    pass


def test_launch_reads_its_options_and_the_command() -> None:
    assert launch.parse(["parent=1", "memory=5", "--", "ls", "--", "x=y"]) == (
        {"parent": "1", "memory": "5"},
        ["ls", "--", "x=y"],
    )


def launched(*arguments: str, parent: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", launch.__file__, f"parent={parent or os.getpid()}", *arguments],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_launch_sets_the_limits_and_becomes_the_program() -> None:
    program = (
        "import resource as r, os, signal;"
        "print(r.getrlimit(r.RLIMIT_DATA), r.getrlimit(r.RLIMIT_CPU), r.getrlimit(r.RLIMIT_FSIZE),"
        " r.getrlimit(r.RLIMIT_CORE), os.sched_getaffinity(0))"
    )
    core = min(os.sched_getaffinity(0))
    done = launched(
        f"memory={1 << 30}", "cpu_seconds=7", "file_bytes=4096", f"cpus={core}", "--", sys.executable, "-c", program
    )
    assert done.stdout.strip() == f"({1 << 30}, {1 << 30}) (7, 7) (4096, 4096) (0, 0) {{{core}}}"


def test_a_limit_is_never_raised() -> None:
    def lowered() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (50, 50))

    done = subprocess.run(  # The limit is set on the child alone.
        [sys.executable, "-I", "-S", launch.__file__, f"parent={os.getpid()}", "cpu_seconds=99", "--", "/bin/sh", "-c",
         "ulimit -t"],
        capture_output=True, text=True, timeout=30, check=False, preexec_fn=lowered,
    )  # fmt: skip
    assert done.stdout == "50\n"


def test_memory_over_the_limit_is_refused() -> None:
    done = launched(f"memory={256 << 20}", "--", sys.executable, "-c", "bytearray(512 << 20)")
    assert done.returncode == 1
    assert "MemoryError" in done.stderr


def test_what_cannot_be_run_is_told(tmp_path: Path) -> None:
    missing = launched("--", str(tmp_path / "missing"))
    assert (missing.returncode, missing.stderr) == (
        127,
        f"cannot run {tmp_path / 'missing'}: No such file or directory\n",
    )
    assert launched("--", str(tmp_path)).returncode == 126


def test_what_lost_its_parent_does_not_begin() -> None:
    done = launched("--", "/bin/echo", "x", parent=1)
    assert (done.returncode, done.stdout) == (126, "")


def test_the_ways_to_end_have_words() -> None:
    assert ending(3) == "exited with code 3"
    assert ending(-11) == "was killed by SIGSEGV"
    assert ending(-60) == "was killed by signal 60"


def test_cores_are_spread_and_rounded_up() -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert list(_options(Limits(cpu=len(cores)), 0)) == []
    if len(cores) > 1:
        assert list(_options(Limits(cpu=0.5), 1)) == [f"cpus={cores[1]}"]


def test_processes_of_nobody_are_not_found() -> None:
    assert Selection({"CLUSTER_CODE_INSTANCE": "no such instance"}).find() == []
    # Least of all everybody's.
    assert Selection({}).find() == []


def test_a_port_is_promised_once() -> None:
    ports = Ports()
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="is taken"):
            ports.promise(port)
    assert ports.promise(port) == port
    with pytest.raises(OSError, match="is taken"):
        ports.promise(port)
    ports.give_back(port)
    assert ports.promise(port) == port
    assert ports.promise(0) != ports.promise(0)


def test_no_free_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((HOST, 0)) as taken:
        monkeypatch.setattr(
            "orchestrator.providers.supervise._PORTS", range(taken.getsockname()[1], taken.getsockname()[1] + 1)
        )
        with pytest.raises(OSError, match="no port is free"):
            Ports().promise(0)


def test_wrong_options_are_told_with_the_provider_and_the_place(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'mine': options\.clone_deadline: .*; options\.nonsense: Unknown field"):
        open_provider("local", "mine", {"clone_deadline": -1, "nonsense": 1}, data_dir=tmp_path, sink=ignore)
    with pytest.raises(SettingsError, match=r"'boxes': options\.ports: Length must be 2"):
        open_provider("docker", "boxes", {"ports": [20000]}, data_dir=tmp_path, sink=ignore)
    with pytest.raises(SettingsError, match="'future' is of the kind 'quantum'"):
        open_provider("quantum", "future", {}, data_dir=tmp_path, sink=ignore)


def test_the_registry_opens_local_providers(tmp_path: Path) -> None:
    provider = open_provider("local", "l", {"repo_schemes": ["https"]}, data_dir=tmp_path, sink=ignore)
    assert isinstance(provider, LocalProvider)
    assert list(tmp_path.iterdir()) == []
    assert LocalOptions.load({"repo_schemes": ["https"]}).repo_schemes == ("https",)


async def test_the_registry_opens_a_cluster_that_is_not_there_yet(tmp_path: Path) -> None:
    options = {"kubeconfig": str(tmp_path / "missing"), "transient_reasons": ["FailedScheduling", "BackOff"]}
    provider = open_provider("kubernetes", "east", options, data_dir=tmp_path, sink=ignore)
    assert isinstance(provider, KubernetesProvider)
    assert provider.options.transient_reasons == ("FailedScheduling", "BackOff")
    with pytest.raises(ProviderUnavailable, match="missing"):
        await provider.check()
    await provider.close()
    with pytest.raises(SettingsError, match=r"'east': options\.log_streams: "):
        open_provider("kubernetes", "east", {"log_streams": -1}, data_dir=tmp_path, sink=ignore)


@pytest.mark.parametrize("session_id", ["../x", "7", 0, -1, True, 1.0, None])
def test_an_id_that_would_lead_elsewhere_is_refused(tmp_path: Path, session_id: object) -> None:
    with pytest.raises(ValueError, match="positive number"):
        Directory(tmp_path).files(session_id)  # type: ignore[arg-type]


def test_a_directory_has_one_holder(tmp_path: Path) -> None:
    first, second = Directory(tmp_path), Directory(tmp_path)
    first.hold()
    with pytest.raises(ProviderUnavailable, match="Another process"):
        second.hold()
    first.release()
    first.release()
    second.hold()
    assert second.instance == first.instance != ""
    second.release()


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProviderUnavailable, match=r"Not a directory\. Set DATA_DIR"):
        Directory(tmp_path / "file").hold()
    (tmp_path / "instance").mkdir()
    with pytest.raises(ProviderUnavailable, match="cannot be used: Is a directory"):
        Directory(tmp_path).hold()


def test_a_copy_of_a_directory_has_another_instance(tmp_path: Path) -> None:
    first = Directory(tmp_path / "a")
    first.hold()
    first.release()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "instance").write_text((tmp_path / "a" / "instance").read_text())
    second = Directory(tmp_path / "b")
    second.hold()
    second.release()
    assert first.instance != second.instance


def test_a_lost_directory_is_told(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    with pytest.raises(ProviderUnavailable, match="cannot write"):
        directory.check()


def test_a_broken_state_file_counts_as_none(tmp_path: Path) -> None:
    files = Directory(tmp_path).files(1)
    (tmp_path / "sessions" / "1").mkdir(parents=True)
    assert files.read_state() == {}
    (files.root / "session.json").write_text("[1]")
    assert files.read_state() == {}
    files.write_state(repository="x")
    assert files.read_state() == {"repository": "x"}


def test_a_tree_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_tree(tmp_path / "absent")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, says in (("rm", "echo rm: no >&2; exit 1"), ("chmod", "exit 1")):
        (tools / name).write_text(f"#!/bin/sh\n{says}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    (tmp_path / "tree").mkdir()
    with pytest.raises(ProviderUnavailable, match="cannot be removed: rm: no"):
        remove_tree(tmp_path / "tree")


async def test_the_newest_change_of_each_session_is_told_once() -> None:
    changes = Changes()
    one, two = SessionRef(1, "n", "c"), SessionRef(2, "n", "c")
    changes.put(one, Observation(State.STARTING))
    changes.put(two, Observation(State.RUNNING))
    changes.put(one, Observation(State.FAILED))
    changes.put(SessionRef(3, "n", "c"), Observation(State.FAILED))
    changes.forget(3)
    reader = changes.read()
    assert await anext(reader) == (two, Observation(State.RUNNING))
    assert await anext(reader) == (one, Observation(State.FAILED))
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    changes.put(one, Observation(State.RUNNING))
    assert await waiting == (one, Observation(State.RUNNING))
    changes.close()
    with pytest.raises(StopAsyncIteration):
        await anext(reader)


async def test_one_thing_at_a_time_is_done_with_a_session() -> None:
    operations = Operations()
    order: list[str] = []
    gate = asyncio.Event()

    async def first() -> None:
        order.append("first begins")
        await gate.wait()
        order.append("first ends")

    async def second() -> None:
        order.append("second")

    tasks = [operations.begin("first", 1, first), operations.begin("second", 1, second)]
    await operations.run("other", 2, second)
    gate.set()
    await asyncio.gather(*tasks)
    assert order == ["first begins", "second", "first ends", "second"]


async def test_a_stop_goes_on_when_its_caller_is_cancelled_and_close_waits_for_it() -> None:
    operations = Operations()
    gate, begun = asyncio.Event(), asyncio.Event()
    ended: list[bool] = []

    async def work() -> None:
        begun.set()
        await gate.wait()
        ended.append(True)
        raise ProviderUnavailable("to be logged")

    caller = asyncio.create_task(operations.run("stop", 1, work))
    await begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert not ended
    gate.set()
    await operations.close()
    assert ended == [True]
    with pytest.raises(ProviderUnavailable, match="closed"):
        await operations.run("stop", 1, work)


async def test_a_start_that_close_cancels_says_so_to_its_caller() -> None:
    operations = Operations()
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    caller = asyncio.create_task(operations.run("start", 1, work, undo=True))
    await begun.wait()
    await operations.close()
    with pytest.raises(ProviderUnavailable, match="being closed"):
        await caller


async def test_what_is_to_be_finished_is_although_cancelled() -> None:
    gate, begun = asyncio.Event(), asyncio.Event()
    ended: list[bool] = []

    async def work() -> None:
        begun.set()
        await gate.wait()
        ended.append(True)

    task = asyncio.create_task(finish(work(), name="work"))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


def test_the_servers_schemes_hold_unless_the_providers_options_name_others(tmp_path: Path) -> None:
    theirs = open_provider("local", "l", {}, data_dir=tmp_path, sink=ignore, repo_schemes=["https"])
    own = open_provider("local", "l", {"repo_schemes": ["ssh"]}, data_dir=tmp_path, sink=ignore, repo_schemes=["https"])
    assert isinstance(theirs, LocalProvider)
    assert isinstance(own, LocalProvider)
    assert (theirs._options.repo_schemes, own._options.repo_schemes) == (("https",), ("ssh",))
