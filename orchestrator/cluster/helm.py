"""Helm, run as a child that ends with us: its arguments, its errors in our words.

Values go in over stdin: a command line is for all to see. What helm prints is parsed and never logged as it is, since
it repeats values. No secret may be in the values either: Helm keeps them, and `helm get values` shows them.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from orchestrator.errors import ApiRefused, ClusterCodeError, ProviderFailure, ProviderUnavailable

OLDEST = (3, 8)
# Revisions that Helm keeps of a release. Going back needs one, who looks into what happened some more.
_HISTORY = 5
# Seconds for what asks nobody.
_VERSION_DEADLINE = 30.0
# What names another cluster, place or store than ours, or makes helm print what it does.
_NOT_PASSED_ON = re.compile(r"HELM_(KUBE.*|NAMESPACE|DRIVER|DEBUG|MAX_HISTORY)\Z")

# What helm, client-go and the API server say when something does not answer, or only not now.
_AWAY = re.compile(
    r"cluster unreachable|connection refused|connection reset|i/o timeout|TLS handshake timeout|no such host|x509:"
    r"|context deadline exceeded|client connection lost|\bEOF\b|no route to host|network is unreachable|Unauthorized"
    r"|the server (?:is currently unable|was unable|has asked for the client to provide credentials|is shutting down)"
    r"|apiserver not ready|etcdserver|[Tt]oo many requests|Internal error occurred|the object has been modified",
)
# Of the release's own records: a crash, or somebody's hand, has left them so that helm cannot go on from them.
_BROKEN = re.compile(
    r"another operation .*in progress|has no deployed releases|release: (?:not found|already exists)"
    r"|no revision for release|no release provided"
    r"|secrets \"sh\.helm\.release\.v1\.\S+\" already exists|cannot re-use a name|failed to decode|illegal base64"
    r"|gzip: invalid|invalid character|unexpected end of JSON|has no \d+ version|release name is invalid"
)
_UNPATCHABLE = re.compile(r"cannot patch \"[^\"]*\" with kind Deployment")
# The chart's own mistakes, whatever words they are told in.
_CHART = re.compile(r"\A(?:parse error at |template: |YAML parse error on )")
_FORBIDDEN = re.compile(r"(?:\S+ )?(?:\"[^\"]*\" )?is forbidden: .*", re.DOTALL)
_FOREIGN = re.compile(r"(\S+) \"([^\"]+)\" in namespace \"[^\"]*\" exists and cannot be imported", re.DOTALL)
# What a template calls for with `required` or `fail`.
_TEMPLATE = re.compile(r"execution error at \([^)]*\): (?P<lines>.*)", re.DOTALL)
_SCHEMA = re.compile(r"values don't meet the specifications of the schema.*?:\s*\n\S+:\s*\n(?P<lines>.*)", re.DOTALL)


class ReleaseBroken(ClusterCodeError):
    """What Helm keeps about a release is of no use any more; without it, helm takes over what is there."""


class DeploymentBroken(ReleaseBroken):
    """The Deployment cannot become what it shall be from what it is: without it, helm makes it anew."""


class _Release(msgspec.Struct):
    version: int


class Helm:
    """One helm, pointed at one cluster. Every call is bounded by a deadline in seconds; cancelling one kills helm.

    `launcher` is put before the program: what ties a child's life to ours. With `in_cluster` helm uses the pod's
    service account, else `kubeconfig` (several with `:` between them) and `context`, or what it finds itself.
    """

    def __init__(
        self,
        *,
        program: str | None = None,
        launcher: Sequence[str] = (),
        kubeconfig: str | None = None,
        context: str | None = None,
        in_cluster: bool = False,
    ) -> None:
        self._program = program
        self._launcher = tuple(launcher)
        self._flags = [f"--kube-context={context}"] if context else []
        self._environment = {name: value for name, value in os.environ.items() if not _NOT_PASSED_ON.match(name)}
        if in_cluster:
            # An empty configuration is what makes client-go look for the service account.
            self._environment["KUBECONFIG"] = os.devnull
        elif kubeconfig:
            # Not as a flag, which takes no more than one.
            paths = kubeconfig.split(os.pathsep)
            self._environment["KUBECONFIG"] = os.pathsep.join(str(Path(one).expanduser()) for one in paths)
        self._version: tuple[int, int] | None = None

    async def check(self) -> tuple[int, int]:
        """Helm's version, asked for once. Raises ProviderUnavailable: there is none, or it is too old."""
        if self._version is None:
            out = await self._run("version", "--template={{.Version}}", deadline=_VERSION_DEADLINE)
            found = re.match(rb"v?(\d+)\.(\d+)", out)
            if found is None:
                raise ProviderUnavailable("What is installed as `helm` is not Helm: set the provider's option `helm`.")
            version = int(found[1]), int(found[2])
            if version < OLDEST:
                least, have = (".".join(map(str, one)) for one in (OLDEST, version))
                raise ProviderUnavailable(f"Helm {have} is too old: install Helm {least} or newer.")
            self._version = version
        return self._version

    async def upgrade(
        self, release: str, namespace: str, chart: str, version: str | None, values: bytes, *, deadline: float
    ) -> int:
        """Install the release or bring it up to date, and return its new revision; does not wait for pods.

        `values` are JSON or YAML. Raises ProviderUnavailable, ApiRefused (what the API forbids), ReleaseBroken,
        DeploymentBroken, and ProviderFailure: `InvalidValues`, `ObjectTaken`, `HelmFailed`.
        """
        # Helm 4 applies on the server, where somebody who scaled the Deployment by hand would own its replicas.
        force = ["--force-conflicts"] if (await self.check())[0] >= 4 else []
        out = await self._run(
            "upgrade", release, chart, "--install", f"--namespace={namespace}", "--values=-", "--output=json",
            f"--history-max={_HISTORY}", f"--timeout={deadline:.0f}s", *force,
            *([f"--version={version}"] if version else []),
            stdin=values, deadline=deadline,
        )  # fmt: skip
        try:
            # Warnings may come before it.
            return msgspec.json.decode(out[max(out.find(b"{"), 0) :], type=_Release).version
        except msgspec.DecodeError as error:
            raise ProviderFailure("HelmFailed", "helm upgrade answered something that is no release.") from error

    async def rollback(self, release: str, namespace: str, revision: int, *, deadline: float) -> None:
        """Go back to an earlier revision, as a new one. Raises what `upgrade` does."""
        force = ["--force-conflicts"] if (await self.check())[0] >= 4 else []
        await self._run(
            "rollback", release, str(revision), f"--namespace={namespace}", f"--history-max={_HISTORY}",
            f"--timeout={deadline:.0f}s", *force, deadline=deadline,
        )  # fmt: skip

    async def values(self, release: str, namespace: str, revision: int, *, deadline: float) -> bytes:
        """The values that a revision was made with, as JSON. Raises what `upgrade` does."""
        return await self._run(
            "get", "values", release, f"--revision={revision}", f"--namespace={namespace}", "--output=json",
            deadline=deadline,
        )  # fmt: skip

    async def manifest(self, release: str, namespace: str, *, deadline: float) -> bytes:
        """The objects of the newest revision, as YAML. Raises what `upgrade` does."""
        return await self._run("get", "manifest", release, f"--namespace={namespace}", deadline=deadline)

    async def uninstall(self, release: str, namespace: str, *, deadline: float) -> None:
        """Remove the release and all that is its; does not wait for pods. Raises what `upgrade` does."""
        await self._run(
            "uninstall", release, f"--namespace={namespace}", f"--timeout={deadline:.0f}s", deadline=deadline
        )

    async def _run(self, verb: str, *arguments: str, stdin: bytes = b"", deadline: float) -> bytes:
        flags = [] if verb == "version" else self._flags
        # A file without a name, and no pipe: helm may end before it has read all, or anything, of it.
        with tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            process = await asyncio.create_subprocess_exec(
                *self._launcher, self._find(), verb, *arguments, *flags,
                env=self._environment, start_new_session=True,
                stdin=given, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
        try:
            async with asyncio.timeout(deadline):
                out, err = await process.communicate()
        except TimeoutError:
            raise ProviderUnavailable(f"helm {verb} did not end within {deadline:.0f} seconds.") from None
        finally:
            if process.returncode is None:
                # The whole group: credential plugins are helm's children.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode != 0:
            raise failure(verb, err.decode(errors="replace"))
        return out

    def _find(self) -> str:
        beside = Path(sys.executable).with_name("helm")
        found = shutil.which(self._program or (str(beside) if beside.exists() else "helm"))
        if found is None:
            what = repr(self._program) if self._program else "here"
            raise ProviderUnavailable(
                f"There is no helm {what if self._program is None else 'at ' + what}:"
                " install it, or set the provider's option `helm`."
            )
        return str(Path(found).absolute())


def failure(verb: str, text: str) -> ClusterCodeError:
    """What it means that helm has failed and said this."""
    said = _error_of(text)
    line = " ".join(said.split())
    if foreign := _FOREIGN.search(said):
        return ProviderFailure(
            "ObjectTaken",
            f"The {foreign[1]} {foreign[2]} is in the session's namespace already, and was not made for the session:"
            " remove it, and start again.",
        )
    if refused := _TEMPLATE.search(said) or _SCHEMA.search(said):
        wrong = "; ".join(one.strip().removeprefix("- ") for one in refused["lines"].strip().splitlines())
        return ProviderFailure(
            "InvalidValues",
            f"The chart refuses the session's values: {wrong or line}. Correct the machine config, or the project's"
            " chart values.",
        )
    if forbidden := _FORBIDDEN.search(line):
        return ApiRefused(403, "Forbidden", forbidden[0])
    if _CHART.match(said):
        return ProviderFailure("HelmFailed", f"helm {verb} cannot make anything of the chart: {line}")
    if _UNPATCHABLE.search(said) and not _AWAY.search(said):
        return DeploymentBroken(f"helm {verb}: {line}")
    if _BROKEN.search(said):
        return ReleaseBroken(f"helm {verb}: {line}")
    if _AWAY.search(said):
        return ProviderUnavailable(f"helm {verb} did not get through to the cluster or its chart: {line}")
    return ProviderFailure("HelmFailed", f"helm {verb} failed: {line or 'it did not say why'}")


def _error_of(text: str) -> str:
    """What comes after the last `Error:`, without the words that only say which verb it was."""
    said = text.rpartition("Error: ")[2].strip()
    return re.sub(r"\A(?:INSTALLATION|UPGRADE|UNINSTALL|ROLLBACK) FAILED: ", "", said)
