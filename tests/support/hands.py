"""A worker made of hands: tests lease frames and settle them job by job, without a process."""

import json
from collections.abc import Callable
from typing import Any

import redis

from tqe import codec
from tqe.job import IDS
from tqe.store import working
from tqe.store.call import SyncDoor
from tqe.store.keys import Keys
from tqe.store.settling import DEAD, RETRY, Item, Part, SettleBatch

LANES = ("high", "normal", "low")


class Hands:
    """One incarnation. `leases` is what it holds: lease name -> frame."""

    def __init__(self, client: redis.Redis, namespace: str = "tq") -> None:
        self.keys = Keys(namespace)
        self.door = SyncDoor(client)
        self.incarnation = IDS.frame_id().decode()
        self.leases: dict[bytes, bytes] = {}
        self.cancels: dict[bytes, set[int]] = {}
        self.door.run(working.takeover(self.keys, "", self.incarnation, 60_000))

    def fetch(self, jobs: int = 1_000_000) -> "Hands":
        fetcher = working.Fetcher(
            self.keys, self.incarnation, [working.LaneRule(lane) for lane in LANES], 60_000
        )
        reply = self.door.run(fetcher.call(jobs_max=jobs, bytes_max=1 << 24, frames_max=1_000))
        fetched = working.read_fetch(reply)
        for position, frame in enumerate(fetched.frames):
            header = codec.parse(frame)
            self.leases[header.lease] = frame
            if position in fetched.cancels:
                self.cancels[header.lease] = fetched.cancels[position]
        return self

    def jobs(self) -> list[tuple[str, str, Any]]:
        """(id, type, payload) of all jobs that are held."""
        return [
            (f"{codec.parse(frame).frame_id.decode()}.{index}", kind.decode(), json.loads(payload))
            for frame in self.leases.values()
            for index, kind, payload, _, _ in codec.walk(frame)
        ]

    def settle(self, outcome: Callable[[str], tuple[str, Any]]) -> None:
        """End all that is held: `outcome(job id)` is ("C", result), ("X", reason), ("E", None), ("D",
        message) or ("R", delay in ms)."""
        batch = SettleBatch()
        for lease, frame in self.leases.items():
            header = codec.parse(frame)
            tracked = bool(header.flags & codec.TRACKED)
            item = Item(lease, header.frame_id, tracked, 1_700_000_001_000, 1_700_000_002_000)
            for index in range(header.base, header.base + header.n):
                self._add(item, header, frame, index, *outcome(f"{header.frame_id.decode()}.{index}"))
            batch.add(item)
        for call in batch.calls(self.keys, self.incarnation, result_ttl_s=3600, dlq_max=100_000):
            _, marks = self.door.run(call.call)
            assert set(marks.decode()) == {"1"}, marks
        self.leases.clear()

    def _add(self, item: Item, header: codec.Header, frame: bytes, index: int, state: str, told: Any) -> None:
        attempts = header.attempts + 1
        own: dict[str, Any] = {"attempts": attempts}
        if state == "R":
            alone = codec.single(frame, index, attempts=attempts, run=header.run + 1)
            item.parts.append(Part(RETRY, str(told).encode(), alone, header.lane))
            own["error"] = {"reason": "failed", "message": "not yet"}
        elif state == "D":
            error = {"reason": "failed", "message": told}
            alone = codec.single(frame, index, attempts=attempts, run=header.run + 1)
            meta = {
                "type": codec.job_at(frame, index)[0].decode(),
                "lane": header.lane,
                "reason": "failed",
                "error": error,
                "attempts": attempts,
                "crashes": 0,
                "died_at": 1_700_000_002_000,
            }
            item.parts.append(Part(DEAD, json.dumps(meta).encode(), alone, header.lane))
            own["error"] = error
        else:
            item.ranges.append((index, 1, state))
            if state == "C" and isinstance(told, Exception):
                own["error"] = {"reason": "result_too_large", "message": "70000 bytes", "bytes": 70_000}
            elif state == "C":
                own["result"] = told
            elif told is not None:
                own["error"] = {"reason": "cancelled", "message": told}
        item.fields.append((index, json.dumps(own).encode()))
