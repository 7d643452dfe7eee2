"""`simulate` and `schema`: what is of use without a daemon."""

from __future__ import annotations

import asyncio
import signal
import sys
from enum import StrEnum
from typing import Annotated

import orjson
import typer

from poller import app, events, settings, sim
from poller.cli.common import DEFAULT, Config, all_vendors, loop, options_of, usage
from poller.vendors import load, names
from poller.wire import Vendor
from poller.world import World


class SchemaName(StrEnum):
    """What there is a schema of."""

    EVENT = "event"
    SETTINGS = "settings"


def simulate(
    vendor: Annotated[str, typer.Argument(help="datameer, scale, kylin, cdm or dataarts.")],
    port: Annotated[
        int, typer.Option(help="On 127.0.0.1; 0 takes a free one.", min=0, max=65535)
    ] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same jobs.")] = 1,
    jobs: Annotated[int, typer.Option(help="How many jobs there are.", min=1)] = 5,
    pace: Annotated[
        float, typer.Option(help="10 makes everything ten times slower.", min=0.001)
    ] = 1.0,
    faults: Annotated[
        str, typer.Option(help="What goes wrong, with its probability: 503=0.1,torn=0.05.")
    ] = "",
    config: Config = DEFAULT,
) -> None:
    """Serve one vendor's API on loopback, with living fake jobs, until Ctrl-C.

    Faults: 500, 503, 429, 401, html, torn, empty, hang, drop.
    """
    loop(_simulate(_vendor(vendor), port, seed, jobs, pace, faults))


async def _simulate(
    vendor: Vendor, port: int, seed: int, jobs: int, pace: float, faults: str
) -> None:
    world = World(kinds=vendor.kinds, seed=seed, jobs=jobs, now_ms=app.now_ms(), pace=pace)
    served = sim.serve(
        vendor, world, port=port, faults=sim.parse_faults(faults), seed=seed, now_ms=app.now_ms
    )
    async with served as url:
        typer.echo(url)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()


def _vendor(name: str) -> Vendor:
    if name not in names():
        usage(f"simulate: {name!r} is none of {', '.join(names())}")
    return load(name)


def schema(
    what: Annotated[SchemaName, typer.Argument(help="event or settings.")],
    config: Config = DEFAULT,
) -> None:
    """Print a JSON Schema (draft 2020-12)."""
    document = (
        events.schema() if what is SchemaName.EVENT else settings.schema(options_of(all_vendors()))
    )
    sys.stdout.buffer.write(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
