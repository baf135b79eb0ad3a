"""Whether everything is as it should be, and what to do if not: `tqe doctor`."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal

import click
from rich.text import Text

from tqe import __version__, clock, codec, cpus
from tqe.cli.options import json_option, with_settings
from tqe.cli.output import count, duration, emit, number, show, shown, table
from tqe.cli.server import Meeting
from tqe.client import Client
from tqe.errors import ServerError, ServerUnfit, TQEError
from tqe.settings import Settings
from tqe.store import reading
from tqe.store.keys import Keys
from tqe.store.reading import QueueStatus

Level = Literal["ok", "note", "warning", "error"]

OFFSET_WARN_MS: Final = 2_000  # ids and times that people read come from our clock, what is due from Redis'
FILES_WARN: Final = 512  # open files: sockets of a worker, and whatever its tasks open
WAIT_NOTE_S: Final = 300.0
WAIT_WARN_S: Final = 900.0  # the alert's bound: lanes go strictly by rank, so that a low one can starve
_MARKS: Final[Mapping[Level, tuple[str, str]]] = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warning": ("warning", "yellow"),
    "error": ("ERROR", "red"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: a `warning` or an `error` is wrong, and `advice` says what to do."""

    check: str
    level: Level
    text: str
    advice: str = ""

    @property
    def wrong(self) -> bool:
        return self.level in ("warning", "error")


@click.command()
@json_option
@with_settings
@click.pass_context
def doctor(ctx: click.Context, settings: Settings, as_json: bool) -> None:
    """Check Redis, its persistence and clock, this machine, and the state of the queue.

    Starts the embedded Redis if that is the one and it does not run. Exit code 1 if something is wrong; notes
    are not.

    \b
    Examples:
      tqe doctor
      tqe doctor --redis redis://10.0.0.5:6379/0 --json
    """
    checks = [*of_build(), *of_machine(), *of_redis(settings)]
    good = not any(check.wrong for check in checks)
    if as_json:
        emit({"ok": good, "checks": [asdict(check) for check in checks]})
    else:
        rows = table("", "", "")
        rows.show_header = False
        for check in checks:
            word, style = _MARKS[check.level]
            advice = f"\n→ {check.advice}" if check.advice else ""
            rows.add_row(Text(word, style=style), check.check, shown(check.text + advice))
        show(rows)
        click.echo("all is well" if good else "something is wrong: see above")
    if not good:
        ctx.exit(1)


# ------------------------------------------------------------------ this installation and machine


def of_build() -> Iterator[Check]:
    """The interpreter and the compiled extension."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    yield Check("version", "ok", f"tqe {__version__} on {python}")
    if codec.BACKEND == "compiled":
        yield Check("extension", "ok", "the compiled fast path is in use")
    else:
        yield Check(
            "extension",
            "error",
            f"the compiled fast path is missing ({codec.FALLBACK_REASON}): all is a hundred times slower",
            "install again with a C compiler and Python's headers; Debian and Ubuntu: gcc python3-dev",
        )


def of_machine() -> Iterator[Check]:
    """CPUs and limits of this process, which those of workers started from the same place share."""
    allowed, present, quota = len(cpus.allowed()), os.cpu_count() or 1, cpus.quota()
    text = f"{allowed} of {present} CPUs may be used" if allowed < present else f"{present} CPUs"
    if quota:
        yield Check("cpus", "note", f"{text}, with a quota of {quota:g} CPUs: workers are not pinned")
    else:
        yield Check("cpus", "ok", text)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES_WARN:
        yield Check(
            "limits",
            "warning",
            f"a process may open only {soft} files and sockets",
            f"raise it with `ulimit -n 4096` (the hard limit is {hard}), or LimitNOFILE= of the service",
        )
    else:
        yield Check("limits", "ok", f"{'unlimited' if soft < 0 else number(soft)} open files a process")
    if sys.platform != "linux":
        yield Check("system", "warning", f"{sys.platform} is not supported", "use Linux")


# ------------------------------------------------------------------ Redis and what is in it


def of_redis(settings: Settings) -> Iterator[Check]:
    """The server, then the queue; only the first failure if there is no way to it."""
    try:
        with Meeting(settings) as meeting:
            try:
                yield from _server(meeting)
                yield from _clock(meeting)
            finally:
                if meeting.met.own is not None:
                    meeting.met.own.close()
        with Client(settings) as client:
            yield from of_queue(client, settings)
    except ServerUnfit as e:
        yield Check("redis", "error", str(e), "it is not used as it is: change what the text says")
    except ServerError as e:
        yield Check("redis", "error", str(e))


def _server(meeting: Meeting) -> Iterator[Check]:
    met = meeting.met
    yield Check("redis", "ok", met.place)
    found = met.findings
    for finding in found:
        yield Check(finding.code, finding.level, finding.text)
    if not any(finding.code in ("aof", "disk") for finding in found):
        fsync = _config(meeting, "appendfsync")
        yield Check("persistence", "ok", "the append-only file is on" + (f", fsync {fsync}" if fsync else ""))
    lazy = _config(meeting, "lazyfree-lazy-expire")
    if lazy == "no":
        yield Check(
            "lazyfree",
            "note",
            "records that expire are freed in Redis' main thread, which may pause it for milliseconds",
            "redis-cli CONFIG SET lazyfree-lazy-expire yes, and in redis.conf",
        )


def _config(meeting: Meeting, name: str) -> str:
    """A setting of the server; empty where it does not tell, as managed ones deny the command."""
    (answer,) = meeting.door.send([("CONFIG", "GET", name)])
    if isinstance(answer, TQEError) or not isinstance(answer, list) or len(answer) != 2:
        return ""
    return str(answer[1].decode("utf-8", "replace"))


def _clock(meeting: Meeting) -> Iterator[Check]:
    """Our clock against Redis', taken in the middle of the question."""
    before_us = clock.wall_us()
    (answer,) = meeting.door.send([("TIME",)])
    if isinstance(answer, TQEError):
        raise answer
    ours_us = (before_us + clock.wall_us()) // 2
    offset_ms = (int(answer[0]) * 1_000_000 + int(answer[1]) - ours_us) / 1000
    text = f"Redis' clock is {abs(offset_ms):.1f} ms {'ahead of' if offset_ms > 0 else 'behind'} ours"
    if abs(offset_ms) > OFFSET_WARN_MS:
        yield Check(
            "clock", "warning", text, "synchronize both with NTP; leases and delays follow Redis' clock"
        )
    else:
        yield Check("clock", "ok", text)


