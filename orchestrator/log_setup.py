"""How the processes log: to stderr, coloured for a person at a terminal, else one JSON object a line."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from orchestrator.settings import load, variable

if TYPE_CHECKING:
    from environs import Env
    from structlog.typing import Processor

_LEVELS = ("debug", "info", "warning", "error")
_FORMATS = ("auto", "text", "json")


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What is logged, and how."""

    level: str = variable(
        "LOG_LEVEL",
        "str",
        "info",
        help="Least level that is logged: debug, info, warning or error.",
        check=lambda level: None if level in _LEVELS else f"must be one of {', '.join(_LEVELS)}, not {level!r}",
    )
    format: str = variable(
        "LOG_FORMAT",
        "str",
        "auto",
        help="text, json, or auto: text on a terminal, else json.",
        check=lambda name: None if name in _FORMATS else f"must be one of {', '.join(_FORMATS)}, not {name!r}",
    )


def configure(env: Env, *, at_least: str = "debug") -> None:
    """Set up structlog, and the standard library's logging for what aiohttp and asyncio have to say.

    `at_least` lets a command be quieter than the settings. Raises SettingsError.
    """
    settings = load(LogSettings, env)
    level = max(_number(settings.level), _number(at_least))
    text = settings.format == "text" or (settings.format == "auto" and sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, *_renderer(text=text)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_NamedLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderer(text=text)],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


class _NamedLogger(structlog.PrintLogger):
    """Writes whole lines to stderr, and knows the name that `get_logger` was given."""

    def __init__(self, name: str = "") -> None:
        super().__init__(sys.stderr)
        self.name = name


def _renderer(*, text: bool) -> list[Processor]:
    """Tracebacks come without local variables (structlog's default): a password or token may be among them."""
    if text:
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]
