"""One viewer of the live view: reads server-sent events as a browser does."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.support.web import Web


@dataclass
class Viewer:
    """A connection that is being sent events."""

    connection: socket.socket
    head: str
    rest: bytes = b""

    def pieces(self) -> Iterator[str]:
        """Events and comments as they come, without the framing of HTTP; ends with the connection."""
        text = b""
        while True:
            size, _, self.rest = self._until(b"\r\n")
            if size is None or int(size, 16) == 0:
                return
            while len(self.rest) < int(size, 16) + 2:
                self.rest += self.connection.recv(65_536)
            text += self.rest[: int(size, 16)]
            self.rest = self.rest[int(size, 16) + 2 :]
            while b"\n\n" in text:
                piece, _, text = text.partition(b"\n\n")
                yield piece.decode()

    def _until(self, end: bytes) -> tuple[bytes | None, bytes, bytes]:
        while end not in self.rest:
            piece = self.connection.recv(65_536)
            if not piece:
                return None, b"", b""
            self.rest += piece
        return self.rest.partition(end)

    def event(self, name: str) -> Any:
        """The data of the next event of that name."""
        for piece in self.pieces():
            if piece.startswith(f"event: {name}\ndata: "):
                return json.loads(piece.partition("\ndata: ")[2])
        raise AssertionError(f"the stream has ended before an event {name}")


@contextlib.contextmanager
def view(web: Web, **headers: str) -> Iterator[Viewer]:
    """Look, as long as the block lasts."""
    with socket.create_connection(("127.0.0.1", web.port), 30) as connection:
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in (web.headers | headers).items()]
        head = "\r\n".join([f"Host: 127.0.0.1:{web.port}", "Connection: close", *lines])
        connection.sendall(f"GET /api/v1/events HTTP/1.1\r\n{head}\r\n\r\n".encode())
        viewer = Viewer(connection, "")
        found, _, viewer.rest = viewer._until(b"\r\n\r\n")
        viewer.head = (found or b"").decode()
        yield viewer
