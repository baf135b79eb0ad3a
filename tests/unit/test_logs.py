"""Log lines: for people and for machines, with fields; a line never fails."""

import asyncio
import io
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest

from tqe import current
from tqe.telemetry import logs, redaction


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


# --- jobs ---


@pytest.fixture
def in_job(stream: io.StringIO) -> Iterator[current.CurrentJob]:
    """A worker's process with a job that runs inline; our handler is at the root as well."""
    job = current.CurrentJob(id="01J.0", type="EMAIL", lane="high", attempt=2, crashes=0, token="t")
    factory, root = logging.getLogRecordFactory(), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    logs.configure(stream=stream, style="json")
    logs.set_process("worker 3")
    logs.begin_worker()
    before = current.set_look_up(lambda other: job if other is None else other)
    yield job
    current.set_look_up(before)
    logging.setLogRecordFactory(factory)
    root.handlers[:], root.level = handlers, level


def told(stream: io.StringIO) -> dict[str, object]:
    return dict(json.loads(stream.getvalue().splitlines()[-1]))


def test_lines_of_a_job_name_it_whoever_logs(stream: io.StringIO, in_job: current.CurrentJob) -> None:
    for log in (logging.getLogger("shop.mail"), logging.getLogger("tqe.worker")):
        log.info("sent %d", 3, extra={"to": "ann"})
        line = told(stream)
        assert (line["event"], line["logger"], line["to"]) == ("sent 3", log.name, "ann")
        assert (line["job_id"], line["type"], line["lane"]) == ("01J.0", "EMAIL", "high")
        assert (line["attempt"], line["worker"]) == (2, 3)
    current.set_look_up(None)
    logging.getLogger("shop").warning("outside")
    assert "job_id" not in told(stream) and told(stream)["worker"] == 3


def test_a_caller_may_use_the_same_names(stream: io.StringIO, in_job: current.CurrentJob) -> None:
    logging.getLogger("shop").info("mine", extra={"job_id": "7", "type": "x", "worker": 9, "fresh": 1})
    assert told(stream)["job_id"] == "01J.0" and told(stream)["fresh"] == 1


def test_a_format_of_the_apps_own_can_name_the_job(in_job: current.CurrentJob) -> None:
    own = io.StringIO()
    handler = logging.StreamHandler(own)
    handler.setFormatter(logging.Formatter("%(tqe_job_id)s|%(message)s"))
    log = logging.getLogger("shop")
    log.addHandler(handler)
    try:
        log.info("inside")
        current.set_look_up(None)
        log.info("outside")
    finally:
        log.removeHandler(handler)
    assert own.getvalue() == "01J.0|inside\n|outside\n"


def test_threads_of_a_job_and_threads_that_were_there_before(
    stream: io.StringIO, in_job: current.CurrentJob
) -> None:
    go, gone = threading.Event(), threading.Event()

    def background() -> None:
        go.wait(10)
        logging.getLogger("shop").info("background")
        gone.set()

    old = threading.Thread(target=background)
    old.start()
    logs.note_threads()
    new = threading.Thread(target=logging.getLogger("shop").info, args=("of the job",))
    new.start()
    new.join()
    assert told(stream)["job_id"] == "01J.0"
    go.set()
    assert gone.wait(10)
    old.join()
    assert told(stream)["event"] == "background" and "job_id" not in told(stream)


async def test_tasks_and_threads_of_asyncio_have_their_own_job(
    stream: io.StringIO, in_job: current.CurrentJob
) -> None:
    async def one(name: str) -> None:
        current.IN_CONTEXT.set(replace(in_job, id=name))
        await asyncio.sleep(0)
        await asyncio.to_thread(logging.getLogger("shop").info, name)

    await asyncio.gather(*(asyncio.create_task(one(f"job {n}")) for n in range(3)))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert sorted(line["job_id"] for line in lines) == ["job 0", "job 1", "job 2"]
    assert all(line["event"] == line["job_id"] for line in lines)


def test_logging_that_the_app_has_set_up_is_left_alone(in_job: current.CurrentJob) -> None:
    root = logging.getLogger()
    own = root.handlers[:] = [logging.NullHandler()]
    logs.begin_worker()
    assert root.handlers == own


# --- secrets ---


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "DB_PASSWORD",
        "dbPassword",
        "X-Api-Key",
        "apikey",
        "access_token",
        "authorization",
        "jwt",
        "passwd",
        "credentials",
        "Set-Cookie",
        "client_secret",
        "private_key",
        "secretKey",
    ],
)
def test_fields_with_names_of_secrets_are_hidden(name: str) -> None:
    assert redaction.fields({name: "s3cret", "more": {name: ["s3cret"]}}) == {
        name: "***",
        "more": {name: "***"},
    }


@pytest.mark.parametrize(
    "name", ["tokens", "token_count", "author", "keyboard", "passage", "key", "cookies_eaten_by", "secretary"]
)
def test_other_fields_are_told(name: str) -> None:
    assert redaction.fields({name: 512}) == {name: 512}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("redis://user:pa@ss@host:1/0 failed", "redis://***@host:1/0 failed"),
        ("see https://tok3n@host/x, and http://b/?q=a@b", "see https://***@host/x, and http://b/?q=a@b"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("mail to ann@example.com", "mail to ann@example.com"),
        ("token tqe_shop_" + "0a" * 32 + " is unknown", "token tqe_shop_*** is unknown"),
        ("db password=hunter2 of ann", "db password=*** of ann"),
        ("{'dbPassword': 'hunter 2', 'n': 1}", "{'dbPassword': ***, 'n': 1}"),
        ("token_count=5, the password: none", "token_count=5, the password: none"),
        ("the basic idea, the bearer of news", "the basic idea, the bearer of news"),
    ],
)
def test_logins_in_texts_are_hidden(said: str, shown: str) -> None:
    assert redaction.text(said) == shown
    assert redaction.fields({"url": [said]}) == {"url": [shown]}


@pytest.mark.parametrize("style", ["text", "json"])
def test_no_part_of_a_line_tells_a_secret(stream: io.StringIO, style: Literal["text", "json"]) -> None:
    logs.configure(stream=stream, style=style)
    try:
        raise ValueError("postgres://ann:s3cret@db/x")
    except ValueError:
        logs.get("x").exception(
            "at postgres://ann:s3cret@db/x", url="postgres://ann:s3cret@db/x", token="s3cret"
        )
    logging.getLogger("tqe.y").info("own", extra={"password": "s3cret", "deep": {"token": "s3cret"}})
    assert "s3cret" not in stream.getvalue() and stream.getvalue().count("***") >= 5


def test_no_text_can_look_like_another_line(stream: io.StringIO) -> None:
    logs.configure(stream=stream)
    forged = "x\r\n12:00:00.000 error   forged \x1b[2K\x9b1A\u2028"
    try:
        raise ValueError(forged)
    except ValueError:
        logs.get("x").exception(forged, path=forged, way="\x1b")
    said = stream.getvalue()
    assert not set(said) & set("\r\x1b\x9b\u2028") and "\\x1b[2K" in said
    trace = said.splitlines()[1:]
    assert trace and all(line.startswith("  ") for line in trace)


def test_fields_that_hold_themselves_end(stream: io.StringIO) -> None:
    loop: dict[str, object] = {}
    loop["loop"] = loop
    logs.configure(stream=stream, style="json")
    logs.get("x").info("odd", loop=loop)
    assert "odd" in stream.getvalue()
