"""Log lines: for people and for machines, with fields; a line never fails."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from tqe.telemetry import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    yield io.StringIO()
    logger = logging.getLogger("tqe")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    logs.set_process("")


def test_text_lines_have_time_level_process_event_and_fields(stream: io.StringIO) -> None:
    logs.configure(stream=stream)
    logs.set_process("worker 3")
    logs.get("worker").warning("100% of it failed", attempt=2, why="no answer")
    line = stream.getvalue().rstrip("\n")
    assert line.endswith('warning worker 3: 100% of it failed (attempt=2 why="no answer")')
    assert line[2] == ":" and "." in line.split()[0]


def test_json_lines_are_one_object_each(stream: io.StringIO) -> None:
    logs.configure(stream=stream, style="json")
    logs.get("steward").info("two\nlines", path=object, event="not mine")
    told = json.loads(stream.getvalue())
    assert (told["level"], told["logger"], told["event"]) == ("info", "tqe.steward", "two\nlines")
    assert "class" in told["path"]


def test_levels_and_a_second_configure(stream: io.StringIO) -> None:
    logs.configure(stream=io.StringIO())
    logs.configure(stream=stream, level="error")
    log = logs.get("x")
    log.warning("not this")
    log.error("this")
    assert stream.getvalue().count("\n") == 1


def test_a_traceback_is_told(stream: io.StringIO) -> None:
    logs.configure(stream=stream, style="json")
    try:
        raise ValueError("odd")
    except ValueError:
        logs.get("x").exception("it failed")
    assert "ValueError: odd" in json.loads(stream.getvalue())["trace"]


def test_lines_of_other_loggers_below_ours_are_shown_too(stream: io.StringIO) -> None:
    logs.configure(stream=stream)
    logging.getLogger("tqe.worker").info("plain %s", "logging")
    assert "plain logging" in stream.getvalue()
