"""Why a DevPod command failed, from what it said: a reason, and a sentence for the one who can do something then."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from orchestrator import git
from orchestrator.errors import ClusterCodeError, ProviderFailure, ProviderUnavailable
from orchestrator.providers.devpod_command import Said

# What is away, whatever was asked of DevPod: the first that is found counts. {line} is what was said.
_AWAY = {
    r"cannot connect to the docker daemon|error during connect|is the docker daemon running"
    r"|permission denied while trying to connect to the docker": (
        "DevPod cannot reach its Docker engine ({line}): see that it runs, and the provider's option DOCKER_HOST."
    ),
    r'"docker": executable file not found|docker: (?:command )?not found': (
        "DevPod needs the docker command, which is not installed on the orchestrator's machine."
    ),
    r"unable to connect to the server|connection to the server .* was refused": (
        "DevPod cannot reach its Kubernetes cluster ({line}): see that it runs."
    ),
}
# Why a session cannot run.
_FAILURES = {
    r"pars(?:e|ing) devcontainer|devcontainer path .* doesn't exist": (
        "InvalidDevContainer",
        "The repository's devcontainer.json cannot be used: {line}",
    ),
    r"no space left on device|disk quota exceeded": (
        "DiskFull",
        "There is no room left where DevPod builds and runs the session: {line}",
    ),
    r"unauthorized|authentication required|pull access denied|denied: requested access|403 forbidden": (
        "RegistryUnauthorized",
        "The image does not exist, or its registry wants credentials that it was not given: {line}",
    ),
    r"manifest.unknown|manifest for .* not found|name.unknown|404 not found": (
        "ImageNotFound",
        "The image of the devcontainer.json is not there: {line}",
    ),
    r"retrieve image|get image config remotely|pull(?:ing)? image|error response from daemon: get\b": (
        "ImagePull",
        "The image of the devcontainer.json cannot be pulled: {line}",
    ),
    r"lifecycle hook|\b(?:onCreate|updateContent|postCreate|postStart|postAttach|initialize)Commands?\b": (
        "CommandFailed",
        "A command of the devcontainer.json failed: {line}",
    ),
    r"build image|failed to solve|returned a non-zero code|dockerfile": (
        "BuildFailed",
        "The image of the devcontainer.json cannot be built: {line}",
    ),
    r"provider .* (?:doesn't exist|not found|is not initialized)|resolve options|option .* is required"
    r"|couldn't find default provider|no default provider": (
        "DevPodProvider",
        "DevPod's own provider is not set up as it must be: {line}",
    ),
}
# Lines that are looked at: what a build or a command has printed before is no cause.
_LAST = 6
# What says nothing that another line does not say better.
_EMPTY = re.compile(
    r"(?:run agent command|tunnel to container|start tunnel server): |(?:process )?exit(?:ed with)? status \d+"
    r"|try using the --debug flag|error tunneling|successfully |running .* from devcontainer.json"
    # Said of every image without git, and no failure.
    r"|error configuring git credentials",
    re.IGNORECASE,
)
# The container runs, and DevPod's own connection to it has broken before the result was through: it happens.
_CUT_OFF = r"run agent command: (?:EOF|.*closed)|handshake failed: EOF|broken pipe|connection reset"
_CLONE = re.compile(r"\bclone repository: ", re.IGNORECASE)
# What git itself says of a failure, on whatever level DevPod logs it.
_OF_GIT = re.compile(r"(?:fatal|error|remote): ")
_PREFIX = re.compile(r"(?:devcontainer up|start dev container|fatal|error): ")


def of_up(said: Sequence[Said], repository: git.Git, branch: str | None) -> ClusterCodeError:
    """Why a session could not be brought up."""
    if any(_CLONE.search(one.text) for one in said):
        words = [one.text for one in said if one.level == "error" or _OF_GIT.match(one.text)]
        return repository.failure("\n".join(words) or telling(said), branch=branch, target=repository.home)
    return of(said, "start the session")


def is_cut_off(said: Sequence[Said]) -> bool:
    """Whether an `up` that failed is worth another: what it has begun, it goes on with."""
    return any(one.text.startswith("Setup container") for one in said) and _find((_CUT_OFF,), said) is not None


def of(said: Sequence[Said], what: str) -> ClusterCodeError:
    """Why DevPod could not do `what`."""
    if (line := _find(_AWAY, said)) is not None:
        pattern, text = line
        return ProviderUnavailable(_AWAY[pattern].format(line=_cut(text).removesuffix(".")))
    if (line := _find(_FAILURES, said)) is not None:
        pattern, text = line
        reason, sentence = _FAILURES[pattern]
        return ProviderFailure(reason, sentence.format(line=_cut(text)))
    return ProviderFailure("DevPodFailed", f"DevPod could not {what}: {telling(said)}")


def telling(said: Sequence[Said]) -> str:
    """The last words that tell something."""
    lines = [one for one in said if not _EMPTY.match(one.text)]
    grave = [one for one in lines if one.level in ("error", "fatal")] or lines
    return _cut(grave[-1].text) if grave else "it does not say why."


def _find(patterns: Iterable[str], said: Sequence[Said]) -> tuple[str, str] | None:
    """The first pattern that one of the last lines matches, and that line. Before these, all went well."""
    last = [one for one in said if not _EMPTY.match(one.text)][-_LAST:]
    for pattern in patterns:
        for one in last:
            if re.search(pattern, one.text, re.IGNORECASE):
                return pattern, one.text
    return None


def _cut(line: str) -> str:
    """A line for a person: without the names of DevPod's own steps, and not endless."""
    while found := _PREFIX.match(line):
        line = line[found.end() :]
    return line if len(line) <= 400 else f"{line[:400]}…"
