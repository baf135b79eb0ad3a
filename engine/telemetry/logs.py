"""Structured logs: one event a line, as text for people or JSON for machines, with fields beside it.

`configure` is called once by the composition root; until then the standard library's rules hold, so a
program that only submits jobs is never surprised by our handlers. A forked child inherits the handler and
names itself with `set_process`.
"""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import IO, Any, Final, Literal

ROOT: Final = "tqe"
_FIELDS: Final = "tqe_fields"
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# Who writes: "supervisor", "steward", "worker 3". Set in each process after the fork, read by the formatters.
_process = ""


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


def set_process(name: str) -> None:
    """Name this process in every line that it writes from now on."""
    global _process
    _process = name


class TextFormatter(logging.Formatter):
    """`12:04:11.482 warning worker 3: the connection was lost (attempt=2)`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_plain(value)}" for name, value in _fields(record).items())
        who = f"{_process}: " if _process else ""
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        line = f"{when} {record.levelname.lower():7} {who}{record.getMessage()}"
        return _with_trace(self, record, f"{line} ({fields})" if fields else line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, process, pid, event and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": _process,
            "pid": record.process,
            "event": record.getMessage(),
        }
        told |= {name: value for name, value in _fields(record).items() if name not in told}
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        # What is no JSON is told in words: a log line must never be the thing that fails.
        return json.dumps(told, default=str, ensure_ascii=False)


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields = getattr(record, _FIELDS, None)
    return fields if isinstance(fields, Mapping) else {}


def _plain(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' "=\n') else text


def _with_trace(formatter: logging.Formatter, record: logging.LogRecord, line: str) -> str:
    return f"{line}\n{formatter.formatException(record.exc_info)}" if record.exc_info else line
