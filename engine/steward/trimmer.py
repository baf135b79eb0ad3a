"""Removes what is over: snapshots beyond the limit, waiters that went away, cancel requests of ended jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tqe.steward.context import Context
from tqe.store import housekeeping
from tqe.telemetry import logs

_log = logs.get("steward")

AGE_MS: Final = 60_000  # a bucket that closed less than this ago stays: somebody may still read its results
PASSES_MAX: Final = 20


@dataclass(frozen=True)
class TrimReport:
    """Fields of snapshots dropped and known, waiters and cancel requests removed."""

    dropped: int = 0
    fields: int = 0
    waiters: int = 0
    cancels: int = 0


class Trimmer:
    """The trim duty."""

    name = "trim"
    period_s = 5.0

    def __init__(self, context: Context, *, age_ms: int = AGE_MS) -> None:
        self._context = context
        self._age_ms = age_ms
        self.next_in_s: float | None = None
        self._fields: dict[bytes, int] = {}  # closed bucket → its size
        self._total = 0
        self._seen_ms = 0
        self._cancel_cursor = 0
        self._over: dict[bytes, set[int]] = {}

    def run_once(self) -> TrimReport:
        context = self._context
        now_ms = housekeeping.redis_now_ms(context.door)
        context.note_redis_ms(now_ms)
        self._learn()
        dropped = self._trim(now_ms)
        self._forget(now_ms)
        waiters = housekeeping.drop_waiters(context.door, context.keys, now_ms)
        cancels = self._sweep_cancels()
        return TrimReport(dropped, self._total, waiters, cancels)

    def _learn(self) -> None:
        """Sizes of the buckets that closed since the last pass; each is asked for once, not at every pass."""
        context = self._context
        for _ in range(PASSES_MAX):
            found = housekeeping.closed_since(context.door, context.keys, self._seen_ms)
            sizes = housekeeping.fields_of(context.door, [bucket for bucket, _ in found])
            for (bucket, _), size in zip(found, sizes, strict=True):
                self._total += size - self._fields.get(bucket, 0)
                self._fields[bucket] = size
            # Inclusive, since others may close at the same ms; a whole page of one ms is stepped over.
            before, self._seen_ms = self._seen_ms, found[-1][1] if found else self._seen_ms
            if len(found) < housekeeping.BUCKETS_MAX:
                return
            if self._seen_ms == before:
                self._seen_ms += 1

    def _trim(self, now_ms: int) -> int:
        context = self._context
        dropped = 0
        for _ in range(PASSES_MAX):
            if self._total <= context.settings.snapshots_max:
                break
            oldest = housekeeping.closed_before(context.door, context.keys, now_ms - self._age_ms)
            chosen, size = [], 0
            for bucket in oldest:
                if self._total - size <= context.settings.snapshots_max:
                    break
                chosen.append(bucket)
                size += self._fields.get(bucket, 0)
            if not chosen:
                break
            dropped += housekeeping.trim(context.door, context.keys, chosen, age_ms=self._age_ms)
            self._drop_known(chosen)
        if dropped:
            context.count("snapshots_dropped", dropped)
            _log.warning(f"{dropped} status records were dropped: there were more than snapshots_max")
        return dropped

    def _forget(self, now_ms: int) -> None:
        """Names of buckets that Redis has expired, as nobody has written to them for the result TTL."""
        context = self._context
        gone_ms = now_ms - context.settings.result_ttl_s * 1000 - housekeeping.CLOSED_MARGIN_MS
        expired = housekeeping.closed_before(context.door, context.keys, gone_ms)
        housekeeping.trim(context.door, context.keys, expired, age_ms=None)
        self._drop_known(expired)

    def _drop_known(self, buckets: list[bytes]) -> None:
        for bucket in buckets:
            self._total -= self._fields.pop(bucket, 0)

    def _sweep_cancels(self) -> int:
        """Requests whose jobs have ended, found so in two passes: the first may have looked at a stale
        record."""
        context = self._context
        self._cancel_cursor, wanted = housekeeping.cancels(context.door, context.keys, self._cancel_cursor)
        over = housekeeping.settled_cancels(context.door, context.keys, wanted | self._over)
        asked = self._over | wanted
        twice = {one: asked[one] for one in over if self._over.get(one) == asked[one]}
        self._over = {one: asked[one] for one in over if one not in twice}
        return housekeeping.drop_cancels(context.door, context.keys, twice) if twice else 0
