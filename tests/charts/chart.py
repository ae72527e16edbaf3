"""The charts as the tests look at them: rendered by helm, with values of `values/`, and what was rendered before.

    python -m tests.charts.chart

renews `golden/` and the tables of values in the charts' READMEs. Read the difference before you commit it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HELM = str(Path(sys.executable).with_name("helm"))
CHARTS = Path(__file__).parents[2] / "charts"
NAMES = ("dev-session-template", "dev-container", "cluster-code")
NAMESPACE = "6f1f9a52-5f0e-4f3b-8a0c-7a2a3f0a1b11"
# What a case is rendered for, unless it names another: `defaults-1.20.yaml`.
RECENT = "1.34.0"

_HERE = Path(__file__).parent
_BEGIN, _END = "<!-- values: python -m tests.charts.chart -->\n", "<!-- end of values -->\n"


@dataclass(frozen=True)
class Case:
    """One file of values, and what it makes of its chart."""

    chart: str
    name: str

    @property
    def values(self) -> Path:
        return _HERE / "values" / self.chart / f"{self.name}.yaml"

    @property
    def golden(self) -> Path:
        return _HERE / "golden" / self.chart / f"{self.name}.yaml"

    @property
    def kubernetes(self) -> str:
        return "1.20.0" if self.name.endswith("-1.20") else RECENT

    def __str__(self) -> str:
        return f"{self.chart}/{self.name}"


CASES = tuple(Case(name, path.stem) for name in NAMES for path in sorted((_HERE / "values" / name).glob("*.yaml")))


def helm(*arguments: str, stdin: str = "", timeout: float = 50) -> subprocess.CompletedProcess[str]:
    """Run helm to its end, whatever it is."""
    return subprocess.run([HELM, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=timeout)


def template(case: Case, **values: Any) -> subprocess.CompletedProcess[str]:
    """Render the chart with the case's values, and these over them: nested mappings."""
    return helm(
        *("template", "session-42", str(CHARTS / case.chart), "--namespace", NAMESPACE),
        *("--kube-version", case.kubernetes, "--values", str(case.values), "--values", "-"),
        stdin=yaml.safe_dump(values),
    )


def rendered(case: Case, **values: Any) -> list[dict[str, Any]]:
    """The objects that the chart becomes."""
    done = template(case, **values) if values else _as_it_is(case)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


@cache
def _as_it_is(case: Case) -> subprocess.CompletedProcess[str]:
    return template(case)


def objects(text: str) -> list[dict[str, Any]]:
    """The objects of a stream of YAML, in an order that tells nothing."""
    found = [one for one in yaml.safe_load_all(text) if one]
    return sorted(found, key=lambda one: (one["kind"], one["metadata"]["name"]))


def only(kind: str, found: list[dict[str, Any]], name: str = "session-42") -> dict[str, Any]:
    """The one of this kind and name."""
    (one,) = [one for one in found if one["kind"] == kind and one["metadata"]["name"] == name]
    return one


def rows(chart: str) -> Iterator[tuple[str, str, str]]:
    """The table of a chart's values: `(key, default, meaning)`, from the comments of its values.yaml.

    A mapping in which keys have comments is a heading. Raises AssertionError for a key that nothing explains.
    """
    text = (CHARTS / chart / "values.yaml").read_text()
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    yield from _rows(node, text.splitlines(), "")


def _rows(node: yaml.MappingNode, lines: list[str], prefix: str) -> Iterator[tuple[str, str, str]]:
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        if path in ("services.chat", "services.vscode"):
            # Said once, of `preview`; that they are alike is a test of its own.
            continue
        comment = _comment(lines, key.start_mark.line, key.start_mark.column)
        if _explained(value, lines):
            if comment:
                yield path, "", comment
            yield from _rows(value, lines, f"{path}.")
        else:
            assert comment, f"{path} has no comment"
            yield path, _flow(value), comment


def _explained(node: yaml.Node, lines: list[str]) -> bool:
    """Whether something in a mapping has a comment."""
    return isinstance(node, yaml.MappingNode) and any(
        _comment(lines, key.start_mark.line, key.start_mark.column) or _explained(value, lines)
        for key, value in node.value
    )


def _comment(lines: list[str], line: int, column: int) -> str:
    said: list[str] = []
    start = " " * column + "# "
    while line > 0 and lines[line - 1].startswith(start):
        line -= 1
        said.insert(0, lines[line].removeprefix(start))
    return " ".join(said)


def _flow(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    text = yaml.serialize(_flowing(node), Dumper=yaml.SafeDumper, width=10_000)
    return text.strip().removesuffix("...").strip()


def _flowing(node: yaml.Node) -> yaml.Node:
    if not isinstance(node, yaml.ScalarNode):
        node.flow_style = True
        for one in node.value:
            for part in one if isinstance(one, tuple) else (one,):
                _flowing(part)
    return node


def table(chart: str) -> str:
    """The README's part about values."""
    lines = ["| Value | Default | Meaning |", "|---|---|---|"]
    others = _values(chart).get("services", {})
    for key, default, meaning in rows(chart):
        path, shown = key, default
        if key.startswith("services.preview."):
            path = "services.*." + key.removeprefix("services.preview.")
            of_each = [_scalar(others[name][key.removeprefix("services.preview.")]) for name in others]
            if len(set(of_each)) > 1:
                shown = " · ".join(of_each)
        written = f"`{shown}`" if shown not in ("", "[]", "{}") else ""
        escaped = meaning.replace("|", "\\|")
        lines.append(f"| `{path}` | {written} | {escaped} |")
    return "\n".join(lines) + "\n"


def _values(chart: str) -> Mapping[str, Any]:
    loaded: Mapping[str, Any] = yaml.safe_load((CHARTS / chart / "values.yaml").read_text())
    return loaded


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def readme(chart: str) -> tuple[Path, str, str]:
    """The README of a chart: where it is, what it says, and what it should say."""
    path = CHARTS / chart / "README.md"
    text = path.read_text()
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert end, f"{path} has no place for the values: {_BEGIN.strip()} {_END.strip()}"
    return path, text, f"{before}{begin}\n{table(chart)}\n{end}{after}"


def renew() -> None:
    """Write down what the charts are now."""
    for case in CASES:
        done = template(case)
        if done.returncode != 0:
            raise SystemExit(f"{case}: {done.stderr}")
        case.golden.parent.mkdir(parents=True, exist_ok=True)
        case.golden.write_text(done.stdout)
    for chart in NAMES:
        path, _, wanted = readme(chart)
        path.write_text(wanted)


if __name__ == "__main__":
    renew()
