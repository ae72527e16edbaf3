"""What is read out of Dockerfiles before they are built."""

from __future__ import annotations

import time

import pytest

from orchestrator.deployments.dockerfile import expand, images, labelled, only_buildkit, parse


def test_instructions_go_over_lines_and_leave_comments_out() -> None:
    text = (
        "# syntax=docker/dockerfile:1\n# A comment\nfrom --platform=linux/amd64 \\\n # another\n\n  alpine:3 AS one\n"
        'RUN a \\\n  b\nCOPY <<-A <<"B" /x\nFROM nothing\nA\nFROM nothing\nB\nCMD c'
    )
    found = [(one.name, list(one.flags), one.rest, one.last_line) for one in parse(text)]
    assert found == [
        ("FROM", [("platform", "linux/amd64")], "alpine:3 AS one", 5),
        ("RUN", [], "a   b", 7),
        ("COPY", [], '<<-A <<"B" /x', 12),
        ("CMD", [], "c", 13),
    ]


def test_another_escape_character_may_be_set() -> None:
    assert [one.rest for one in parse("# escape=`\nFROM a\nRUN b `\nc\nCOPY d \\\nCMD e")] == ["a", "b c", "d \\", "e"]


@pytest.mark.parametrize(
    ("line", "only"),
    [
        ("RUN --mount=type=cache,target=/c make", "RUN --mount"),
        ("RUN <<EOF\nmake\nEOF", "RUN <<"),
        ("COPY --link --from=x a b", "COPY --link"),
        ("ADD --checksum=sha256:1 a b", "ADD --checksum"),
        ("FROM --platform=$BUILDPLATFORM alpine", "$BUILDPLATFORM"),
        ("ARG TARGETARCH", "ARG TARGETARCH"),
        ("COPY --chown=1:1 --from=x a b", None),
        ("RUN echo --mount $((1<<4)) && cat <file", None),
        ("RUN bash -c 'grep x <<< y' && echo $((1 << n)) \"<<EOF\" <<<z", None),
        ("RUN 3<<-EOF cat\nEOF", "RUN <<"),
        ("ARG TARGET", None),
    ],
)
def test_what_only_buildkit_can_is_found(line: str, only: str | None) -> None:
    assert only_buildkit(parse(f"FROM scratch\n{line}\n")) == only


def test_images_are_named_as_arguments_say_and_stages_are_none() -> None:
    text = """\
ARG BASE=alpine
ARG TAG
ARG FULL="${BASE}:${TAG:-3}"
FROM $FULL AS Build
ARG BASE=other
COPY --from=docker.io/library/tool:1 /t /t
RUN --mount=type=bind,from=build,target=/b --mount=from=mounted,target=/m true
FROM build
FROM scratch
COPY --from=0 /a /a
COPY --from=BUILD /a /a
FROM ${BASE:+python}
"""
    found = ["docker.io/library/tool:1", "mounted"]
    assert images(parse(text), {}) == ["alpine:3", *found, "python"]
    assert images(parse(text), {"BASE": "debian", "TAG": "12", "OTHER": "x"}) == ["debian:12", *found, "python"]


def test_variables_without_a_value_are_empty() -> None:
    assert expand(r"$A-${B}-${C:-c}-${A-x}-\$A-${C:+n}", {"A": "a"}) == "a--c-a-$A-"


def test_labels_come_into_each_stage_and_to_the_end_and_lines_are_counted() -> None:
    text = "FROM a \\\n  AS b\nRUN c\nFROM b"
    marked, added = labelled(text, parse(text), {"one": "1", "two": "2"}, {"one": "3"})
    each = 'LABEL "one"="1" "two"="2"'
    assert marked == f'FROM a \\\n  AS b\n{each}\nRUN c\nFROM b\n{each}\nLABEL "one"="3"'
    assert added == [3, 6, 7]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("FROM a\nRUN b \\\n\n# c\n", "RUN b \n\n# c\n"),
        ("FROM a\nRUN b \\ ", "RUN b "),
        ("FROM a\nRUN b \\\\", "RUN b \\\\"),
        ("# escape=`\nFROM a\nRUN b `", "RUN b "),
        ("# escape=`\nFROM a\nRUN b \\", "RUN b \\"),
    ],
)
def test_a_last_line_that_would_go_on_does_not_swallow_the_labels(text: str, end: str) -> None:
    marked, _ = labelled(text, parse(text), {"x": "1"}, {"x": "2"})
    assert marked.endswith(f'LABEL "x"="1"\n{end}\nLABEL "x"="2"')


def test_what_has_no_stage_gets_no_label() -> None:
    assert labelled("# nothing\n", [], {"x": "1"}, {"x": "2"}) == ("# nothing\n", [])


def test_a_hostile_dockerfile_takes_no_time() -> None:
    size = 1 << 18
    for piece in (
        "FROM a\n",
        "${a-",
        "# a=" + " " * 50,
        "<<'a ",
        "FROM ${a:-",
        "RUN \\\n",
        "ARG a=${b-\n",
        "\t \r",
        "--a ",
        "ARG a=$a$a\n",
    ):
        text = f"# x={' ' * 1000}y z\nARG a={piece * (size // len(piece))}\n{piece * (size // len(piece))}"
        began = time.process_time()
        found = parse(text)
        only_buildkit(found)
        images(found, {})
        labelled(text, found, {"a": "b"}, {"a": "b"})
        assert time.process_time() - began < 20


def test_lines_that_double_what_is_before_them_fill_no_memory() -> None:
    text = "ARG A0=xx\n" + "".join(f"ARG A{n + 1}=$A{n}$A{n}\n" for n in range(200))
    assert images(parse(f"{text}FROM b$A200\nFROM c$A1"), {}) == ["b", "cxxxx"]
    flags = parse("RUN " + "--a " * 200_000)
    assert len(flags[0].flags) == 200_000
