"""Looks once a second at how much work waits; with autoscale, the number of workers follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from tqe.steward.context import Context
from tqe.steward.scaling import Scaler
from tqe.store import backlog, housekeeping
from tqe.store.backlog import Backlog


@dataclass(frozen=True)
class BacklogReport:
    """What waits, in jobs and seconds by lane."""

    backlog: Backlog


class BacklogReader:
    """The backlog duty."""

    name = "backlog"
    period_s = 1.0

    def __init__(self, context: Context) -> None:
        self._context = context
        self.next_in_s: float | None = None
        bounds = context.settings.autoscale
        self._scaler = None if bounds is None else Scaler(context, *bounds)

    def run_once(self) -> BacklogReport:
        context = self._context
        context.backlog = housekeeping.drive(context.door, backlog.look(context.keys, context.settings.lanes))
        if self._scaler is not None:
            self._scaler.follow(context.backlog)
        return BacklogReport(context.backlog)
