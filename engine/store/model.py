"""Owns the layout of `p model`: which model is in use, and in which order each lane runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

from tqe.store.keys import Keys

Mode = Literal["fifo", "shadow", "bounded", "sjf"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
DEFAULT_MODE: Final[Mode] = "bounded"

VERSION, SHA256, BOUND_US, MEAN_US, RUNG = b"version", b"sha256", b"bound_us", b"mean_us", b"rung"
CHOSEN: Final = b"chosen"
RUNGS: Final = ("model", "mean", "fifo")  # what may predict; the last: nothing
# What orders while a version is in use, by what the gate chose.
RUNG_OF: Final = {"model": "model", "hierarchical_mean": "mean", "type_mean": "mean"}
SJF_BOUND_US: Final = 30 * 86_400 * 1_000_000  # T of `sjf`: the same rule with a bound that nobody meets
# m in mean durations, as the gate and every evaluation have it: half of it would leave `sjf` more of the long
# jobs in the order of entry (a boost ends at 28.6 m) than anybody has measured.
SCALES: Final[Mapping[Mode, float]] = {"bounded": 0.5, "sjf": 1.0}


def mode_field(lane: str) -> bytes:
    """Field with a lane's mode."""
    return b"mode:" + lane.encode()


class Order(NamedTuple):
    """What a worker has to know: the version in use ('' = none), T and the mean duration in µs (0 = not
    known), modes by lane."""

    version: str
    sha256: str
    bound_us: int
    mean_us: float
    modes: Mapping[str, Mode]
    rung: str = ""  # what predicts: model, mean, fifo (nothing); '' leaves it to the version

    def bound_of(self, lane: str) -> int:
        """By how many µs a score in this lane may lie before the time of entry; 0 is plain FIFO."""
        mode = self.modes.get(lane, "fifo")
        return self.bound_us if mode == "bounded" else SJF_BOUND_US if mode == "sjf" else 0

    def scale_of(self, lane: str) -> float:
        """m in µs for this lane; 0 if it is not known."""
        return self.mean_us * SCALES.get(self.modes.get(lane, "fifo"), 1.0)

    def predicted_s(self, lane: str, boost_us: int) -> float | None:
        """The prediction behind a boost: p = -m ln(boost / T). None for a boost that says nothing."""
        bound_us, scale_us = self.bound_of(lane), self.scale_of(lane)
        if not 0 < boost_us <= bound_us or scale_us <= 0:
            return None
        return -scale_us / 1e6 * math.log(boost_us / bound_us)

    def likely_boost_us(self, lane: str, predicted_s: float | None) -> float:
        """What a worker would prefer such a job by: T * e^(-p/m); 0 where nothing orders."""
        scale_us = self.scale_of(lane)
        if predicted_s is None or scale_us <= 0 or not self.version or self.rung == "fifo":
            return 0.0
        return self.bound_of(lane) * math.exp(-predicted_s * 1e6 / scale_us)


NO_ORDER: Final = Order("", "", 0, 0.0, {})


def order_command(keys: Keys, lanes: Sequence[str]) -> tuple[str | bytes, ...]:
    """The command whose reply `read_order` understands."""
    return ("HMGET", keys.model, VERSION, SHA256, BOUND_US, MEAN_US, RUNG, *map(mode_field, lanes))


def read_order(reply: Sequence[Any], lanes: Sequence[str]) -> Order:
    """Parse the reply. What makes no sense there (a hand may have written it) counts as absent."""
    version, sha256, bound, mean, rung = (
        value.decode("utf-8", "replace") if value else "" for value in reply[:5]
    )
    modes: dict[str, Mode] = {}
    for lane, value in zip(lanes, reply[5:], strict=True):
        told = (value or b"").decode("ascii", "replace")
        modes[lane] = next((mode for mode in MODES if mode == told), DEFAULT_MODE)
    return Order(version, sha256, int(min(_number(bound), SJF_BOUND_US)), _number(mean), modes, rung)


class Standing(NamedTuple):
    """What orders now, for who looks on: the rung in use, the one that the gate chose for the version (they
    differ when the watch has stepped down), modes by lane."""

    rung: str
    chosen: str
    modes: Mapping[str, Mode]


def standing_command(keys: Keys, lanes: Sequence[str]) -> tuple[str | bytes, ...]:
    """The command whose reply `read_standing` understands."""
    return ("HMGET", keys.model, CHOSEN, *order_command(keys, lanes)[2:])


def read_standing(reply: Sequence[Any], lanes: Sequence[str]) -> Standing:
    """Parse the reply, with as little trust as `read_order`. Without a version nothing orders."""
    order = read_order(reply[1:], lanes)
    chosen = RUNG_OF.get((reply[0] or b"").decode("ascii", "replace"), "fifo") if order.version else "fifo"
    rung = order.rung if order.rung in RUNGS else chosen
    return Standing(rung if order.version else "fifo", chosen, order.modes)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 < value < math.inf else 0.0
