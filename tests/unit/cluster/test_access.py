"""The way into a cluster: what kubeconfigs and service accounts say, and how it is told that they are wrong."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from orchestrator.cluster import access
from orchestrator.cluster.access import Access, Credentials, Kubeconfig, ServiceAccount, find
from orchestrator.errors import ProviderUnavailable

SECRET = "s3cr3t-t0k3n"


def config(user: Mapping[str, Any] | None = None, **cluster: Any) -> dict[str, Any]:
    """A kubeconfig with one context, `here`."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": "http://10.0.0.1:8080/"} | cluster}],
        "users": [{"name": "u", "user": dict(user or {})}],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
    }


def written(folder: Path, content: Any, name: str = "kubeconfig") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def certificate() -> tuple[str, str]:
    """A certificate of itself, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    signed = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1)).sign(key, hashes.SHA256())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return signed.public_bytes(Encoding.PEM).decode(), private.decode()


async def shown(way: Access) -> str | None:
    """The header that the API is shown."""
    return (await way.credentials()).headers.get("Authorization")


async def wrong(way: Access) -> str:
    """How it is told that there is no way in. No secret is in it, nor in where it comes from."""
    with pytest.raises(ProviderUnavailable) as error:
        await way.credentials()
    assert SECRET not in "".join(traceback.format_exception(error.value))
    return str(error.value)


# Kubeconfigs. --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "header"),
    [
        ({}, None),
        ({"token": SECRET}, f"Bearer {SECRET}"),
        ({"username": "ann", "password": "pw"}, f"Basic {base64.b64encode(b'ann:pw').decode()}"),
        ({"auth-provider": {"name": "oidc", "config": {"id-token": SECRET}}}, f"Bearer {SECRET}"),
    ],
)
async def test_a_kubeconfig_says_where_and_with_what(tmp_path: Path, user: dict[str, Any], header: str | None) -> None:
    way = Kubeconfig(str(written(tmp_path, config(user))))
    credentials = await way.credentials()
    assert credentials.server == "http://10.0.0.1:8080"
    assert credentials.ssl is None
    assert credentials.headers.get("Authorization") == header
    assert SECRET not in repr(credentials)
    assert await way.credentials() is credentials


async def test_whom_the_kubeconfig_impersonates_is_told_to_the_api(tmp_path: Path) -> None:
    user = {"token": SECRET, "as": "bob", "as-uid": "7", "as-groups": ["a", "b"], "as-user-extra": {"s/c": ["x"]}}
    credentials = await Kubeconfig(str(written(tmp_path, config(user)))).credentials()
    assert list(credentials.headers.items()) == [
        ("Authorization", f"Bearer {SECRET}"),
        ("Impersonate-User", "bob"),
        ("Impersonate-Uid", "7"),
        ("Impersonate-Group", "a"),
        ("Impersonate-Group", "b"),
        ("Impersonate-Extra-s%2Fc", "x"),
    ]


async def test_a_context_can_be_chosen_and_what_comes_first_counts(tmp_path: Path, monkeypatch: Any) -> None:
    one, two = config({"token": "one"}), config({"token": "two"}, server="http://10.0.0.2")
    two["users"].append({"name": "v", "user": {"tokenFile": "token"}})
    two["contexts"].append({"name": "there", "context": {"cluster": "c", "user": "v"}})
    (tmp_path / "b").mkdir()
    written(tmp_path / "b", "three\n", "token")
    both = f"{written(tmp_path, one)}:{tmp_path / 'missing'}:{written(tmp_path / 'b', two)}"
    assert await shown(Kubeconfig(both)) == "Bearer one"
    # Relative to the file that says so.
    assert await shown(Kubeconfig(both, "there")) == "Bearer three"
    assert (await Kubeconfig(both, "there").credentials()).server == "http://10.0.0.1:8080"
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "b" / "kubeconfig"))
    assert await shown(Kubeconfig()) == "Bearer two"
    assert await shown(Kubeconfig(str(tmp_path / "kubeconfig"))) == "Bearer one"
    assert await wrong(Kubeconfig(both, "nowhere")) == (
        f"The kubeconfig {both} has no context 'nowhere': it has here, there."
    )


async def test_the_first_current_context_counts_and_nothing_said_is_as_good_as_nothing(tmp_path: Path) -> None:
    one = config({"token": "one", "tokenFile": None, "exec": None}, **{"proxy-url": None, "tls-server-name": ""})
    two = config({"token": "two"}) | {"current-context": "there"}
    both = f"{written(tmp_path, one, 'a')}:{written(tmp_path, two, 'b')}"
    assert await shown(Kubeconfig(both)) == "Bearer one"


_TLS = {"server": "https://10.0.0.1"}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: Any) -> Path:
    """Where temporary files are made."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def left(folder: Path) -> list[str]:
    """Files there, and those that were there and are still open."""
    opened = [str(one.readlink()) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    return [*(one.name for one in folder.iterdir()), *(one for one in opened if one.startswith(str(folder)))]


async def test_certificates_in_a_kubeconfig_are_left_in_no_file(tmp_path: Path, temporary: Path) -> None:
    pair = [base64.b64encode(one.encode()).decode() for one in certificate()]
    user = {"client-certificate-data": pair[0], "client-key-data": pair[1]}
    way = Kubeconfig(str(written(tmp_path, config(user, **_TLS, **{"certificate-authority-data": pair[0]}))))
    credentials = await way.credentials()
    assert credentials.ssl is not None
    assert credentials.ssl.cert_store_stats()["x509"] == 1
    assert (await way.renew(credentials)).ssl is not credentials.ssl
    assert left(temporary) == []


async def test_without_a_user_nothing_is_shown_and_servers_are_looked_at(tmp_path: Path) -> None:
    nobody = config(**_TLS) | {"contexts": [{"name": "here", "context": {"cluster": "c"}}]}
    credentials = await Kubeconfig(str(written(tmp_path, nobody))).credentials()
    assert credentials.ssl is not None
    assert credentials.ssl.check_hostname
    assert credentials.ssl.verify_mode is ssl.CERT_REQUIRED
    assert not credentials.headers


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"users:\n- {{token: {SECRET}\n", r"is no YAML \(line 3\)"),
        (config({"token": [SECRET]}), r"is not as it should be: Expected `str \| null`"),
        (config(**{"insecure-skip-tls-verify": "false"}), "is not as it should be: Expected `bool`"),
        ([SECRET], "is not as it should be: correct it"),
        (config() | {"users": [SECRET]}, "is not as it should be: correct it"),
        (config() | {"contexts": [{"name": "here"}]}, "is not as it should be: correct it"),
        ("", "is not as it should be: correct it"),
        (config() | {"current-context": ""}, "has no current-context"),
        (config() | {"contexts": []}, "has no context 'here': it has none"),
        (config() | {"clusters": None}, "has no cluster 'c', which the context 'here' names"),
        (config() | {"users": None}, "has no user 'u', which the context 'here' names"),
        (config(server=f"{SECRET}:8080"), "Not a URL of http or https is the server in"),
        (config(server="http://host:99999999"), "Not a URL of http or https is the server in"),
        (config(**{"proxy-url": SECRET}), "Not a URL of http or https is the proxy-url in"),
        (config(**_TLS, **{"certificate-authority-data": "%"}), "certificate-authority-data that is no base64"),
        (config(**_TLS, **{"certificate-authority-data": "AAAA"}), "authority that is no certificate"),
        (config(**_TLS, **{"certificate-authority": "no"}), r"no cannot be read \(No such file or directory\)"),
        (config({"client-certificate-data": "AAAA", "client-key-data": "AAAA"}, **_TLS), "key that cannot be used"),
        (config({"tokenFile": "no"}), r"no cannot be read \(No such file or directory\)"),
        (config({"tokenFile": os.devnull}), "is empty: it should hold a token"),
        (config({"auth-provider": {"name": "gcp", "config": {"access-token": SECRET}}}), "use a credential plugin"),
    ],
)
async def test_it_is_told_what_is_wrong_with_a_kubeconfig_but_not_what_it_says(
    tmp_path: Path, content: Any, said: str
) -> None:
    path = written(tmp_path, content)
    message = await wrong(Kubeconfig(str(path)))
    assert re.search(said, message), message
    assert str(tmp_path) in message or "/dev/null" in message


