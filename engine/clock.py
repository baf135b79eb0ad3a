"""The one place that reads a clock.

Wall time goes into ids and into what people read. Durations and deadlines use the monotonic or the boot
clock: those do not step, and the boot clock also counts while the machine sleeps, so that a lease that
ended during a suspend is seen as ended on waking. Nothing here decides what is due in Redis: scripts ask
Redis for its own TIME.
"""

import time
from typing import Final, Protocol


class Clock(Protocol):
    """What a part of the engine asks for when its tests must move time by hand."""

    def wall_ms(self) -> int: ...
    def wall_us(self) -> int: ...
    def monotonic_ns(self) -> int: ...
    def boottime_ns(self) -> int: ...


def wall_ms() -> int:
    """Milliseconds since 1970 by the wall clock; may step back."""
    return time.time_ns() // 1_000_000


def wall_us() -> int:
    """Microseconds since 1970 by the wall clock; may step back."""
    return time.time_ns() // 1_000


def monotonic_ns() -> int:
    """Nanoseconds that never step back; stands still while the machine is suspended."""
    return time.monotonic_ns()


def boottime_ns() -> int:
    """Nanoseconds since boot, suspends included; the same in every process of the machine."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def process_cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process of this machine, 0 when there is none (clock_getcpuclockid(3))."""
    try:
        return time.clock_gettime_ns(~pid << 3 | 2)
    except OSError:
        return 0


class SystemClock:
    """The real clock, as an object to hand to what takes a `Clock`."""

    __slots__ = ()

    def wall_ms(self) -> int:
        return wall_ms()

    def wall_us(self) -> int:
        return wall_us()

    def monotonic_ns(self) -> int:
        return monotonic_ns()

    def boottime_ns(self) -> int:
        return boottime_ns()


SYSTEM: Final[Clock] = SystemClock()
