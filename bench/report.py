"""What was measured, as a table on the terminal and as `docs/performance.md`."""

from __future__ import annotations

import math
import os
import platform
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bench import scale
from bench.measure import Curve, Report, Result


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
    """Write the page and its plots: figures, curves, and the notes with the figures put in."""
    lines = ["# Performance", "", _INTRODUCTION, "", _machine(), ""]
    lines += [_row(_HEAD), _row(["---"] * len(_HEAD))]
    lines += [_row(_cells(result)) for report in measured.values() for result in report.results]
    lines += ["", "## Growth", ""]
    for curve in (curve for report in measured.values() for curve in report.curves):
        (docs / f"{curve.name}.svg").write_text(plot(curve), encoding="utf-8")
        points = ", ".join(f"{x:,.0f}: {number(y)}" for x, y in curve.points)
        lines += [
            f"![{curve.title}]({curve.name}.svg)",
            "",
            f"{curve.title}: {points} {curve.y}.",
            "",
        ]
    facts = {name: value for report in measured.values() for name, value in report.facts.items()}
    notes = (Path(__file__).parent / "notes.md").read_text(encoding="utf-8")
    text = "\n".join(lines) + "\n" + scale.filled(notes, facts)
    (docs / "performance.md").write_text(text, encoding="utf-8")


_INTRODUCTION = """Written by `make bench`; the text of the notes is in `bench/notes.md`.

The product's own objects are measured against the floor, a bare loop in the same file and the same
run. Both take turns; a figure is a median of at least five, a ratio the median of the ratios of
neighbouring turns, so that what slows both down cancels. CPU is that of the measured process with
all its threads. Absolute figures are of this machine; ratios hold elsewhere, too."""


def _machine() -> str:
    modules = ("aiohttp", "aiomqtt", "msgspec", "redis", "uvloop")
    versions = ", ".join(f"{name} {version(name)}" for name in modules)
    model = platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line for line in lines if line.startswith("model name")).split(": ")[1]
    return (
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {os.cpu_count()} × {model}, "
        f"{platform.system()}, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}, {versions}; load {os.getloadavg()[0]:.1f}."
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 560, 260, 70, 34, 210


def plot(curve: Curve) -> str:
    """A curve as SVG: x logarithmic, y from zero."""
    low, high = (math.log10(curve.points[at][0]) for at in (0, -1))
    most = max(y for _, y in curve.points) * 1.15

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - 40), _BOTTOM - y / most * (_BOTTOM - _TOP)

    marks, path = [], []
    for x, y in curve.points:
        at_x, at_y = place(x, y)
        path.append(f"{at_x:.0f},{at_y:.0f}")
        marks += [
            f'<circle cx="{at_x:.0f}" cy="{at_y:.0f}" r="4" fill="#1f6feb"/>',
            f'<text x="{at_x:.0f}" y="{at_y - 9:.0f}" text-anchor="middle">{number(y)}</text>',
            f'<text x="{at_x:.0f}" y="{_BOTTOM + 18}" text-anchor="middle">{x:,.0f}</text>',
        ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            f'<text x="{_LEFT}" y="18" font-size="14">{curve.title}</text>',
            f'<text x="{_WIDTH // 2}" y="{_HEIGHT - 8}" text-anchor="middle">{curve.x}</text>',
            f'<text x="12" y="{_TOP}">{curve.y}</text>',
            f'<path d="M{_LEFT} {_TOP}V{_BOTTOM}H{_WIDTH - 30}" fill="none" stroke="#888"/>',
            f'<polyline points="{" ".join(path)}" fill="none" stroke="#1f6feb" stroke-width="2"/>',
            *marks,
            "</svg>\n",
        ]
    )
