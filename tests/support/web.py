"""A `tqe serve` for tests: a real process on loopback, and a client that can send anything."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.cli import Program


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def problem(self, status: int, name: str) -> Any:
        """The document, which must be a sound problem of this kind."""
        assert self.status == status, (self.status, self.body)
        assert self.headers["content-type"] == "application/problem+json"
        found = self.json
        assert found["status"] == status and found["title"] and found["detail"]
        assert found["type"] == f"urn:tqe:problem:{name}", found
        return found


@dataclass
class Web:
    """`web("POST", "/api/v1/jobs", {...})` against one running server."""

    program: Program
    headers: dict[str, str] = field(default_factory=dict)
    port: int = 0

    def __post_init__(self) -> None:
        found = re.search(r"serving +http://[^ ]*:(\d+)", self.program.says("stop  "))
        assert found is not None, self.program.text()
        self.port = int(found[1])

    def __call__(
        self, method: str, path: str, body: Any = None, timeout: float = 30.0, **headers: str
    ) -> Answer:
        """One request on a connection of its own. A body that is no bytes goes as JSON."""
        sent = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, named, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self("GET", path, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self("POST", path, body, **headers)

    def raw(self, data: bytes, timeout: float = 30.0) -> bytes:
        """Whatever the server answers to these bytes until it closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return read_to_end(connection)


ServeIt = Callable[..., Web]


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the other side closes; a reset ends it too."""
    found = b""
    try:
        while piece := connection.recv(65_536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def serve(folder: Path, env: dict[str, str], *args: str) -> Program:
    """Start a server on a free port."""
    return Program(folder, env, ("serve", *args, "--port", "0"))
