"""Owns the route of many jobs: lines of JSON in, as they arrive, and one line of JSON out for each."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tqe.api.bodies import BODY_BYTES_MAX, LINE_TYPES, check_type, pieces_of
from tqe.api.carrier import carry
from tqe.api.jobs import lane_of
from tqe.api.limits import CALLER
from tqe.api.problems import Problem, body_too_large, of_error
from tqe.api.room import Hold, hold_of, no_room
from tqe.api.service import Service
from tqe.client import submission_from_json, submissions_from_lines
from tqe.client.payloads import Submission
from tqe.errors import PartialSubmit, SubmitError, TQEError

LINES_MAX: Final = 10_000
BYTES_MAX: Final = 64 * 1024 * 1024
_GROUP_BYTES: Final = 128 * 1024  # lines that are submitted together
_encode_line: Final = msgspec.json.Encoder().encode_lines


async def submit_batch(service: Service, request: Request) -> Response:
    """200 with a line for each line that was read: `{"line", "id", "created"}` or `{"line", "error"}`.

    The answer is written when all is read: a client that sends first and reads later would otherwise wait
    for us while we wait for it. It is bounded by the number of lines.
    """
    check_type(request, LINE_TYPES)
    carry(request)
    batch = Batch(service, request.scope[CALLER], hold_of(request.scope))
    rest = b""
    try:
        async for piece in pieces_of(request, limit_bytes=BYTES_MAX):
            rest += piece
            if batch.hold.over:
                raise no_room()
            if len(rest) < _GROUP_BYTES:
                continue
            group, newline, rest = rest.rpartition(b"\n")
            if newline:
                await batch.take(group)
            if len(rest) > BODY_BYTES_MAX:
                raise body_too_large(BODY_BYTES_MAX)  # a single line
        await batch.take(rest)
    except (Problem, TQEError) as e:
        problem = e if isinstance(e, Problem) else of_error(e)
        if not batch.answered:
            raise problem from e
        # Some lines are in. What follows was not looked at: told as the answer of the next line.
        batch.stopped(problem)
    return Response(bytes(batch.answers), media_type="application/x-ndjson")


class Batch:
    """One request's lines so far: `answers` are the lines to send."""

    def __init__(self, service: Service, caller: str | None, hold: Hold) -> None:
        self.hold = hold
        self._service = service
        self._caller = caller
        self._client = service.client
        self._payload_max_bytes = service.settings.payload_max_bytes
        self._line = 0
        self.answers = bytearray()
        self.answered = 0

    async def take(self, group: bytes) -> None:
        """Submit whole lines. Raises Problem for what ends the batch; what came before it is submitted."""
        async with self._service.parsed:
            before = len(self.answers)
            await self._take(group)
            self.hold.add(len(self.answers) - before - len(group) - 1)

    async def _take(self, group: bytes) -> None:
        lines: list[bytes] = []
        numbers: list[int] = []
        full = False
        for line in group.split(b"\n"):
            self._line += 1
            if not line.strip():
                continue
            if self.answered + len(lines) == LINES_MAX:
                full = True
                break
            lines.append(line)
            numbers.append(self._line)
        if lines:
            await self._submit(lines, numbers)
        if full:
            self._line -= 1
            detail = f"a batch has at most {LINES_MAX} lines: send the rest in another one"
            raise Problem(413, "batch-too-long", "The batch is too long", detail, limitLines=LINES_MAX)

    async def _submit(self, lines: list[bytes], numbers: list[int]) -> None:
        answers: list[Any] = [None] * len(lines)
        found = submissions_from_lines(lines, payload_max_bytes=self._payload_max_bytes)
        if found is None:
            submissions, places = [], []
            for at, line in enumerate(lines):
                try:
                    submissions.append(submission_from_json(line, payload_max_bytes=self._payload_max_bytes))
                    places.append(at)
                except SubmitError as e:
                    answers[at] = _refused(numbers[at], e)
        else:
            submissions, places = found, list(range(len(lines)))
        if self._service.limits.active:
            refusals = {at: self._refusal(one) for one, at in zip(submissions, places, strict=True)}
            submissions = [one for one, at in zip(submissions, places, strict=True) if refusals[at] is None]
            places = [at for at in places if refusals[at] is None]
            for at, problem in refusals.items():
                if problem is not None:
                    answers[at] = {"line": numbers[at], "error": problem.document()}
        # Without options of their own the items are pairs: those of one type are packed all at once.
        items = [one if one[2] else one[:2] for one in submissions]
        try:
            handles = await self._client.submit_many(items, collect=True)
        except PartialSubmit as e:
            # Which of them went in cannot be told apart here; keys make it safe to send them again.
            detail = f"{len(e.handles)} of these {len(items)} lines went in before: {e.cause}"
            problem = Problem(504, "outcome-unknown", "Nobody can tell whether the job was created", detail)
            for at in places:
                answers[at] = {"line": numbers[at], "error": problem.document()}
            self._add(answers)
            if isinstance(e.cause, TQEError):
                raise e.cause from e
            raise
        accepted = iter(handles)
        for position, at in enumerate(places):
            error = handles.refused.get(position)
            if error is None:
                job = next(accepted)
                answers[at] = {"line": numbers[at], "id": job.id, "created": job.created}
            else:
                answers[at] = _refused(numbers[at], error)
        self._add(answers)

    def _refusal(self, submission: Submission) -> Problem | None:
        """Why a sound line may not go in now."""
        problem = self._service.limits.turn(self._caller)
        if problem is not None:
            return problem
        try:
            return self._service.limits.enter(lane_of(self._service, submission[0], submission[2]))
        except SubmitError:
            return None  # it is refused for that, with all that is said of it

    def _add(self, answers: list[Any]) -> None:
        self.answers += _encode_line(answers)
        self.answered += len(answers)

    def stopped(self, problem: Problem) -> None:
        """The batch ends here: this and what follows was not looked at."""
        self.answers += _encode_line([{"line": self._line + 1, "error": problem.document()}])


def _refused(line: int, error: SubmitError) -> dict[str, Any]:
    return {"line": line, "error": of_error(error).document()}
