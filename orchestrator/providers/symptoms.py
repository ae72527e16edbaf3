"""What Kubernetes' own messages mean, in plain words. Pure.

Kubernetes passes on what its parts say (the scheduler, the kubelet, a container runtime, a registry) as text for
people, whose wording changes from version to version: what is recognised here was seen from 1.20 on, and what is not
recognised is told as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

from orchestrator.errors import ApiRefused, ClusterCodeError, ProviderFailure, ProviderUnavailable
from orchestrator.text import clean

# Of what Kubernetes says, so many bytes are passed on.
_LIMIT = 300

_USERINFO = re.compile(r"://[^/\s@\"']+@")
_TOKEN = re.compile(r"(?i)\b(bearer|basic|token|password|secret|authorization)([=:]\s*|\s+)[\w.~+/=-]{12,}")
_POD_UID = re.compile(r"_[0-9a-f-]{36}\([0-9a-f-]{36}\)")


def plain(text: str, limit: int = _LIMIT) -> str:
    """As `masked`, and without a period at its end."""
    return masked(text, limit).rstrip(". ")


def masked(text: str, limit: int = _LIMIT) -> str:
    """On one line, without credentials, cut to `limit` bytes."""
    if not text:
        # By far the most: it is called for every container of every change of a pod.
        return ""
    text = " ".join(text.split())
    text = _TOKEN.sub(r"\1\2***", _USERINFO.sub("://***@", _POD_UID.sub("", text)))
    # Not printable: control characters, and marks that change the direction of what follows.
    if not text.isprintable():
        text = "".join(character if character.isprintable() else "�" for character in text)
    return clean(text, limit)


def quoted(text: str, limit: int = _LIMIT) -> str:
    """What somebody else says, as a part of a sentence: ` (it says: …)`; nothing when it says nothing."""
    return f" (Kubernetes says: {told})" if (told := plain(text, limit)) else ""


class Pull(Enum):
    """Why an image cannot be pulled."""

    GONE = auto()  # The registry does not have it.
    DENIED = auto()
    UNREACHABLE = auto()  # Nothing answers at its registry's name.
    BUSY = auto()  # The registry, or the way to it, is not well just now.
    UNKNOWN = auto()

    @property
    def final(self) -> bool:
        """Whether the next try has no better chance than the first."""
        return self in (Pull.GONE, Pull.DENIED)


_PULLS = (
    (
        Pull.DENIED,
        re.compile(r"unauthori[sz]ed|denied|forbidden|authentication required|insufficient_scope|basic auth"),
    ),
    (Pull.GONE, re.compile(r"not ?found|(manifest|name|blob)[ _]unknown|does not exist|no match(ing manifest)? for ")),
    (
        Pull.BUSY,
        re.compile(
            r"too ?many ?requests|rate limit|\b50[0234] [a-z]|service unavailable|timeout|timed out|deadline exceeded"
            r"|connection reset|unexpected eof|: eof|try again|no space left"
        ),
    ),
    (
        Pull.UNREACHABLE,
        re.compile(
            r"no such host|server misbehaving|temporary failure|refused|no route|unreachable|dial tcp|x509|certificate"
            r"|to https client"
        ),
    ),
)
_QUOTED = re.compile(r'"[^"]*"')


def pull(message: str) -> Pull:
    """Why, from what the container runtime says."""
    # Names of images are no words of the runtime's.
    text = _QUOTED.sub('""', message).lower()
    return next((kind for kind, words in _PULLS if words.search(text)), Pull.UNKNOWN)


def registry(image: str) -> str:
    """Where an image is pulled from."""
    host, slash, _ = image.partition("/")
    return host if slash and (host == "localhost" or "." in host or ":" in host) else "docker.io"


_CORRECT_IMAGE = "correct the image in the machine config or in the project's chart values"


def pull_failure(container: str, image: str, kind: Pull, message: str) -> str:
    """The sentence about an image that cannot be pulled."""
    host = registry(image)
    what = f"The image {plain(image)} of {container}"
    match kind:
        case Pull.GONE:
            return f"{what} was not found in its registry ({host}); {_CORRECT_IMAGE}, or push it there."
        case Pull.DENIED:
            return (
                f"{what} is refused by its registry ({host}): it does not exist there, or needs credentials;"
                f" {_CORRECT_IMAGE}, or have an operator set `imagePullSecrets`."
            )
        case Pull.UNREACHABLE:
            return (
                f"{what} was not found: its registry {host} cannot be reached{quoted(_cause(message))};"
                f" {_CORRECT_IMAGE}, or have an operator let the nodes reach the registry."
            )
        case Pull.BUSY:
            return (
                f"{what} cannot be pulled, for the registry {host} does not deliver just now{quoted(_cause(message))};"
                " start the session again later, or have an operator look at the registry."
            )
        case Pull.UNKNOWN:
            return f"{what} cannot be pulled{quoted(_cause(message))}; {_CORRECT_IMAGE}, or push it to {host}."


# What was asked, before what came of it.
_ADDRESS = re.compile(r'(?:Get|Head) "[^"]*": |dial tcp [^ ]*: (?:connect: )?')


def _cause(message: str) -> str:
    """The innermost cause of a runtime's message: what follows the names of what was tried."""
    for tried in ("failed to do request: ", "failed to resolve reference ", "desc = ", "ErrImagePull: "):
        _, found, rest = message.rpartition(tried)
        if found:
            return _ADDRESS.sub("", rest, count=1)
    return "" if message.startswith("Back-off pulling image") else message


