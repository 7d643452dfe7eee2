"""The daemon with something wrong in it: `python -m tests.hampered WORD,… <arguments of poller>`.

A word is `WHAT:MODULE:NAME`, with `@N` behind it from the Nth call on (the first by default):

- `hang`: this coroutine function does not return as long as the file $HELD is there.
- `block`: this function does not; it holds its thread up.
- `end`: this coroutine function returns at once.
- `sigterm`: SIGTERM comes when this function is called, once.

Or `set:MODULE:NAME=SECONDS`, for what would take a test too long. It is started where the project
is, so that the program of this checkout runs.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any

Function = Callable[..., Any]


def _held() -> bool:
    return Path(os.environ["HELD"]).exists()


def _hang(original: Function, first: int) -> Function:
    calls = count(1)

    async def hampered(*args: Any, **kwargs: Any) -> Any:
        hangs = next(calls) >= first
        while hangs:
            await asyncio.sleep(0.02)
            hangs = _held()
        return await original(*args, **kwargs)

    return hampered


def _block(original: Function, first: int) -> Function:
    calls = count(1)

    def hampered(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= first:
            while _held():
                time.sleep(0.02)
        return original(*args, **kwargs)

    return hampered


def _end(original: Function, first: int) -> Function:
    calls = count(1)

    async def hampered(*args: Any, **kwargs: Any) -> Any:
        if next(calls) < first:
            return await original(*args, **kwargs)
        return None

    return hampered


def _sigterm(original: Function, first: int) -> Function:
    calls = count(1)

    def hampered(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == first:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    return hampered


KINDS = {"hang": _hang, "block": _block, "end": _end, "sigterm": _sigterm}


def hamper(word: str) -> None:
    """Change the program of this process as the word says."""
    kind, module, target = word.split(":")
    owner: Any = importlib.import_module(module)
    target, _, value = target.partition("=")
    target, _, first = target.partition("@")
    *path, name = target.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    if kind == "set":
        setattr(owner, name, float(value))
    else:
        setattr(owner, name, wraps(original)(KINDS[kind](original, int(first or 1))))


if __name__ == "__main__":
    for each in sys.argv.pop(1).split(","):
        hamper(each)
    from poller.cli import main

    main()
