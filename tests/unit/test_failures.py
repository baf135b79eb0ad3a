"""What becomes of a job that raised: every kind of error against every rule, and what is told of it."""

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import msgspec
import pytest

from tests.support.hotpath import BACKENDS, NAMES, Rig
from tqe import errors
from tqe.board import layout
from tqe.registry import Task, task_options
from tqe.worker import failures
from tqe.worker.failures import Failures, Outcome, RetryRule

RULE = RetryRule(max_retries=3, base_ms=1_000, cap_ms=60_000)
GRACE_MS = 600_000


class Clock:
    now_ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def judge(clock: Clock) -> Failures:
    return Failures(error_max_bytes=8_192, grace_ms=GRACE_MS, now_ms=clock, known=("EMAIL", "SMS"))


def task_of(**options: Any) -> "Task[..., Any]":
    def send(to: str, *, times: int = 1) -> None: ...

    return Task("EMAIL", send, task_options("EMAIL", options))


TASK = task_of()


def raised(error: BaseException) -> BaseException:
    """The error as it comes out of a task."""
    try:
        raise error
    except BaseException as e:
        return e


def judged(judge: Failures, error: BaseException, *, task: Any = TASK, **given: Any) -> tuple[Outcome, Any]:
    fields: dict[str, Any] = {"attempts": 0, "unknowns": 0, "rule": RULE, "in_arguments": False}
    outcome = judge.judge(task, raised(error), **(fields | given))
    return outcome, json.loads(outcome.error)


def refused(payload: bytes) -> msgspec.DecodeError:
    with pytest.raises(msgspec.DecodeError) as found:
        TASK.decoder.decode(payload)
    return found.value


