"""Estimates the clock of Redis from its replies, never ahead of it."""

from typing import Final

from tqe import clock

FRESH_NS: Final = 1_000_000_000
# Two clocks may differ in speed by 0.05 % each while they are being corrected (adjtimex(2)).
_SLOWER: Final = 1_000


class RedisTime:
    """What Redis' TIME is at least. Each reply says what it was when a script ran: before we read it.

    So an estimate lies behind Redis by the age of the reply when it was read, and by 0.1 % of the time since.
    After a second it is forgotten: by then Redis' clock may have been stepped. Threads may share one; an
    estimate that was wrong all the same is noticed by the script, which then puts in its own time.
    """

    __slots__ = ("_known", "_time")

    def __init__(self, time: clock.Clock = clock.SYSTEM) -> None:
        self._time = time
        self._known = (0, -FRESH_NS)  # Redis' time in us, and ours in ns when we read it

    def heard(self, now_us: int) -> None:
        """A reply that was read just now said so."""
        read_ns = self._time.monotonic_ns()
        # Both are at most Redis' time, so the later is closer. A reply that waits while we pack is read late.
        if now_us >= self._at(read_ns):
            self._known = (now_us, read_ns)

    def now_us(self) -> int:
        """Microseconds since 1970 by the clock of Redis or a little less, 0 if it is not known."""
        return self._at(self._time.monotonic_ns())

    def _at(self, ns: int) -> int:
        redis_us, read_ns = self._known
        age_ns = ns - read_ns
        if age_ns >= FRESH_NS:
            return 0
        return redis_us + (age_ns - age_ns // _SLOWER) // 1_000
