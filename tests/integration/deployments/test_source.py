"""Repositories as an app's deployment clones them: real git, real servers, and strangers who want more than a clone."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from orchestrator.children.processes import Selection
from orchestrator.deployments import source
from orchestrator.deployments.contract import AppSecrets, AppSettings, Source, StepFailed, Task
from orchestrator.deployments.source import MARKER, checkout
from orchestrator.settings import DeploySettings
from tests.conftest import no_task_left
from tests.git_server import GitServer, Link, Submodule

pytestmark = pytest.mark.timeout(120)


@dataclass
class Deployment:
    """A deployment whose first step is tried."""

    directory: Path
    said: list[str] = field(default_factory=list)
    secrets: AppSecrets = field(default_factory=AppSecrets)

    async def clone(
        self, url: str, branch: str | None = None, *, commit_id: str | None = None, **settings: Any
    ) -> Source:
        task = Task(
            1, "shop", 1, 1, 1, url, branch, commit_id, AppSettings(), self.secrets, self.directory, self.said.append
        )
        return await checkout(
            task, DeploySettings(**{"directory": self.directory.parent, "clone_deadline": 60.0, **settings})
        )

    async def refused(self, url: str, branch: str | None = None, **more: Any) -> StepFailed:
        with pytest.raises(StepFailed) as failed:
            await self.clone(url, branch, **more)
        return failed.value

    @property
    def log(self) -> str:
        return "".join(self.said)

    def processes(self) -> list[int]:
        return [process.pid for process in Selection({MARKER: str(self.directory)}).find()]

    def holding(self, word: str) -> str:
        """The files of it that hold a word."""
        return subprocess.run(["grep", "-rlaF", word, str(self.directory)], capture_output=True, text=True).stdout


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[GitServer]:
    async with GitServer(tmp_path / "repositories") as server:
        yield server


@pytest_asyncio.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    """One whose processes and tasks are all gone afterwards."""
    directory = tmp_path / "deployments/1"
    directory.mkdir(parents=True)
    made = Deployment(directory)
    async with no_task_left():
        yield made
    assert made.processes() == []
    assert not (directory / "deploy-key").exists()


async def test_the_newest_commit_of_the_branch_is_checked_out_without_history(
    server: GitServer, deployment: Deployment
) -> None:
    repository = server.repository("shop")
    repository.commit({"index.html": "one"}, "First")
    repository.switch("next")
    newest = repository.commit({"index.html": "two", "run": Link("index.html")}, "Second\n\nwith more words")
    repository.switch("main")
    found = await deployment.clone(server.url("shop"), "next")
    assert (found.commit_id, found.subject, found.directory) == (newest, "Second", deployment.directory / "source")
    assert found.committed_at == int(repository.git("log", "-1", "--format=%ct", newest))
    assert (found.directory / "index.html").read_text() == "two"
    assert (found.directory / "run").readlink() == Path("index.html")
    assert (found.directory / ".git/shallow").read_text().strip() == newest
    assert not (found.directory / ".git/hooks").exists()
    assert deployment.said[0] == f"Cloning {server.url('shop')} (branch next)\n"
    assert deployment.said[-1] == f"At {newest[:12]}: Second\n"


async def test_without_a_branch_the_repository_says_which_and_a_tag_is_as_good(
    server: GitServer, deployment: Deployment
) -> None:
    repository = server.repository("shop", branch="trunk")
    first = repository.commit({"a": "1"})
    repository.git("tag", "-a", "v1.0", "-m", "the first")
    second = repository.commit({"a": "2"})
    assert (await deployment.clone(server.url("shop"))).commit_id == second
    # What is there is made anew.
    assert (await deployment.clone(server.url("shop"), "v1.0")).commit_id == first


@pytest.mark.parametrize("old", [False, True])
async def test_a_commit_is_found_though_the_branch_went_on(
    server: GitServer, deployment: Deployment, old: bool
) -> None:
    repository = server.repository("shop")
    wanted = repository.commit({"a": "1"})
    for number in range(60):
        repository.git("commit", "--quiet", "--allow-empty", "-m", str(number))
    server.old_protocol = old
    found = await deployment.clone(server.url("shop"), "main", commit_id=wanted)
    assert (found.commit_id, (found.directory / "a").read_text()) == (wanted, "1")
    for missing, branch in (("1" * 40, "main"), ("1" * 40, None)):
        told = await deployment.refused(server.url("shop"), branch, commit_id=missing)
        assert told.reason == "CommitNotFound"
        assert str(told) == f"The commit {missing} is not in {server.url('shop')}, or no longer: deploy another one."


async def test_a_server_that_only_hands_out_files_is_cloned_from_too(server: GitServer, deployment: Deployment) -> None:
    repository = server.repository("shop")
    commit = repository.commit({"a": "1"})
    repository.git("update-server-info")
    server.plain.add("shop")
    assert (await deployment.clone(server.url("shop"))).commit_id == commit


async def test_schemes_are_a_setting(server: GitServer, deployment: Deployment, tmp_path: Path) -> None:
    commit = server.repository("shop").commit({"a": "1"})
    found = await deployment.clone(f"file://{tmp_path}/repositories/shop", repo_schemes=["file"])
    assert found.commit_id == commit
    assert (await deployment.refused(server.url("shop"), repo_schemes=["file"])).reason == "SchemeRefused"


@pytest.mark.parametrize(
    ("name", "branch", "reason", "sentence"),
    [
        ("shop", "no;$(such)", "BranchNotFound", "The branch 'no;$(such)' does not exist in {}: correct its name."),
        ("shop", "--upload-pack=touch x", "InvalidBranch", "The name of the branch is none that git allows."),
        ("none", None, "RepositoryNotFound", "There is no repository at {}, or it may not be read"),
        ("empty", None, "EmptyRepository", "{} has no commit yet: push one."),
    ],
)
async def test_what_is_not_there_is_told(
    server: GitServer, deployment: Deployment, name: str, branch: str | None, reason: str, sentence: str
) -> None:
    server.repository("shop").commit({"a": "1"})
    server.repository("empty")
    told = await deployment.refused(server.url(name), branch)
    assert told.reason == reason
    assert str(told).startswith(sentence.format(server.url(name)))
    assert str(deployment.directory) not in str(told) + deployment.log


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ext::sh -c touch% /tmp/x", "InvalidRepository"),
        ("--upload-pack=x", "InvalidRepository"),
        ("file:///etc", "SchemeRefused"),
    ],
)
async def test_what_git_would_take_for_something_else_never_reaches_it(
    deployment: Deployment, url: str, reason: str
) -> None:
    assert (await deployment.refused(url)).reason == reason
    assert deployment.said == []


async def test_a_commit_that_is_not_one_never_reaches_git(server: GitServer, deployment: Deployment) -> None:
    told = await deployment.refused(server.url("shop"), commit_id="--upload-pack=x")
    assert told.reason == "CommitNotFound"
    assert server.requests == []


async def test_a_token_opens_the_repository_and_its_submodules_and_is_kept_nowhere(
    server: GitServer, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = server.repository("part").commit({"b": "2"})
    server.repository("shop").commit({"a": "1", "part": Submodule("../part.git", part)})
    server.credentials = "deployer:sesame-1"
    deployment.secrets = AppSecrets(deploy_user="deployer", deploy_token="sesame-1")
    seen: list[bytes] = []
    spawn = asyncio.create_subprocess_exec

    async def watched(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        seen.append(" ".join(map(str, arguments)).encode())
        return await spawn(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", watched)
    found = await deployment.clone(server.url("shop"))
    assert (found.directory / "part/b").read_text() == "2"
    assert deployment.holding("sesame") == ""
    assert "sesame" not in deployment.log
    assert b"http-backend" in b"".join(seen)
    assert b"sesame" not in b"".join(seen)


async def test_credentials_of_the_url_do_as_well_and_wrong_ones_are_told_without_them(
    server: GitServer, deployment: Deployment
) -> None:
    server.repository("shop").commit({"a": "1"})
    server.credentials = "ada:sesame-1"
    await deployment.clone(server.url("shop", credentials="ada:sesame-1"))
    told = await deployment.refused(server.url("shop", credentials="ada:opensaysme"))
    assert told.reason == "AuthenticationNeeded"
    assert "opensaysme" not in str(told) + deployment.log + deployment.holding("opensaysme")
    assert (await deployment.refused(server.url("shop"))).reason == "AuthenticationNeeded"


async def test_credentials_do_not_follow_to_another_host(
    server: GitServer, deployment: Deployment, tmp_path: Path
) -> None:
    async with GitServer(tmp_path / "elsewhere") as other:
        other.repository("shop").commit({"a": "1"})
        other.credentials = "ada:sesame-1"
        server.redirects["shop"] = other.url("shop")
        deployment.secrets = AppSecrets(deploy_user="ada", deploy_token="sesame-1")
        assert (await deployment.refused(server.url("shop"))).reason == "AuthenticationNeeded"
        part = other.url("shop")
        server.repository("whole").commit({"part": Submodule(part, "1" * 40)})
        assert (await deployment.refused(server.url("whole"))).reason == "AuthenticationNeeded"
        assert {given for _, _, given in other.requests} == {""}
        # Nor to what is no repository at all.
        server.redirects["shop"] = "file:///etc"
        assert (await deployment.refused(server.url("shop"))).reason in ("CloneFailed", "SchemeRefused")


# Stands for ssh: checks the key's file, and runs the command here.
SSH = """#!/bin/sh
for word; do case $word in IdentityFile=*) key=${word#*=};; esac; done
stat -c '%a %s' "$key" > "$key.seen"; printf '%s\\n' "$@" >> "$key.seen"; cat "$key" >> "$key.seen"
for last; do :; done
eval "exec $last"
"""


async def test_a_deploy_key_is_a_file_for_ssh_alone_and_is_gone_afterwards(
    server: GitServer, deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = server.repository("shop").commit({"a": "1"})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(SSH)
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    deployment.secrets = AppSecrets(deploy_key="-----BEGIN KEY-----\r\nsesame\r\n-----END KEY-----")
    found = await deployment.clone(f"ssh://git@host.test{tmp_path}/repositories/shop")
    assert found.commit_id == commit
    mode, *words = (deployment.directory / "deploy-key.seen").read_text().splitlines()
    assert mode.split()[0] == "600"
    assert words[-3:] == ["-----BEGIN KEY-----", "sesame", "-----END KEY-----"]
    assert "StrictHostKeyChecking=accept-new" in words
    assert f"UserKnownHostsFile={deployment.directory.parent}/.ssh-known-hosts" in words


async def test_submodules_are_cloned_with_theirs(server: GitServer, deployment: Deployment) -> None:
    leaf = server.repository("leaf")
    old = leaf.commit({"c": "old"})
    leaf.commit({"c": "new"})
    middle = server.repository("middle").commit({"b": "2", "deep/leaf": Submodule("../leaf.git", old)})
    server.repository("shop").commit({"a": "1", "lib/middle": Submodule(server.url("middle"), middle)})
    found = await deployment.clone(server.url("shop"))
    assert (found.directory / "lib/middle/b").read_text() == "2"
    assert (found.directory / "lib/middle/deep/leaf/c").read_text() == "old"
    assert f"Cloning the submodule lib/middle/deep/leaf from {server.url('leaf')}\n" in deployment.said


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("part", "ext::sh -c 'touch {}/pwned'"),
        ("part", "file://{}/repositories/part"),
        ("part", "{}/repositories/part"),
        ("part", "--upload-pack=touch {}/pwned"),
        ("part", "-u./pwned"),
        ("part", "ssh://-oProxyCommand=touch%20{}/pwned/x"),
        ("part", "../../../../../../etc"),
        ("-part", "../part.git"),
    ],
)
async def test_a_submodule_may_not_lead_anywhere_else(
    server: GitServer, deployment: Deployment, tmp_path: Path, name: str, url: str
) -> None:
    part = server.repository("part").commit({"b": "2"})
    repository = server.repository("shop")
    # As `git submodule` would not do it.
    repository.git("update-index", "--add", "--cacheinfo", f"160000,{part},{name}")
    modules = f'[submodule "x"]\n\tpath = {name}\n\turl = "{url.format(tmp_path)}"\n'
    (repository.path / ".gitmodules").write_text(modules)
    repository.git("add", ".gitmodules")
    repository.git("commit", "--quiet", "-m", "x")
    told = await deployment.refused(server.url("shop"))
    assert told.reason == "InvalidSubmodule"
    assert str(told).startswith(f"The submodule '{name}' ")
    assert not list(tmp_path.rglob("pwned"))


async def test_submodules_without_end_are_refused(
    server: GitServer, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_DEEPEST_SUBMODULE", 2)
    commit = server.repository("r0").commit({"a": "1"})
    for number in range(1, 4):
        commit = server.repository(f"r{number}").commit({"s": Submodule(f"../r{number - 1}.git", commit)})
    told = await deployment.refused(server.url("r3"))
    assert (told.reason, "nested more than 2 deep" in str(told)) == ("InvalidSubmodule", True)


async def test_what_a_submodule_lacks_is_told(server: GitServer, deployment: Deployment) -> None:
    server.repository("part").commit({"b": "2"})
    server.repository("shop").commit({"part": Submodule("../part.git", "1" * 40)})
    told = await deployment.refused(server.url("shop"))
    assert (told.reason, server.url("part") in str(told)) == ("CommitNotFound", True)


LFS = pytest.mark.skipif(shutil.which("git-lfs") is None and not os.environ.get("CI"), reason="apt install git-lfs")


@LFS
async def test_large_files_are_fetched(server: GitServer, deployment: Deployment) -> None:
    pointer = server.keep_large(b"a large file")
    server.repository("shop").commit({"assets/.gitattributes": "*.bin filter=lfs -text\n", "assets/x.bin": pointer})
    server.credentials = "ada:sesame-1"
    deployment.secrets = AppSecrets(deploy_user="ada", deploy_token="sesame-1")
    found = await deployment.clone(server.url("shop"))
    assert (found.directory / "assets/x.bin").read_bytes() == b"a large file"
    assert "Fetching 1 file of Git LFS\n" in deployment.said
    assert deployment.holding("sesame") == ""


@LFS
async def test_large_files_that_are_not_there_are_told(server: GitServer, deployment: Deployment) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n"
    server.repository("shop").commit({".gitattributes": "*.bin filter=lfs\n", "x.bin": pointer})
    told = await deployment.refused(server.url("shop"))
    assert (told.reason, str(told).startswith("The files of Git LFS cannot be fetched.")) == ("LargeFilesMissing", True)


@LFS
async def test_large_files_come_from_allowed_places_only(
    server: GitServer, deployment: Deployment, tmp_path: Path
) -> None:
    repository = server.repository("shop")
    repository.commit({".gitattributes": "*.bin filter=lfs\n", "x.bin": server.keep_large(b"x")})
    for config in (
        f"[lfs]\n\turl = file://{tmp_path}/etc\n",
        '[remote "origin"]\n\tlfsurl = ssh://-oProxyCommand=id/x\n',
    ):
        repository.commit({".lfsconfig": config})
        assert (await deployment.refused(server.url("shop"))).reason in ("SchemeRefused", "InvalidRepository")


async def test_a_missing_git_lfs_is_told(
    server: GitServer, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source.shutil, "which", lambda name: None if name == "git-lfs" else f"/usr/bin/{name}")
    server.repository("shop").commit({".gitattributes": "*.bin filter=lfs\n", "x.bin": server.keep_large(b"x")})
    told = await deployment.refused(server.url("shop"))
    assert (told.reason, "is not installed where apps are built" in str(told)) == ("LargeFilesMissing", True)


async def test_nothing_of_the_repository_or_the_machine_runs(
    server: GitServer, deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"touch {tmp_path}/pwned"
    config = f'[filter "x"]\n\tsmudge = {run}\n[core]\n\tfsmonitor = {run}\n\thooksPath = {tmp_path}/hooks\n'
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.gitconfig").write_text(config)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "home/.gitconfig"))
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/post-checkout").write_text(f"#!/bin/sh\n{run}\n")
    (tmp_path / "hooks/post-checkout").chmod(0o755)
    server.repository("shop").commit({".gitattributes": "* filter=x\n", "a": "1", ".gitconfig": config})
    assert ((await deployment.clone(server.url("shop"))).directory / "a").read_text() == "1"
    assert not (tmp_path / "pwned").exists()


async def test_a_repository_that_is_too_large_is_refused_while_it_comes(
    server: GitServer, deployment: Deployment
) -> None:
    server.repository("shop").commit({"a": "1"})
    server.endless.add("shop")
    told = await deployment.refused(server.url("shop"), clone_bytes=8 << 20)
    assert told.reason == "RepositoryTooLarge"
    assert str(told) == "The repository is larger than 8 MiB, which is the most that is cloned."
    # It would go on for 2^40 bytes.
    assert server.sent < 1 << 30


async def test_what_is_small_on_the_wire_and_large_on_the_disk_is_refused_too(
    server: GitServer, deployment: Deployment
) -> None:
    server.repository("shop").commit({"zeros": bytes(64 << 20)})
    assert (await deployment.refused(server.url("shop"), clone_bytes=8 << 20)).reason == "RepositoryTooLarge"


async def test_too_many_files_are_refused(
    server: GitServer, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_MOST_FILES", 50)
    server.repository("shop").commit({f"f{number}": "" for number in range(60)})
    told = await deployment.refused(server.url("shop"))
    assert (told.reason, str(told)) == ("RepositoryTooLarge", "The repository has more than 50 files.")


async def test_a_server_that_never_answers_is_given_up(server: GitServer, deployment: Deployment) -> None:
    server.silent.add("shop")
    told = await deployment.refused(server.url("shop"), clone_deadline=0.5)
    assert told.reason == "CloneTimeout"
    assert str(told).startswith(f"{server.url('shop')} could not be cloned within 0.5 s")


@pytest.mark.parametrize("kind", ["silent", "endless"])
async def test_cancelling_ends_all_of_it(server: GitServer, deployment: Deployment, kind: str) -> None:
    server.repository("shop").commit({"a": "1"})
    getattr(server, kind).add("shop")
    deployment.secrets = AppSecrets(deploy_key="x")
    clone = asyncio.create_task(deployment.clone(server.url("shop")))
    async with asyncio.timeout(30):
        while not (server.waiting.is_set() or server.sent > 1 << 20):
            await asyncio.sleep(0.01)
    assert deployment.processes() != []
    assert stat.S_IMODE((deployment.directory / "deploy-key").stat().st_mode) == 0o600
    clone.cancel()
    async with asyncio.timeout(5):
        with suppress(asyncio.CancelledError):
            await clone
    assert clone.cancelled()
    assert deployment.processes() == []


async def test_what_a_killed_worker_left_is_ended_and_cleared_away(server: GitServer, deployment: Deployment) -> None:
    server.repository("shop").commit({"a": "1"})
    left = await asyncio.create_subprocess_exec(
        "sleep", "60", env={**os.environ, MARKER: str(deployment.directory)}, start_new_session=True
    )
    (deployment.directory / "source/.git").mkdir(parents=True)
    (deployment.directory / "source/.git/index.lock").write_text("")
    (deployment.directory / "deploy-key").write_text("old")
    deployment.secrets = AppSecrets(deploy_key="x")
    await deployment.clone(server.url("shop"))
    assert await left.wait() == -9


async def test_the_log_holds_only_so_much_of_what_a_server_says(
    server: GitServer, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_MOST_SAID", 20)
    server.repository("shop").commit({f"f{number}": str(number) for number in range(60)})
    await deployment.clone(server.url("shop"))
    assert deployment.said.count("git says more than is kept here.\n") == 1
    assert len(deployment.said) <= 4


@pytest.mark.parametrize(
    ("base", "url", "resolved"),
    [
        ("https://h/a/b.git", "../c.git", "https://h/a/c.git"),
        ("https://h/a/b.git/", "./c.git", "https://h/a/b.git/c.git"),
        ("https://h/a/b.git?token=t", "../../c", "https://h/c"),
        ("git@h:a/b.git", "../c.git", "git@h:a/c.git"),
        ("git@h:b.git", "../c.git", "git@h:c.git"),
        ("git@h:/srv/b.git", "../c.git", "git@h:/srv/c.git"),
        ("https://h/a", "../../c.git", ""),
        ("https://h/a", "https://x/y", "https://x/y"),
    ],
)
def test_relative_urls_are_those_of_git(base: str, url: str, resolved: str) -> None:
    assert source._resolve(base, url) == resolved
