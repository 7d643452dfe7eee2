"""`python -m bench [P1 …] [--json]`: measure all rows, or some; all of them also write the docs."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import structlog

import bench
from bench import measure, report
from bench.measure import Report
from poller import telemetry
from poller.cli.common import loop

_MOST_S = 400
"""A row that takes longer has gone wrong."""
_DOCS = Path(__file__).parent.parent / "docs"


def _rows() -> dict[str, str]:
    """`P1` → `p1_small_polls`, by number: a row is a module of this package with `measure`."""
    names = [module.name for module in pkgutil.iter_modules(bench.__path__)]
    rows = [name for name in names if name[0] == "p" and name[1].isdigit()]
    rows.sort(key=lambda name: int(name[1:].partition("_")[0]))
    return {name.partition("_")[0].upper(): name for name in rows}


def _alone(row: str) -> Report:
    """Measure one row in a process of its own, so that none finds another's memory."""
    began_s = time.monotonic()
    command = [sys.executable, "-m", "bench", row, "--here"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=_MOST_S)
    print(f"{row}: {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    return msgspec.json.decode(done.stdout, type=Report)


def _here(module: str) -> Report:
    telemetry.configure_logs(level=40)
    measure.pin()
    row = importlib.import_module(f"bench.{module}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        measured: Report = loop(row.measure(Path(folder)))
    return measured


def main() -> None:
    """Measure, print, and after all rows write `docs/performance.md`."""
    rows = _rows()
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {' '.join(rows)}; default all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chosen = [row.upper() for row in arguments.rows] or list(rows)
    if unknown := set(chosen) - set(rows):
        parser.error(f"no such rows: {' '.join(sorted(unknown))}")
    if arguments.here:
        sys.stdout.buffer.write(msgspec.json.encode(_here(rows[chosen[0]])))
        return
    structlog.reset_defaults()
    measured = {row: _alone(row) for row in chosen}
    if arguments.json:
        print(msgspec.json.encode(measured).decode())
    else:
        print(report.table(measured))
    if not arguments.rows:
        report.write(_DOCS, measured)


if __name__ == "__main__":
    main()
