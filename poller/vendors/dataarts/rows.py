"""What DataArts' answers hold: words, jobs, batch instances, nodes; and how a run is read of them.

Editions and pages differ in which fields they give, and in how they spell some.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Generic, TypeAlias, TypeVar

import msgspec
from msgspec.structs import replace

from poller.events import rfc3339
from poller.known import Known, Memory
from poller.payload import Table, epoch_ms
from poller.runs import TERMINAL, Job, Ms, Problem, Seen, State
from poller.wire import Words, look_up

WORDS: Words = {
    # real-time jobs and their nodes
    "starting": (State.STARTING, None),
    "init": (State.STARTING, None),
    "normal": (State.RUNNING, None),
    "overload": (State.RUNNING, "overload"),
    "disable": (State.SUSPENDED, None),
    "stopping": (State.STOPPING, None),
    "exception": (State.FAILED, None),
    "abnormal": (State.FAILED, None),
    "stopped": (State.CANCELED, None),
    # both
    "pause": (State.SUSPENDED, None),
    # batch instances and their nodes
    "waiting": (State.QUEUED, None),
    "waiting-confirm": (State.QUEUED, None),
    "running": (State.RUNNING, None),
    "running-exception": (State.RUNNING, "exception"),
    "freeze": (State.SUSPENDED, None),
    "success": (State.SUCCEEDED, None),
    "forcesuccess": (State.SUCCEEDED, "forced"),
    "ignoresuccess": (State.SUCCEEDED, "failure_ignored"),
    "fail": (State.FAILED, None),
    "manual-stop": (State.CANCELED, None),
    "skip-by-depend": (State.CANCELED, "skipped"),
}

_MOST_NODES = 20

R = TypeVar("R")
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Id = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)] | _Name
Stamp: TypeAlias = int | float | str | None


class Row(msgspec.Struct, rename="camel", kw_only=True):
    """What is told of a run."""

    status: _Text | None = None
    plan_time: Stamp = None
    submit_time: Stamp = None
    start_time: Stamp = None
    starttime: Stamp = None
    end_time: Stamp = None
    force_success: bool | None = None
    ignore_success: bool | None = None
    owner: _Text | None = None
    path: _Text | None = None
    instance_type: _Int64 | _Text | None = None
    error_message: str | None = None

    @property
    def state(self) -> State:
        """What its word means."""
        return look_up(WORDS, self.status or "").state

    @property
    def started_ms(self) -> Ms | None:
        """When it started, as it is told."""
        return epoch_ms(self.start_time) or epoch_ms(self.starttime)

    @property
    def ended_ms(self) -> Ms | None:
        """When it ended; None where what is told is the end of the attempt before."""
        ended_ms = epoch_ms(self.end_time) or 0
        return ended_ms if self.state in TERMINAL and ended_ms >= (self.started_ms or 1) else None

    @property
    def fingerprint(self) -> int:
        """Of what a listed row tells; a change of anything else is no news."""
        times = (self.submit_time, self.start_time, self.starttime, self.end_time)
        return hash((self.status, self.force_success, self.ignore_success, *times))


class JobRow(Row, kw_only=True):
    """A job of the list; the status of a batch job is its scheduler's and tells nothing of runs."""

    name: _Name
    status: _Name
    last_instance_status: _Text | None = None
    last_instance_end_time: Stamp = None

    @property
    def ids(self) -> tuple[str, str]:
        """Job id and run id, of a real-time job."""
        return self.name, self.name


class InstanceRow(Row, kw_only=True):
    """A batch instance of the list; in the vendor's older SDK its id is `instancesId`."""

    job_name: _Name
    status: _Name
    instance_id: _Id | None = None
    instances_id: _Id | None = None

    def __post_init__(self) -> None:
        if self.instance_id is None and self.instances_id is None:
            raise ValueError("Object missing required field `instanceId`")

    @property
    def ids(self) -> tuple[str, str]:
        """Job id and run id."""
        return self.job_name, str(self.instance_id or self.instances_id)


