"""Owns the append-only journals of a chaos run: what was submitted, what ran, and what was done to whom.

Every line is one `os.write` to a file of the writing process, opened with O_APPEND, so a SIGKILL loses
nothing that was written and can tear at most the last line of that one file (the kernel may stop a write at a
page boundary). A line without its newline is therefore skipped by the reader, never guessed. All stamps are
CLOCK_MONOTONIC in ns: one machine, one clock, so real-time order between processes is a fact.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACCEPTED, DUPLICATE, REFUSED, UNKNOWN, PENDING = "ok", "dup", "refused", "unknown", "pending"
END_OK, END_FAIL = "ok", "fail"


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


@dataclass(slots=True)
class Submission:
    """One attempt of a producer to create a job; `n` is the producer's own number, carried in the payload."""

    n: int
    type: str
    expect: str = "ok"  # ok | fail:<k> | dead | poison | cancelled | any
    lane: str = ""
    key: str = ""
    invoke_ns: int = 0
    outcome: str = PENDING
    id: str = ""
    reply_ns: int = 0
    opts: dict[str, Any] | None = None  # delay_ms, max_retries, key_ttl_ms, result, track

    def opt(self, name: str, default: Any) -> Any:
        return default if self.opts is None else self.opts.get(name, default)


@dataclass(slots=True)
class Execution:
    """One start of a job's function, and its end if the function reached it."""

    job: str
    n: int
    attempt: int
    token: str
    pid: int
    start_ns: int
    end_ns: int = 0
    outcome: str = ""  # ok | fail | "" when the process never came to the end
    order: int = 0  # position among the starts of this process
    last: int = 0  # number of later starts in the same process: 0 means nothing started after it


@dataclass(slots=True)
class Fault:
    """Something that the harness did: `t_ns` just before it, `until_ns` when it was over (0: an instant)."""

    t_ns: int
    kind: str
    pids: tuple[int, ...] = ()
    until_ns: int = 0
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Event:
    """An operator's action or an observed state of one job."""

    t_ns: int
    kind: str  # cancel | replay | purge | observe
    id: str
    answer: str


@dataclass(slots=True)
class Journals:
    submissions: list[Submission] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    torn: int = 0


class Journal:
    """One kind of journal in one folder; each process writes its own file, also after a fork."""

    def __init__(self, folder: Path | str, kind: str) -> None:
        self._folder = Path(folder)
        self._kind = kind
        self._pid = -1
        self._fd = -1

    def write(self, text: str) -> None:
        pid = os.getpid()
        if pid != self._pid:
            self._open(pid)
        os.write(self._fd, text.encode())

    def _open(self, pid: int) -> None:
        # The inherited descriptor is of the parent's file: leave it, two writers would share a torn tail.
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{self._kind}-{pid}-{now_ns()}.log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self._folder / name, flags, 0o600)
        self._pid = pid


class SubmitJournal(Journal):
    """What a producer asked for and what it was told."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder, "submit")

    def invoke(
        self, n: int, type_: str, expect: str = "ok", lane: str = "", key: str = "", **opts: Any
    ) -> None:
        tail = json.dumps(opts) if opts else ""
        self.write(f"I\t{now_ns()}\t{n}\t{type_}\t{expect}\t{lane}\t{key}\t{tail}\n")

    def invoke_many(
        self, first: int, count: int, type_: str, expect: str = "ok", lane: str = "", **opts: Any
    ) -> None:
        tail = json.dumps(opts) if opts else ""
        self.write(f"IB\t{now_ns()}\t{first}\t{count}\t{type_}\t{expect}\t{lane}\t{tail}\n")

    def ok(self, n: int, job_id: str) -> None:
        self.write(f"A\t{now_ns()}\t{n}\t{job_id}\n")

    def ok_many(self, first: int, job_ids: Iterable[str]) -> None:
        self.write(f"AB\t{now_ns()}\t{first}\t{' '.join(job_ids)}\n")

    def dup(self, n: int, job_id: str) -> None:
        self.write(f"D\t{now_ns()}\t{n}\t{job_id}\n")

    def refused(self, n: int, reason: str) -> None:
        self.write(f"R\t{now_ns()}\t{n}\t{_plain(reason)}\n")

    def unknown(self, n: int, job_id: str = "") -> None:
        self.write(f"U\t{now_ns()}\t{n}\t{job_id}\n")

    def unknown_many(self, first: int, count: int) -> None:
        self.write("".join(f"U\t{now_ns()}\t{n}\t\n" for n in range(first, first + count)))

    def event(self, kind: str, job_id: str, answer: str) -> None:
        self.write(f"V\t{now_ns()}\t{kind}\t{job_id}\t{_plain(answer)}\n")


class ExecJournal(Journal):
    """What the job functions themselves saw; two writes a job, no lock, no flush."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder, "exec")

    def start(self, job_id: str, n: int, attempt: int, token: str) -> None:
        self.write(f"S\t{now_ns()}\t{job_id}\t{n}\t{attempt}\t{token}\t{os.getpid()}\n")

    def end(self, job_id: str, outcome: str) -> None:
        self.write(f"E\t{now_ns()}\t{job_id}\t{outcome}\n")


