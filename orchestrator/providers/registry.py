"""Which code stands behind each kind of provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import SettingsError
from orchestrator.providers.contract import LogSink, Provider
from orchestrator.providers.local import LocalProvider
from orchestrator.providers.options import LocalOptions


def open_provider(kind: str, name: str, options: Mapping[str, Any], *, data_dir: Path, sink: LogSink) -> Provider:
    """A provider that takes hold of its place at the first call (`check`, say) and is to be closed.

    Raises SettingsError, naming the provider, for wrong options and for a kind that this version cannot run.
    """
    if kind == "local":
        return LocalProvider(data_dir, sink, LocalOptions.load(options, provider=name))
    raise SettingsError(
        f"The provider {name!r} is of the kind {kind!r}, which this version cannot run: known is 'local'."
    )
