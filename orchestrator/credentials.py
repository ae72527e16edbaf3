"""Credentials by reference: a provider's row names environment variables and files, and who opens it reads them.

{"token": {"env": "CLUSTER_TOKEN"}, "certificate_authority": {"file": "/etc/cluster-code/ca.pem"}}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import SettingsError

# Bytes: more than any key or kubeconfig, less than what costs.
_LARGEST = 1 << 20


def resolve(references: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What each name stands for, as the environment and the disk of this process have it; blocks for the disk.

    Line ends at the end of a file are left out. Raises SettingsError that names what is missing, never what is there.
    """
    found: dict[str, str] = {}
    missing: list[str] = []
    for name, reference in references.items():
        try:
            found[name] = _value(reference)
        except SettingsError as error:
            missing.append(f"its credential {name!r} is missing: {error}")
    if missing:
        raise SettingsError(f"{'; '.join(missing)}.")
    return found


def _value(reference: Mapping[str, str]) -> str:
    if (variable := reference.get("env")) is not None:
        if not (value := os.environ.get(variable)):
            raise SettingsError(f"the environment variable {variable} of this process is not set")
        return value
    path = Path(reference["file"])
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise SettingsError(f"the file {path} cannot be read ({error.strerror})") from error
    if len(content) > _LARGEST:
        raise SettingsError(f"the file {path} is larger than 1 MiB, which no credential is")
    try:
        text = content.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        text = ""
    if not text or "\0" in text:
        raise SettingsError(f"the file {path} {'is no text' if content.strip() else 'is empty'}")
    return text
