"""The API keeps to its own description."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st

from poller.events import schema as event_schema
from poller.runs import State
from poller.web.openapi import document
from poller.web.parameters import cursor
from tests.served import Patient, known, serving

CURSORS = st.builds(cursor, st.tuples(st.integers(0, 1 << 50), st.text(), st.text(), st.text()))
schemathesis.openapi.format("cursor", CURSORS)
API = schemathesis.openapi.from_dict(document()).exclude(path="/api/v1/events")


@contextmanager
def threaded(folder: Path) -> Iterator[str]:
    """Serve from a loop of its own; gives the URL."""
    told: list[str] = []
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serving(folder, Patient()) as here:
            await here.tell(*(known(state.value, state) for state in State))
            told.append(here.url)
            ready.set()
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        yield told[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with threaded(tmp_path_factory.mktemp("openapi")) as url:
        yield url


@API.parametrize()
@hypothesis.settings(max_examples=30, deadline=None)
def test_every_answer_is_as_described(case: schemathesis.Case[Any], base_url: str) -> None:
    # An empty parameter counts as not given, which no schema can say.
    given = [value for value in (case.query or {}).values() for value in _each(value)]
    hypothesis.assume("" not in given)
    case.call_and_validate(base_url=base_url)


def _each(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("state", State)
def test_a_run_is_as_described(state: State, base_url: str) -> None:
    ids = {"source": "a", "job": "j", "run": state.value}
    case = API["/api/v1/runs/{source}/{job}/{run}"]["GET"].Case(path_parameters=ids)
    response = case.call(base_url=base_url)
    assert response.status_code == 200
    case.validate_response(response)


def test_the_document_is_valid() -> None:
    API.validate()


def test_events_are_described_as_the_bus_has_them() -> None:
    """`poller schema event` and the API say the same, but for where they keep what is shared."""
    text = json.dumps(document()["components"]["schemas"])
    schemas = json.loads(text.replace("#/components/schemas/", "#/$defs/"))
    for name, definition in event_schema()["$defs"].items():
        here = schemas[name]
        assert here.get("properties") == definition.get("properties"), name
