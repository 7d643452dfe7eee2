"""Texts of others, fit to be shown."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.terminal import plain, plain_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("load_orders 7", "load_orders 7"),
        ("Größe 😀 作业\u3000一", "Größe 😀 作业\u3000一"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\x9b31m\x85\x7f\x00", r"\x9b31m\x85\x7f\x00"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ufeff\u200b", r"\ufeff\u200b"),
        ("half \ud800", r"half \ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
    ids=ascii,
)
def test_what_cannot_be_seen_is_escaped(text: str, shown: str) -> None:
    assert plain(text) == shown


SAFE = st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"])


@given(st.text())
def test_nothing_is_left_that_ends_a_line_or_moves_a_cursor(text: str) -> None:
    shown = plain(text)
    assert {unicodedata.category(char) for char in shown}.isdisjoint({"Cc", "Cf", "Cs"})
    assert len(shown.splitlines()) <= 1


@given(st.text(SAFE))
def test_what_can_be_seen_is_left_alone(text: str) -> None:
    assert plain(text) == text


@given(st.dictionaries(st.text(), st.text() | st.lists(st.text())))
def test_json_says_the_same_on_one_line_whoever_splits_it(document: dict[str, object]) -> None:
    text = json.dumps(document, ensure_ascii=False)
    shown = plain_json(text)
    assert json.loads(shown) == document
    assert len(shown.splitlines()) == 1
    assert {unicodedata.category(char) for char in shown}.isdisjoint({"Cc", "Cf", "Cs"})
