"""What an error says of an answer that nobody could read."""

from __future__ import annotations

import pytest

from poller.errors import Invalid


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b"<html>Please log in</html>", "<html>Please log in</html>"),
        (b'{"rows": 5, "password": "hunter2"}', '{"rows": 5, "password": "…"}'),
        (b' [{"name": "a \\"b\\" c", "x":"y"}', ' [{"name": "…", "x":"…"}'),
        (b'["one", "two"]', '["…", "…"]'),
        (b'{"password" : "hunt', '{"password" : "…"'),
        (b'{"password": "hunt\\', '{"password": "…"'),
        (b'{"pass', '{"…"'),
        (b'{"a": "' + b"x" * 1000, '{"a": "…"'),
        (b"x" * 1000, "x" * 256),
        (b"", ""),
    ],
)
def test_the_log_gets_the_start_of_an_answer_but_no_texts_of_json(body: bytes, shown: str) -> None:
    assert Invalid("no", body).body == shown
