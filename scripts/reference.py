"""Every variable that can be set, from the declarations that read it: for a terminal, `.env.example`, the README."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.settings import GatewaySettings, RealtimeSettings
from gateway.token_settings import TokenVariables
from orchestrator.log_setup import LogSettings
from orchestrator.settings import (
    AmqpSettings,
    DatabaseSettings,
    DeploySettings,
    OrchestratorSettings,
    ProbeSettings,
    Variable,
    variables,
)
from scripts.settings import DevSettings

if TYPE_CHECKING:
    from rich.table import Table

SECTIONS: tuple[tuple[str, type], ...] = (
    ("HTTP", GatewaySettings),
    ("WebSocket", RealtimeSettings),
    ("Tokens", TokenVariables),
    ("Database", DatabaseSettings),
    ("Event log", AmqpSettings),
    ("Orchestrator", OrchestratorSettings),
    ("Orchestrator", ProbeSettings),
    ("Apps", DeploySettings),
    ("Logs", LogSettings),
    ("`cluster-code dev`", DevSettings),
)
# Set by nobody, these take what is said here.
_STAND_INS = {
    "DATABASE_URL": "the embedded PostgreSQL, in `dev` and admin commands",
    "AMQP_URL": "the log in memory, in `dev`",
    "JWT_SECRET": "made and kept in DATA_DIR by `dev`",
    "SECRETS_KEY": "made and kept in DATA_DIR by `dev`",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One variable as a reader sees it."""

    section: str
    name: str
    # As it would be written; empty when there is none.
    default: str
    # In words, where nothing set means something.
    stand_in: str
    help: str


def entries() -> Iterator[Entry]:
    """All of them, in order, each once: where it stands first."""
    seen = set()
    for section, settings in SECTIONS:
        for declared, default in variables(settings):
            if declared.name in seen:
                continue
            seen.add(declared.name)
            yield Entry(
                section, declared.name, _written(default), _STAND_INS.get(declared.name, ""), _sentence(declared)
            )


def markdown() -> str:
    """The table of the README."""
    lines = ["| Variable | Default | Meaning |", "|---|---|---|"]
    section = ""
    for entry in entries():
        if entry.section != section:
            section = entry.section
            lines.append(f"| **{section}** | | |")
        default = entry.stand_in or (f"`{entry.default}`" if entry.default else "")
        lines.append(f"| `{entry.name}` | {default} | {entry.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def env_file() -> str:
    """`.env.example`."""
    lines = ["# Copy this file to .env and take the # away from what you change. The environment wins over the file."]
    section = ""
    for entry in entries():
        if entry.section != section:
            section = entry.section
            lines += ["", f"# ---- {section.replace('`', '')} ----"]
        lines += ["", f"# {entry.help}"]
        if entry.stand_in:
            lines.append(f"# Not set: {entry.stand_in.replace('`', '')}.")
        lines.append(f"#{entry.name}={entry.default}")
    return "\n".join(lines) + "\n"


def table() -> Table:
    """For a terminal."""
    from rich.table import Table

    result = Table("Variable", "Default", "Meaning", highlight=False)
    section = ""
    for entry in entries():
        if entry.section != section:
            section = entry.section
            result.add_section()
        result.add_row(entry.name, entry.stand_in.replace("`", "") or entry.default, entry.help)
    return result


def _written(default: Any) -> str:
    if default is dataclasses.MISSING:
        return ""
    if isinstance(default, bool):
        return "true" if default else "false"
    if isinstance(default, list):
        return ",".join(default)
    if isinstance(default, float):
        return f"{default:.10g}"
    return default.as_posix() if isinstance(default, Path) else str(default)


def _sentence(declared: Variable) -> str:
    return declared.help if declared.help.endswith(".") else f"{declared.help}."
