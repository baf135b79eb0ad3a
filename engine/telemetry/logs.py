"""Structured logs: one event a line, as text for people or JSON for machines, with fields beside it.

`configure` is called once by the composition root; until then the standard library's rules hold, so a
program that only submits jobs is never surprised by our handlers. A forked child inherits the handler and
names itself with `set_process`.

In a worker (`begin_worker`) every record that is made while a job's code runs carries the job, whoever logs
it: `record.tqe_job` is what `current_job()` answers, or None, and `record.tqe_job_id` its id, or "". It is
looked up when a record is made, so a job that logs nothing pays nothing.
"""

import json
import logging
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import IO, Any, Final, Literal

from tqe import current
from tqe.telemetry import redaction

ROOT: Final = "tqe"
_FIELDS: Final = "tqe_fields"
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# Controls, separators of lines, and what turns the direction of writing.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

# Who writes: "supervisor", "steward", "worker 3". Set in each process after the fork, read by the formatters.
_process = ""

# Threads that were there before the first job: what they log is no job's, even while one runs inline.
_strangers: frozenset[int] = frozenset()

# What a record of the standard library has; the rest was given as `extra` and is shown as fields.
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    "message", "asctime", "taskName", _FIELDS, "tqe_job", "tqe_job_id",
}  # fmt: skip


class Log:
    """A named logger whose keyword arguments become fields: `log.info("worker died", worker=3)`."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{ROOT}.{name}")

    def debug(self, event: str, /, **fields: object) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: object) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, fields, trace=True)

    def _log(self, level: int, event: str, fields: Mapping[str, object], *, trace: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            # The event is a sentence of ours, never a format string: a % in it stays one.
            self._logger.log(level, "%s", event, extra={_FIELDS: fields}, exc_info=trace)


def get(name: str) -> Log:
    """The log of a part of the engine, `tqe.<name>` for the standard library."""
    return Log(name)


def configure(
    *,
    level: Literal["debug", "info", "warning", "error"] = "info",
    style: Literal["text", "json"] = "text",
    stream: IO[str] | None = None,
) -> None:
    """Send our events to `stream` (stderr by default). Called again, it replaces what it did before."""
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logger.addHandler(handler)
    logger.setLevel(_LEVELS[level])
    logger.propagate = False


def begin_worker() -> None:
    """From now on, in this process: jobs are named in each record, and what the app logs is shown as our
    lines are, unless it has set up logging itself."""
    make = logging.getLogRecordFactory()

    def with_job(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        job = _job_here()
        record.tqe_job, record.tqe_job_id = job, "" if job is None else job.id
        return record

    logging.setLogRecordFactory(with_job)
    ours, root = logging.getLogger(ROOT), logging.getLogger()
    if not root.handlers:
        for handler in ours.handlers:
            root.addHandler(handler)
        root.setLevel(ours.level)


def note_threads() -> None:
    """The first job is about to come: no thread that runs now is one of a job's."""
    global _strangers
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    _strangers = frozenset(thread.ident for thread in others if thread.ident is not None)


def _job_here() -> current.CurrentJob | None:
    if threading.get_ident() in _strangers and current.IN_CONTEXT.get() is None:
        return None
    return current.job_or_none()


def set_process(name: str) -> None:
    """Name this process in every line that it writes from now on."""
    global _process
    _process = name


class TextFormatter(logging.Formatter):
    """`12:04:11.482 warning worker 3: no answer (host=db1 job_id=01J….0 type=EMAIL lane=high attempt=2)`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = _one_line(" ".join(f"{name}={_plain(value)}" for name, value in _fields(record).items()))
        who = f"{_process}: " if _process else ""
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        said = _one_line(redaction.text(record.getMessage()))
        line = f"{when} {record.levelname.lower():7} {who}{said}"
        return _with_trace(self, record, f"{line} ({fields})" if fields else line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, process, pid, event and the fields; of a worker its number
    as `worker`, and inside of a job `job_id`, `type`, `lane`, `attempt`."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": _process,
            "pid": record.process,
            "event": redaction.text(record.getMessage()),
        }
        kind, _, number = _process.partition(" ")
        if kind == "worker" and number.isdecimal():
            told["worker"] = int(number)
        told |= {name: value for name, value in _fields(record).items() if name not in told}
        if record.exc_info:
            told["trace"] = redaction.text(self.formatException(record.exc_info))
        # What is no JSON is told in words: a log line must never be the thing that fails.
        return json.dumps(told, default=str, ensure_ascii=False)


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    """The job's, then those of our own lines, then what others gave as `extra`."""
    told: dict[str, Any] = {}
    job = getattr(record, "tqe_job", None)
    if isinstance(job, current.CurrentJob):
        told = {"job_id": job.id, "type": job.type, "lane": job.lane, "attempt": job.attempt}
    given = getattr(record, _FIELDS, None)
    if isinstance(given, Mapping):
        told = {**redaction.fields(given), **told}
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return {**redaction.fields(extra), **told}


def _plain(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' "=\n') else text


def _one_line(text: str) -> str:
    """With what begins a line or steers a terminal written out: text of others could forge lines."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _with_trace(formatter: logging.Formatter, record: logging.LogRecord, line: str) -> str:
    if not record.exc_info:
        return line
    # Set in, so that no message of an exception can look like a line of ours.
    trace = redaction.text(formatter.formatException(record.exc_info))
    return "\n  ".join([line, *map(_one_line, trace.splitlines())])