class FaultLog(Journal):
    """What the harness did to whom."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder, "fault")

    def record(
        self, kind: str, pids: Sequence[int] = (), *, t_ns: int = 0, until_ns: int = 0, **info: Any
    ) -> None:
        row = {"t": t_ns or now_ns(), "kind": kind, "pids": list(pids), "until": until_ns, "info": info}
        self.write(json.dumps(row) + "\n")


@contextmanager
def collector_off() -> Iterator[None]:
    """Millions of live objects and no cycles: the collector would only double the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load(folder: Path | str) -> Journals:
    """Read every journal of a run; torn last lines are counted and skipped."""
    with collector_off():
        return _load(folder)


def _load(folder: Path | str) -> Journals:
    out = Journals()
    root = Path(folder)
    by_n: dict[int, Submission] = {}
    # Replies may stand in another file than their invocation (a producer process and its parent): two passes.
    replies: list[list[str]] = []
    for lines in _files(root, "submit", out):
        for line in lines:
            row = line.split("\t")
            if row[0] == "I" or row[0] == "IB":
                _add_invocation(row, by_n)
            else:
                replies.append(row)
    replies.sort(key=lambda row: int(row[1]))
    for row in replies:
        _add_reply(row, by_n, out.events)
    out.submissions = list(by_n.values())
    for lines in _files(root, "exec", out):
        out.executions += _executions(lines)
    for lines in _files(root, "fault", out):
        for line in lines:
            row_ = json.loads(line)
            pids = tuple(row_["pids"])
            out.faults.append(Fault(row_["t"], row_["kind"], pids, row_["until"], row_["info"]))
    out.faults.sort(key=lambda fault: fault.t_ns)
    out.events.sort(key=lambda event: event.t_ns)
    return out


def _files(root: Path, kind: str, out: Journals) -> Iterator[list[str]]:
    for path in sorted(root.glob(f"{kind}-*.log")):
        text = path.read_text()
        lines = text.split("\n")
        if lines.pop():  # what stands behind the last newline was torn by a kill
            out.torn += 1
        yield lines


def _add_invocation(row: list[str], by_n: dict[int, Submission]) -> None:
    if row[0] == "I":
        _, t, n, type_, expect, lane, key, opts = row
        sub = Submission(int(n), type_, expect, lane, key, int(t), opts=json.loads(opts) if opts else None)
        by_n.setdefault(sub.n, sub)  # invoked again after an unknown reply: the first stamp counts
        return
    _, t, first, count, type_, expect, lane, opts = row
    shared = json.loads(opts) if opts else None
    stamp = int(t)
    for number in range(int(first), int(first) + int(count)):
        by_n[number] = Submission(number, type_, expect, lane, "", stamp, opts=shared)


_REPLIES = {"A": ACCEPTED, "D": DUPLICATE, "R": REFUSED, "U": UNKNOWN}


def _add_reply(row: list[str], by_n: dict[int, Submission], events: list[Event]) -> None:
    stamp = int(row[1])
    if row[0] == "V":
        events.append(Event(stamp, row[2], row[3], row[4]))
        return
    if row[0] == "AB":
        number = int(row[2])
        for job_id in row[3].split():
            sub = by_n[number]
            sub.outcome, sub.id, sub.reply_ns = ACCEPTED, job_id, stamp
            number += 1
        return
    sub = by_n[int(row[2])]
    sub.outcome, sub.reply_ns = _REPLIES[row[0]], stamp
    if row[0] != "R":
        sub.id = row[3]


def _executions(lines: list[str]) -> list[Execution]:
    """The starts of one process in order, each joined with the end that follows it."""
    out: list[Execution] = []
    open_: dict[str, Execution] = {}
    for line in lines:
        row = line.split("\t")
        if row[0] == "S":
            _, t, job, n, attempt, token, pid = row
            run = Execution(job, int(n), int(attempt), token, int(pid), int(t), order=len(out))
            out.append(run)
            open_[job] = run
        else:
            run_ = open_.pop(row[2], None)
            if run_ is not None:
                run_.end_ns, run_.outcome = int(row[1]), row[3]
    for run in out:
        run.last = len(out) - 1 - run.order
    return out


def _plain(text: str) -> str:
    return text.replace("\t", " ").replace("\n", " ")[:500]