def of_queue(client: Client, settings: Settings) -> Iterator[Check]:
    """Lanes, workers, and what was put aside."""
    found = client.status()
    waiting = {name: lane.queued for name, lane in found.lanes.items() if lane.queued}
    oldest = client.run(reading.oldest_waiting(client.core.keys, list(waiting))) if waiting else {}
    yield from _lanes(found, waiting, oldest)
    yield from _aside(found, client.core.keys)
    if not found.workers:
        level: Level = "warning" if waiting else "note"
        yield Check("workers", level, "no worker runs", "start some with `tqe run`")
    else:
        hosts = len({worker.host for worker in found.workers})
        yield Check("workers", "ok", f"{count(len(found.workers), 'worker')} on {count(hosts, 'host')}")
    if found.dead:
        share = f", of {number(settings.dlq_max)} that are kept"
        yield Check("dead", "note", f"{count(found.dead, 'dead job')}{share}", "see `tqe dlq list`")


def _lanes(found: QueueStatus, waiting: Mapping[str, int], oldest: Mapping[str, int]) -> Iterator[Check]:
    tell = [worker.lanes for worker in found.workers]
    served = {name for lanes in tell for name in lanes}
    for name, jobs in waiting.items():
        text = f"lane {name}: {count(jobs, 'waiting job')}"
        if name in oldest:
            age_s = max(0.0, (clock.wall_ms() - oldest[name]) / 1000)
            text += f", the oldest for {duration(age_s)}"
        else:
            age_s = 0.0
        if found.lanes[name].paused:
            yield Check("lane", "note", f"{text}; it is paused", f"`tqe resume {name}`")
        elif tell and all(tell) and name not in served:
            yield Check(
                "lane",
                "warning",
                f"{text}, and no worker serves it",
                f"add {name} to --lanes of a `tqe run`",
            )
        elif age_s > WAIT_WARN_S:
            advice = "more workers, or lane_weights if higher lanes never run empty: see docs/OPERATING.md"
            yield Check("lane", "warning", text, advice)
        else:
            yield Check("lane", "note" if age_s > WAIT_NOTE_S else "ok", text)
    if not waiting:
        yield Check("lanes", "ok", "no job waits")


def _aside(found: QueueStatus, keys: Keys) -> Iterator[Check]:
    if found.quarantined_frames:
        yield Check(
            "quarantine",
            "warning",
            f"{count(found.quarantined_frames, 'damaged frame')} put aside, not executed",
            f"something outside of the engine has changed data in Redis; look at {keys.quarantine.decode()}",
        )
    if found.parked_frames:
        yield Check(
            "parked",
            "warning",
            f"{count(found.parked_frames, 'frame')} of another version, kept for a worker that reads them",
            "upgrade the workers; they take them up within a minute",
        )