async def test_a_kubeconfig_that_is_not_there_may_still_come(tmp_path: Path) -> None:
    way = Kubeconfig(str(tmp_path / "kubeconfig"))
    assert (await wrong(way)).startswith(f"The kubeconfig {tmp_path}/kubeconfig is not there: set KUBECONFIG")
    written(tmp_path, config({"token": SECRET}))
    assert await shown(way) == f"Bearer {SECRET}"


async def test_what_is_refused_is_read_again_once_however_many_ask(tmp_path: Path) -> None:
    path = written(tmp_path, config({"token": "old"}))
    way = Kubeconfig(str(path))
    old = await way.credentials()
    written(tmp_path, config({"token": "new"}))
    assert await way.credentials() is old
    new = await asyncio.gather(*(way.renew(old) for _ in range(10)))
    assert {id(one) for one in new} == {id(new[0])}
    assert new[0].headers["Authorization"] == "Bearer new"
    path.unlink()
    with pytest.raises(ProviderUnavailable):
        await way.renew(new[0])
    # Nobody has refused them to the next.
    assert await way.credentials() is new[0]


async def test_a_token_in_a_file_is_read_again_and_a_missing_one_is_waited_for(
    tmp_path: Path, monkeypatch: Any
) -> None:
    written(tmp_path, "one\n", "token")
    way = Kubeconfig(str(written(tmp_path, config({"tokenFile": "token", "token": "not this"}))))
    assert await shown(way) == "Bearer one"
    written(tmp_path, "two", "token")
    assert await shown(way) == "Bearer one"
    way._due = 0.0
    assert await shown(way) == "Bearer two"
    (tmp_path / "token").unlink()
    way._due = 0.0
    assert await shown(way) == "Bearer two"
    monkeypatch.setattr(access, "TOKEN_AGE", 0.0)
    written(tmp_path, "three", "token")
    way._due = 0.0
    assert await shown(way) == "Bearer three"
    written(tmp_path, "four", "token")
    assert await shown(way) == "Bearer four"


