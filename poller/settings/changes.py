"""What differs between two readings of the settings."""

from __future__ import annotations

from poller.settings.tables import Settings

_AT_A_START = ("poller", "redis", "mqtt", "http")


def restart_needed(old: Settings, new: Settings) -> list[str]:
    """The keys that differ and count at a start only, as `table.key`.

    `table` if all of it is new or gone, or the content of a certificate's file is another.
    """
    found: list[str] = []
    for table in _AT_A_START:
        before, after = getattr(old, table), getattr(new, table)
        fields = {} if before is None or after is None else type(after).model_fields
        keys = [
            f"{table}.{field.validation_alias or name}"
            for name, field in fields.items()
            if getattr(before, name) != getattr(after, name)
        ]
        if before != after:
            found += keys or [table]
    return found
