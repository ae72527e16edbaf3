from __future__ import annotations

import random
import subprocess

import pytest

from gateway.repository import check_branch, check_repo_url, without_secrets
from orchestrator.errors import Invalid

SCHEMES = ("https", "http", "ssh", "git")

ACCEPTED_URLS = [
    "https://example.org/team/site.git",
    "http://127.0.0.1:3000/site",
    "https://name:token@example.org/site.git",
    "https://[::1]:8443/site",
    "ssh://git@example.org:2222/team/site",
    "ssh://git@example.org/~ann/site",
    "git://example.org/site",
    "git@example.org:team/site.git",
    "example.org:site",
    "https://example.org/$(id);'--\"",
]

REFUSED_URLS = [
    "",
    "-oProxyCommand=id",
    "--upload-pack=id",
    "ext::sh -c id",
    "ext::sh",
    "fd::17",
    "file:///etc",
    "FILE:///etc",
    "HTTPS://example.org/site",
    "ssh://%2doProxyCommand=id@example.org/site",
    "https://u%0ahost=evil:pw@example.org/site",
    "file:/etc",
    "File:etc",
    "https:/example.org/site",
    "/etc/passwd",
    "./site",
    "site",
    "https://",
    "https:///site",
    "https://example.org",
    "https://example.org/",
    "https://-example.org/site",
    "https://example.org:99999/site",
    "https://example.org:port/site",
    "https://exa mple.org/site",
    "https://example.org/si\nte",
    "https://example.org/si\x00te",
    "https://example.org/\N{NO-BREAK SPACE}site",
    "https://exam_ple!.org/site",
    "https://example.org\\@evil.org/site",
    "https://[::1/site",
    "ssh://-oProxyCommand=id/site",
    "ssh://-l@example.org/site",
    "ftp://example.org/site",
    "-git@example.org:site",
    "git@-example.org:site",
    "git@example.org:-site",
    "git@example.org::site",
    "@example.org:site",
    "git@example.org:",
]


@pytest.mark.parametrize("url", ACCEPTED_URLS)
def test_a_repository_behind_an_allowed_scheme_is_accepted(url: str) -> None:
    check_repo_url(url, SCHEMES)


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_what_git_could_take_for_something_else_is_refused(url: str) -> None:
    with pytest.raises(Invalid) as refusal:
        check_repo_url(url, SCHEMES)
    assert refusal.value.field == "repo_url"


@pytest.mark.parametrize("url", ["git@example.org:site", "ssh://example.org/site", "http://example.org/site"])
def test_a_scheme_that_is_not_allowed_is_refused(url: str) -> None:
    with pytest.raises(Invalid, match="https://"):
        check_repo_url(url, ["https"])


@pytest.mark.parametrize(
    "url", ["https://ann:hunter2@example.org", "ftp://ann:hunter2@example.org/x", "https://ann:hunter2@-x/y"]
)
def test_a_refusal_does_not_repeat_the_password(url: str) -> None:
    with pytest.raises(Invalid) as refusal:
        check_repo_url(url, SCHEMES)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("branch", ["main", "feature/x", "v1.0", "a-b_c", "hotfix@2", "日本", "$(id)", "a'b\"c;d|e"])
def test_a_branch_that_git_allows_is_accepted(branch: str) -> None:
    check_branch(branch)


FORBIDDEN_BRANCHES = [
    "-b", "--upload-pack=x", "a..b", "a b", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b", "/a", "a/", "a//b", "a.",
    ".a",
    "a/.b", "a.lock", "a.lock/b", "@", "a@{1}", "a\x00b", "a\x7fb", "a\nb",
]  # fmt: skip


@pytest.mark.parametrize("branch", FORBIDDEN_BRANCHES)
def test_a_branch_that_git_forbids_is_refused(branch: str) -> None:
    with pytest.raises(Invalid) as refusal:
        check_branch(branch)
    assert refusal.value.field == "branch"


@pytest.mark.random
def test_git_accepts_every_branch_that_is_accepted() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(100):
        branch = "".join(draw.choices("ab./-@{}~^:?*[\\ lock\x01é", k=draw.randint(1, 8)))
        try:
            check_branch(branch)
        except Invalid:
            continue
        done = subprocess.run(["git", "check-ref-format", "--branch", branch], check=False, capture_output=True)
        assert done.returncode == 0, branch


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://name:secret@example.org:8443/site.git?token=t#f", "https://example.org:8443/site.git#f"),
        ("https://token@example.org/site", "https://example.org/site"),
        ("ssh://git:secret@example.org/site", "ssh://git@example.org/site"),
        ("git://example.org/site", "git://example.org/site"),
        ("git@example.org:team/site", "git@example.org:team/site"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
