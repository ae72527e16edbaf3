"""docs/asyncapi.yaml for tests: its schemas, stricter than clients need them, and the official parser."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

PATH = Path(__file__).parents[1] / "docs" / "asyncapi.yaml"
# Beside what pip installs: it comes and goes with that.
_NODE = Path(sys.prefix) / "share" / "cluster-code-tests"
_PARSER = "@asyncapi/parser@3.6"
_SCRIPT = """
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
const { Parser } = createRequire(process.argv[1] + "/")("@asyncapi/parser");
const { document, diagnostics } = await new Parser().parse(readFileSync(process.argv[2], "utf8"));
// 0: error, 1: warning. The rest is advice.
const wrong = diagnostics.filter((one) => one.severity < 2);
for (const one of wrong) console.log(one.code, one.path.join("."), one.message);
console.log(document === undefined ? "unreadable" : `${document.operations().all().length} operations`);
"""


@cache
def document() -> dict[str, Any]:
    """The document, as Python objects."""
    return yaml.safe_load(PATH.read_text())


def schema(name: str) -> dict[str, Any]:
    """A schema of the document."""
    return document()["components"]["schemas"][name]


@cache
def validator(name: str, *, strict: bool = True) -> jsonschema_rs.Draft7Validator:
    """What holds a value against a schema of the document. `strict`: keys that it does not name are wrong."""
    schemas = document()["components"]["schemas"]
    components = {"schemas": {key: _closed(value) if strict else value for key, value in schemas.items()}}
    whole = {"allOf": [{"$ref": f"#/components/schemas/{name}"}], "components": components}
    return jsonschema_rs.Draft7Validator(whole, validate_formats=True)


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(one) for one in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value) for key, value in node.items()}
    if "properties" in node and node.get("type") == "object":
        closed["additionalProperties"] = False
    return closed


@cache
def _by_event_type() -> dict[str, str]:
    """Which schema the messages of an event type have."""
    found = {}
    for name, one in document()["components"]["schemas"].items():
        declared = one.get("properties", {}).get("event_type", {})
        for event_type in declared.get("enum", [declared["const"]] if "const" in declared else []):
            found[event_type] = name
    return found


def check_sent(message: dict[str, Any]) -> str:
    """Raise ValidationError unless the document describes this message of a gateway; returns the schema's name."""
    name = _by_event_type().get(message["event_type"], "Foreign")
    validator(name).validate(message)
    return name


async def parse() -> str:
    """What the official parser says of the document: a line for each error or warning, and the number of operations.

    It is installed from npm once. Skips where that cannot be; fails where everything must be there.
    """
    if not (_NODE / "node_modules" / "@asyncapi" / "parser").is_dir():
        await _install()
    # As a file, since the package is looked for from where the script is.
    return await _run(
        "node", "--input-type=module", "--eval", _SCRIPT.replace("process.argv[1]", f'"{_NODE}"').replace(
            "process.argv[2]", f'"{PATH}"'
        ),
    )  # fmt: skip


async def _install() -> None:
    if shutil.which("npm") is None:
        _missing("npm is not installed: apt install npm")
    partial = _NODE.with_name(f"{_NODE.name}-{os.getpid()}")
    try:
        await _run(
            "npm",
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--prefix",
            str(partial),
            _PARSER,
        )
        shutil.rmtree(_NODE, ignore_errors=True)
        partial.rename(_NODE)
    except ChildProcessError as error:
        _missing(f"npm could not install {_PARSER}: {error}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


async def _run(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(150):
            output, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise ChildProcessError(output.decode()[-2000:])
    return output.decode().strip()


def _missing(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
