"""What a Dockerfile asks for, as far as one must know before it is built. By its reference, and BuildKit's parser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_DIRECTIVE = re.compile(r"#\s*([a-z][a-z0-9]*)\s*=\s*(\S+)\Z", re.IGNORECASE)
# A word of its own, outside of quotes.
_HEREDOC = re.compile(
    r"""\\.|"(?:\\.|[^"\\])*+"|'[^']*+'|(?<!\S)\d*+<<-?(?P<quote>["']?)(?P<word>[A-Za-z_][\w.]*+)(?P=quote)(?!\S)"""
)
_FLAG = re.compile(r"\s*--([a-z][a-z-]*)(?:=(\S*))?(?=\s|\Z)")
_VARIABLE = re.compile(r"\\(.)|\$(?:\{(\w+)(?:(:?[-+])([^}]*))?\}|(\w+))")
# Of the name of an image, with room for variables: what is looked at takes time by the square of its length.
_LONGEST = 4096
# Made up by BuildKit for each platform.
_PLATFORM = re.compile(r"\$\{?(?:TARGET|BUILD)(?:PLATFORM|OS|ARCH|VARIANT)\b")
# Flags that only BuildKit knows, by instruction.
_ONLY_BUILDKIT = {
    "RUN": {"mount", "network", "security", "device"},
    "COPY": {"link", "chmod", "parents", "exclude"},
    "ADD": {"link", "chmod", "parents", "exclude", "checksum", "keep-git-dir", "unpack"},
}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its name in capitals, its flags, the rest, and the number of its last line, from 0."""

    name: str
    flags: Sequence[tuple[str, str]]
    rest: str
    last_line: int
    heredoc: bool


def parse(text: str) -> list[Instruction]:
    """The instructions. What cannot be understood is left for the builder to complain of."""
    lines = text.split("\n")
    escape = _directives(lines).get("escape", "\\")
    found: list[Instruction] = []
    at = 0
    while at < len(lines):
        logical, at = _logical(lines, at, escape)
        name, _, rest = logical.strip().partition(" ")
        if not name:
            continue
        name = name.upper()
        documents = [found["word"] for found in _HEREDOC.finditer(rest) if found["word"]]
        if name not in ("RUN", "COPY", "ADD"):
            documents = []
        for word in documents:
            while at < len(lines) and lines[at].lstrip("\t").rstrip("\r") != word:
                at += 1
            at += 1
        flags, rest = _flags(rest)
        found.append(Instruction(name, flags, rest.strip(), min(at, len(lines)) - 1, bool(documents)))
    return found


def only_buildkit(instructions: Sequence[Instruction]) -> str | None:
    """What in them takes BuildKit, in words; None: every builder can build them."""
    for one in instructions:
        if one.heredoc:
            return f"{one.name} <<"
        for flag, _ in one.flags:
            if flag in _ONLY_BUILDKIT.get(one.name, ()):
                return f"{one.name} --{flag}"
        words = " ".join([*(value for _, value in one.flags), one.rest])
        if one.name == "FROM" and (match := _PLATFORM.search(words)):
            return match[0]
        if one.name == "ARG" and re.match(r"(?:TARGET|BUILD)(?:PLATFORM|OS|ARCH|VARIANT)\b", one.rest):
            return f"ARG {one.rest}"
    return None


def images(instructions: Sequence[Instruction], build_args: Mapping[str, str]) -> list[str]:
    """The images that are built on, or copied from, each once; without those that are made on the way."""
    known: dict[str, str] = {}
    stages: set[str] = {"scratch"}
    found: dict[str, None] = {}
    for one in instructions:
        named = [value for flag, value in one.flags if flag == "from"]
        mounted = [value for flag, value in one.flags if flag == "mount"]
        named += [part[5:] for mount in mounted for part in mount.split(",") if part.startswith("from=")]
        if one.name == "ARG" and len(stages) == 1:
            name, _, default = one.rest.partition("=")
            known[name] = build_args.get(name, expand(default.strip("\"'"), known))
        elif one.name == "FROM" and one.rest:
            image, *alias = one.rest.split()
            named.append(expand(image, known))
            for each in named:
                _note(found, each, stages)
            # Without a name a stage has its number.
            stages.add(alias[1].lower() if len(alias) == 2 else f"#{len(stages)}")
            continue
        for each in named:
            _note(found, each, stages)
    return list(found)


def _note(found: dict[str, None], image: str, stages: set[str]) -> None:
    if image and image.lower() not in stages and not image.isdecimal() and "$" not in image:
        found[image] = None


def labelled(
    text: str, instructions: Sequence[Instruction], each: Mapping[str, str], image: Mapping[str, str]
) -> tuple[str, list[int]]:
    """The Dockerfile with labels of each stage at its beginning, those of the image at the end, and the numbers of the
    lines added, from 1. The builder makes a step of each label that it is given beside the Dockerfile."""
    ends = {one.last_line for one in instructions if one.name == "FROM"}
    marked: list[str] = []
    added: list[int] = []
    for number, line in enumerate(text.split("\n")):
        marked.append(line)
        if number in ends:
            marked.append(_label(each))
            added.append(len(marked))
    if ends:
        _end(marked, _directives(text.split("\n")).get("escape", "\\"))
        marked.append(_label(image))
        added.append(len(marked))
    return "\n".join(marked), added


def _end(lines: list[str], escape: str) -> None:
    """Let the last instruction go on with nothing."""
    for number in reversed(range(len(lines))):
        if (line := lines[number].strip()) and not line.startswith("#"):
            lines[number] = re.sub(rf"(?<!{re.escape(escape)}){re.escape(escape)}[ \t\r]*\Z", "", lines[number])
            return


def _label(labels: Mapping[str, str]) -> str:
    return "LABEL " + " ".join(f'"{name}"="{value}"' for name, value in labels.items())


def expand(text: str, variables: Mapping[str, str]) -> str:
    """With the values of variables in their places; those without one are empty, and so is what is no name, as it is
    and as it becomes: each of twenty lines may double what the line before it has made."""
    if len(text) > _LONGEST:
        return ""

    def value(match: re.Match[str]) -> str:
        escaped, braced, operator, word, plain = match.groups()
        if escaped is not None:
            return str(escaped)
        held = variables.get(braced or plain, "")
        if operator and operator.endswith("-"):
            return held or expand(word, variables)
        if operator:
            return expand(word, variables) if held else ""
        return held

    expanded = _VARIABLE.sub(value, text)
    return expanded if len(expanded) <= _LONGEST else ""


def _directives(lines: Sequence[str]) -> dict[str, str]:
    """What comments at the very beginning set."""
    found: dict[str, str] = {}
    for line in lines:
        match = _DIRECTIVE.match(line.strip())
        if match is None or match[1].lower() in found:
            break
        found[match[1].lower()] = match[2]
    return found


def _logical(lines: Sequence[str], at: int, escape: str) -> tuple[str, int]:
    """The line at `at` with those that it goes on in, without comments; and the number of the next."""
    parts: list[str] = []
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.lstrip().startswith("#") or (parts and not line.strip()):
            if parts:
                continue
            return "", at
        stripped = line.rstrip()
        if not stripped.endswith(escape):
            parts.append(line)
            break
        parts.append(stripped[: -len(escape)])
    return "".join(parts).replace("\t", " "), at


def _flags(rest: str) -> tuple[list[tuple[str, str]], str]:
    flags = []
    at = 0
    while match := _FLAG.match(rest, at):
        flags.append((match[1], match[2] or ""))
        at = match.end()
    return flags, rest[at:]