# Service accounts. ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: Any) -> Path:
    """What a pod finds of its service account."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    monkeypatch.setattr(access, "SERVICE_ACCOUNT", tmp_path)
    written(tmp_path, f"{SECRET}\n", "token")
    written(tmp_path, certificate()[0], "ca.crt")
    return tmp_path


async def test_a_pod_uses_its_service_account_and_keeps_its_connections_when_the_token_changes(pod: Path) -> None:
    way = ServiceAccount(pod)
    first = await way.credentials()
    assert first.server == "https://[fd00::1]:6443"
    assert first.headers["Authorization"] == f"Bearer {SECRET}"
    written(pod, "another", "token")
    way._due = 0.0
    second = await way.credentials()
    assert second.headers["Authorization"] == "Bearer another"
    assert second.ssl is first.ssl


async def test_it_is_told_what_a_pod_lacks(pod: Path, monkeypatch: Any) -> None:
    (pod / "ca.crt").unlink()
    assert await wrong(ServiceAccount(pod)) == f"{pod}/ca.crt cannot be read (No such file or directory)."
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    assert "this is no pod" in await wrong(ServiceAccount(pod))


def test_the_way_that_is_named_is_taken_then_the_pods_then_the_users(pod: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    assert find().in_cluster
    assert not find(in_cluster=False).in_cluster
    assert not find("a-file").in_cluster
    assert not find(context="there").in_cluster
    assert find("a-file", in_cluster=True).in_cluster
    monkeypatch.setenv("KUBECONFIG", "a-file")
    assert not find().in_cluster
    monkeypatch.delenv("KUBECONFIG")
    (pod / "token").unlink()
    assert not find().in_cluster


# Credential plugins. -------------------------------------------------------------------------------------------------


_VERSION = "client.authentication.k8s.io/v1"


def plugged(folder: Path, script: str, **more: Any) -> Kubeconfig:
    """A kubeconfig with a plugin that is a script of Python, and counts its runs in `runs`."""
    count = "import os, sys, json\nwith open('%s', 'a') as runs: runs.write('.')\n" % (folder / "runs")
    program = written(folder, f"#!{sys.executable}\n{count}{script}\n", "plugin")
    program.chmod(0o700)
    user = {"exec": {"apiVersion": _VERSION, "command": "./plugin", "args": ["an argument"]} | more}
    cluster = {"certificate-authority-data": "Q0E=", "tls-server-name": "name"}
    return Kubeconfig(str(written(folder, config(user, **cluster))))


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text())


def printing(status: Mapping[str, Any]) -> str:
    return f"print({json.dumps({'apiVersion': _VERSION, 'kind': 'ExecCredential', 'status': dict(status)})!r})"


async def test_a_plugin_gives_the_token_and_is_told_what_it_asks_for(tmp_path: Path) -> None:
    script = (
        "info = json.loads(os.environ['KUBERNETES_EXEC_INFO'])\n"
        "token = '|'.join([sys.argv[1], os.environ['FLAVOUR'], json.dumps(info['spec'])])\n"
        "print(json.dumps({'apiVersion': info['apiVersion'], 'kind': info['kind'], 'status': {'token': token}}))"
    )
    way = plugged(tmp_path, script, env=[{"name": "FLAVOUR", "value": "sweet"}], provideClusterInfo=True)
    argument, flavour, spec = (await shown(way) or "").removeprefix("Bearer ").split("|")
    assert (argument, flavour) == ("an argument", "sweet")
    assert json.loads(spec) == {
        "interactive": False,
        "cluster": {
            "server": "http://10.0.0.1:8080/",
            "tls-server-name": "name",
            "certificate-authority-data": "Q0E=",
        },
    }


async def test_a_plugin_can_ask_nobody_and_may_complain_at_length(tmp_path: Path) -> None:
    script = f"sys.stderr.write('x' * 1_000_000)\nassert sys.stdin.read() == ''\n{printing({'token': SECRET})}"
    assert await shown(plugged(tmp_path, script)) == f"Bearer {SECRET}"


async def test_a_plugin_is_run_again_before_its_credentials_expire_and_when_they_are_refused(tmp_path: Path) -> None:
    at = (datetime.now(UTC) + timedelta(seconds=600)).isoformat()
    way = plugged(tmp_path, printing({"token": SECRET, "expirationTimestamp": at}))
    credentials = await way.credentials()
    assert await way.credentials() is credentials
    assert runs(tmp_path) == 1
    assert 500 < way._due - asyncio.get_running_loop().time() < 541
    way._due = 0.0
    credentials = await way.credentials()
    assert runs(tmp_path) == 2
    await way.renew(credentials)
    assert runs(tmp_path) == 3


@pytest.mark.parametrize(
    ("script", "more", "said"),
    [
        (f"sys.exit('{SECRET}')", {}, "ended with 1. Run kubectl"),
        (f"print('{SECRET}')", {}, "printed something else"),
        (printing({}), {}, "neither a token nor a certificate"),
        (printing({"clientCertificateData": SECRET}), {}, "neither a token nor a certificate"),
        ("", {"apiVersion": "client.authentication.k8s.io/v1alpha1"}, "it must be non-interactive, and of"),
        ("", {"interactiveMode": "Always"}, "it must be non-interactive, and of"),
        ("", {"command": "/no/such", "installHint": "Ask Ann."}, "'/no/such' of The kubeconfig"),
        ("", {"command": "no-such-program", "installHint": "Ask Ann."}, "install it. Ask Ann."),
    ],
)
async def test_a_plugin_that_fails_is_told_of_without_what_it_printed(
    tmp_path: Path, script: str, more: dict[str, Any], said: str
) -> None:
    message = await wrong(plugged(tmp_path, script, **more))
    assert said in message


async def test_a_plugin_that_fails_is_not_run_for_each_request(tmp_path: Path) -> None:
    way = plugged(tmp_path, "sys.exit(1)")
    messages = {await wrong(way) for _ in range(5)}
    assert len(messages) == 1
    assert runs(tmp_path) == 1


async def test_a_plugin_may_give_a_certificate_which_is_left_in_no_file(tmp_path: Path, temporary: Path) -> None:
    shown, key = certificate()
    way = plugged(tmp_path, printing({"clientCertificateData": shown, "clientKeyData": key}))
    ours = config(yaml.safe_load((tmp_path / "kubeconfig").read_text())["users"][0]["user"], **_TLS)
    written(tmp_path, ours)
    credentials = await way.credentials()
    assert credentials.ssl is not None
    assert "Authorization" not in credentials.headers
    assert left(temporary) == []


@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_a_plugin_that_hangs_is_killed(tmp_path: Path, monkeypatch: Any, how: str) -> None:
    marker = tmp_path / "pid"
    script = f"""import subprocess, time
