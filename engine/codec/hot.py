"""The hot path's parts: the worker's slot of the board, its tasks, its leases, its runner. Compiled, else the
plain-Python twin.

They write the same board. The twin's stores are not ordered against a kill as the compiled ones are, so that
after a crash of a worker that ran on it the steward may run finished jobs again: it serves where no compiler
was, not for speed or exactness.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqe import _fast as _backend
else:
    try:
        from tqe import _fast as _backend
    except ImportError:
        from tqe import _pure_board as _backend

AsyncJob = _backend.AsyncJob
Entry = _backend.Entry
Lease = _backend.Lease
Runner = _backend.Runner
Slot = _backend.Slot

MODES = {"fields": 0, "struct": 1, "kwargs": 2}
RUN_ENDED = _backend.RUN_ENDED
RUN_TIME = _backend.RUN_TIME
RUN_STOP = _backend.RUN_STOP
RUN_FULL = _backend.RUN_FULL
RUN_LEASE_END = _backend.RUN_LEASE_END
RUN_SPECIAL = _backend.RUN_SPECIAL
RUN_BLOCKED = _backend.RUN_BLOCKED
admit = _backend.admit
plain_done = _backend.plain_done
records_of = _backend.records_of
results_of = _backend.results_of
types_of = _backend.types_of
close_all = _backend.close_all
end_if_forked = _backend.end_if_forked
hold_all = _backend.hold_all
names_of = _backend.names_of
rows_of = _backend.rows_of
start_all = _backend.start_all
still_held = _backend.still_held
waited = _backend.waited

__all__ = [
    "MODES",
    "RUN_BLOCKED",
    "RUN_ENDED",
    "RUN_FULL",
    "RUN_LEASE_END",
    "RUN_SPECIAL",
    "RUN_STOP",
    "RUN_TIME",
    "AsyncJob",
    "Entry",
    "Lease",
    "Runner",
    "Slot",
    "admit",
    "close_all",
    "end_if_forked",
    "hold_all",
    "names_of",
    "plain_done",
    "records_of",
    "results_of",
    "rows_of",
    "start_all",
    "still_held",
    "types_of",
    "waited",
]
