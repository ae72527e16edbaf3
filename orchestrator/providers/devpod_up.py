"""What `devpod up` is told of a session: its repository and credentials, its environment, and what its machine says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator import git
from orchestrator.errors import ProviderFailure
from orchestrator.providers.contract import SessionSpec
from orchestrator.providers.devpod_home import Handover

# What DevPod takes for a branch behind the `@`.
_BRANCH = re.compile(r"[A-Za-z0-9./_-]+\Z")
# Bytes of one line of a file of environment variables: DevPod stops reading at a longer one.
_LONGEST_LINE = 60_000


def repository_of(spec: SessionSpec, schemes: Collection[str]) -> git.Repository:
    """The project's repository, if DevPod can be told of it. Raises ProviderFailure."""
    if spec.repo_url is None:
        raise ProviderFailure(
            "NoRepository", "A DevPod session is made from a repository: set the project's repository URL."
        )
    repository = git.parse(spec.repo_url, schemes)
    path = urlsplit(repository.url).path if "://" in repository.url else repository.url.partition(":")[2]
    if "@" in path or "?" in repository.url:
        # What follows an `@` is a branch for DevPod, and the URL is in its files for all time.
        raise ProviderFailure("InvalidRepository", "DevPod takes no repository URL with an '@' or a '?' in its path.")
    if spec.branch is not None:
        git.check_branch(spec.branch)
        if not _BRANCH.match(spec.branch):
            raise ProviderFailure(
                "InvalidBranch", "DevPod takes branches of letters, digits, '.', '/', '_' and '-' only."
            )
    return repository


def source(repository: git.Repository, branch: str | None) -> str:
    """What is brought up."""
    return repository.url if branch is None else f"{repository.url}@{branch}"


def cloning(repository: git.Repository, branch: str | None) -> str:
    """What is going on, for people."""
    return f"Cloning {repository}." if branch is None else f"Cloning {repository} (branch {branch})."


def arguments(spec: SessionSpec, provider: str, ssh_config: Path, handover: Handover) -> Iterator[str]:
    """What is said of the session beside its repository. Raises ProviderFailure. Blocks for the disk."""
    options = spec.machine.options
    yield from ("--provider", provider, "--ide", "none", "--open-ide=false", "--ssh-config", str(ssh_config))
    for option in ("devcontainer_path", "devcontainer_image", "fallback_image"):
        if option in options:
            yield from (f"--{option.replace('_', '-')}", options[option])
    if options.get("clone", "full") != "full":
        yield from ("--git-clone-strategy", options["clone"])
    if options.get("submodules"):
        yield "--git-clone-recursive-submodules"
    for name, value in options.get("provider_options", {}).items():
        yield from ("--provider-option", f"{name}={value}")
    if env := {name: value for name, value in spec.env.items() if _fits(name, value)}:
        yield from ("--workspace-env-file", str(handover.environment(env)))


def _fits(name: str, value: str) -> bool:
    """Whether a variable is handed over; DevPod takes none without a value. Raises ProviderFailure."""
    if "\n" in value or "\r" in value or "\0" in value or len(value.encode()) > _LONGEST_LINE:
        raise ProviderFailure(
            "InvalidEnvironment",
            f"The project's environment variable {name!r} cannot be handed to DevPod:"
            " it has several lines, or is longer than 60 kB.",
        )
    return bool(value)


def git_environment(repository: git.Repository, schemes: Collection[str], handover: Handover) -> dict[str, str]:
    """The environment that makes git, which DevPod runs, as careful as ours (`git`), and gives it the credentials.

    Those are in a file for the time of the start: DevPod writes its environment down, and shows it to the
    devcontainer.json. Where DevPod clones elsewhere, it asks git here for the credentials and hands them on.
    Blocks for the disk.
    """
    settings = {
        "core.hooksPath": "/dev/null",
        "core.fsmonitor": "false",
        "protocol.ext.allow": "never",
        "credential.helper": "",
    }
    if repository.url.startswith("http") and (repository.username or repository.password):
        file = handover.credentials(repository.username, repository.password)
        parts = urlsplit(repository.url)
        settings[f"credential.{parts.scheme}://{parts.netloc}.helper"] = (
            f'!f() {{ test "$1" = get && cat {shlex.quote(str(file))}; }}; f'
        )
    environment = {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ALLOW_PROTOCOL": ":".join(schemes),
        "GIT_CONFIG_COUNT": str(len(settings)),
    }
    for number, (name, value) in enumerate(settings.items()):
        environment[f"GIT_CONFIG_KEY_{number}"] = name
        environment[f"GIT_CONFIG_VALUE_{number}"] = value
    return environment
