"""`python -m tests.soak`: everything goes wrong for a while, and nothing may be lost."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import msgspec
import orjson

from tests.crashing import BUGS
from tests.soak.run import Report, soak


def main() -> None:
    """Run one soak for every seed, report each, and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seeds", default="1,2,3", help="decide what goes wrong (1,2,3)")
    parser.add_argument("--seconds", type=float, default=180, help="for each seed (180)")
    parser.add_argument("--rate", type=float, default=8, help="faults per second (8)")
    parser.add_argument("--planted", default="plain", choices=BUGS, help="a bug to be noticed")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--keep", type=Path, help="keep the brokers' and the daemon's files here")
    asked = parser.parse_args()
    good = True
    for seed in map(int, asked.seeds.split(",")):
        report = asyncio.run(_one(asked, seed))
        good = good and report.is_good
        as_json = asked.json or not sys.stdout.isatty()
        sys.stdout.write((_json if as_json else _text)(report) + "\n")
        sys.stdout.flush()
    sys.exit(not good)


async def _one(asked: argparse.Namespace, seed: int) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if asked.keep is None else asked.keep / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        return await soak(
            folder,
            seed=seed,
            for_s=asked.seconds,
            per_s=asked.rate,
            planted=asked.planted,
            progress=_tell,
        )


def _json(report: Report) -> str:
    return orjson.dumps(msgspec.structs.asdict(report)).decode()


def _text(report: Report) -> str:
    counts = {
        "crashes and cuts": report.points,
        "starts of the daemon": report.lives,
        "deaths of its own": len(report.deaths),
        "true transitions": report.transitions,
        "events in Redis": report.events,
        "events by MQTT": report.messages,
        "of these repeated": report.repeats,
        **report.flaws,
    }
    lines = [f"\nseed {report.seed}, {report.seconds:.0f} s"]
    lines += [f"  {times:6} {kind}" for kind, times in report.faults.items()]
    lines += ["  ------"] + [f"  {times:6} {what}" for what, times in counts.items()]
    lines += ["", *report.what, *report.deaths]
    return "\n".join([*lines, "nothing is wrong" if report.is_good else "SOMETHING IS WRONG"])


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