# --- retried or dead ---


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("x"), "failed"), (SystemExit(3), "failed"), (KeyboardInterrupt(), "failed"),
        (GeneratorExit(), "failed"), (errors.Retry("later"), "failed"), (errors.SoftTimeLimit(), "timeout"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("attempts", range(6))
def test_a_failure_is_retried_until_its_attempts_are_used_up(
    judge: Failures, error: BaseException, reason: str, attempts: int
) -> None:
    outcome, told = judged(judge, error, attempts=attempts)
    assert outcome.status == (layout.OUT_RETRY if attempts < RULE.max_retries else layout.OUT_DEAD)
    assert (told["reason"], told["type"]) == (reason, type(error).__name__)
    if outcome.status == layout.OUT_RETRY:
        whole = 1_000 * 2**attempts
        assert whole // 2 <= outcome.delay_ms <= whole
    else:
        assert outcome.delay_ms == 0


def test_no_retries_means_one_try(judge: Failures) -> None:
    assert judged(judge, ValueError(), rule=RetryRule(0, 1, 1))[0].status == layout.OUT_DEAD


@pytest.mark.parametrize(
    ("options", "error", "status"),
    [
        ({"retry_on": [KeyError]}, KeyError(), layout.OUT_RETRY),
        ({"retry_on": [LookupError]}, KeyError(), layout.OUT_RETRY),
        ({"retry_on": [KeyError]}, ValueError(), layout.OUT_DEAD),
        ({"no_retry_on": [ValueError]}, ValueError(), layout.OUT_DEAD),
        ({"no_retry_on": [ValueError]}, UnicodeError(), layout.OUT_DEAD),
        ({"no_retry_on": [ValueError]}, KeyError(), layout.OUT_RETRY),
        ({"retry_on": [LookupError], "no_retry_on": [KeyError]}, KeyError(), layout.OUT_DEAD),
        ({"retry_on": [LookupError], "no_retry_on": [KeyError]}, IndexError(), layout.OUT_RETRY),
        # what the task asks for, and what is no error of its own
        ({"retry_on": [KeyError]}, errors.Retry(), layout.OUT_RETRY),
        ({"no_retry_on": [Exception]}, errors.Retry(), layout.OUT_RETRY),
        ({"retry_on": [KeyError]}, SystemExit(), layout.OUT_RETRY),
        ({"retry_on": [KeyError]}, errors.SoftTimeLimit(), layout.OUT_RETRY),
        ({"retry_on": [errors.Reject]}, errors.Reject("no"), layout.OUT_DEAD),
        ({"retry_on": [KeyError]}, errors.JobCancelled(), layout.OUT_CANCELLED),
    ],
)  # fmt: skip
def test_the_task_says_what_is_worth_a_retry(
    judge: Failures, options: dict[str, Any], error: BaseException, status: int
) -> None:
    outcome, _ = judged(judge, error, task=task_of(**options))
    assert outcome.status == status


def test_a_cancelled_job_is_cancelled_however_often_it_failed(judge: Failures) -> None:
    for attempts in (0, 99):
        outcome, told = judged(judge, errors.JobCancelled("on request"), attempts=attempts)
        assert outcome.status == layout.OUT_CANCELLED
        assert (told["reason"], told["message"]) == ("cancelled", "on request")


def test_a_rejected_job_is_dead_at_once_with_its_reason(judge: Failures) -> None:
    outcome, told = judged(judge, errors.Reject("no such address"))
    assert (outcome.status, outcome.delay_ms) == (layout.OUT_DEAD, 0)
    assert (told["reason"], told["message"]) == ("rejected", "no such address")
    assert "traceback" not in told


@pytest.mark.parametrize(
    ("delay", "expected_ms"),
    [
        (0, 0), (0.0015, 1), (5, 5_000), (60, 60_000), (61, 60_000), (1e300, 60_000), (10**400, 60_000),
        (float("inf"), 60_000), (-1, 0), (float("-inf"), 0), (float("nan"), 0),
    ],
)  # fmt: skip
def test_a_task_may_ask_for_its_delay(judge: Failures, delay: float, expected_ms: int) -> None:
    outcome, _ = judged(judge, errors.Retry(delay=delay))
    assert (outcome.status, outcome.delay_ms) == (layout.OUT_RETRY, expected_ms)


@pytest.mark.parametrize("delay", [None, "soon", [5], object()])
def test_a_delay_that_is_none_means_the_usual_one(judge: Failures, delay: Any) -> None:
    outcome, _ = judged(judge, errors.Retry(delay=delay), attempts=2)
    assert outcome.status == layout.OUT_RETRY
    assert 2_000 <= outcome.delay_ms <= 4_000


@pytest.mark.parametrize("error", [ValueError(), errors.Retry(delay=1e12)])
def test_no_delay_is_longer_than_a_record_can_tell(judge: Failures, error: Exception) -> None:
    """Or it could not be written, and the worker would die of it at each try."""
    rule = RetryRule(max_retries=1_000, base_ms=86_400_000, cap_ms=365 * 86_400_000)
    outcome, _ = judged(judge, error, rule=rule, attempts=500)
    assert layout.DELAY_MS_MAX // 2 < outcome.delay_ms <= layout.DELAY_MS_MAX


# --- what is told ---


def deep(k: int) -> None:
    if k == 0:
        raise ValueError("at the bottom")
    deep(k - 1)


def failing(k: int) -> BaseException:
    try:
        deep(k)
    except ValueError as e:
        return e
    raise AssertionError


def test_an_error_tells_where_it_was_raised(judge: Failures) -> None:
    outcome = judge.judge(TASK, failing(2), attempts=9, unknowns=0, rule=RULE, in_arguments=False)
    told = json.loads(outcome.error)
    assert told["where"].startswith(__file__ + ":")
    assert told["message"] == "at the bottom"
    assert 'raise ValueError("at the bottom")' in told["traceback"]
    assert told["traceback"].rstrip().endswith("ValueError: at the bottom")
    assert told["traceback"].count("deep(k - 1)") == 2


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
def test_a_traceback_begins_in_the_task_s_own_code(judge: Failures, backend: ModuleType) -> None:
    rig = Rig(backend)
    rig.task(lambda: deep(1))
    told = []

    def on_failure(_lease: Any, _index: int, _entry: Any, error: BaseException, _in_arguments: bool) -> None:
        outcome = judge.judge(TASK, error, attempts=9, unknowns=0, rule=RULE, in_arguments=False)
        told.append(json.loads(outcome.error))

    rig.runner(on_failure=on_failure).run([rig.lease()], 0, 10**9)
    lines = told[0]["traceback"].splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert __file__ in lines[1]
    assert "<lambda>" in lines[1]
    assert not [line for line in lines if "_dispatch" in line or "_pure_board" in line]
    assert told[0]["where"].startswith(__file__)


def test_of_a_deep_traceback_the_end_is_told(judge: Failures) -> None:
    outcome = judge.judge(TASK, failing(300), attempts=9, unknowns=0, rule=RULE, in_arguments=False)
    text = json.loads(outcome.error)["traceback"]
    assert len(text) < 8_192
    assert text.rstrip().endswith("ValueError: at the bottom")


def test_failures_at_one_place_are_described_once_a_second(judge: Failures, clock: Clock) -> None:
    def described(k: int = 1) -> bool:
        outcome = judge.judge(TASK, failing(k), attempts=0, unknowns=0, rule=RULE, in_arguments=False)
        told = json.loads(outcome.error)
        assert told["where"]
        assert told["message"] == "at the bottom"
        return "traceback" in told

    assert [described() for _ in range(3)] == [True, False, False]
    clock.now_ms += 999
    assert not described()
    clock.now_ms += 1
    assert described()
    # another place, and another error at the same place, are told at once
    assert "traceback" in judged(judge, ValueError())[1]
    assert "traceback" in judged(judge, KeyError())[1]


def test_the_last_attempt_is_always_described(judge: Failures) -> None:
    for _ in range(3):
        outcome = judge.judge(TASK, failing(1), attempts=3, unknowns=0, rule=RULE, in_arguments=False)
        assert "traceback" in json.loads(outcome.error)


def test_the_memory_of_places_is_bounded(judge: Failures) -> None:
    for k in range(failures.TRACEBACKS_MAX * 3):
        judged(judge, type(f"Error{k}", (Exception,), {})())
    assert len(judge._described) <= failures.TRACEBACKS_MAX


class Nasty(Exception):
    def __init__(self, text: Callable[[], Any]) -> None:
        super().__init__()
        self.text = text

    def __str__(self) -> str:
        told: str = self.text()
        return told


def exits() -> str:
    raise SystemExit("gotcha")


@pytest.mark.parametrize("text", [exits, lambda: 1 / 0, lambda: 5, lambda: "\ud800", lambda: "\0" * 9_000])
def test_an_error_with_a_nasty_text_is_told_all_the_same(judge: Failures, text: Callable[[], Any]) -> None:
    outcome, told = judged(judge, Nasty(text), attempts=9)
    assert outcome.status == layout.OUT_DEAD
    assert told["type"] == "Nasty"
    assert told["message"]


def test_names_that_are_too_long_or_no_text_are_cut(judge: Failures) -> None:
    space: dict[str, Any] = {}
    exec(compile("def task(): raise kind()", "\udc80" * 3_000, "exec"), space)
    space["kind"] = type("x" * 100_000, (Exception,), {})
    try:
        space["task"]()
    except Exception as e:
        outcome = judge.judge(TASK, e, attempts=0, unknowns=0, rule=RULE, in_arguments=False)
    told = json.loads(outcome.error)
    assert len(told["type"]) <= failures.NAME_BYTES_MAX
    assert len(told["where"].encode()) <= failures.PLACE_BYTES_MAX
    assert len(outcome.error) < 20_000


@pytest.mark.parametrize("most", [64, 1_000, 8_192])
@pytest.mark.parametrize("text", ["x" * 100_000, "é" * 50_000, "\U0001f600" * 30_000])
def test_text_is_cut_to_its_limit(clock: Clock, most: int, text: str) -> None:
    judge = Failures(error_max_bytes=most, grace_ms=0, now_ms=clock, known=())
    _, told = judged(judge, ValueError(text), attempts=9)
    for name in ("message", "traceback"):
        assert len(told[name].encode()) <= most // 2
        assert told[name].endswith("[cut]")


def test_cut_leaves_alone_what_fits() -> None:
    assert failures.cut("é", 2) == "é"
    assert failures.cut("éé", 3) == failures.MARKER
    long = "é" * 100
    for most in range(20, 200):
        cut = failures.cut(long, most)
        assert len(cut.encode()) <= most
        assert cut.removesuffix(failures.MARKER) == long[: len(cut) - len(failures.MARKER)]
    assert failures.cut(long, 200) == long


def test_an_error_without_a_traceback(judge: Failures) -> None:
    outcome = judge.judge(TASK, ValueError("x"), attempts=9, unknowns=0, rule=RULE, in_arguments=False)
    told = json.loads(outcome.error)
    assert "where" not in told
    assert told["traceback"] == "ValueError: x\n"


def test_a_time_limit_explains_itself(judge: Failures) -> None:
    _, told = judged(judge, errors.SoftTimeLimit())
    assert told["message"] == "it ran past its time limit"
    _, told = judged(judge, errors.SoftTimeLimit("my own words"))
    assert told["message"] == "my own words"


def test_plain_outcomes(judge: Failures) -> None:
    outcome = judge.plain(layout.OUT_EXPIRED, "expired", "too late")
    assert (outcome.status, outcome.delay_ms) == (layout.OUT_EXPIRED, 0)
    assert json.loads(outcome.error) == {"reason": "expired", "message": "too late"}


# --- arguments and unknown types ---


@pytest.mark.parametrize("payload", [b'{"to":5}', b'{"to":"a","times":"x"}', b"[]", b"no json", b'{"to":"a"'])
def test_wrong_arguments_are_dead_at_once(judge: Failures, payload: bytes) -> None:
    outcome, told = judged(judge, refused(payload), in_arguments=True)
    assert (outcome.status, told["reason"]) == (layout.OUT_DEAD, "arguments")
    assert told["message"].startswith("EMAIL: ")
    assert "traceback" not in told


@pytest.mark.parametrize(
    ("payload", "text"), [(b"{}", "argument to is missing"), (b'{"to":"a","cc":"b"}', "no argument cc")]
)
def test_missing_and_unknown_arguments_may_be_another_version_s(
    judge: Failures, payload: bytes, text: str
) -> None:
    outcome, told = judged(judge, refused(payload), in_arguments=True, attempts=99)
    assert (outcome.status, told["reason"]) == (layout.OUT_UNKNOWN, "arguments")
    assert outcome.delay_ms == 30_000
    assert text in told["message"]


def unknown(judge: Failures, unknowns: int) -> Outcome:
    return judge.unknown_type("FAX", unknowns)


def test_an_unknown_type_is_redelivered_for_the_grace(judge: Failures) -> None:
    """30, 60, 120, 240 s and what is left of ten minutes; then it is dead."""
    delays: list[int] = []
    while (outcome := unknown(judge, len(delays))).status == layout.OUT_UNKNOWN:
        delays.append(outcome.delay_ms)
    assert delays == [30_000, 60_000, 120_000, 240_000, 150_000]
    assert sum(delays) == GRACE_MS
    assert (outcome.status, outcome.delay_ms) == (layout.OUT_DEAD, 0)
    told = json.loads(outcome.error)
    assert told["reason"] == "unknown_type"
    assert "'FAX'" in told["message"]
    assert "EMAIL, SMS" in told["message"]


@pytest.mark.parametrize("grace_ms", [0, 1, 30_000, 10**9])
def test_any_grace_is_kept(clock: Clock, grace_ms: int) -> None:
    judge = Failures(error_max_bytes=64, grace_ms=grace_ms, now_ms=clock, known=())
    waited, unknowns = 0, 0
    while (outcome := unknown(judge, unknowns)).status == layout.OUT_UNKNOWN:
        assert 0 < outcome.delay_ms <= failures.UNKNOWN_CAP_MS
        waited, unknowns = waited + outcome.delay_ms, unknowns + 1
        if unknowns > 5_000:
            break
    assert waited == grace_ms


def test_a_worker_of_many_types_does_not_list_them_all(clock: Clock) -> None:
    known = tuple(f"TASK{k:03}" for k in range(500))
    judge = Failures(error_max_bytes=8_192, grace_ms=0, now_ms=clock, known=known)
    message = json.loads(unknown(judge, 0).error)["message"]
    assert "TASK049" in message
    assert "TASK050" not in message
