"""The daemon with a clock that can be stepped: `python -m tests.soak.launch CLOCK WORD …`.

CLOCK is a file of eight bytes: by how many nanoseconds the clock is wrong. WORD is what
`tests.crashing` plants; the arguments of `poller` follow.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from pathlib import Path

from poller.cli import main
from tests.crashing import plant

SIZE = 8


def write_offset(clock: Path, offset_ms: int) -> None:
    """Let the clock of a running daemon be wrong by this from now on."""
    with clock.open("r+b") as file:
        file.write(struct.pack("<q", offset_ms * 1_000_000))


def _follow(clock: Path) -> None:
    true_ns = time.time_ns
    with clock.open("rb") as file:
        offset = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
    time.time_ns = lambda: true_ns() + struct.unpack("<q", offset[:SIZE])[0]


if __name__ == "__main__":
    _follow(Path(sys.argv.pop(1)))
    plant(sys.argv.pop(1))
    main()
