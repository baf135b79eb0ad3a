"""Owns the framing of the Redis protocol: where one message ends, in either direction, however it was cut."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1

LINE_BYTES_MAX = 64 * 1024
BULK_BYTES_MAX = 512 * 1024 * 1024
_ONE_LINE = b"+-:_#,("
_BULK = b"$=!"
_AGGREGATE = b"*~>"
_MAP = b"%|"


class ProtocolError(Exception):
    """The peer sent bytes that are not the protocol."""


class Framer:
    """Cuts a byte stream into whole messages, each returned with its bytes unchanged.

    Incremental: what was scanned is not scanned again, so a megabyte that comes byte by byte is cheap.
    """

    def __init__(self, *, inline: bool = False) -> None:
        self._inline = inline  # commands typed by hand: `PING\r\n`
        self._buffer = bytearray()
        self._at = 0  # everything before it is understood
        self._bulk = -1  # bytes of a bulk string still to come, with its newline
        self._open: list[int] = []  # elements still missing, a number for each nesting level

    @property
    def pending(self) -> int:
        """Bytes of a message that is not whole yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        self._buffer += data
        messages = []
        while self._step():
            if not self._open and self._bulk < 0:
                messages.append(bytes(self._buffer[: self._at]))
                del self._buffer[: self._at]
                self._at = 0
        return messages

    def _step(self) -> bool:
        """Understand one more line or bulk string; False when its bytes are not all there."""
        if self._bulk >= 0:
            if len(self._buffer) - self._at < self._bulk:
                return False
            self._at += self._bulk
            if self._buffer[self._at - 2 : self._at] != b"\r\n":
                raise ProtocolError("a bulk string does not end with its newline")
            self._bulk = -1
            self._element_done()
            return True
        end = self._buffer.find(b"\r\n", self._at)
        if end < 0:
            if len(self._buffer) - self._at > LINE_BYTES_MAX:
                raise ProtocolError("a line without an end")
            return False
        line = bytes(self._buffer[self._at : end])
        self._at = end + 2
        self._understand(line)
        return True

    def _understand(self, line: bytes) -> None:
        kind, rest = line[:1], line[1:]
        if kind and kind in _ONE_LINE:
            self._element_done()
        elif kind and kind in _BULK:
            length = _number(rest, BULK_BYTES_MAX)
            if length < 0:
                self._element_done()
            else:
                self._bulk = length + 2
        elif kind and kind in _AGGREGATE + _MAP:
            count = _number(rest, 1 << 30) * (2 if kind in _MAP else 1)
            # An attribute stands before the value that it describes.
            count += 1 if kind == b"|" else 0
            if count <= 0:
                self._element_done()
            else:
                self._open.append(count)
        elif self._inline and not self._open:
            return
        else:
            raise ProtocolError(f"not the start of a message: {line[:40]!r}")

    def _element_done(self) -> None:
        while self._open:
            self._open[-1] -= 1
            if self._open[-1]:
                return
            self._open.pop()


def _number(text: bytes, highest: int) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise ProtocolError(f"not a length: {text[:40]!r}") from error
    if not -1 <= value <= highest:
        raise ProtocolError(f"a length of {value}")
    return value


def parse_command(message: bytes) -> list[bytes]:
    """The arguments of one whole command."""
    if message[:1] != b"*":
        return message.split()
    out: list[bytes] = []
    at = message.index(b"\r\n") + 2
    for _ in range(int(message[1 : at - 2])):
        end = message.index(b"\r\n", at)
        length = int(message[at + 1 : end])
        out.append(message[end + 2 : end + 2 + length])
        at = end + 2 + length + 2
    return out


def encode_command(argv: Sequence[bytes | str | int]) -> bytes:
    parts = [part if isinstance(part, bytes) else str(part).encode() for part in argv]
    head = b"*%d\r\n" % len(parts)
    return head + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


def script_sha(argv: Sequence[bytes]) -> str:
    """Which script a command runs, as SHA-1 of its text; empty for other commands."""
    name = argv[0].upper() if argv else b""
    if len(argv) > 1 and name in (b"EVALSHA", b"EVALSHA_RO"):
        return argv[1].decode("ascii", "replace").lower()
    if len(argv) > 1 and name in (b"EVAL", b"EVAL_RO"):
        return sha1(argv[1], usedforsecurity=False).hexdigest()
    return ""
