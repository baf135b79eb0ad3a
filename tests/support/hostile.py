"""Broken and hostile HTTP, made from a seed; and a run of as much of it as one wants against a server.

`python -m tests.support.hostile --requests 100000` starts a server of its own, and prints what was answered
and how the server's memory grew as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import select
import socket
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.redis_server import RedisServer, binaries
from tests.support.web import Web, serve

QUIET_S = 0.1
HEAD = b"host: localhost\r\nconnection: close\r\n"
JSON_HEAD = HEAD + b"content-type: application/json\r\n"
LINES_HEAD = HEAD + b"content-type: application/x-ndjson\r\n"
ID = b"01ARZ3NDEKTSV4RRFFQ69G5F00.0"
GETS = (
    *(b"/api/v1/jobs/" + ID, b"/api/v1/queues", b"/api/v1/workers", b"/api/v1/dlq", b"/api/v1/dlq/groups"),
    *(b"/api/v1/dlq/" + ID, b"/api/v1/cron", b"/healthz", b"/readyz", b"/openapi.json", b"/metrics", b"/x"),
)
POSTS = (
    *(b"/api/v1/jobs", b"/api/v1/jobs:batch", b"/api/v1/dlq:replay", b"/api/v1/dlq:delete"),
    *(b"/api/v1/queues/low/pause", b"/api/v1/queues/low/purge", b"/api/v1/cron/x/pause"),
    *(b"/api/v1/queues/low/resume", b"/api/v1/dlq/" + ID + b"/replay"),
)
FIELDS = ("type", "payload", "priority", "idempotencyKey", "delay", "runAt", "timeout", "maxRetries", "track")
SELECTION = ("ids", "type", "reason", "all", "dryRun", "cursor", "expires")
# Written as they are: no encoder would.
ODD_VALUES = (
    *(b"null", b"true", b"-1", b"0", b"1e999", b"-0.0", b"1e-400", b"NaN", b"Infinity", b"[]", b"{}", b'""'),
    *(
        b"9" * 400,
        b"9007199254740993",
        b"18446744073709551616",
        b"-9223372036854775809",
        b"0x10",
        b"01",
        b"1.",
    ),
    *(b'"\\ud800"', b'"\\u0000"', b'"\x00"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\xf0\x9f\x92\xa9"', b"'a'"),
    *(
        b'"A"',
        b'"' + b"x" * 5_000 + b'"',
        b'"HIGH"',
        b'"2031-01-31T08:00:00Z"',
        b'"9999-12-31T23:59:59+14:00"',
    ),
    *(b"[" * 70 + b"]" * 70, b'{"a":' * 70 + b"1" + b"}" * 70, b'{"a":1,"a":2}', b'"{\\"a\\": 1}"', b'"{"'),
)


@dataclass
class Attack:
    """Bytes to send in pieces. `leave`: do not wait for the answer; `reset`: and break the connection."""

    pieces: list[bytes]
    leave: bool = False
    reset: bool = False


def attacks(seed: int) -> Iterator[Attack]:
    """Endlessly many, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        data = rng.choice(MAKERS)(rng)
        if rng.random() < 0.15:
            data = _damaged(rng, data)
        kind = rng.random()
        if kind < 0.85:
            yield Attack([data])
        elif kind < 0.9:
            at = rng.randrange(len(data) + 1)
            yield Attack([data[:at], data[at:]])
        else:
            yield Attack([data[: rng.randrange(len(data) + 1)]], leave=True, reset=rng.random() < 0.5)


def _damaged(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(found) + 1)
        what = rng.random()
        if what < 0.4 and at < len(found):
            found[at] = rng.randrange(256)
        elif what < 0.7:
            found[at:at] = rng.choice((b"\0", b"\r\n", b"\n", b"\xff", b" ", b":", b"\r", rng.randbytes(3)))
        else:
            del found[at : at + rng.randint(1, 20)]
    return bytes(found)


def request(method: bytes, path: bytes, head: bytes = HEAD, body: bytes | None = None) -> bytes:
    """One that is whole."""
    length = b"" if body is None else b"content-length: %d\r\n" % len(body)
    return method + b" " + path + b" HTTP/1.1\r\n" + head + length + b"\r\n" + (body or b"")


def _value(rng: random.Random) -> bytes:
    return rng.choice(ODD_VALUES)


