"""Texts of others, fit to be shown: nothing in them ends the line, moves the cursor or hides."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Controls, what turns the direction of writing, halves of characters, ends of lines."""


def plain(text: str) -> str:
    r"""The text with what cannot be seen escaped, such as `\x1b`, `\n` or `\u202e`."""
    return _escaped(text, repr)


def plain_json(text: str) -> str:
    """JSON without line breaks, escaped likewise; it still says the same."""
    return _escaped(text, json.dumps)


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():
        return text
    return "".join(
        escape(char)[1:-1] if unicodedata.category(char) in _UNSEEN else char for char in text
    )
