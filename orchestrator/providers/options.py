"""The options of a local provider, with their units and reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from marshmallow import ValidationError

from orchestrator.errors import SettingsError
from orchestrator.machine_schema import LocalOptionsSchema, flatten


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """All times are in seconds."""

    # Where the sessions' files are kept, in place of the data directory.
    directory: str | None = None
    # Of repositories; what is not named here is refused, whoever asks. Lower-case, without `://`.
    repo_schemes: tuple[str, ...] = ("https", "http", "ssh", "git")
    # The key that repositories are cloned with over ssh. None: the server's own keys are not lent to its users.
    ssh_key: str | None = None
    # For all processes of all sessions, a proxy for instance.
    env: Mapping[str, str] = field(default_factory=dict)
    # A clone that takes longer is given up: a repository that never answers is as bad as none.
    clone_deadline: float = 120.0
    # From the start of the processes until all of them answer.
    ready_deadline: float = 60.0
    exec_deadline: float = 60.0
    # Between SIGTERM and SIGKILL.
    stop_grace: float = 5.0
    # The wait after the first crash; it doubles with each.
    restart_delay: float = 0.5
    # A process that was up so long has recovered: its crashes are counted anew.
    stable_after: float = 60.0
    # Crashes in a row that fail the session.
    crashes: int = 5

    @classmethod
    def load(cls, options: Mapping[str, Any], *, provider: str = "local") -> LocalOptions:
        """Raises SettingsError, one line that names what is wrong."""
        try:
            loaded = LocalOptionsSchema().load(dict(options))
        except ValidationError as error:
            wrong = "; ".join(flatten(error.messages, "options"))
            raise SettingsError(f"The provider {provider!r}: {wrong}.") from error
        if "repo_schemes" in loaded:
            loaded["repo_schemes"] = tuple(loaded["repo_schemes"])
        return cls(**loaded)
