"""Which of the files with secrets others may read."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path


def exposed(document: object) -> list[Path]:
    """Files with secrets that settings refer to, and that others on this machine may read."""
    return sorted({file for file in _secret_files(document) if _is_exposed(file)})


def _secret_files(value: object) -> Iterator[Path]:
    if isinstance(value, str) and value.startswith("file:"):
        yield Path(value.removeprefix("file:"))
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _secret_files(part)
    if isinstance(value, dict) and "client_cert" in value:
        yield Path(value.get("client_key") or value["client_cert"])


def _is_exposed(file: Path) -> bool:
    """Whether others may read it; a group may if the file is root's, who chose the group."""
    try:
        found = file.stat()
    except OSError:
        return False
    of_group = found.st_mode & stat.S_IRGRP and found.st_uid != 0
    return bool(of_group or found.st_mode & stat.S_IROTH)