_NODES = re.compile(r"(\d+)/(\d+) nodes? (?:are|is) available")
_INSUFFICIENT = re.compile(r"(?:(\d+) )?Insufficient ([\w./-]+)")
_TAINT = re.compile(r"(?:(\d+) )?node\(s\) had (?:untolerated )?taints?(?:\(s\))? ?\{([^}]*)\}")
# Of what else the scheduler says, and of whom it is: our words for each, and what to do.
_ASK_OPERATOR = "have an operator add a node that fits"
_UNFIT = (
    (
        re.compile(r"(?:(\d+) )?node\(s\) didn't match (?:node selector|Pod's node affinity)"),
        "other labels than its node selector asks for",
        "correct the node selector (chart values), or have an operator label a node.",
    ),
    (
        re.compile(r"(?:(\d+) )?node\(s\) had (?:volume node affinity conflict|no available volume zone)"),
        "no way to the session's volume, which is tied to another node or zone",
        "have an operator add a node where the volume is.",
    ),
    (
        re.compile(r"(?:(\d+) )?node\(s\) didn't find available persistent volumes"),
        "no volume to give",
        "have an operator add persistent volumes, or a storage class that makes them.",
    ),
    (
        re.compile(r"(?:(\d+) )?node\(s\) exceed max volume count"),
        "no room for more volumes",
        f"stop other sessions, or {_ASK_OPERATOR}.",
    ),
    (re.compile(r"(?:(\d+) )?Too many pods"), "too many pods", f"stop other sessions, or {_ASK_OPERATOR}."),
    (
        re.compile(r"(?:(\d+) )?node\(s\) had taints? that"),
        "a taint that the session does not tolerate",
        "have an operator set `tolerations` (chart values) or add nodes.",
    ),
    (
        re.compile(r"(?:(\d+) )?node\(s\) were unschedulable"),
        "a cordon",
        "have an operator uncordon a node, or add one.",
    ),
    (
        re.compile(r"(?:(\d+) )?node\(s\) didn't (?:match|satisfy) (?:pod|existing)[^,]*?(?:affinity|spread)"),
        "other pods than its rules of affinity and spread allow",
        "correct the rules (chart values), or have an operator add nodes.",
    ),
    (
        re.compile(r"(?:(\d+) )?node\(s\) didn't have free ports"),
        "its host ports taken",
        "use no host ports (chart values).",
    ),
)
_UNBOUND = re.compile(r"unbound immediate PersistentVolumeClaims", re.IGNORECASE)
_NO_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)" (?:not found|is being deleted)', re.IGNORECASE)


def unbound(message: str) -> bool:
    """Whether the scheduler waits for a volume."""
    return bool(_UNBOUND.search(message))


