"""The labels that mark what is ours at a Docker engine. What lacks them is foreign, and never touched.

All of ours have INSTANCE: installations that share an engine differ in its value.
"""

from __future__ import annotations

from collections.abc import Mapping

INSTANCE = "cluster-code.io/instance"

# Of sessions: the project's uuid, the session's id.
PROJECT = "cluster-code.io/project"
SESSION = "cluster-code.io/session"

# Of apps: their id, the deployment's id, and the commit that an image was built from.
APP = "cluster-code.io/app"
DEPLOYMENT = "cluster-code.io/deployment"
COMMIT = "cluster-code.io/commit"
# Of what is kept to build an app faster: its id. "" on the images that are built.
CACHE = "cluster-code.io/cache"


def matches(there: Mapping[str, str] | None, wanted: Mapping[str, str]) -> bool:
    """Whether an object with the labels `there` has all that are wanted. An empty value wants any."""
    held = there or {}
    return all(name in held and (not value or held[name] == value) for name, value in wanted.items())


def selectors(wanted: Mapping[str, str]) -> list[str]:
    """The labels as the engine's filter `label` takes them: an empty value finds any."""
    return [f"{name}={value}" if value else name for name, value in wanted.items()]
