"""How a message of the socket looks in a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from rich.text import Text

_STYLES = {
    "running": "bold green", "live": "bold green", "error": "bold red", "failed": "bold red", "deleted": "bold magenta"
}  # fmt: skip
_CHANGES = {"added": ("+", "green"), "modified": ("~", "yellow"), "deleted": ("-", "red")}
_PHASES = {"Running": "green", "Active": "green", "Succeeded": "green", "Failed": "bold red"}
# Of containers that wait: reasons that nobody needs to look into.
_ON_THE_WAY = frozenset({"", "ContainerCreating", "PodInitializing"})


def line(message: dict[str, Any]) -> Text:
    """One envelope as one line: offset, event type, channel, and what a person wants to know of the data."""
    text = Text()
    text.append(f"{message.get('offset', '·')!s:>6} ", style="dim")
    text.append(f"{message['event_type']:<16} ", style="cyan")
    text.append(f"{message['channel']:<14} ", style="blue")
    try:
        text.append_text(_KINDS[message["event_type"]](message["data"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        # Of a kind that is not known here; or of another service, which may send anything.
        text.append(orjson.dumps(message["data"]).decode(), style="" if "offset" in message else "dim")
    return text


def _status(data: dict[str, Any]) -> Text:
    said = " ".join(filter(None, (data["reason"], data["message"])))
    return Text.assemble((f"{data['status']:<9} ", _STYLES.get(data["status"], "yellow")), said)


def _log(data: dict[str, Any]) -> Text:
    return Text(data["line"], style="red" if data["stream"] == "stderr" else "")


def _deployed(data: dict[str, Any]) -> Text:
    said = " ".join(filter(None, (data["reason"], data["message"])))
    text = Text.assemble((f"{data['status']:<9} ", _STYLES.get(data["status"], "yellow")))
    for step in data["steps"]:
        text.append(f"{step['name']} ", style="red" if step["status"] in ("failed", "cancelled") else "")
        text.append("… " if step["seconds"] is None else f"{step['seconds']:.1f} s ", style="dim")
    return text.append(said)


def _output(data: dict[str, Any]) -> Text:
    """Of a piece of output each line under the other, in the colours that its program gave it."""
    lines = Text.from_ansi(data["text"].rstrip("\n")).split("\n")
    return Text("\n" + " " * 40).join(Text(f"{data['step']:<6} ", style="dim").append_text(line) for line in lines)


def _app(data: dict[str, Any]) -> Text:
    return Text.assemble((data["name"], "bold"), f" {data['url']} {data['message']}")


def _head(data: dict[str, Any], name: str) -> Text:
    """Whether an object came, changed or went, and which."""
    sign, style = _CHANGES[data["change"]]
    return Text.assemble((f"{sign} ", f"bold {style}"), (name, "bold"))


def _pod(data: dict[str, Any]) -> Text:
    text = _head(data, data["pod"])
    text.append(f" {data['phase'] or 'Unknown'}", style=_PHASES.get(data["phase"], "yellow"))
    if data["node"]:
        text.append(f" on {data['node']}", style="dim")
    if data["reason"]:
        text.append(f" {data['reason']}", style="red")
    if data["message"]:
        text.append(f" {data['message']}")
    for container in data["containers"]:
        # Those that prepare are of interest while they do.
        if not (container["init"] and container["exit_code"] == 0):
            text.append(" · ", style="dim").append_text(_container(container))
    return text


def _container(container: dict[str, Any]) -> Text:
    state, reason = container["state"], container["reason"]
    what = " ".join(filter(None, (state if state != "waiting" or not reason else "", reason)))
    if container["ready"]:
        what, style = "ready", "green"
    elif state == "running" or reason in _ON_THE_WAY:
        style = "yellow"
    else:
        style = "red"
    text = Text.assemble(container["name"], " ", (what, style))
    if not container["ready"] and container["exit_code"]:
        text.append(f" exit {container['exit_code']}", style="red")
    if (restarts := container["restarts"]) > 0:
        text.append(f" ({restarts} restart{'s' if restarts > 1 else ''})", style="red")
    return text


def _event(data: dict[str, Any]) -> Text:
    warns = data["type"] != "Normal"
    text = Text.assemble((data["reason"], "bold yellow" if warns else "dim"), f" {data['object']}")
    if data["container"]:
        text.append(f" [{data['container']}]")
    if data["count"] > 1:
        text.append(f" ({data['count']} times)", style="yellow" if warns else "dim")
    return text.append(f" {data['message']}", style="" if warns else "dim")


def _deployment(data: dict[str, Any]) -> Text:
    ready = data["ready_replicas"] == data["replicas"]
    text = _head(data, data["deployment"])
    return text.append(f" {data['ready_replicas']}/{data['replicas']} ready", style="green" if ready else "yellow")


def _namespace(data: dict[str, Any]) -> Text:
    return _head(data, data["namespace"]).append(f" {data['phase']}", style=_PHASES.get(data["phase"], "yellow"))


def _ingress(data: dict[str, Any]) -> Text:
    text = _head(data, data["ingress"]).append(f" {', '.join(data['hosts'])}")
    return text.append(f" at {', '.join(data['addresses']) or 'no address yet'}", style="dim")


_KINDS: dict[str, Callable[[dict[str, Any]], Text]] = {
    "session.status": _status,
    "session.log": _log,
    "session.pod": _pod,
    "deployment.status": _deployed,
    "deployment.log": _output,
    "app.created": _app,
    "app.updated": _app,
    "app.deleted": _app,
    "session.event": _event,
    "cluster.deployment": _deployment,
    "cluster.namespace": _namespace,
    "cluster.ingress": _ingress,
}
