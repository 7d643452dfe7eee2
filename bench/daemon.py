"""The daemon itself: settings for it, and it as a subprocess."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def settings(
    folder: Path,
    sources: str,
    *,
    interval: str,
    redis: str | None = None,
    mqtt: str | None = None,
    rate: str = "1000/s",
) -> Path:
    """A settings file; `sources` is its part with the sources."""
    tables = [
        f'[poller]\ninstance = "bench"\njournal = "{folder}/journal.db"',
        f'[redis]\nurl = "{redis}"' if redis else "",
        f'[mqtt]\nurl = "{mqtt}"' if mqtt else "",
        '[http]\nlisten = ""',
        f'[defaults]\ninterval = "{interval}"\nidle_interval = "{interval}"\nrate = "{rate}"',
        sources,
    ]
    path = folder / "settings.toml"
    path.write_text("\n\n".join(tables), encoding="utf-8")
    return path


def source(name: str, vendor: str, url: str, more: str = "") -> str:
    """A source in a settings file."""
    return f'[sources.{name}]\nvendor = "{vendor}"\nurl = "{url}"\n{more}'


@contextmanager
def running(config: Path) -> Iterator[int]:
    """`poller run` as a subprocess on this process's core; gives its process id."""
    log = config.with_suffix(".log")
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "poller", "run", "-c", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        yield process.pid
        if process.poll() is not None:
            raise RuntimeError(f"the daemon ended: {log.read_text(errors='replace')[-2000:]}")
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
