"""The exception tree: one root, documented, and copies keep the facts."""

import copy
import inspect

import pytest

from tqe import errors
from tqe.errors import (
    IdempotencyConflict,
    JobCancelled,
    JobFailed,
    JobWasCancelled,
    PartialSubmit,
    PayloadTooLarge,
    RedisUnavailable,
    Reject,
    ResultTimeout,
    Retry,
    SoftTimeLimit,
    SubmitUnknown,
    TQEError,
    UnknownLane,
)

CLASSES = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, BaseException)]
FOR_TASKS = {Retry, Reject, SoftTimeLimit, JobCancelled}


def test_everything_but_the_words_of_tasks_is_under_one_root() -> None:
    assert {c for c in CLASSES if not issubclass(c, TQEError)} == FOR_TASKS


def test_interrupts_are_not_swallowed_by_except_exception() -> None:
    assert not issubclass(SoftTimeLimit, Exception)
    assert not issubclass(JobCancelled, Exception)


def test_a_result_timeout_is_also_pythons() -> None:
    assert issubclass(ResultTimeout, TimeoutError)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_each_says_when_and_what_to_do(cls: type) -> None:
    doc = inspect.cleandoc(cls.__dict__["__doc__"] or "")
    assert doc[0].isupper() and doc.endswith("."), doc
    assert doc.count(".") >= 2 or cls is TQEError, "when it is raised, and what to do about it"


@pytest.mark.parametrize(
    ("error", "text", "facts"),
    [
        (PayloadTooLarge(20, 10), "20 bytes and the limit is 10", {"size_bytes": 20, "limit_bytes": 10}),
        (UnknownLane("x", ["a", "b"]), "no lane 'x'; configured are: a, b", {"lanes": ("a", "b")}),
        (IdempotencyConflict("J.1"), "belongs to job J.1", {"first_id": "J.1"}),
        (RedisUnavailable("gone"), "gone", {"applied": None}),
        (RedisUnavailable("gone", applied=False), "gone", {"applied": False}),
        (SubmitUnknown("J.1"), "whether job J.1 was created", {"job_id": "J.1"}),
        (JobFailed("boom", "J.1"), "job J.1 failed: boom", {"error": "boom", "job_id": "J.1"}),
        (JobFailed("boom"), "the job failed: boom", {"error": "boom", "job_id": ""}),
        (JobWasCancelled("J.1", "expired"), "J.1 was cancelled: expired", {"reason": "expired"}),
        (Retry(delay=5), "asked for a retry", {"delay": 5, "message": ""}),
        (Retry("later"), "later", {"delay": None}),
        (Reject("no"), "no", {"reason": "no"}),
    ],
    ids=repr,
)
def test_text_and_facts_survive_a_copy(error: BaseException, text: str, facts: dict[str, object]) -> None:
    for one in (error, copy.copy(error)):
        assert text in str(one)
        assert {name: getattr(one, name) for name in facts} == facts


def test_partial_submit_keeps_handles_and_cause() -> None:
    cause = ConnectionError("gone")
    error = copy.copy(PartialSubmit(["h1", "h2"], cause))
    assert (error.handles, error.cause) == (["h1", "h2"], cause)
    assert str(error) == "2 jobs were created before the submission failed: gone"
