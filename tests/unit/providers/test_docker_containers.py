"""What a session's containers are made from."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from orchestrator.errors import ProviderFailure
from orchestrator.providers.contract import Machine, SessionRef, SessionSpec
from orchestrator.providers.docker_containers import Container, Names, containers_of, ref_of
from orchestrator.providers.options import DockerOptions

REF = SessionRef(42, str(UUID(int=1)), "session-42")


def made(
    services: dict[str, Any], *, cores: float = 8, options: dict[str, Any] | None = None, **machine: Any
) -> dict[str, Container]:
    spec = SessionSpec(REF, UUID(int=1), None, None, {"A": "b"}, Machine("m", services=services, **machine))
    return {one.service: one for one in containers_of(spec, DockerOptions.load(options or {}), cores=cores)}


def test_names_are_the_session_s_and_another_instance_s_are_others() -> None:
    usual, other = Names("cluster-code"), Names("staging")
    assert usual.container(REF, "preview") == "session-42-preview"
    assert usual.volume(REF) == "session-42"
    assert usual.network(REF) == f"cluster-code-{UUID(int=1)}"
    assert other.container(REF, "preview") == "staging-session-42-preview"
    assert other.network(REF) == f"staging-cluster-code-{UUID(int=1)}"
    assert ref_of(usual.of_project(REF) | usual.of_session(REF)) == REF
    assert ref_of({}) is None
    assert ref_of({"cluster-code.io/session": "¹"}) is None


def test_limits_are_shared_out_as_in_a_cluster() -> None:
    image = {"image": "x"}
    three = made({"preview": image, "chat": image, "vscode": image}, cpu=2.0, memory_bytes=1000 << 20)
    assert [three[name].config["HostConfig"]["NanoCpus"] for name in three] == [800_000_000, 400_000_000, 800_000_000]
    assert [three[name].config["HostConfig"]["Memory"] >> 20 for name in three] == [400, 200, 400]
    # Who has a limit of its own takes no share.
    own = made({"preview": {"image": "x", "memory": "600Mi"}, "chat": image}, memory_bytes=1000 << 20)
    assert [own[name].config["HostConfig"]["Memory"] >> 20 for name in own] == [600, 400]
    assert "NanoCpus" not in own["chat"].config["HostConfig"]
    # The engine refuses more cores than there are.
    assert made({"preview": image}, cores=2, cpu=16.0)["preview"].config["HostConfig"]["NanoCpus"] == 2_000_000_000
    with pytest.raises(ProviderFailure, match="its memory leaves too little for chat, which takes 6Mi"):
        made({"preview": {"image": "x", "memory": "1000Mi"}, "chat": image}, memory_bytes=1000 << 20)


def test_variables_are_filled_in_as_kubernetes_does() -> None:
    service = {"image": "x", "command": ["serve", "$(PORT)", "$$(PORT)", "$(NONE)", "$HOME"], "env": {"B": "c"}}
    config = made({"preview": service | {"args": ["$(A)$(B)"]}})["preview"].config
    assert config["Entrypoint"] == ["serve", "3000", "$(PORT)", "$(NONE)", "$HOME"]
    assert config["Cmd"] == ["bc"]
    assert set(config["Env"]) >= {"A=b", "B=c", "PORT=3000", "HOST=0.0.0.0", "WORKSPACE=/workspace"}


def test_a_container_is_made_from_all_but_its_port_on_the_machine() -> None:
    one, same = made({"preview": {"image": "x"}})["preview"], made({"preview": {"image": "x"}})["preview"]
    other = made({"preview": {"image": "x", "env": {"N": "1"}}})["preview"]
    assert one.made_from("sha256:1") == same.made_from("sha256:1")
    assert len({one.made_from("sha256:1"), one.made_from("sha256:2"), other.made_from("sha256:1")}) == 3
    config = one.to_create("sha256:1", publish="127.0.0.1", port=20001)
    assert config["HostConfig"]["PortBindings"] == {"3000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "20001"}]}
    assert "PortBindings" not in one.to_create("sha256:1", publish=None, port=20001)["HostConfig"]


def test_a_machine_config_and_a_service_have_the_last_word() -> None:
    options = {"user": "1:2", "cap_add": ["KILL"], "pids_limit": 99, "runtime": "a", "init": False}
    plain = made({"preview": {"image": "x"}}, options=options)["preview"].config
    assert (plain["User"], plain["HostConfig"]["Runtime"], plain["HostConfig"]["Init"]) == ("1:2", "a", False)
    spec = SessionSpec(
        REF, UUID(int=1), None, None, {},
        Machine("m", services={"preview": {"image": "x", "user": "node"}, "chat": {"image": "x"}},
                options={"user": "3:4", "cap_add": [], "pids_limit": 77, "runtime": "b"}),
    )  # fmt: skip
    preview, chat = (one.config for one in containers_of(spec, DockerOptions.load(options), cores=1))
    assert (preview["User"], chat["User"]) == ("node", "3:4")
    host = chat["HostConfig"]
    assert (host["CapAdd"], host["PidsLimit"], host["Runtime"]) == ([], 77, "b")
