"""The files of a DevPod provider: a home for each tenant, which is DevPod's, and what is handed over to it.

    {directory}/local.lock, instance          as a local provider has them (`workspace.Directory`)
    {directory}/sessions/42/                  credentials and environment, while `devpod up` runs; else nothing
    {directory}/tenants/7/                    DEVPOD_HOME and HOME of all commands about the sessions of workspace 7
        config.yaml, contexts/, agent/        DevPod's
        .cluster-code/provider                what its provider was last set up from
        .cluster-code/42.json                 where a session's services were last reached
        .cluster-code/42.machine              what its container was made from
        .cluster-code/42.ssh                  where DevPod keeps the session's user (`--ssh-config`)

A session's repository is in `agent/`, and mounted into its container from there, where DevPod's own provider works on
this machine. Everything here blocks for the disk: call it in a thread.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import ProviderUnavailable
from orchestrator.providers.workspace import remove_tree

# DevPod's settings that its flags cannot make. What the orchestrator's machine knows (its Docker logins, its ssh agent)
# is not lent to sessions.
_CONTEXT = {
    "SSH_ADD_PRIVATE_KEYS": "false",
    "SSH_AGENT_FORWARDING": "false",
    "SSH_INJECT_DOCKER_CREDENTIALS": "false",
    "GIT_SSH_SIGNATURE_FORWARDING": "false",
    "TELEMETRY": "false",
}


@dataclass(frozen=True, slots=True)
class Home:
    """The home of one tenant."""

    path: Path

    @property
    def _ours(self) -> Path:
        return self.path / ".cluster-code"

    @property
    def is_there(self) -> bool:
        """Whether anything was ever done for this tenant."""
        return self._ours.is_dir()

    def make(self) -> None:
        """Make it, for nobody but us."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._ours.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ProviderUnavailable(f"DevPod's files cannot be kept in {self.path}: {error.strerror}.") from error

    # DevPod's own provider.

    def has_provider(self, name: str) -> bool:
        """Whether DevPod knows the provider."""
        return (self.path / "contexts/default/providers" / name / "provider.json").is_file()

    def is_set_up(self, state: str) -> bool:
        """Whether the provider was last set up from this."""
        return _read(self._ours / "provider") == state

    def set_up(self, state: str) -> None:
        """From now on it is."""
        _write(self._ours / "provider", state)

    def write_options(self, provider: str, options: Mapping[str, str]) -> None:
        """Put the options into DevPod's configuration, in place of those that were there.

        That is what `devpod provider set-options -o NAME=VALUE` does, with secrets on a command line.
        """
        path = self.path / "config.yaml"
        config: dict[str, Any] = yaml.safe_load(_read(path) or "") or {}
        context = config.setdefault("contexts", {}).setdefault("default", {})
        context["options"] = _given(_CONTEXT)
        context.setdefault("providers", {}).setdefault(provider, {})["options"] = _given(options)
        _write(path, yaml.safe_dump(config))

    # Sessions.

    def ssh_config(self, session_id: int) -> Path:
        """Where DevPod writes down how a session is reached: a file each, because it rewrites it without a lock."""
        return self._ours / f"{session_id}.ssh"

    def remember(self, session_id: int, **started: Any) -> None:
        """Write down how a session is reached again. Nothing secret."""
        _write(self._ours / f"{session_id}.json", json.dumps(started))

    def recall(self, session_id: int) -> dict[str, Any]:
        """What `remember` wrote; {} when its container never ran."""
        return _json(self._ours / f"{session_id}.json")

    def made_by(self, session_id: int) -> str | None:
        """What its container was made from, as far as that is ours; None: there was none."""
        return _read(self._ours / f"{session_id}.machine")

    def make_by(self, session_id: int, machine: str) -> None:
        """From now on it is."""
        _write(self._ours / f"{session_id}.machine", machine)

    def has_begun_only(self, devpod_id: str) -> bool:
        """Whether DevPod was never done with the session's first `up`: what is there of its clone may be half of it."""
        begun = self._workspace(devpod_id).exists() or self._agent(devpod_id).exists()
        return begun and not (self._workspace(devpod_id) / "workspace_result.json").is_file()

    def folder(self, devpod_id: str) -> str | None:
        """Where the repository is in the container, by what DevPod made of its devcontainer.json."""
        result = _json(self._workspace(devpod_id) / "workspace_result.json")
        try:
            folder = (result.get("MergedConfig") or {}).get("workspaceFolder") or (
                result["SubstitutionContext"]["ContainerWorkspaceFolder"]
            )
        except (KeyError, TypeError, AttributeError):
            return None
        return folder if isinstance(folder, str) else None

    def forget(self, session_id: int, devpod_id: str) -> None:
        """Remove what is left of a session that DevPod has deleted. Raises ProviderUnavailable when it cannot be.

        DevPod ignores files that it cannot remove: what a container's root has written, and we may not.
        """
        remove_tree(self._agent(devpod_id))
        remove_tree(self._workspace(devpod_id))
        for kind in ("json", "machine", "ssh"):
            (self._ours / f"{session_id}.{kind}").unlink(missing_ok=True)
        (self.path / f"contexts/default/locks/{devpod_id}.workspace.lock").unlink(missing_ok=True)

    def _workspace(self, devpod_id: str) -> Path:
        return self.path / "contexts/default/workspaces" / devpod_id

    def _agent(self, devpod_id: str) -> Path:
        return self.path / "agent/contexts/default/workspaces" / devpod_id


@dataclass(frozen=True, slots=True)
class Handover:
    """What DevPod is given for one `up` by files that only we can read, in a directory that is removed after it."""

    directory: Path

    def credentials(self, username: str, password: str) -> Path:
        """As git asks a helper for them (git-credential(1), "INPUT/OUTPUT FORMAT")."""
        path = self._make() / "credentials"
        _write(path, f"username={username}\npassword={password}\n")
        return path

    def environment(self, env: Mapping[str, str]) -> Path:
        """For `--workspace-env-file`: a line each, as it is."""
        path = self._make() / "environment"
        _write(path, "".join(f"{name}={value}\n" for name, value in env.items()))
        return path

    def _make(self) -> Path:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        return self.directory


def fingerprint(*parts: Any) -> str:
    """The same for the same, and telling nothing of it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _given(options: Mapping[str, str]) -> dict[str, Any]:
    """As DevPod's config.yaml has options that its user has set."""
    return {name: {"value": value, "userProvided": True} for name, value in options.items()}


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, text: str) -> None:
    """In one step, for nobody but us. Raises ProviderUnavailable."""
    new = path.with_name(f"{path.name}.new")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        new.replace(path)
    except OSError as error:
        raise ProviderUnavailable(f"{path} cannot be written: {error.strerror}.") from error
