"""Owns the bytes of a payload: JSON in and out, compression, the refusal of what would not survive the way.

A payload is a JSON object: text keys, finite numbers of at most 64 bits, at most DEPTH_MAX levels. What the
encoder knows beyond plain data (dataclasses, datetimes, UUIDs, …) is taken and arrives as what it encodes to.
"""

import math
import re
import threading
from typing import TYPE_CHECKING, Any, Final

import msgspec
import zstandard

from tqe.errors import InvalidPayload, PayloadTooLarge

if TYPE_CHECKING:
    from tqe import _fast as _backend
else:
    from tqe.codec import _backend

PAYLOAD_MAX_BYTES: Final = 1024 * 1024
ZSTD_THRESHOLD_BYTES: Final = 1024
DEPTH_MAX: Final = 64  # levels of objects and arrays; a worker's decoder must never run out of stack

_TOO_DEEP: Final = f"this JSON is nested deeper than {DEPTH_MAX} levels, which is the most"
_INT_MIN: Final = -(2**63)
_INT_MAX: Final = 2**64 - 1
_ZSTD_LEVEL: Final = 3

_encoder: Final = msgspec.json.Encoder()
_encode: Final = _encoder.encode
_encode_sorted: Final = msgspec.json.Encoder(order="deterministic").encode
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode
_decode_lines: Final = msgspec.json.Decoder(dict[str, Any]).decode_lines
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_local: Final = threading.local()


def encode(payload: Any, *, payload_max_bytes: int = PAYLOAD_MAX_BYTES) -> bytes:
    """The payload as JSON. Raises InvalidPayload or PayloadTooLarge, whose text says what to change."""
    # The look comes first: the encoder writes NaN as null and a number as a key in silence.
    if _backend.plain_payloads([payload]) == 0:
        payload = _plain(payload)
    try:
        encoded = _encode(payload)
    except UnicodeEncodeError as e:
        raise InvalidPayload("the payload holds half of a surrogate pair, which is no text: clean it") from e
    if len(encoded) > payload_max_bytes:
        raise PayloadTooLarge(len(encoded), payload_max_bytes)
    return encoded


def encode_lines(
    payloads: list[Any], *, payload_max_bytes: int = PAYLOAD_MAX_BYTES
) -> tuple[bytes, int] | None:
    """The payloads as JSON, each ended by a newline, and the size of the longest: several times faster than
    one by one. None if any of them is not surely sound and has to be looked at by itself."""
    if _backend.plain_payloads(payloads) != len(payloads):
        return None
    try:
        lines = _encoder.encode_lines(payloads)
    except UnicodeEncodeError:
        return None
    longest = _backend.longest_line(lines)
    return (lines, longest) if longest <= payload_max_bytes else None


def decode(encoded: bytes, *, what: str = "payload") -> dict[str, Any]:
    """The payload that encode() wrote. Raises InvalidPayload when it is no JSON object; `what` it is called
    then."""
    try:
        return _decode(encoded)
    except RecursionError as e:
        raise InvalidPayload(_TOO_DEEP) from e
    except msgspec.ValidationError as e:
        if encoded.lstrip()[:1] == b"{":  # a number that no double holds, or endless digits
            raise InvalidPayload(f"the {what} holds a value that cannot be read: {e}") from e
        raise InvalidPayload(f"the {what} is no JSON object") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise InvalidPayload(f"the {what} is not JSON: {e}") from e


