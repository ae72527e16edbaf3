"""The figures of a run as a table: what was measured, what was wanted, and what came out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure. `wanted` is prose: a benchmark reports and never fails."""

    name: str
    value: str
    wanted: str = ""
    note: str = ""


class Progress:
    """Tells at a terminal what is being done, since a benchmark takes minutes; and prints tables above that."""

    def __init__(self, title: str) -> None:
        self._console = Console(stderr=True, width=140)
        self._status = self._console.status(title)
        self._title = title

    def __enter__(self) -> Progress:
        if not self._console.is_terminal:
            self._console.print(f"{self._title} …")
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def at(self, what: str) -> None:
        """What is being done now."""
        self._status.update(f"{self._title}: {what}")

    def print(self, what: str | Table) -> None:
        """Something that stays."""
        self._console.print(what)


def show(figures: Sequence[Figure]) -> None:
    """Print the figures."""
    table = table_of("Cluster Code benchmarks (ratios of one run)", "measure", "measured", "wanted", "how")
    for figure in figures:
        table.add_row(figure.name, figure.value, figure.wanted, figure.note)
    Console(width=140).print(table)


def table_of(title: str, *headings: str) -> Table:
    """An empty table."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, with the smallest and the largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0-1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
