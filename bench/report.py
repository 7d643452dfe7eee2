"""What was measured, as a table on the terminal and as `docs/performance.md`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.measure import Report, Result


def table(measured: Mapping[str, Report]) -> str:
    """The lines of all rows, aligned."""
    lines = [_HEAD, *(_cells(result) for report in measured.values() for result in report.results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


_HEAD = ("", "what", "figure", "floor", "ratio", "target", "holds")


def _cells(result: Result) -> tuple[str, ...]:
    holds = {True: "yes", False: "no", None: ""}[result.holds]
    return (
        result.target,
        result.what,
        f"{number(result.figure)} {result.unit}",
        "" if result.floor is None else number(result.floor),
        "" if result.ratio is None else f"{result.ratio:.2f}",
        result.goal,
        holds,
    )


def number(value: float) -> str:
    """Three digits that count, thousands apart."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def write(docs: Path, measured: Mapping[str, Report]) -> None:
    """Write the page and its plots."""
