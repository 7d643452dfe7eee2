"""Tells systemd how the daemon is (sd_notify(3)); does nothing where nobody listens."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send one state, such as `READY=1`, `WATCHDOG=1` or `STOPPING=1`."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)
        try:
            channel.sendto(state.encode(), address)
        except OSError:
            return  # the daemon must not end because its supervisor does not listen


def watchdog_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Seconds within which systemd wants a sign of life; None if it wants none of us."""
    wanted = environ.get("WATCHDOG_USEC", "")
    of_us = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(wanted) / 1_000_000 if wanted.isdigit() and int(wanted) and of_us else None