child = subprocess.Popen(['sleep', '1000'])
open('{marker}.new', 'w').write(f'{{os.getpid()}} {{child.pid}}')
os.rename('{marker}.new', '{marker}')
time.sleep(1000)"""
    way = plugged(tmp_path, script)
    if how == "deadline":
        monkeypatch.setattr(access, "DEADLINE", 3.0)
    task = asyncio.create_task(way.credentials())
    async with asyncio.timeout(20):
        while not marker.exists():
            await asyncio.sleep(0.01)
    if how == "cancel":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        with pytest.raises(ProviderUnavailable, match="Gave up after 3 seconds"):
            await task
    async with asyncio.timeout(20):
        while any(_alive(int(pid)) for pid in marker.read_text().split()):
            await asyncio.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


# All of it. ----------------------------------------------------------------------------------------------------------


def test_credentials_show_no_secret() -> None:
    assert repr(Credentials("https://host")) == "Credentials(server='https://host', ssl=None, server_name=None)"


def test_a_large_library_is_loaded_by_nobody_who_does_not_ask_a_cluster() -> None:
    imported = "import sys, scripts.dev, orchestrator.__main__, orchestrator.cluster.client as client"
    made = "from orchestrator.cluster.access import find; client.Cluster(find('nowhere'))"
    program = f"{imported}; {made}; assert 'kubernetes_asyncio' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
