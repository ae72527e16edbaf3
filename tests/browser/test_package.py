"""cluster-code.js by itself: its tests in Node, its types, and the package that it makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[2] / "gateway" / "static"
TYPESCRIPT = "typescript@5.9.3"
# A program that uses all of the client; it need only compile.
_PROGRAM = """
import { ClusterCode, ClusterCodeError, swap, type ClusterEvent, type SessionPod, type State } from "cluster-code";

const client: ClusterCode = new ClusterCode({
  url: "https://code.example.org",
  auth: swap(async (refused?: string) => (refused ? "new" : "old"), { channels: ["session:*"] }),
  storage: sessionStorage,
});
const show = (event: ClusterEvent) => console.log(event.offset);
const end: () => void = client.subscribe("session:1", show, { since: "e:1" });
client.follow("session:1", async ({ signal }) => void (await fetch("/", { signal })), ({ data }) => console.log(data));
const restarts = ({ data }: ClusterEvent): number[] => (data as SessionPod).containers.map((one) => one.restarts);
client.on("event", (event) => console.log(restarts(event)));
client.on("state", ({ state, delay }) => { const now: State = state; console.log(now, delay?.toFixed()); });
client.on("lost", ({ channels, position }) => console.log(channels.length, position.length));
client.on("error", (error: ClusterCodeError) => console.log(error.code, error.fatal));
// @ts-expect-error There is no such notice.
client.on("nothing", () => {});
// @ts-expect-error A client needs to know who it is.
new ClusterCode({});
client.connect();
end();
client.close();
"""


def tool(name: str) -> str:
    """Where it is. Skips the test when it is missing; with CI set, fails it."""
    if found := shutil.which(name):
        return found
    message = f"no {name}: install it (apt install nodejs npm)"
    if os.environ.get("CI"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a program to its end; its output. Fails with all that it said when it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.random
@pytest.mark.timeout(180)
def test_it_holds_to_the_contract_whatever_happens() -> None:
    print(run(tool("node"), "--test", Path(__file__).with_name("client.test.mjs")))


@pytest.mark.timeout(180)
def test_its_types_are_those_of_its_code_and_the_package_can_be_imported(tmp_path: Path) -> None:
    npm, node = tool("npm"), tool("node")
    packed = json.loads(run(npm, "pack", "--json", "--pack-destination", tmp_path, STATIC))
    assert {file["path"] for file in packed[0]["files"]} == {"cluster-code.js", "cluster-code.d.ts", "package.json"}
    app = tmp_path / "app"
    app.mkdir()
    (app / "package.json").write_text('{"type": "module", "private": true}')
    run(
        npm,
        "install",
        "--no-audit",
        "--no-fund",
        "--prefer-offline",
        tmp_path / packed[0]["filename"],
        TYPESCRIPT,
        cwd=app,
    )

    compiler = [node, app / "node_modules" / "typescript" / "bin" / "tsc", "--strict", "--target", "es2022"]
    compiler += ["--lib", "es2022,dom", "--module", "nodenext", "--moduleResolution", "nodenext"]
    (app / "program.ts").write_text(_PROGRAM)
    run(*compiler, "--noEmit", "program.ts", cwd=app)

    # What the code itself says, by its comments: made anew by the command that CONTRIBUTING.md tells.
    made = ["--allowJs", "--checkJs", "--declaration", "--emitDeclarationOnly", "--outDir", tmp_path]
    run(*compiler, *made, STATIC / "cluster-code.js", cwd=app)
    assert (tmp_path / "cluster-code.d.ts").read_text() == (STATIC / "cluster-code.d.ts").read_text()

    import_it = (
        "import { ClusterCode } from 'cluster-code'; console.log(new ClusterCode({ auth: async () => '' }).state)"
    )
    assert run(node, "--input-type=module", "--eval", import_it, cwd=app) == "idle\n"
