"""What every vendor must do, checked over all of them against their own simulated API."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poller.errors import VendorError
from poller.known import Index, Memory
from poller.runs import ACTIVE, TERMINAL, Job, Seen, State
from poller.vendors import BUILT_IN, load, names
from poller.wire import Options, Page, Request, Response, Vendor
from poller.world import World
from tests.support import answer, read, remember, runs, serve

BEGAN = 1_790_000_000_000
OWN: dict[str, dict[str, str]] = {
    "cdm": {"project_id": "p", "cluster_id": "c"},
    "dataarts": {"project_id": "p", "workspace": "w"},
}

each = pytest.mark.parametrize("vendor", [load(name) for name in BUILT_IN], ids=BUILT_IN)


def options(vendor: Vendor) -> Options:
    return vendor.options(**OWN.get(vendor.name, {}))


def memory(world: World, index: Index | None = None, **fields: Any) -> Memory:
    fields = {"contact_ms": BEGAN, "since_ms": BEGAN - 86_400_000, "rate_per_s": 100.0} | fields
    return Memory(now_ms=world.now_ms, index=index or Index(), **fields)


def living(vendor: Vendor, seed: int = 3, seconds: float = 20, jobs: int = 12) -> World:
    world = World(kinds=vendor.kinds, seed=seed, jobs=jobs, now_ms=BEGAN)
    world.advance(BEGAN + int(seconds * 1000))
    return world


def first_requests(vendor: Vendor, world: World) -> list[Request]:
    return list(vendor.start(options(vendor), memory(world)))


def test_every_vendor_can_be_named() -> None:
    assert names() == sorted(BUILT_IN)
    assert [load(name).name for name in names()] == names()


@each
def test_its_table_of_states_is_in_lower_case_and_reaches_every_ending(vendor: Vendor) -> None:
    assert all(word == word.strip().lower() for word in vendor.words)
    assert {state for state, _ in vendor.words.values()} >= TERMINAL | {State.RUNNING}


@each
@pytest.mark.parametrize("seed", range(5))
def test_what_it_reads_is_what_the_world_holds(vendor: Vendor, seed: int) -> None:
    world = living(vendor, seed)
    seen = {
        row.run_id: row
        for row in runs(read(vendor, options(vendor), memory(world), serve(vendor, world)))
    }
    told = 0
    for run in world.active():
        ids = [run.uuid, str(run.number), run.definition.name]
        row = next((seen[i] for i in ids if i in seen), None)
        if row is None:
            # A run without its real id yet is known by its configuration and start.
            row = next(
                (r for r in seen.values() if r.run_id.startswith(f"{run.definition.number}@")), None
            )
        assert row is not None, run
        assert row.state is run.now.state
        assert row.job.id
        told += 1
    assert told


@each
def test_every_state_that_it_can_show_is_read(vendor: Vendor) -> None:
    states = set()
    world = World(kinds=vendor.kinds, seed=5, jobs=25, now_ms=BEGAN)
    for second in range(1, 60):
        world.advance(BEGAN + 1000 * second)
        pages = read(vendor, options(vendor), memory(world, publish_all=True), serve(vendor, world))
        states |= {row.state for row in runs(pages)}
    assert states == {state for kind in vendor.kinds for state in kind.states}


@each
def test_reading_is_pure(vendor: Vendor) -> None:
    world = living(vendor)
    for request in first_requests(vendor, world):
        response = vendor.render(world, request)
        first = vendor.parse(options(vendor), request, response, memory(world))
        assert vendor.parse(options(vendor), request, response, memory(world)) == first


@each
def test_a_run_that_does_not_exist_is_gone(vendor: Vendor) -> None:
    world = living(vendor)
    for kind in vendor.kinds:
        row = Seen(
            job=Job("424242", "424242"), run_id="424242", state=State.RUNNING, vendor_state="x",
            scope=kind.name if vendor.name != "kylin" else "5",
        )  # fmt: skip
        index = Index()
        known = remember(index, row)
        request = vendor.settle(options(vendor), known)
        assert request is not None
        assert request.by_id
        page = vendor.parse(
            options(vendor), request, vendor.render(world, request), memory(world, index)
        )
        assert list(page.gone) == [("424242", "424242")]
        assert not page.runs


@each
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "rejected"),
        (403, "rejected"),
        (429, "limited"),
        (500, "unreachable"),
        (404, "invalid"),
    ],
)
def test_http_errors_mean_the_same_everywhere(vendor: Vendor, status: int, reason: str) -> None:
    world = living(vendor)
    request = first_requests(vendor, world)[0]
    with pytest.raises(VendorError) as caught:
        vendor.parse(options(vendor), request, answer("", status), memory(world))
    assert caught.value.reason == reason


@each
@pytest.mark.parametrize(
    "body", [b"<html>Log in</html>", b"", b"{", b"[1", b"\xff\xfe", b"null", b'"x"']
)
def test_what_is_not_json_of_its_shape_is_invalid(vendor: Vendor, body: bytes) -> None:
    world = living(vendor)
    request = next(r for r in first_requests(vendor, world) if not r.by_id)
    with pytest.raises(VendorError) as caught:
        vendor.parse(options(vendor), request, Response(status=200, body=body), memory(world))
    assert caught.value.reason == "invalid"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=20,
)


@each
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    body=st.binary(max_size=200) | JSON.map(msgspec.json.encode),
    status=st.sampled_from([200, 200, 200, 400, 500]),
)
def test_hostile_answers_raise_nothing_but_vendor_errors(
    vendor: Vendor, body: bytes, status: int
) -> None:
    world = living(vendor, seconds=5, jobs=2)
    for request in first_requests(vendor, world):
        with suppress(VendorError):
            vendor.parse(options(vendor), request, answer(body, status), memory(world))


@each
def test_unchanged_rows_are_recognised(vendor: Vendor) -> None:
    world = living(vendor, seconds=8)
    index = Index()
    marks: dict[str, str] = {}
    pages: list[Page] = []
    rows: list[Seen] = []
    for last_good_ms in (None, BEGAN + 7000, BEGAN + 7500):
        before = memory(world, index, last_good_ms=last_good_ms, whole=True, marks=marks)
        pages = read(vendor, options(vendor), before, serve(vendor, world))
        rows = runs(pages)
        for row in rows:
            remember(index, row)
        marks |= {name: value for page in pages for name, value in page.marks.items()}
    active = {known.run_id for known in index.active()}
    assert active
    assert not [row for row in rows if row.state in ACTIVE]
    assert {known.run_id for page in pages for known in page.shown} >= active
