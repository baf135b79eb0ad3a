"""Owns the counters that tell what came of an order: who was overtaken, who had waited for the bound, and how
far predictions were off.

Only jobs that were put in order are looked at, and only runs that are captured: a lane that is FIFO pays
nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from tqe import codec
from tqe.board.board import SlotView
from tqe.errors import FrameError


class Tally:
    """One worker's."""

    def __init__(self, view: SlotView) -> None:
        self._view = view
        self._newest_us: dict[str, int] = {}  # lane → entry of the latest job that was taken

    def taken(
        self, frames: Iterable[bytes], predicted: Container[bytes], bounds: Mapping[str, int], now_us: int
    ) -> None:
        """These run next, in this order. Those in `predicted` were put in order now, those with a score
        before. `bounds`: lane → T in µs; `now_us` by the clock of Redis, as a frame's entry is.

        Overtakes among workers are not seen: each job counts at most once, and rather too few do.
        """
        overtakes = hits = 0
        for frame in frames:
            if frame not in predicted and not _is_scored(frame):
                continue
            try:
                header = codec.peek(frame)
            except FrameError:
                continue  # refused when it is taken in
            lane, entered_us = header.lane, header.enqueued_us
            if entered_us < self._newest_us.get(lane, 0):
                overtakes += header.n
            else:
                self._newest_us[lane] = entered_us
            # From then on nothing that enters can get a score before it.
            if 0 < bounds.get(lane, 0) <= now_us - entered_us:
                hits += header.n
        if overtakes:
            self._view.add("overtakes", overtakes)
        if hits:
            self._view.add("bound_hits", hits)

    def ran(self, predicted_s: float | None, run_s: float) -> None:
        """A run ended well after so long; None if nobody had predicted it."""
        if predicted_s is not None:
            self._view.add("predictions")
            self._view.add("prediction_off_us", round(abs(predicted_s - run_s) * 1e6))


def _is_scored(frame: bytes) -> bool:
    return len(frame) > codec.HEADER_BYTES and bool(frame[2] & codec.SCORED)