def unschedulable(message: str) -> tuple[str, str]:
    """What the scheduler says: which resource is missing on how many nodes; and what to do, with its period."""
    # What newer schedulers add of preemption repeats it.
    told = message.split("preemption:")[0]
    if missing := _NO_CLAIM.search(told):
        name = plain(missing[1])
        return f"The session's volume claim {name} is missing or being deleted", "start the session again."
    found: list[tuple[str, str, str]] = []
    for count, resource in _INSUFFICIENT.findall(told):
        do = f"ask for less {plain(resource)} in the machine config, stop other sessions, or {_ASK_OPERATOR}."
        found.append((count, f"too little {plain(resource)} left", do))
    for count, taint in _TAINT.findall(told):
        name = plain(taint).removesuffix(":").strip()
        unwell = name.startswith("node.kubernetes.io/")
        do = "look at the nodes." if unwell else "set `tolerations` (chart values) or add nodes."
        found.append((count, f"the taint {name}", f"have an operator {do}"))
    for words, what, do in _UNFIT:
        found += [(count, what, do) for count in words.findall(told)]
    if not found:
        if "no nodes available" in told:
            return "The cluster has no node that takes sessions", "have an operator add one."
        if _UNBOUND.search(told):
            return "The session waits for its volume", "have an operator look at its claim and storage class."
        do = f"change the machine config, or {_ASK_OPERATOR}."
        return f"No node of the cluster can take the session{quoted(told)}", do
    nodes = _NODES.search(told)
    if nodes is not None and nodes[2] == "1":
        why = ", ".join(what for _, what, _ in found)
        return f"The cluster's only node cannot take the session ({why})", found[0][2]
    of = f"None of the {nodes[2]} nodes" if nodes is not None else "No node"
    why = ", ".join(f"{count or 'one'} with {what}" for count, what, _ in found)
    return f"{of} can take the session ({why})", found[0][2]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an object may not be. `passing`: it may be allowed a moment later."""

    reason: str
    message: str
    passing: bool = False


_EXCEEDED = re.compile(r"exceeded quota: ([^,\s]+), requested: (.*?), used: (.*?), limited: (.*)")
_MUST_SPECIFY = re.compile(r"failed quota: ([^:\s]+): must specify (.*)")
_LIMITS = re.compile(r"(?:maximum|minimum) [\w./-]+ usage per |max limit to request ratio per ", re.IGNORECASE)
_POD_SECURITY = re.compile(
    r'violates PodSecurity "([^"]*)":? ?(.*)|unable to (?:validate against any|admit pod)(.*)', re.DOTALL
)
_WEBHOOK = re.compile(r'admission webhook "([^"]*)" denied the request:? ?(.*)', re.DOTALL)
_RBAC = re.compile(
    r'User "([^"]*)" cannot ([\w*]+) (?:resource "([^"]*)"(?: in API group "([^"]*)")?|path "([^"]*)")'
    r'(?: in the namespace "([^"]*)"| at the cluster scope)?'
)
_ACCOUNT = re.compile(
    r'serviceaccount "([^"]*)" not found|no api token found for service account "([^"]*)"', re.IGNORECASE
)
_TERMINATING = re.compile(r"because it is being terminated|namespace .* is terminating|NamespaceTerminating")


def refusal(message: str) -> Refusal:
    """Why the API refused to make something, most often a pod."""
    if found := _EXCEEDED.search(message):
        return Refusal("QuotaExceeded", _quota(*found.groups()))
    if found := _MUST_SPECIFY.search(message):
        resources = plain(found[2].split(";")[0]).replace(",", ", ")
        return Refusal(
            "QuotaExceeded",
            f"The quota {plain(found[1])} demands that every container says its {resources};"
            " set `resources` in the machine config, or have an operator add a LimitRange with defaults.",
        )
    if _LIMITS.search(message):
        what = plain(message.rpartition("is forbidden: ")[2])
        return Refusal(
            "LimitRange",
            f"The namespace's LimitRange does not allow the session: {what};"
            " correct cpu and memory in the machine config, or have an operator change the LimitRange.",
        )
    if found := _POD_SECURITY.search(message):
        level = f" ({plain(found[1])})" if found[1] else ""
        what = plain(found[2] or found[3] or "")
        return Refusal(
            "PodSecurity",
            f"The cluster's pod security{level} does not allow the session{f': {what}' if what else ''};"
            " correct `securityContext` in the chart's values, or have an operator set another level for sessions.",
        )
    if found := _WEBHOOK.search(message):
        return Refusal(
            "AdmissionDenied",
            f"The cluster's policy {plain(found[1])} does not allow the session{quoted(found[2])};"
            " correct the machine config, or have an operator change the policy.",
        )
    if "failed calling webhook" in message:
        return Refusal(
            "AdmissionUnavailable",
            f"A policy that the cluster asks about every pod does not answer{quoted(message)};"
            " have an operator look at that webhook.",
            passing=True,
        )
    if found := _ACCOUNT.search(message):
        name = plain(found[1] or found[2])
        # Kubernetes makes this one in every namespace, after an outage of its own a while later.
        by_itself = name == "default"
        remedy = (
            "Kubernetes makes it by itself, so wait, or have an operator look at its controllers."
            if by_itself
            else "correct `serviceAccountName` in the chart's values, or make it."
        )
        return Refusal("ServiceAccountMissing", f"The service account {name} is not there; {remedy}", passing=by_itself)
    if found := _RBAC.search(message):
        return Refusal("Forbidden", _forbidden(found))
    if _TERMINATING.search(message):
        return Refusal(
            "NamespaceTerminating",
            "The session's namespace is being deleted; start the session again when it is gone.",
            passing=True,
        )
    return Refusal(
        "FailedCreate",
        f"Kubernetes refuses to make the session's pod{quoted(message)}; correct the machine config, or ask an"
        " operator.",
    )


def _quota(name: str, requested: str, used: str, limited: str) -> str:
    uses, limits = _amounts(used), _amounts(limited)
    parts = [
        f"{plain(resource)} {plain(amount)} requested, {plain(uses.get(resource, '0'))} of"
        f" {plain(limits.get(resource, '?'))} used"
        for resource, amount in _amounts(requested).items()
    ]
    return (
        f"The quota {plain(name)} does not allow the session: {'; '.join(parts) or 'it is used up'};"
        " ask for less in the machine config, or have an operator raise the quota."
    )


def _amounts(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split(";")[0].split(","))
    return {name.strip(): amount.strip() for name, _, amount in pairs if name.strip()}


def _forbidden(found: re.Match[str]) -> str:
    user, verb, resource, group, path, namespace = (plain(part or "") for part in found.groups())
    what = f"{resource}.{group}" if group else resource or path
    where = f" in the namespace {namespace}" if namespace else " in the cluster"
    return (
        f"Cluster Code may not {verb} {what}{where}; have an operator grant the verb {verb} on {what} to {user}"
        " (RBAC; the chart cluster-code does)."
    )


def api_failure(error: ApiRefused, doing: str) -> ProviderFailure | ProviderUnavailable:
    """What a refusal of the API is to the user. `doing`: what was tried, such as "start the session"."""
    said: ClusterCodeError = error
    message = str(said)
    tried = plain(doing) or "do what was asked"
    if error.status in (401, 408, 429) or error.status >= 500:
        return ProviderUnavailable(
            f"Kubernetes cannot {tried} now (HTTP {error.status}){quoted(message)}; it is tried again."
        )
    found = refusal(message)
    if found.reason != "FailedCreate":
        return ProviderFailure(found.reason, found.message)
    match error.reason or error.status:
        case "Forbidden" | 403:
            do = "have an operator look at the permissions (RBAC) and policies of the cluster."
        case "NotFound" | 404:
            do = "Something of the session was deleted by hand: start the session again."
        case "AlreadyExists" | "Conflict" | 409:
            do = "Somebody else is changing the session: try again."
        case "Invalid" | "BadRequest" | 400 | 422:
            do = "correct the machine config or the chart's values."
        case "RequestEntityTooLarge" | 413:
            do = "make the project's environment and chart values smaller."
        case _:
            do = "try again, or ask an operator."
    return ProviderFailure(plain(error.reason) or "ApiRefused", f"Kubernetes refused to {tried}{quoted(message)}; {do}")


_NOT_THERE = re.compile(
    r'exec: "([^"]*)": (?:stat [^:]*: )?(no such file|executable file not found|permission denied|is a dir)'
)
_SYNCING = re.compile(
    r"failed to sync (?:secret|configmap)|timed out|deadline exceeded|context canceled|is reserved for", re.IGNORECASE
)
_MISSING = re.compile(r'(secret|configmap) "?([\w./-]+)"? not found', re.IGNORECASE)
_KEY = re.compile(r"couldn't find key ([\w.-]+) in (Secret|ConfigMap) (?:[\w.-]+/)?([\w.-]+)", re.IGNORECASE)
_ROOT = re.compile(r"runAsNonRoot")


def passing(message: str) -> bool:
    """Whether the kubelet was only too slow."""
    return bool(_SYNCING.search(message))


def command_failure(container: str, message: str) -> str | None:
    """The sentence about a command that cannot be run; None: it is something else."""
    if (found := _NOT_THERE.search(message)) is None:
        return None
    command = plain(found[1]) or "(empty)"
    why = "may not be executed" if found[2] in ("permission denied", "is a dir") else "is not in its image"
    return (
        f"The command {command} of {container} {why};"
        " correct `command` in the machine config, or choose an image that has it."
    )


def configuration_failure(container: str, message: str) -> str:
    """The sentence about a container that cannot be made from what it is told."""
    if found := _KEY.search(message):
        return (
            f"{container} cannot be started: the {found[2]} {found[3]} has no key {found[1]};"
            " add the key, or correct the name in the machine config's chart values."
        )
    if found := _MISSING.search(message):
        return (
            f"{container} cannot be started: there is no {found[1].lower()} {found[2]} in the session's namespace;"
            " start the session again, or correct the name in the chart values."
        )
    if _ROOT.search(message):
        return (
            f"{container} cannot be started: its image runs as root, which the session's pod security forbids;"
            " choose an image with another user, or set `securityContext` in the chart values."
        )
    return (
        f"{container} cannot be started from its configuration{quoted(message)};"
        " correct it in the machine config, then start the session again."
    )


def mount_failure(message: str) -> str:
    """The sentence about a volume that cannot be mounted."""
    if found := _MISSING.search(message):
        return (
            f"A volume of the session needs the {found[1].lower()} {found[2]}, which is not there;"
            " make it, or correct its name in the chart values."
        )
    if "Multi-Attach" in message:
        return (
            "The session's volume is still attached to another node; wait until that node lets it go, or have an"
            " operator remove the node if it is lost."
        )
    return (
        f"The session's volume cannot be mounted{quoted(message)};"
        " have an operator look at the storage and at the node."
    )


def mount_missing(message: str) -> bool:
    """Whether a mount waits for something that nobody makes by itself."""
    return bool(_MISSING.search(message))


_NO_CLASS = re.compile(r'storageclass(?:\.storage\.k8s\.io)? "([^"]*)" not found', re.IGNORECASE)


def volume_failure(claim: str, message: str) -> tuple[str, bool]:
    """The sentence about a volume that is not made, and whether that lasts until somebody changes something."""
    if found := _NO_CLASS.search(message):
        return (
            f"The session's volume {claim} cannot be made: there is no storage class {plain(found[1])};"
            " correct `storage.className` in the machine config's chart values, or have an operator make the class."
        ), True
    if "no storage class is set" in message:
        return (
            f"The session's volume {claim} cannot be made: the cluster has no default storage class;"
            " set `storage.className` in the chart values, or have an operator set a default."
        ), True
    return (
        f"The session's volume {claim} cannot be made{quoted(message)}; have an operator look at the storage."
    ), False


_PROBE = re.compile(r"(readiness|liveness|startup) probe (?:failed|errored|warning):? ?(.*)", re.IGNORECASE | re.DOTALL)


def probe(message: str) -> tuple[str, str]:
    """Which probe failed, and what was answered."""
    found = _PROBE.search(message)
    kind, answer = (found[1].lower(), found[2]) if found else ("readiness", message)
    return kind, plain(_ADDRESS.sub("", answer)) or "no answer"


_KILLED_BY = re.compile(r"failed (liveness|startup) probe")


def killed_by(message: str) -> str:
    """The probe that a container was ended for; "": something else."""
    found = _KILLED_BY.search(message)
    return found[1] if found else ""
