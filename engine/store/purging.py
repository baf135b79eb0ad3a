"""Owns emptying a lane: its frames are leased like a worker's, and settled as cancelled.

There is no script for it: fetch takes frames out in bounded steps, settle tells their records, and if we die
in between, the lease ends and the reaper puts back what was not settled.
"""

from typing import Final

from tqe import codec
from tqe.job import IDS
from tqe.store import working
from tqe.store.keys import Keys
from tqe.store.producing import persist
from tqe.store.settling import Item, SettleBatch
from tqe.store.steps import Steps

LEASE_MS: Final = 30_000
_JOBS_AT_ONCE: Final = 20_000
_FRAMES_AT_ONCE: Final = 256
_BYTES_AT_ONCE: Final = 4 * 1024 * 1024


def purge_lane(keys: Keys, lane: str, *, jobs_max: int, result_ttl_s: int) -> Steps[int]:
    """Cancel what waits in the lane, paused or not, until it is empty or about `jobs_max` jobs are gone: who
    submits meanwhile must not keep this busy for ever. How many it were."""
    incarnation = IDS.frame_id().decode()
    yield from persist(working.takeover(keys, "", incarnation, LEASE_MS))
    fetcher = working.Fetcher(keys, incarnation, [working.LaneRule(lane)], LEASE_MS, even_paused=True)
    purged = 0
    while purged < jobs_max:
        call = fetcher.call(
            jobs_max=min(_JOBS_AT_ONCE, jobs_max - purged),
            bytes_max=_BYTES_AT_ONCE,
            frames_max=_FRAMES_AT_ONCE,
        )
        fetched = working.read_fetch((yield from persist(call)))
        if not fetched.frames:
            break
        batch = SettleBatch()
        for frame in fetched.frames:
            header = codec.parse(frame)
            tracked = bool(header.flags & codec.TRACKED)
            item = Item(header.lease, header.frame_id, tracked, finished_ms=fetched.now_us // 1000)
            item.ranges.append((header.base, header.n, "X"))
            batch.add(item)
            purged += header.n
        for settle in batch.calls(keys, incarnation, result_ttl_s=result_ttl_s, dlq_max=0):
            yield from persist(settle.call)
    yield from persist(working.leave(keys, incarnation))
    return purged
