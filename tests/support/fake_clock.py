"""A clock that moves only when a test moves it."""


class FakeClock:
    """Fits `tqe.clock.Clock`. Wall time and the two steady clocks start apart, so that mixing them shows."""

    def __init__(self, wall_ms: int = 1_700_000_000_000, monotonic_ns: int = 10**9, suspended_ns: int = 0):
        self._wall_us = wall_ms * 1000
        self._monotonic_ns = monotonic_ns
        self._suspended_ns = suspended_ns

    def wall_ms(self) -> int:
        return self._wall_us // 1000

    def wall_us(self) -> int:
        return self._wall_us

    def monotonic_ns(self) -> int:
        return self._monotonic_ns

    def boottime_ns(self) -> int:
        return self._monotonic_ns + self._suspended_ns

    def advance(self, *, ms: float = 0, us: int = 0) -> None:
        """Time passes: all clocks move together."""
        step_us = int(ms * 1000) + us
        if step_us < 0:
            raise ValueError("time does not pass backwards; use step_wall")
        self._wall_us += step_us
        self._monotonic_ns += step_us * 1000

    def step_wall(self, *, ms: int) -> None:
        """Somebody sets the clock: only wall time moves, either way."""
        self._wall_us += ms * 1000

    def suspend(self, *, ms: int) -> None:
        """The machine sleeps: wall and boot clock move, the monotonic one stands."""
        self._wall_us += ms * 1000
        self._suspended_ns += ms * 1_000_000
