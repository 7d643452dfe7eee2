"""What every vendor must do, checked over all of them against their own simulated API."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poller.errors import SettingsError, VendorError
from poller.known import Index, Memory
from poller.runs import ACTIVE, TERMINAL, Job, Ms, Seen, State
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


def test_a_package_adds_a_vendor_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "acme_vendor-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-vendor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[poller.vendors]\nacme = acme_vendor:VENDOR\nno_vendor = acme_vendor:replace\n"
    )
    (tmp_path / "acme_vendor.py").write_text(
        "from dataclasses import replace\n"
        "from poller.vendors.scale import VENDOR as SCALE\n"
        'VENDOR = replace(SCALE, name="acme")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert names() == sorted([*BUILT_IN, "acme", "no_vendor"])
    assert load("acme").name == "acme"
    with pytest.raises(SettingsError, match="vendor: 'no_vendor' is none of acme, cdm, dataarts"):
        load("no_vendor")


def test_a_vendor_that_nobody_brings_is_refused_with_the_names_of_the_others() -> None:
    with pytest.raises(SettingsError) as caught:
        load("acne")
    assert caught.value.problems == [
        "vendor: 'acne' is none of cdm, dataarts, datameer, kylin, scale"
    ]


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
def test_a_run_that_is_as_it_was_but_further_on_tells_how_far(vendor: Vendor) -> None:
    world, index = living(vendor), Index()
    found = runs(read(vendor, options(vendor), memory(world), serve(vendor, world)))
    before = {remember(index, seen).key: seen.progress for seen in reversed(found)}
    world.advance(world.now_ms + 400)
    pages = read(vendor, options(vendor), memory(world, index), serve(vendor, world))
    now = {key: share for page in pages for key, share in page.progress.items()}
    shown = {known.key for page in pages for known in page.shown if known.watched}
    further = [
        (share, now[key])
        for key, share in before.items()
        if share is not None and key in now and key in shown
    ]
    tells = any(share is not None for share in before.values())
    assert any(was < is_ for was, is_ in further) == tells
    assert all(0 <= was <= is_ <= 1 for was, is_ in further)


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


class Watch:
    """Polls a world that stands still and remembers what it was told."""

    def __init__(self, vendor: Vendor) -> None:
        self.vendor = vendor
        self.world = living(vendor, seconds=8)
        self.index = Index()
        self.marks: dict[str, str] = {}

    def poll(self, last_good_ms: Ms | None) -> list[Page]:
        view = memory(
            self.world, self.index, last_good_ms=last_good_ms, whole=True, marks=self.marks
        )
        pages = read(self.vendor, options(self.vendor), view, serve(self.vendor, self.world))
        for row in runs(pages):
            remember(self.index, row)
        self.marks |= {name: value for page in pages for name, value in page.marks.items()}
        return pages


@each
def test_unchanged_rows_are_recognised(vendor: Vendor) -> None:
    watch = Watch(vendor)
    watch.poll(None)
    watch.poll(BEGAN + 7000)
    pages = watch.poll(BEGAN + 7500)
    active = {known.run_id for known in watch.index.active()}
    assert active
    assert not [row for row in runs(pages) if row.state in ACTIVE]
    assert {known.run_id for page in pages for known in page.shown} >= active


@each
def test_a_lasting_page_without_news_says_the_same_at_any_later_time(vendor: Vendor) -> None:
    watch = Watch(vendor)
    watch.poll(None)
    watch.poll(BEGAN + 7000)
    answers = serve(vendor, watch.world)
    view = memory(
        watch.world, watch.index, last_good_ms=BEGAN + 7000, whole=True, marks=watch.marks
    )
    views = [view, *(replace(view, now_ms=view.now_ms + ms) for ms in (1000, 86_400_000))]
    lasting = 0
    for request in vendor.start(options(vendor), views[0]):
        response = answers(request)
        first, *later = (vendor.parse(options(vendor), request, response, view) for view in views)
        if first.lasting and not (first.runs or first.follow):
            lasting += first.marks.items() <= watch.marks.items()
            assert all(page == first for page in later)
    assert lasting or vendor.name in ("cdm", "dataarts")


@each
def test_a_run_that_was_given_up_is_told_again_when_it_is_shown_again(vendor: Vendor) -> None:
    watch = Watch(vendor)
    watch.poll(None)
    watch.poll(BEGAN + 7000)
    active = list(watch.index.active())
    assert active
    for known in active:
        watch.index.put(
            msgspec.structs.replace(known, state=State.UNKNOWN, vendor_state=None, vanished=True),
            BEGAN + 7000,
        )
    told = {row.run_id: row.state for row in runs(watch.poll(BEGAN + 7500))}
    assert {known.run_id: told.get(known.run_id) for known in active} == {
        known.run_id: known.state for known in active
    }
