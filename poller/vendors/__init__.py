"""The vendors by name: modules of this package, and entry points of the group `poller.vendors`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from poller.errors import SettingsError
from poller.wire import Vendor

BUILT_IN = ("cdm", "dataarts", "datameer", "kylin", "scale")


def names() -> list[str]:
    """Every vendor that can be named in settings, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group="poller.vendors"))})


def load(name: str) -> Vendor:
    """The vendor of that name.

    Raises:
        SettingsError: there is none.
    """
    if name in BUILT_IN:
        vendor: Vendor = import_module(f"poller.vendors.{name}").VENDOR
        return vendor
    for point in entry_points(group="poller.vendors", name=name):
        loaded = point.load()
        if isinstance(loaded, Vendor):
            return loaded
    raise SettingsError([f"vendor: {name!r} is none of {', '.join(names())}"])
