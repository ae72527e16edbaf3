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


def show(figures: Sequence[Figure]) -> None:
    """Print the figures."""
    table = Table(title="Cluster Code benchmarks (ratios of one run)", title_justify="left")
    for heading in ("measure", "measured", "wanted", "how"):
        table.add_column(heading, overflow="fold")
    for figure in figures:
        table.add_row(figure.name, figure.value, figure.wanted, figure.note)
    Console(width=140).print(table)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, with the smallest and the largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0-1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
