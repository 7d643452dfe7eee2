"""P4: events from the journal to Redis."""

from __future__ import annotations

from pathlib import Path

from redis.asyncio import Redis

from bench.events import drafts
from bench.measure import Cost, Report, costing, interleaved, median, on_servers_cores
from bench.product import relaying
from poller.brokers import redis_server
from poller.journal import Journal, open_journal
from poller.known import Commit
from poller.sinks.redis import RedisSink

EVENTS = 20_000
PER_CALL = 200

_APPEND = """
local offset = tonumber(redis.call('GET', KEYS[2]) or '0')
if offset ~= tonumber(ARGV[1]) then return offset end
for i = 3, #ARGV, 2 do
  redis.call('XADD', KEYS[1], '*', 'type', ARGV[i], 'event', ARGV[i + 1])
end
redis.call('SET', KEYS[2], ARGV[2])
return tonumber(ARGV[2])
"""


async def measure(folder: Path) -> Report:
    """Ten sources' events, relayed from the first; against a loop of one script call each 200."""
    with on_servers_cores():
        broker = redis_server(folder)
        broker.start()
    try:
        async with (
            Redis.from_url(broker.url) as client,
            open_journal(folder / "journal.db") as journal,
        ):
            entries = await _filled(journal)
            file_bytes = sum(path.stat().st_size for path in folder.glob("journal.db"))
            append = client.register_script(_APPEND)

            async def bare() -> Cost:
                await client.flushall()
                with costing(EVENTS) as cost:
                    for start in range(0, EVENTS, PER_CALL):
                        call = entries[2 * start : 2 * (start + PER_CALL)]
                        await append(["stream", "cursor"], [start, start + PER_CALL, *call])
                return cost

            async def product() -> Cost:
                await client.flushall()
                await journal.advance(RedisSink.name, 0)
                with costing(EVENTS) as cost:
                    async with relaying(RedisSink(broker.url, journal=journal.uuid), journal) as r:
                        await r.drained()
                return cost

            pairs = await interleaved(bare, product)
    finally:
        broker.stop()
    goal = "≥ 60,000 per core, ≥ 0.4 × a bare script loop"
    return Report(
        results=[
            pairs.result(
                "P4",
                "events, journal → Redis, per second of CPU",
                "events/s",
                lambda cost: cost.per_core_s,
                goal,
                lambda figure, ratio: figure >= 60_000 and ratio >= 0.4,
            ),
            pairs.result("P4", "the same by the clock", "events/s", lambda cost: cost.per_s),
        ],
        facts={
            "redis_per_core_s": median(pairs.product, lambda cost: cost.per_core_s),
            "event_bytes": file_bytes / EVENTS,
        },
    )


async def _filled(journal: Journal) -> list[str | bytes]:
    """Events of ten sources, in turn, as polls would write them; gives type and bytes of each."""
    entries: list[str | bytes] = []
    for start in range(0, EVENTS, 100):
        source = f"source-{start // 100 % 10}"
        events = drafts(source, start, 100)
        await journal.commit(Commit(source=source, events=events))
        for event in events:
            entries += (event.type, event.body)
    return entries
