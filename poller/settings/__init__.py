"""Settings: settings.toml with the environment over it, checked as a whole before anything starts.

`values` says how single values are written, `tables` what the file may hold and what the rest of
the package reads, `reading` merges file and environment and gathers every problem, `changes` tells
two readings apart.

Merging is done here and not by pydantic-settings, which knows neither sources whose `-` is written
`_`, nor variables that match no key, nor which variable a wrong value came from.
"""

from poller.settings.changes import restart_needed
from poller.settings.reading import load
from poller.settings.tables import (
    Auth,
    Basic,
    Bearer,
    Daemon,
    Defaults,
    Http,
    HuaweiAkSk,
    HuaweiToken,
    Mqtt,
    NoAuth,
    NoOptions,
    Redis,
    Settings,
    Source,
    Token,
    schema,
)
from poller.settings.values import Seconds, Secret

__all__ = [
    "Auth",
    "Basic",
    "Bearer",
    "Daemon",
    "Defaults",
    "Http",
    "HuaweiAkSk",
    "HuaweiToken",
    "Mqtt",
    "NoAuth",
    "NoOptions",
    "Redis",
    "Seconds",
    "Secret",
    "Settings",
    "Source",
    "Token",
    "load",
    "restart_needed",
    "schema",
]
