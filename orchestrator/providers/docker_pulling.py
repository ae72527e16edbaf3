"""The images of a session, pulled where the engine lacks them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from orchestrator.docker.engine import Engine
from orchestrator.errors import ImagePullFailed, ProviderFailure
from orchestrator.providers.contract import Report
from orchestrator.providers.docker_containers import Container

# What people can do.
_MEND = {
    "ImageNotFound": "correct the image in the machine config, or have an operator put it there or at the engine",
    "RegistryUnauthorized": "have an operator give the provider credentials for it",
    "RegistryUnreachable": "have an operator look at the engine's way to the registry, or correct the image",
}
_MEND_ANY = "have an operator look at the engine"


@dataclass(frozen=True, slots=True)
class Pulls:
    """Pulls by one engine. `registries`: `user:password` by the registry's host, `docker.io` for Docker Hub."""

    engine: Engine
    registries: Mapping[str, str] = field(repr=False)

    async def images(self, wanted: Collection[Container], report: Report, say: Callable[[str], None]) -> dict[str, str]:
        """The id of each image, by its name. `say` takes lines of progress.

        Raises ProviderFailure (`ImageNotFound`, `RegistryUnauthorized`, `RegistryUnreachable`), EngineRefused,
        ProviderUnavailable.
        """
        policies: dict[str, set[str]] = {}
        for one in wanted:
            policies.setdefault(one.image, set()).add(one.pull_policy)
        return {image: await self._image(image, said, report, say) for image, said in policies.items()}

    async def _image(self, image: str, policies: set[str], report: Report, say: Callable[[str], None]) -> str:
        found = await self.engine.images.inspect(image)
        if "Always" in policies or (found is None and policies != {"Never"}):
            await report("Pulling", f"Pulling the image {image}.")
            say(f"pulling {image}")
            try:
                await self.engine.images.pull(image, auth=self._credentials(image), say=say)
            except ImagePullFailed as error:
                say(str(error))
                told = str(error).rstrip(".")
                raise ProviderFailure(error.reason, f"{told}; {_MEND.get(error.reason, _MEND_ANY)}.") from error
            found = await self.engine.images.inspect(image)
        if found is None:
            raise ProviderFailure(
                "ImageNotFound",
                f"The Docker engine does not have the image {image}, and `pull_policy` forbids to pull it: correct the"
                " one or the other in the machine config.",
            )
        return str(found["Id"])

    def _credentials(self, image: str) -> dict[str, str] | None:
        first, slash, _ = image.partition("/")
        host = first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"
        user, colon, password = self.registries.get(host, "").partition(":")
        return {"username": user, "password": password, "serveraddress": host} if colon else None