def parse_json(
    text: bytes | str, *, payload_max_bytes: int = PAYLOAD_MAX_BYTES, what: str = "payload"
) -> dict[str, Any]:
    """The payload that someone wrote as JSON. Refuses also keys that occur twice, which decoders let pass."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > payload_max_bytes:
        raise PayloadTooLarge(len(raw), payload_max_bytes)
    payload = decode(raw, what=what)
    # Every member has one colon outside of strings, so a key that was dropped leaves one too many.
    if _check(payload, ()) != _STRING.sub(b"", raw).count(b":"):
        raise InvalidPayload(f"a key occurs twice in one object of the {what}: remove one")
    return payload


def parse_lines(lines: list[bytes]) -> list[dict[str, Any]] | None:
    """The same for many texts, each on one line. None if one of them is odd and all have to be looked at
    singly: no JSON object, or perhaps a key that occurs twice, or nested too deep for the encoder."""
    text = b"\n".join(lines)
    try:
        found: list[dict[str, Any]] = _decode_lines(text)
        again = _encoder.encode_lines(found)
    except (ValueError, RecursionError, OverflowError):
        return None
    # A key that was dropped took its colon along. (So did a colon that was written as an escape: odd enough.)
    if len(found) != len(lines) or again.count(b":") != text.count(b":"):
        return None
    return found


def canonical(encoded: bytes) -> bytes:
    """The same payload with all keys sorted: equal for payloads that say the same in another order."""
    return _encode_sorted(decode(encoded))


def compress(encoded: bytes, *, zstd_threshold_bytes: int = ZSTD_THRESHOLD_BYTES) -> tuple[bytes, bool]:
    """The bytes to store, and whether they are zstd: from the threshold on, and only if they shrink."""
    if len(encoded) < zstd_threshold_bytes:
        return encoded, False
    compressor = getattr(_local, "compressor", None)
    if compressor is None:
        # One a thread: two threads must not share a context, and making one costs more than compressing.
        compressor = _local.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    stored: bytes = compressor.compress(encoded)
    return (stored, True) if len(stored) < len(encoded) else (encoded, False)


def decompress(stored: bytes, *, payload_max_bytes: int = PAYLOAD_MAX_BYTES) -> bytes:
    """Undo compress(). Never makes more than payload_max_bytes: a few bytes can stand for gigabytes."""
    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    # The library trusts the size that the data states, and allocates it: look first.
    size = plain_bytes(stored)
    if size > payload_max_bytes:
        raise PayloadTooLarge(size, payload_max_bytes)
    try:
        encoded: bytes = decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise InvalidPayload(f"the compressed payload is damaged: {e}") from e
    return encoded


def plain_bytes(stored: bytes) -> int:
    """The size that compressed data says it has when it is undone. Raises InvalidPayload."""
    try:
        size: int = zstandard.get_frame_parameters(stored).content_size
    except zstandard.ZstdError as e:
        raise InvalidPayload(f"the compressed payload is damaged: {e}") from e
    if size == zstandard.CONTENTSIZE_UNKNOWN:
        raise InvalidPayload("the compressed payload does not state its size")
    return size


def _plain(payload: Any) -> dict[str, Any]:
    """The payload as plain data. Raises InvalidPayload for what must not be sent."""
    try:
        value = msgspec.to_builtins(payload)
        _encode(value)
    except RecursionError as e:
        raise InvalidPayload(_TOO_DEEP) from e
    except UnicodeEncodeError:
        pass  # encode() says so
    except (TypeError, ValueError, OverflowError) as e:
        raise InvalidPayload(f"the payload cannot be written as JSON: {e}") from e
    if not isinstance(value, dict):
        raise InvalidPayload(f"a payload is a JSON object, and {type(payload).__name__} is none")
    _check(value, ())
    return value


def _check(value: Any, path: tuple[str, ...]) -> int:
    """Refuse what is not plain, by its place; the number of members of all objects."""
    if value is None or isinstance(value, str | bool):
        return 0
    if isinstance(value, int):
        if not _INT_MIN <= value <= _INT_MAX:
            raise InvalidPayload(f"{_place(path)} is a number beyond 64 bits: send it as a text")
        return 0
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidPayload(f"{_place(path)} is {value}, which JSON has not: send null or a text")
        return 0
    if len(path) >= DEPTH_MAX:
        raise InvalidPayload(_TOO_DEEP)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise InvalidPayload(f"{_place(path)} has the key {key!r}, and keys are texts")
        return len(value) + sum(_check(item, (*path, f".{key}")) for key, item in value.items())
    return sum(_check(item, (*path, f"[{i}]")) for i, item in enumerate(value))


def _place(path: tuple[str, ...]) -> str:
    """Where in the payload: `to.name[2]`."""
    return repr("".join(path)[1:81]) if path else "the payload"