def _object(rng: random.Random, names: tuple[str, ...]) -> bytes:
    members = [b'"%b": %b' % (rng.choice(names).encode(), _value(rng)) for _ in range(rng.randint(0, 4))]
    if rng.random() < 0.7:
        members.insert(0, b'"type": "A"')
    if rng.random() < 0.1:
        members.append(b'"%b": 1' % rng.choice((b"x", b"\\u0000", b"\xff", b"k" * 3_000)))
    return b"{" + b", ".join(members) + b"}"


def submission(rng: random.Random) -> bytes:
    return request(b"POST", b"/api/v1/jobs", JSON_HEAD, _object(rng, FIELDS))


def selection(rng: random.Random) -> bytes:
    path = rng.choice((b"/api/v1/dlq:replay", b"/api/v1/dlq:delete"))
    return request(b"POST", path, JSON_HEAD, _object(rng, SELECTION))


def batch(rng: random.Random) -> bytes:
    lines = [_object(rng, FIELDS) if rng.random() < 0.8 else _value(rng) for _ in range(rng.randint(0, 20))]
    return request(b"POST", b"/api/v1/jobs:batch", LINES_HEAD, b"\n".join(lines))


def big(rng: random.Random) -> bytes:
    """Bodies around and above the limits, and more than the server reads ahead."""
    body = (
        b'{"type": "A", "payload": {"x": "'
        + b"x" * rng.choice((70_000, 200_000, 1_048_500, 1_100_000))
        + b'"}}'
    )
    if rng.random() < 0.5:
        return request(b"POST", b"/api/v1/jobs:batch", LINES_HEAD, b'{"type": "A"}\n' * 3_000 + body)
    return request(b"POST", b"/api/v1/jobs", JSON_HEAD, body)


def chunked(rng: random.Random) -> bytes:
    chunks = rng.choice(
        (
            *(b"5\r\nab\r\n0\r\n\r\n", b"zz\r\n", b"-1\r\n", b"FFFFFFFFFFFFFFFFF\r\nx", b"d\r\n", b"0\r\n"),
            *(
                b'd\r\n{"type": "A"}\r\n0\r\n\r\n',
                b'd;x=y\r\n{"type": "A"}\r\n0\r\nx: y\r\n\r\n',
                b"\r\n" * 50,
            ),
            *(
                b"1\n{\n0\n\n",
                b"7FFFFFFF\r\n{}",
                b"0x5\r\n12345\r\n0\r\n\r\n",
                b"1\r\n{\r\n" * 300,
                b" 1\r\n{\r\n",
            ),
        )
    )
    framing = rng.choice(
        (
            *(b"chunked", b"Chunked", b"chunked, chunked", b"gzip, chunked", b"identity", b"x", b""),
            *(b"chunked\r\ncontent-length: 5", b"\x0bchunked", b"chunked\r\ntransfer-encoding: identity"),
        )
    )
    head = rng.choice((JSON_HEAD, LINES_HEAD)) + b"transfer-encoding: " + framing + b"\r\n"
    return rng.choice((b"POST ", b"GET ")) + rng.choice(POSTS) + b" HTTP/1.1\r\n" + head + b"\r\n" + chunks


def lengths(rng: random.Random) -> bytes:
    length = rng.choice(
        (
            *(
                b"-1",
                b"abc",
                b"99999999999999999999",
                b"1e3",
                b"+5",
                b" 5",
                b"5, 5",
                b"5\r\ncontent-length: 6",
            ),
            *(b"", b"0", b"4", b"1048577", b"0x10", b"\x00", b"5 5"),
        )
    )
    path, head = rng.choice(POSTS), rng.choice((JSON_HEAD, LINES_HEAD))
    return b"POST " + path + b" HTTP/1.1\r\n" + head + b"content-length: " + length + b"\r\n\r\n{}abc"


