"""The image of a deployment: its repository, built by the Docker engine's own API.

Which builder? The classic one, by default: it is the one whose API takes limits. What runs in its containers has no
more memory than DEPLOY_BUILD_MEMORY, no swap, half the weight of an app when CPUs are short, and at most PIDS processes
(set on each container as the builder announces it: the builder itself knows no such limit). It needs no other channel
to the client, and its layers are images, which labels tell from those of others.

BuildKit builds what only it can build: `RUN --mount`, here-documents, `COPY --link` and `--chmod`, variables such as
TARGETARCH. The engine's API takes no limits for it but the deadline; who wants them sets `cgroup-parent` in the
engine's own configuration. Without a session, which is a gRPC server in the client, it cannot ask any registry that
wants a token ("no active sessions"), not even for public images. So the images that a Dockerfile names are pulled
before, in the ordinary way, which also tells best why one cannot be had; BuildKit takes what is there.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from time import monotonic
from typing import Any

import structlog

from orchestrator.deployments import context, detection, dockerfile, masking
from orchestrator.deployments.contract import Image, Source, StepFailed, Task
from orchestrator.deployments.dockerfile import Instruction
from orchestrator.deployments.files import read_text
from orchestrator.docker import labels
from orchestrator.docker.buildkit import Trace
from orchestrator.docker.builds import Builder
from orchestrator.docker.engine import Engine
from orchestrator.docker.images import pull_failed
from orchestrator.errors import EngineRefused, ImagePullFailed, ProviderUnavailable
from orchestrator.settings import DeploySettings
from orchestrator.text import clean

# Processes of one step of a build.
PIDS = 4096
# Of 1024, what a container has by default.
_CPU_SHARES = 512
# Seconds that the engine gets to end what a build has left.
_END_DEADLINE = 4.0
# Of a Dockerfile, in bytes; what is larger was refused.
_MOST_DOCKERFILE = 1 << 20
# What is told of a failed step: the last lines, the characters of each, of its instruction and of all.
_LINES, _LINE, _INSTRUCTION, _TAIL = 5, 200, 160, 4000
_MESSAGE = 2000

_STEP = re.compile(r"Step \d+/\d+ : (.*)", re.DOTALL)
_RUNNING = re.compile(r" ---> Running in ([0-9a-f]{12,64})\n")
_REMOVING = re.compile(r"Removing intermediate container [0-9a-f]+\n")
# The last one: the command is told before it, and may have the same words.
_EXIT = re.compile(r".*(?:returned a non-zero code|exit code): (\d+)", re.DOTALL)
_KILLED = "137"
_SYNTAX = re.compile(
    r"dockerfile parse error|failed to parse Dockerfile|unknown instruction|no build stage|invalid reference format",
    re.IGNORECASE,
)
_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_METADATA = re.compile(r"\[internal\] load metadata for (\S+)")
# What BuildKit puts before what is wrong, and before the name of a step.
_WRAPPING = re.compile(r"\Afailed to solve(?: with frontend \S+)?: |\Afailed to create LLB definition: |\A\[[^\]]*\] ")

log = structlog.get_logger("deployments")


async def build(engine: Engine, task: Task, source: Source, settings: DeploySettings) -> Image:
    """Build what was checked out, tell the output as it comes, and name the image `task.tag`.

    Its labels: instance, app, deployment, commit. What was built before is used again. Raises ProviderUnavailable, and
    StepFailed: what `detection.detect` and `context.pack` raise; `InvalidDockerfile`; `ImageNotFound`,
    `RegistryUnauthorized` and `RegistryUnreachable` for an image that it is built on; `BuildFailed`, with the
    instruction and the last lines; `OutOfMemory`; `DiskFull`; `BuildTimeout`. Cancelling ends the build at the engine
    within seconds, and leaves no container behind.
    """
    recipe = await asyncio.to_thread(detection.detect, source.directory, task.settings, settings)
    task.say(f"{recipe.found}\n")
    text = recipe.text
    if text is None:
        text = await asyncio.to_thread(read_text, source.directory, recipe.dockerfile, _MOST_DOCKERFILE) or ""
    instructions = await asyncio.to_thread(dockerfile.parse, text)
    building = _Build(engine, task, source, settings, recipe, text, instructions)
    try:
        async with asyncio.timeout(settings.build_deadline) as timer:
            await building.pull()
            return await building.run()
    except TimeoutError:
        if not timer.expired():
            raise
        raise StepFailed(
            "BuildTimeout", f"The build did not end within {settings.build_deadline:g} seconds, and was ended."
        ) from None


async def prune_cache(engine: Engine, settings: DeploySettings, *, app_id: int | None = None, older: timedelta) -> None:
    """Remove what is kept to build an app (None: any app) faster, was made so long ago, and is in no image.

    Also what builds left behind whose engine died; and, for any app, what BuildKit has not used for so long, whoever
    built it: that has no labels. Raises ProviderUnavailable and EngineRefused.
    """
    ours = {labels.INSTANCE: settings.instance, labels.CACHE: "" if app_id is None else str(app_id)}
    begun = (await engine.now()).timestamp() - settings.build_deadline
    for container in await engine.containers.list(ours):
        # Those of apps have it, too, without a value; and those of builds that go on are young.
        if container["Labels"][labels.CACHE] and (app_id is not None or container["Created"] < begun):
            await engine.containers.remove(container["Id"])
    await engine.images.prune(ours, older=older)
    if app_id is None:
        await engine.images.prune_cache(older=older)


class _Build:
    def __init__(
        self,
        engine: Engine,
        task: Task,
        source: Source,
        settings: DeploySettings,
        recipe: detection.Recipe,
        text: str,
        instructions: Sequence[Instruction],
    ) -> None:
        self._engine = engine
        self._task = task
        self._source = source
        self._settings = settings
        self._recipe = recipe
        self._text = text
        self._instructions = instructions
        self._cached = {labels.INSTANCE: settings.instance, labels.CACHE: str(task.app_id)}
        self._trace = Trace()
        # The numbers of lines that we added.
        self._added: Sequence[int] = ()
        # What is under way, since when, and the end of what it said.
        self._instruction = ""
        self._since = monotonic()
        self._tail = ""

    async def pull(self) -> None:
        """Get the images that are built on and that the engine does not have. Raises StepFailed."""
        for image in dockerfile.images(self._instructions, self._task.settings.build_args):
            try:
                if await self._engine.images.inspect(image) is not None:
                    continue
                self._task.say(f"Pulling {image}\n")
                await self._engine.images.pull(image, say=lambda line: self._task.say(f"{line}\n"))
            except ImagePullFailed as error:
                raise StepFailed(error.reason, str(error)) from error
            except EngineRefused as error:
                # It is no name of an image, says the engine; the builder says in which line.
                log.info("image not looked for", image=image, error=str(error))

    async def run(self) -> Image:
        """Build. Raises StepFailed."""
        only = dockerfile.only_buildkit(self._instructions)
        try:
            if only is not None:
                self._task.say(f"Building with BuildKit, since the Dockerfile has {only}.\n")
                await self._drive("buildkit", {})
            else:
                limits = {"memory": self._settings.build_memory, "memswap": self._settings.build_memory}
                await self._drive("classic", {**limits, "cpushares": _CPU_SHARES, "rm": True, "forcerm": True})
        except EngineRefused as error:
            # It ends its builds when it is stopped, which is no fault of theirs.
            await self._engine.connection.stays()
            raise await self._failure(str(error)) from None
        built = await self._engine.images.inspect(self._task.tag)
        if built is None:
            raise StepFailed("BuildFailed", "The engine has built an image, and lost it at once: deploy again.")
        return Image(self._task.tag, built["Id"])

    async def _drive(self, builder: Builder, params: Mapping[str, Any]) -> None:
        task = self._task
        text = self._recipe.text
        marks = {
            labels.INSTANCE: self._settings.instance,
            labels.APP: str(task.app_id),
            labels.DEPLOYMENT: str(task.deployment_id),
            labels.COMMIT: self._source.commit_id,
            labels.CACHE: "",
        }
        if builder == "classic":
            # So that what it leaves behind is known as ours.
            text, self._added = dockerfile.labelled(self._text, self._instructions, self._cached, marks)
            marks = {}
        packed = context.pack(
            self._source.directory,
            self._recipe.dockerfile,
            text=text,
            ignore=self._recipe.ignore,
            mtime=self._source.committed_at,
        )
        asked = {
            "t": task.tag,
            "dockerfile": self._recipe.dockerfile,
            "buildargs": dict(task.settings.build_args),
            "labels": marks,
            **params,
        }
        ended = False
        try:
            async with aclosing(self._engine.builds.run(packed, builder, asked)) as telling:
                await self._listen(telling)
            ended = True
        finally:
            if not ended and builder == "classic":
                await self._end()

    async def _listen(self, telling: AsyncGenerator[dict[str, Any], None]) -> None:
        async for told in telling:
            if "trace" in told:
                for text in self._trace.take(told["trace"]):
                    self._say(text)
            elif "stream" in told:
                await self._take(told["stream"])
            elif "error" in told:
                raise EngineRefused(500, (told.get("errorDetail") or {}).get("message") or told["error"])

    async def _take(self, text: str) -> None:
        """What the classic builder says; a build may say the same, to its own confusion only."""
        if step := _STEP.fullmatch(text):
            self._instruction, self._since, self._tail = step[1].strip(), monotonic(), ""
            self._task.say(text)
        elif running := _RUNNING.fullmatch(text):
            self._task.say(text)
            await self._limit(running[1])
        elif _REMOVING.fullmatch(text):
            self._task.say(text)
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        self._tail = (self._tail + text[-_TAIL:])[-_TAIL:]
        self._task.say(text)

    async def _limit(self, container: str) -> None:
        found = await self._engine.containers.inspect(container)
        if found is None or not labels.matches(found["Config"]["Labels"], self._cached):
            return
        try:
            await self._engine.containers.update(found["Id"], {"PidsLimit": PIDS})
        except EngineRefused as error:
            # It has ended meanwhile, and is about to be removed; what runs without a limit is not let run.
            if error.status != 404 and (await self._engine.containers.inspect(container) or found)["State"]["Running"]:
                raise

    async def _end(self) -> None:
        """Remove the containers that the build has left; the engine does so itself, unless it cannot."""
        try:
            async with asyncio.timeout(_END_DEADLINE):
                for container in await self._engine.containers.list(self._cached):
                    await self._engine.containers.remove(container["Id"])
        except (ProviderUnavailable, EngineRefused, TimeoutError) as error:
            log.warning("build not ended", app=self._task.app_id, error=str(error) or type(error).__name__)

    # What went wrong. ------------------------------------------------------------------------------------------------

    async def _failure(self, message: str) -> StepFailed:
        for _ in range(3):
            message = _WRAPPING.sub("", message)
        exited = _EXIT.match(message)
        if exited is None and _SYNTAX.search(message):
            return StepFailed(
                "InvalidDockerfile",
                self._sentence(f"{self._recipe.dockerfile} cannot be built: {self._lines(message)}."),
            )
        failed, said = self._trace.failed
        tail = _ANSI.sub("", said or self._tail)
        if _FULL.search(message) or _FULL.search(tail):
            return StepFailed("DiskFull", "The Docker engine's disk is full: an operator must make room.")
        if (image := self._base(failed)) is not None:
            unpulled = pull_failed(image, message)
            return StepFailed(unpulled.reason, self._sentence(str(unpulled)))
        instruction = self._instruction or _WRAPPING.sub("", failed)
        instruction = " ".join(instruction.split())
        what = instruction if len(instruction) <= _INSTRUCTION else instruction[:_INSTRUCTION] + "…"
        if exited is None:
            return StepFailed("BuildFailed", self._sentence(f"{what or 'The build'} failed: {message}."))
        code = exited[1]
        most = f"a build may use {self._settings.build_memory >> 20} MiB"
        if await self._ran_out_of_memory():
            return StepFailed("OutOfMemory", self._sentence(f"{what} ran out of memory: {most}."))
        if code == _KILLED:
            # Engines may tell of it later.
            return StepFailed("OutOfMemory", self._sentence(f"{what} was killed, most likely for its memory: {most}."))
        lines = [line[:_LINE] for line in tail.replace("\r", "\n").splitlines() if line.strip()][-_LINES:]
        said = " It said last:\n" + "\n".join(lines) if lines else " It said nothing."
        return StepFailed("BuildFailed", self._sentence(f"{what} failed with exit code {code}.{said}"))

    def _base(self, failed: str) -> str | None:
        """The image that the builder was getting; `failed` is a step of BuildKit."""
        if metadata := _METADATA.search(failed):
            return metadata[1]
        name, *rest = self._instruction.split()[:2] or [""]
        return rest[0] if name.upper() == "FROM" and rest else None

    def _lines(self, message: str) -> str:
        """With the numbers of lines as they are in the repository."""

        def numbered(match: re.Match[str]) -> str:
            number = int(match[1])
            return f"line {number - sum(added <= number for added in self._added)}"

        return re.sub(r"line (\d+)", numbered, message)

    async def _ran_out_of_memory(self) -> bool:
        """Whether the kernel has killed something for its memory since the step began."""
        try:
            now = await self._engine.now()
            happened = await self._engine.happened(
                since=now - timedelta(seconds=monotonic() - self._since + 1),
                until=now,
                filters={"event": ["oom"], "label": labels.selectors(self._cached)},
            )
        except (ProviderUnavailable, EngineRefused):
            return False
        return bool(happened)

    def _sentence(self, text: str) -> str:
        """Without secrets, since a build may print them."""
        masker = masking.Masker([*self._task.secrets.values(), *masking.credentials(self._task.repo_url)])
        return clean(masker.feed(text) + masker.end(), _MESSAGE)