class Node(msgspec.Struct, rename="camel"):
    """A node; one without a state of its own tells that of its last instance."""

    name: _Text | None = None
    node_name: _Text | None = None
    status: _Text | None = None
    last_instance_status: _Text | None = None
    last_instance_status_: _Text | None = msgspec.field(default=None, name="LastInstanceStatus")
    log_path: _Text | None = None
    error_message: str | None = None

    @property
    def word(self) -> str:
        """The vendor's word for its condition; empty where none is told."""
        return self.status or self.last_instance_status or self.last_instance_status_ or ""

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or self.node_name or ""

    @property
    def failed(self) -> bool:
        """Whether it is the reason why its run failed."""
        return look_up(WORDS, self.word).state is State.FAILED


class _Jobs(msgspec.Struct, Generic[R]):
    total: int
    jobs: list[R]


class _Instances(msgspec.Struct, Generic[R]):
    total: int
    instances: list[R]


class _Run(Row, Generic[R], kw_only=True):
    """A run's own page."""

    nodes: list[R] | None = None

    @property
    def fingerprint(self) -> int:
        """None: it does not tell all that a listed row is compared by."""
        return 0


JOBS = Table(_Jobs[JobRow], _Jobs[msgspec.Raw], JobRow, lambda page: page.jobs, "$.jobs")
INSTANCES = Table(
    _Instances[InstanceRow],
    _Instances[msgspec.Raw],
    InstanceRow,
    lambda page: page.instances,
    "$.instances",
)
RUN = Table(_Run[Node], _Run[msgspec.Raw], Node, lambda page: page.nodes or [], "$.nodes")

Listed = TypeVar("Listed", JobRow, InstanceRow)


def sift(
    rows: Iterable[Listed], memory: Memory
) -> tuple[list[tuple[Listed, Known | None]], list[Known]]:
    """Rows that tell something new, beside what is known; and what is as it was."""
    news, shown = [], []
    for row in rows:
        known = memory.get(*row.ids)
        if known is not None and known.fingerprint == row.fingerprint and not known.vanished:
            shown.append(known)
        else:
            news.append((row, known))
    return news, shown


def job_of(row: JobRow | InstanceRow) -> Job:
    """The job of a listed row."""
    name, _ = row.ids
    return Job(id=name, name=name, group=row.path, owner=row.owner)


def see(scope: str, job: Job, run_id: str, row: Row, known: Known | None) -> Seen:
    """What a row shows of a run; without `executeTime`: documented in ms, it comes in minutes."""
    state, substate, unmapped = look_up(WORDS, row.status or "")
    started_ms = row.started_ms
    if state is State.STARTING and known is not None and (started_ms or 0) <= (known.last_ms or 0):
        started_ms = None  # it may still be that of the attempt before
    plan_ms, why = epoch_ms(row.plan_time), row.error_message
    detail = {"instance_type": row.instance_type, "plan_time": plan_ms and rfc3339(plan_ms)}
    return Seen(
        job=job,
        run_id=run_id,
        state=state,
        vendor_state=row.status,
        substate=substate,
        queued_ms=epoch_ms(row.submit_time),
        started_ms=started_ms,
        ended_ms=row.ended_ms,
        problem=Problem(None, why) if why and state is State.FAILED else None,
        detail={name: value for name, value in detail.items() if value is not None},
        scope=scope,
        unmapped=unmapped,
        fingerprint=row.fingerprint,
    )


def with_nodes(seen: Seen, nodes: Iterable[Node]) -> Seen:
    """The run with the condition of its nodes, the failed ones first, and why they failed."""
    nodes = sorted(nodes, key=lambda node: not node.failed)[:_MOST_NODES]
    detail = {**seen.detail, **{f"node.{node.called}": node.word or None for node in nodes}}
    if seen.state is not State.FAILED:
        return replace(seen, detail=detail)
    whys = [seen.problem.message] if seen.problem else []
    whys += [
        f"node {node.called}: {node.error_message or node.word}" for node in nodes if node.failed
    ]
    log_path = next((node.log_path for node in nodes if node.log_path), None)
    if log_path:
        detail["log_path"] = log_path
    return replace(seen, detail=detail, problem=Problem(None, "; ".join(whys)) if whys else None)
