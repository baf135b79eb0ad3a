"""Owns the check of payloads before they are sent: JSON within the limits, and arguments that the task
takes."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tqe.codec import payload as codec_payload
from tqe.errors import InvalidOption, InvalidPayload, SubmitError
from tqe.job import OUTWARD_NAMES
from tqe.registry import Task

AnyTask = Task[..., Any]
Submission = tuple[str, dict[str, Any], dict[str, Any]]


class PayloadEncoder:
    """Encodes payloads under the limits of one app. `task` is the task as far as this process knows it."""

    def __init__(self, *, payload_max_bytes: int, zstd_threshold_bytes: int) -> None:
        self.payload_max_bytes = payload_max_bytes
        self.zstd_threshold_bytes = zstd_threshold_bytes

    def encode(self, payload: Any, task: AnyTask | None) -> bytes:
        raw = codec_payload.encode(payload, payload_max_bytes=self.payload_max_bytes)
        if task is not None:
            task.validate(raw)
        return raw

    def encode_many(
        self, payloads: list[Any], task: AnyTask | None
    ) -> tuple[list[bytes], dict[int, SubmitError]]:
        """The encoded payloads, and those that were refused by position, with b"" in their place."""
        encoded: list[bytes] = []
        refused: dict[int, SubmitError] = {}
        for position, payload in enumerate(payloads):
            try:
                encoded.append(self.encode(payload, task))
            except SubmitError as e:
                encoded.append(b"")
                refused[position] = e
        return encoded, refused

    def encode_lines(self, payloads: list[Any], task: AnyTask | None) -> tuple[bytes, int] | None:
        """The encoded payloads, each with a newline behind it, and the size of the longest: a C loop for each
        check over the whole list. None if anything is odd and has to be looked at singly."""
        if task is not None and task.mode == "kwargs":
            return None
        try:
            found = codec_payload.encode_lines(payloads, payload_max_bytes=self.payload_max_bytes)
            if found is not None and task is not None:
                # Decoded just as a worker does, and thrown away: the only check that cannot disagree with it.
                task.decoder.decode_lines(found[0])
        except (ValueError, RecursionError):
            return None
        return found

    def encode_columns(
        self, names: Sequence[str], payloads: list[Any], tasks: Mapping[str, AnyTask | None]
    ) -> list[bytes] | None:
        """The same for payloads of several types, one name each; as a list."""
        found = codec_payload.encode_lines(payloads, payload_max_bytes=self.payload_max_bytes)
        if found is None:
            return None
        encoded = found[0].split(b"\n")
        encoded.pop()  # what follows the last newline
        by_name: dict[str, list[bytes]] = {name: [] for name in tasks}
        for name, raw in zip(names, encoded, strict=True):
            by_name[name].append(raw)
        try:
            for name, some in by_name.items():
                task = tasks[name]
                if task is not None and task.mode == "kwargs":
                    for raw in some:
                        task.validate(raw)
                elif task is not None:
                    task.decoder.decode_lines(b"\n".join(some))
        except (SubmitError, ValueError, RecursionError):
            return None
        return encoded

    def compress(self, raw: bytes) -> tuple[bytes, bool]:
        """The bytes to store, and whether they are compressed."""
        return codec_payload.compress(raw, zstd_threshold_bytes=self.zstd_threshold_bytes)


def submission_from_json(text: str | bytes, *, payload_max_bytes: int, what: str = "line") -> Submission:
    """(type, payload, options) of an NDJSON line or a REST body: `{"type", "payload", "priority", "delay",
    …}`. `what` it is called where it cannot be read."""
    # The limit counts for the payload; the rest of the line is short, and what is longer is refused later.
    body = codec_payload.parse_json(text, payload_max_bytes=2 * payload_max_bytes, what=what)
    return _submission(body, payload_max_bytes)


def submissions_from_lines(lines: list[bytes], *, payload_max_bytes: int) -> list[Submission] | None:
    """The same for many lines at once, at a fraction of the cost; None if any line is odd and all have to be
    looked at singly."""
    bodies = codec_payload.parse_lines(lines)
    if bodies is None:
        return None
    try:
        return [_submission(body, payload_max_bytes) for body in bodies]
    except SubmitError:
        return None


def _submission(body: dict[str, Any], payload_max_bytes: int) -> Submission:
    type_name, payload = body.pop("type", None), body.pop("payload", {})
    if not isinstance(type_name, str):
        fault = "missing" if type_name is None else "no text"
        raise InvalidPayload(f'"type" is {fault}: it names the task')
    if isinstance(payload, str):  # JSON within JSON, as some producers send it
        payload = codec_payload.parse_json(payload, payload_max_bytes=payload_max_bytes)
    if not isinstance(payload, dict):
        raise InvalidPayload('"payload" is not a JSON object')
    if not body:
        return type_name, payload, body
    options = {OUTWARD_NAMES.get(name, name): value for name, value in body.items() if value is not None}
    if isinstance(options.get("run_at"), str):
        options["run_at"] = _instant(options["run_at"])
    return type_name, payload, options


def _instant(text: str) -> datetime:
    """A time in ISO 8601. One without a zone is refused later, as everywhere."""
    try:
        return datetime.fromisoformat(text)
    except ValueError as e:
        raise InvalidOption(f"run_at takes a time such as 2030-01-31T08:00:00Z, not {text[:40]!r}") from e
