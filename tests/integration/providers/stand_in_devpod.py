"""A program that speaks DevPod's contract, and breaks it on demand: for failures that the real one has now and then.

Beside it lie `play.json` (by command: what to do other than right) and `calls.jsonl` (how it was called). Its
"containers" are directories in DEVPOD_HOME, its connections lead to this machine: a service that is started in one is a
process here, which knows nothing of us, as in a container. `${...}` of play.json:

    say      [[stream, line], …]   print these lines first
    hang     true                  then do nothing for ever, nor a child of it
    exit     code                  then end so, having done nothing
    nothing  true                  do nothing of what is asked, and say that it is done
    times    number                only at the first so many calls, ever
    die      true                  (up) be killed as soon as the clone is begun
    state    word                  (status) say this
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

# It is started some hundred times: what takes long to import is imported where it is used.

HERE = Path(sys.argv[0]).resolve().parent
HOME = Path(os.environ.get("DEVPOD_HOME", "/"))
ARGUMENTS = sys.argv[1:]


def main():
    command = ARGUMENTS[0]
    play = json.loads((HERE / "play.json").read_text())
    how = play.get(command, {})
    if record(command) > how.get("times", 1_000_000):
        how = {}
    for stream, line in how.get("say", []):
        print(line, file=getattr(sys, stream), flush=True)
    if how.get("hang"):
        import subprocess

        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    if "exit" in how:
        return how["exit"]
    if command == "version":
        print(play.get("is", "v0.6.15"), end="")
        return 0
    return {"provider": provider, "up": up, "status": status, "stop": stop, "delete": delete, "ssh": ssh}[command](how)


def record(command):
    call = {"command": command, "argv": ARGUMENTS, "env": dict(os.environ), "pid": os.getpid()}
    if (path := option("--workspace-env-file")) is not None:
        call["file"] = {"text": Path(path).read_text(), "mode": Path(path).stat().st_mode & 0o777}
    if command == "up" and (helper := git_helper()) is not None:
        import subprocess

        # As git runs it.
        call["credentials"] = subprocess.run(["sh", "-c", helper[1:] + " get"], capture_output=True, text=True).stdout
    with (HERE / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\n")
    return (HERE / "calls.jsonl").read_text().count(f'{{"command": "{command}"')


def git_helper():
    for number in range(int(os.environ.get("GIT_CONFIG_COUNT", "0"))):
        name, value = (os.environ[f"GIT_CONFIG_{what}_{number}"] for what in ("KEY", "VALUE"))
        if name.startswith("credential.http"):
            return value
    return None


def option(name):
    return ARGUMENTS[ARGUMENTS.index(name) + 1] if name in ARGUMENTS else None


def say(message, level="info"):
    stream = sys.stderr if level in ("error", "fatal") else sys.stdout
    print(json.dumps({"time": "2026-01-01T00:00:00Z", "message": message, "level": level}), file=stream, flush=True)


class Workspace:
    def __init__(self, name):
        self.name = name
        self.folder = HOME / "contexts/default/workspaces" / name
        self.agent = HOME / "agent/contexts/default/workspaces" / name
        self.content = self.agent / "content"
        self.tmp = self.folder / "tmp"

    @property
    def state(self):
        return (self.folder / "state").read_text() if (self.folder / "state").exists() else "NotFound"

    @state.setter
    def state(self, word):
        (self.folder / "state").write_text(word)

    def end_services(self):
        for file in self.tmp.glob(".cluster-code-*/*.pid"):
            with suppress(ProcessLookupError, ValueError):
                os.killpg(int(file.read_text()), signal.SIGKILL)


def provider(how):
    what, name = ARGUMENTS[1], option("--name") or ARGUMENTS[2]
    if what == "add":
        folder = HOME / "contexts/default/providers" / name
        folder.mkdir(parents=True)
        (folder / "provider.json").write_text("{}")
    say(f"provider {name}: {what}")
    return 0


def up(how):
    workspace = Workspace(option("--id"))
    workspace.folder.mkdir(parents=True, exist_ok=True)
    (workspace.folder / "workspace.json").write_text(json.dumps({"source": ARGUMENTS[1]}))
    if not workspace.content.exists():
        say("Clone repository")
        workspace.content.mkdir(parents=True)
        if how.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        (workspace.content / "README").write_text("read me\n")
    say("Setup container...")
    workspace.tmp.mkdir(exist_ok=True)
    if "--recreate" in ARGUMENTS:
        workspace.end_services()
    result = {"SubstitutionContext": {"ContainerWorkspaceFolder": str(workspace.content)}}
    (workspace.folder / "workspace_result.json").write_text(json.dumps(result))
    workspace.state = "Running"
    return 0


def status(how):
    workspace = Workspace(ARGUMENTS[1])
    if not workspace.folder.exists():
        say(f"workspace {workspace.name} doesn't exist", "fatal")
        return 1
    state = how.get("state", workspace.state)
    print(json.dumps({"id": workspace.name, "context": "default", "provider": "docker", "state": state}), end="")
    return 0


def stop(how):
    workspace = Workspace(ARGUMENTS[1])
    if not how.get("nothing"):
        workspace.end_services()
        workspace.state = "Stopped"
    say("Successfully stopped container...")
    return 0


def delete(how):
    workspace = Workspace(ARGUMENTS[1])
    if not workspace.folder.exists():
        say(f"couldn't find workspace {workspace.name}", "fatal")
        return 1
    if how.get("nothing"):
        say(f"Failed to delete workspace '{workspace.name}': something is in the way", "error")
        return 0
    if workspace.state == "NotFound" and "--force" not in ARGUMENTS:
        say("cannot delete workspace because it couldn't be found. Run with --force to ignore this error", "fatal")
        return 1
    import shutil

    workspace.end_services()
    shutil.rmtree(workspace.agent, ignore_errors=True)
    shutil.rmtree(workspace.folder)
    say(f"Successfully deleted workspace '{workspace.name}'")
    return 0


def ssh(how):
    workspace = Workspace(ARGUMENTS[1])
    # As DevPod does, which is a trap.
    workspace.state = "Running"
    if (command := option("--command")) is not None:
        import ctypes
        import subprocess

        run = subprocess.Popen(
            ["sh", "-c", command],
            cwd=workspace.content,
            env={"PATH": os.environ["PATH"], "TMPDIR": str(workspace.tmp)},
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0),
        )
        return 1 if run.wait() else 0
    import threading

    for place, word in enumerate(ARGUMENTS):
        if word == "-L":
            host, port, to_host, to_port = ARGUMENTS[place + 1].split(":")
            threading.Thread(target=forward, args=(host, int(port), to_host, int(to_port)), daemon=True).start()
    time.sleep(600)
    return 0


def forward(host, port, to_host, to_port):
    import socket
    import threading

    with socket.create_server((host, port)) as server:
        while True:
            ours, _ = server.accept()
            try:
                theirs = socket.create_connection((to_host, to_port))
            except OSError:
                ours.close()
                continue
            for one, other in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=pump, args=(one, other), daemon=True).start()


def pump(source, target):
    import socket

    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    finally:
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


sys.exit(main())
