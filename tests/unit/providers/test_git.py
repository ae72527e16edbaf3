from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import git
from orchestrator.errors import ProviderFailure
from orchestrator.git import Clone, Git, Repository, check_branch, classify, parse

SCHEMES = ("https", "http", "ssh", "git")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "InvalidRepository"),
        ("-uhttps://host/x", "InvalidRepository"),
        ("--upload-pack=touch /tmp/x", "InvalidRepository"),
        ("ext::sh -c id", "InvalidRepository"),
        ("ext::id", "InvalidRepository"),
        ("https::ext::id", "InvalidRepository"),
        ("/etc", "InvalidRepository"),
        ("../x", "InvalidRepository"),
        ("host:-oProxyCommand=id", "InvalidRepository"),
        ("https://host/a\nb", "InvalidRepository"),
        ("https://host/a\\b", "InvalidRepository"),
        ("https://host:port/x", "InvalidRepository"),
        ("https:///x", "InvalidRepository"),
        ("ssh://-oProxyCommand=id/x", "InvalidRepository"),
        ("ssh://-l@host/x", "InvalidRepository"),
        ("https://u%0aser:x@host/x", "InvalidRepository"),
        ("https://[1/x", "InvalidRepository"),
        ("file:///etc", "SchemeRefused"),
        ("ext://id", "SchemeRefused"),
        ("ftp://host/x", "SchemeRefused"),
        ("https::ext://host/x", "InvalidRepository"),
        ("HTTPS://host/x", "InvalidRepository"),
    ],
)
def test_what_git_would_take_for_something_else_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ProviderFailure) as refused:
        parse(url, SCHEMES)
    assert refused.value.reason == reason


def test_the_short_form_of_ssh_needs_ssh() -> None:
    assert parse("git@host.example:group/x.git", SCHEMES) == Repository("git@host.example:group/x.git")
    with pytest.raises(ProviderFailure, match="cloned over https only"):
        parse("git@host.example:group/x.git", ["https"])


def test_credentials_are_taken_out_of_the_url() -> None:
    repository = parse("https://user:p%40ss@host.example:8443/x.git?token=t1#f", SCHEMES)
    assert repository == Repository("https://host.example:8443/x.git?token=t1", "user", "p@ss")
    assert str(repository) == "https://host.example:8443/x.git"
    assert parse("ssh://git@host/x", SCHEMES).url == "ssh://git@host/x"
    assert parse("ssh://git:secret@[::1]:22/x", SCHEMES).url == "ssh://git@[::1]:22/x"
    assert parse("https://token@host/x", SCHEMES) == Repository("https://host/x", "token")
    assert parse("file:///srv/x", ["file"]).url == "file:///srv/x"


def test_nothing_secret_is_shown() -> None:
    repository = parse("https://username:password@host/x?key=1", SCHEMES)
    line = repository.hide("fatal: https://host/x?key=1 says password to username")
    assert line == "fatal: https://host/x says *** to ***"
    assert repository.hide("redirect: https://host/y?key=1/info/refs") == "redirect: https://host/y?***/info/refs"


@pytest.mark.parametrize(
    "branch",
    ["", "-x", "--upload-pack=x", "a..b", "a b", "a~1", "a:b", "/a", "a/", "a.lock", "@", "a@{1}", "a\0b", "é^"],
)
def test_branches_that_git_does_not_allow_are_refused(branch: str) -> None:
    with pytest.raises(ProviderFailure) as refused:
        check_branch(branch)
    assert refused.value.reason == "InvalidBranch"


@pytest.mark.parametrize("branch", ["main", "feature/é-1", "v1.0", "$(id)", "a;b"])
def test_other_branches_are_not(branch: str) -> None:
    check_branch(branch)


