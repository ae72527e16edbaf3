"""How a message of the socket looks in a terminal."""

from __future__ import annotations

from typing import Any

import orjson
from rich.text import Text

_STYLES = {"running": "bold green", "error": "bold red", "deleted": "bold magenta"}


def line(message: dict[str, Any]) -> Text:
    """One envelope as one line: offset, event type, channel, and what a person wants to know of the data."""
    data = message["data"]
    text = Text()
    text.append(f"{message.get('offset', '·')!s:>6} ", style="dim")
    text.append(f"{message['event_type']:<16} ", style="cyan")
    text.append(f"{message['channel']:<14} ", style="blue")
    match message["event_type"], data:
        case "session.status", {"status": str(status), "reason": reason, "message": said}:
            text.append(f"{status:<9} ", style=_STYLES.get(status, "yellow"))
            text.append(" ".join(filter(None, (reason, said))))
        case "session.log", {"line": str(said), "stream": stream}:
            text.append(said, style="red" if stream == "stderr" else "")
        case _:
            text.append(orjson.dumps(data).decode(), style="" if "offset" in message else "dim")
    return text
