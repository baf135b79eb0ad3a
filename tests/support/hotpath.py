"""A board with one slot and what the hot path does on it, for either backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import msgspec
import pytest

from tqe import _pure_board, codec
from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.codec import hot
from tqe.registry import Task

_fast = pytest.importorskip("tqe._fast", reason="the extension is not built")

BACKENDS = [_fast, _pure_board]
NAMES = ["compiled", "pure"]
FOREVER = 1 << 62
T0_US = 1_700_000_000_000_000

Job = tuple[bytes, bytes, bytes, bool]


def frame_id(number: int = 1) -> bytes:
    """A frame id that tells its number; all share a time and a bucket."""
    return b"01HF7YATZ0A%013d00" % number


def job(type_name: str = "A", payload: bytes = b"{}", options: bytes = b"", zstd: bool = False) -> Job:
    return type_name.encode(), payload, options, zstd


def frame(jobs: Sequence[Job] | int = 1, *, number: int = 1, **fields: Any) -> bytes:
    """A frame of these jobs, or of so many jobs `A` without arguments."""
    made: bytes = codec.pack(
        [job()] * jobs if isinstance(jobs, int) else list(jobs),
        **{"frame_id": frame_id(number), "lane": "high", "tracked": True, "enqueued_us": T0_US, **fields},
    )
    return made


class Rig:
    """One slot and its runner. `failures` and `odd_results` are what the runner handed to Python."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend: Any = backend
        self.board = Board(1)
        self.view: SlotView = self.board.slots[0]
        self.slot: hot.Slot = backend.Slot(self.board.memory, layout.slot_offset(0))
        self.failures: list[tuple[int, str, BaseException, bool]] = []
        self.odd_results: list[tuple[int, Any]] = []
        self.entries: dict[bytes, hot.Entry] = {}

    # -- making

    def task(self, func: Callable[..., Any], name: str = "A", **options: Any) -> hot.Entry:
        """Register a function as the worker does."""
        task = Task(name, func)
        entry: hot.Entry = self.backend.Entry(
            name=name,
            number=len(self.entries),
            func=func,
            decode=options.pop("decode", task.decoder.decode),
            positional=task.positional,
            keyword_only=task.keyword_only,
            mode=hot.MODES[task.mode],
            is_async=task.is_async,
            **options,
        )
        self.entries[entry.key] = entry
        return entry

    def runner(self, **options: Any) -> hot.Runner:
        """A runner of the tasks so far, whose lease never ends. Failures are recorded as retries."""
        runner: hot.Runner = self.backend.Runner(
            self.slot,
            self.entries,
            on_failure=options.pop("on_failure", self.failed),
            on_result=options.pop("on_result", self.odd),
            encode=options.pop("encode", msgspec.json.encode),
            **options,
        )
        runner.until_ns = FOREVER
        return runner

    def lease(self, jobs: Sequence[Job] | int = 1, **fields: Any) -> hot.Lease:
        lease: hot.Lease = self.backend.Lease(frame(jobs, **fields), self.slot)
        return lease

    def failed(
        self, lease: hot.Lease, index: int, entry: hot.Entry, error: BaseException, in_arguments: bool
    ) -> None:
        self.failures.append((index, entry.name, error, in_arguments))
        self.slot.record(lease.row, index, layout.OUT_RETRY, delay_ms=5, error=b'"failed"')

    def odd(self, lease: hot.Lease, index: int, entry: hot.Entry, result: Any) -> None:
        self.odd_results.append((index, result))
        self.slot.record(lease.row, index, layout.OUT_DONE, error=b'"odd"')

    # -- reading

    def word(self, offset: int) -> int:
        return self.view.get(offset)

    def states(self, lease: hot.Lease) -> str:
        """State bytes of a lease's row as a string of digits."""
        return "".join(map(str, self.slot.states(lease.row)))

    def records(self) -> list[tuple[int, int, int, bytes, bytes]]:
        """(row, index, status, error, result) of both halves, the one in use last."""
        return [(row, one.index, one.status, one.error, one.result) for row, one in self.view.all_records()]

    def task_words(self, name: str) -> Any:
        """The words of a task's block."""
        return dict(self.view.tasks())[name]

    def bins(self, name: str, offset: int = layout.T_RUN_BINS) -> dict[int, int]:
        """Histogram of a task: bin -> jobs, without the empty ones."""
        words = self.task_words(name)
        first = offset // layout.WORD
        return {k: words[first + k] for k in range(layout.BINS) if words[first + k]}