@pytest.mark.parametrize(
    ("said", "reason", "telling"),
    [
        ("fatal: Remote branch x not found in upstream origin", "BranchNotFound", "Remote branch x not found in"),
        ("fatal: transport 'file' not allowed", "SchemeRefused", "transport 'file'"),
        ("error: x\nfatal: write error: No space left on device", "DiskFull", "write error"),
        ("fatal: unable to access 'https://h/': Could not resolve host: h", "HostUnreachable", "unable to access"),
        (
            "ssh: Could not resolve hostname h: Name or service not known\nfatal: Could not read from remote",
            "HostUnreachable",
            "ssh: Could not resolve",
        ),
        (
            "fatal: unable to connect to h:\nh[0: 127.0.0.1]: errno=Connection refused",
            "HostUnreachable",
            "unable to connect to h: h[0: 127.0.0.1]: errno=Connection refused",
        ),
        ("remote: Repository not found.\nfatal: Authentication failed", "RepositoryNotFound", "remote: Repository"),
        ("fatal: remote error: access denied or repository not exported: /x", "RepositoryNotFound", "remote error"),
        ("git@h: Permission denied (publickey).\nfatal: Could not read", "AuthenticationNeeded", "git@h: Permission"),
        ("fatal: could not read Username for 'https://h': terminal prompts", "AuthenticationNeeded", "could not read"),
        ("remote: counting\nfatal: early EOF\nfatal: index-pack failed", "CloneFailed", "early EOF index-pack failed"),
        ("git was killed by SIGKILL", "CloneFailed", "git was killed by SIGKILL"),
    ],
)
def test_the_cause_of_a_failed_clone_is_told(said: str, reason: str, telling: str) -> None:
    found, words = classify(said)
    assert found == reason
    assert words.startswith(telling)


def test_progress_is_told_once_a_second_and_everything_else_at_once() -> None:
    told: list[str] = []
    now = 100.0
    progress = git._Progress(told.append, lambda: now)
    progress("Receiving objects:   1% (1/100)")
    progress("Receiving objects:   2% (2/100)")
    progress("remote: hello")
    progress("Receiving objects: 100% (100/100), done.")
    now += 1.5
    progress("Resolving deltas:   5% (1/20)")
    assert told == [
        "Receiving objects:   1% (1/100)",
        "remote: hello",
        "Receiving objects: 100% (100/100), done.",
        "Resolving deltas:   5% (1/20)",
    ]


def test_git_is_told_to_run_nothing_and_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    repository = parse("https://user:password@host/x", SCHEMES)
    git = Git(repository, SCHEMES, {"MARK": "1"}, tmp_path, tmp_path / "hosts", ssh_key="/k y")
    arguments = list(git._settings({}))
    assert "password" not in " ".join(arguments).replace("password=%s", "").replace("CLONE_PASSWORD", "")
    assert any(argument.startswith("credential.https://host.helper=") for argument in arguments)
    environment = git._environment()
    assert environment["GIT_ALLOW_PROTOCOL"] == "https:http:ssh:git"
    assert environment["GIT_TERMINAL_PROMPT"] == "0"
    assert environment["CLONE_PASSWORD"] == "password"
    assert environment["https_proxy"] == "http://proxy:1"
    assert "'IdentityFile=/k y'" in environment["GIT_SSH_COMMAND"]
    assert "DATABASE_URL" not in environment
    assert environment["MARK"] == "1"


def test_the_url_of_a_clone_is_no_option(tmp_path: Path) -> None:
    clone = Clone(parse("https://host/x", SCHEMES), "main", tmp_path / "target", SCHEMES, 1.0, {}, tmp_path)
    assert list(clone._arguments(shallow=True))[-3:] == ["--", "https://host/x", str(tmp_path / "target")]


async def test_a_missing_git_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    clone = Clone(parse("https://host/x", SCHEMES), None, tmp_path / "target", SCHEMES, 1.0, {}, tmp_path)
    with pytest.raises(ProviderFailure) as failed:
        await clone.make(lambda line: None)
    assert failed.value.reason == "GitMissing"