def heads(rng: random.Random) -> bytes:
    odd = rng.choice(
        (
            *(
                b"x: " + b"y" * 20_000,
                b"x: y\r\n" * 2_000,
                b"y" * 17_000,
                b"x : y",
                b": y",
                b"x",
                b" x: y",
                b"x\0: y",
            ),
            *(
                b"x: a\0b",
                b"x: a\r\n b",
                b"x: \xff\xfe",
                b"x:" + b" " * 9_000,
                b"x: a\rb",
                b"authorization: Bearer ",
            ),
            *(b"authorization: \xff", b"cookie: " + b"a=b; " * 900, b"expect: 100-continue", b"expect: x"),
            *(
                b"upgrade: websocket\r\nconnection: upgrade",
                b"upgrade: h2c\r\nconnection: upgrade, http2-settings",
            ),
            *(
                b"host: evil.example",
                b"host: \xff",
                b"host: localhost, evil",
                b"host: [::1",
                b"host: [" + b":" * 99,
            ),
            *(
                b"origin: null",
                b"origin: \xff",
                b"sec-fetch-site: cross-site",
                b"range: bytes=0-1,5-",
                b"te: x",
            ),
            *(
                b"content-encoding: gzip",
                b"content-encoding: \x80",
                b"x-forwarded-for: \xff",
                b"forwarded: \x01",
            ),
            *(b"content-type: text/html; charset=\xff", b"content-type: application/json; charset=utf-16"),
            *(
                b"content-type: application/json\r\ncontent-type: text/plain",
                b"accept: \x80",
                b"content-type:",
            ),
        )
    )
    body = rng.choice((b"", b"{}", b'{"type": "A"}'))
    return request(
        rng.choice((b"GET", b"POST", b"DELETE")), rng.choice(GETS + POSTS), odd + b"\r\n" + HEAD, body
    )


def lines(rng: random.Random) -> bytes:
    """First lines."""
    method = rng.choice(
        (
            *(
                b"GET",
                b"POST",
                b"DELETE",
                b"PUT",
                b"PATCH",
                b"HEAD",
                b"OPTIONS",
                b"TRACE",
                b"CONNECT",
                b"PRI",
            ),
            *(b"get", b"FOO", b"", b"G\0T", b"\xff", b"A" * 9_000, b"PROPFIND", b"SUBSCRIBE", b"SOURCE"),
        )
    )
    path = rng.choice(
        (
            *(
                b"*",
                b"",
                b"/",
                b"//",
                b"/../../etc/passwd",
                b"http://evil.example/api/v1/queues",
                b"localhost:80",
            ),
            *(
                b"/api/v1/jobs/%00",
                b"/api/v1/jobs/%ff",
                b"/api/v1/jobs/%",
                b"/api/v1/jobs/%zz",
                b"/\xff",
                b"/a b",
            ),
            *(
                b"/api/v1/jobs/" + b"x" * 15_000,
                b"/api/v1/jobs/\xc3\xa4",
                b"/api/v1/queues/%2e%2e/pause",
                b"?",
                b"/#",
            ),
            *(
                b"/api/v1/queues/" + b"%F0%9F%92%A9" * 9 + b"/pause",
                b"/api/v1/dlq?cursor=%00",
                b"/%",
                b"http://[",
            ),
            *GETS,
            *POSTS,
        )
    )
    version = rng.choice(
        (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"http/1.1", b"", b"X")
    )
    return method + b" " + path + b" " + version + b"\r\n" + HEAD + b"\r\n"


def queries(rng: random.Random) -> bytes:
    names = (b"wait", b"cursor", b"type", b"reason", b"%00", b"", b"\xff", b"x" * 500)
    values = (
        *(
            b"",
            b"-1",
            b"nan",
            b"inf",
            b"1e999",
            b"0",
            b"0.001",
            b"%00",
            b"%ff",
            b"%",
            b"\xff",
            b"x" * 9_000,
            b"1/x",
        ),
        *(b"1/" + ID, b"nan/" + ID, b"inf/" + ID, b"-1e308/" + ID, b"A", b"&&&==", b"%F0%9F%92%A9", b"0_1"),
    )
    query = b"&".join(rng.choice(names) + b"=" + rng.choice(values) for _ in range(rng.randint(1, 3)))
    return request(b"GET", rng.choice(GETS) + b"?" + query)


def pipelined(rng: random.Random) -> bytes:
    kept = HEAD.replace(b"connection: close\r\n", b"")
    return b"".join(request(b"GET", rng.choice(GETS), kept) for _ in range(rng.randint(1, 30))) + rng.choice(
        (request(b"GET", b"/healthz"), b"garbage", b"\r\n\r\n", b"")
    )


def noise(rng: random.Random) -> bytes:
    return rng.choice(
        (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
            rng.randbytes(rng.randint(1, 2_000)),
            b"\r\n" * 2_000,
            b"\0" * 100,
            b"GET / HTTP/1.1\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"",
        )
    )


