"""Fuzzes what vendors answer: `python -m tests.fuzz.parse`, with libFuzzer's options.

Guided by which lines an answer reaches, it learns which ones are worth spoiling further.
"""

from __future__ import annotations

import sys
from contextlib import suppress

import atheris

with atheris.instrument_imports(include=["poller"]):
    from poller.errors import VendorError
    from poller.vendors import BUILT_IN, load
    from tests import hostile

    VENDORS = [load(name) for name in BUILT_IN]

from tests.fuzz.dice import Dice


def one(data: bytes) -> None:
    """Roll a vendor, a question and an answer; or take the rest of the bytes as its body."""
    dice = Dice(data)
    vendor = VENDORS[dice.getrandbits(8) % len(VENDORS)]
    exchanges = hostile.exchanges(vendor.name)
    exchange = exchanges[dice.getrandbits(8) % len(exchanges)]
    if dice.getrandbits(8) & 3:
        response = hostile.answer(dice, vendor.name, exchange.response)
    else:
        response = hostile.wrapped(dice, dice.rest())
    with suppress(VendorError):
        page = vendor.parse(hostile.options_of(vendor), exchange.request, response, exchange.memory)
        hostile.check_page(vendor, page, exchange.memory)


if __name__ == "__main__":
    for name in BUILT_IN:
        hostile.exchanges(name)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