def plain(rng: random.Random) -> bytes:
    method = rng.choice((b"GET", b"DELETE", b"POST", b"HEAD"))
    return request(
        method, rng.choice(GETS + POSTS), JSON_HEAD, rng.choice((None, b"", b"{}", b"\xef\xbb\xbf{}"))
    )


# Often what is cheap to answer, seldom what is long.
MAKERS: tuple[Callable[[random.Random], bytes], ...] = (
    *(submission, submission, submission, selection, batch, chunked, lengths, heads, lines, queries) * 5,
    *(pipelined, noise, plain) * 4,
    big,
)


@dataclass
class Tally:
    """What came back."""

    statuses: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[bytes, bytes]] = field(default_factory=list)  # (sent, answered)

    def note(self, attack: Attack, answer: bytes) -> None:
        """Each answer must be HTTP, and no failure of the server."""
        if not answer:
            self.statuses["left" if attack.leave else "none"] += 1
            return
        status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "none of HTTP"
        self.statuses[status] += 1
        if not status.isdigit() or (status[0] == "5" and status != "503") or b"HTTP/1.1 500" in answer:
            self.bad.append((b"".join(attack.pieces), answer))


def send(port: int, attack: Attack, timeout_s: float = 30.0) -> bytes:
    """All that comes back until the server closes."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout_s) as connection:
        if attack.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ended = attack.leave
        try:
            for piece in attack.pieces:
                connection.sendall(piece)
            while not attack.leave:
                if not ended and not select.select([connection], [], [], QUIET_S)[0]:
                    connection.shutdown(socket.SHUT_WR)  # the server waits for more, which will not come
                    ended = True
                piece = connection.recv(65_536)
                if not piece:
                    break
                found += piece
        except TimeoutError:
            raise
        except OSError:
            pass  # refused half-way, and the connection is broken; what was said before counts
    return found


def run(port: int, requests: int, seed: int, *, clients: int = 8) -> Tally:
    """So many, from several clients at once."""
    tally = Tally()

    def client(number: int) -> None:
        made = attacks(seed * 1_000 + number)
        for _ in range(requests // clients):
            attack = next(made)
            tally.note(attack, send(port, attack))

    with ThreadPoolExecutor(clients) as pool:
        for ended in [pool.submit(client, number) for number in range(clients)]:
            ended.result()
    return tally


def rss_kib(pid: int) -> int:
    """Resident memory of a process and its children."""
    total, pids = 0, [pid]
    while pids:
        one = pids.pop()
        with contextlib.suppress(FileNotFoundError):
            text = Path(f"/proc/{one}/status").read_text()
            total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS:"))
            pids += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return total


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    # What a body of the largest size leaves in the allocator; a leak of 1 KiB a request would be 88 MiB.
    parser.add_argument("--growth-mib-max", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = RedisServer(binaries()[0])
        server.start()
        program = serve(folder, {"TQE_REDIS_URL": server.url})
        try:
            web = Web(program)
            found = report(web, options.requests, options.seed)
        finally:
            program.close()
            server.close()
    print(json.dumps(found, indent=1))
    grown = found["rss_kib_at_the_end"] - found["rss_kib_after_a_tenth"]
    print(f"memory grew by {grown / 1024:.1f} MiB; {options.growth_mib_max} MiB are allowed", file=sys.stderr)
    return bool(found["bad"] or found["tracebacks"] or grown > options.growth_mib_max * 1024)


def _tracebacks(log: str) -> dict[str, int]:
    """How often each exception was logged with a traceback."""
    return dict(Counter(re.findall(r"(?m)^Traceback.*\n(?: .*\n)+(.*)$", log)))


def report(web: Web, requests: int, seed: int) -> dict[str, Any]:
    """The run; memory counts from when a tenth has been answered: caches and pools are filled by then."""
    pid = web.program.process.pid
    warm = run(web.port, requests // 10, seed)
    before = rss_kib(pid)
    tally = run(web.port, requests - requests // 10, seed + 1)
    tally.statuses += warm.statuses
    bad = warm.bad + tally.bad
    return {
        "requests": requests,
        "statuses": dict(sorted(tally.statuses.items())),
        "bad": [repr(one)[:2_000] for one in bad[:20]],
        "tracebacks": _tracebacks(web.program.text()),
        "alive": web.get("/healthz").status == 200,
        "rss_kib_after_a_tenth": before,
        "rss_kib_at_the_end": rss_kib(pid),
    }


if __name__ == "__main__":
    sys.exit(main())
