"""The embedded redis-server as its users see it: find it, start it if need be, hold on to it.

`ensure` gives a handle on the one server of a data folder. Whoever holds a handle is a user: its shared lock
keeps the server alive. Nobody but the keeper (`tqe.store.keeper`) starts, restarts or stops the server; what
happens here is to start a keeper when there is none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from tqe import clock
from tqe.errors import RedisUnavailable
from tqe.store import binaries, keeper
from tqe.store.keeper import UNIX_SOCKET_PATH_MAX, Folder, ask, is_same_file, try_lock, write_file

TIMEOUT_S = 15.0
LINGER_S = 60.0
POLL_FIRST_S = 0.005
POLL_MAX_S = 0.05
KEEPER_STARTS_MAX = 5  # in one `ensure`: a keeper that breaks at once would otherwise be started in a loop
LOG_MAX_BYTES = 1 << 20

# Keepers' locks on their way to a keeper. A process that another thread forks meanwhile gets a copy and, as
# long as it lives, nobody could start a keeper any more: so it closes them.
_locks_in_transit: set[int] = set()


def _close_locks_in_transit() -> None:
    for descriptor in _locks_in_transit:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _locks_in_transit.clear()


os.register_at_fork(after_in_child=_close_locks_in_transit)


class EmbeddedServer:
    """A running embedded server and our lock as one of its users; a context manager.

    Forked children share the lock: the server stays until the last of them is gone, even if this process is
    killed. Programs that are started with exec do not inherit it.
    """

    def __init__(self, folder: Folder, lock: int, options: _Options) -> None:
        self._folder = folder
        self._lock: int | None = lock
        self._options = options
        self.socket = ""
        self.pid = 0
        self.version = ""

    @property
    def url(self) -> str:
        return f"unix://{quote(self.socket)}?db=0"

    @property
    def log(self) -> Path:
        """Where keeper and server write what happened to them."""
        return self._folder.log

    def revive(self, *, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until the server answers, and start a keeper when there is none; cheap when all is well.

        For users that live long, after a lost connection: a server that died comes back by itself, but a
        keeper that was killed takes its server along, and then somebody has to start the next one.
        """
        if self._lock is None:
            raise ValueError("this handle is closed")
        deadline_s = _now_s() + timeout_s
        with _as_unavailable(self._folder):
            _prepare(self._folder.path)
            if not is_same_file(self._lock, self._folder.users_lock):
                # The folder was deleted and made anew: our lock is on a file that no keeper looks at.
                stale, self._lock = self._lock, _become_user(self._folder, deadline_s)
                os.close(stale)
            self._attach(deadline_s, timeout_s)

    def _attach(self, deadline_s: float, timeout_s: float) -> None:
        info = _until_ready(self._folder, self._options, deadline_s, timeout_s)
        self.socket = str(_known_socket(self._folder))
        self.pid = int(info.get("process_id", 0))
        self.version = info.get("valkey_version") or info.get("redis_version", "")

    def close(self) -> None:
        """Be a user no longer. The server stops some time after its last user is gone.

        By closing, never by LOCK_UN: that would take the lock from forked children, which share it.
        """
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EmbeddedServer {self.url} pid={self.pid} version={self.version}>"


@dataclass(frozen=True, slots=True)
class _Options:
    linger_s: float
    # As of `ensure`, which runs before workers are pinned: a pinned worker that revives the server must not
    # put it on its own CPU.
    cpus: tuple[int, ...]


def ensure(
    data_dir: Path | str, *, timeout_s: float = TIMEOUT_S, linger_s: float = LINGER_S
) -> EmbeddedServer:
    """The embedded server of `data_dir`, ready for commands; started if it does not run.

    `linger_s` counts for the keeper that this call starts, if it starts one. The timeout begins anew as long
    as a starting server makes progress with loading its data. Raises RedisUnavailable or ServerUnfit.
    """
    deadline_s = _now_s() + timeout_s
    # Resolved, because keeper and server live in another working directory.
    folder = Folder(Path(data_dir).expanduser().resolve() / "redis")
    with _as_unavailable(folder):
        _prepare(folder.path)
        options = _Options(linger_s=linger_s, cpus=tuple(sorted(os.sched_getaffinity(0))))
        server = EmbeddedServer(folder, _become_user(folder, deadline_s), options)
        try:
            server._attach(deadline_s, timeout_s)
        except BaseException:
            server.close()
            raise
    return server


# ------------------------------------------------------------------ the folder


@contextlib.contextmanager
def _as_unavailable(folder: Folder) -> Iterator[None]:
    """An error of the file system, as one sentence that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        at = f" at {error.filename}" if error.filename else ""
        raise RedisUnavailable(
            f"the embedded Redis cannot use the folder {folder.path.parent}: {reason}{at}; "
            "choose a folder that you may write with TQE_DATA_DIR, or a server with --redis"
        ) from error


def _prepare(path: Path) -> None:
    """Make the private folder. Explicit modes, because the umask belongs to the whole process of our user.

    An existing data folder keeps its mode (it may be shared with other things); what matters is that nobody
    else can put a folder of his own in the place of ours, or reach the socket in it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    above = path.parent.stat()
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise RedisUnavailable(
            f"the folder {path.parent} is writable for everyone, so the embedded Redis in it would not be "
            f"private: run `chmod o-w {path.parent}` or choose another one with TQE_DATA_DIR"
        )
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise RedisUnavailable(
            f"the embedded Redis in {path} belongs to user {found.st_uid} and you are {os.geteuid()}: "
            "use one account, or choose another folder with TQE_DATA_DIR"
        )
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)


def _known_socket(folder: Folder) -> Path:
    """Where the server of this folder listens (or will): beside the data, or where a starter wrote down."""
    try:
        return Path(folder.socket_elsewhere.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return folder.socket


def _place_socket(folder: Folder) -> Path:
    """The starter's choice of the socket's path, written down if it is not in the folder.

    A path above 107 bytes does not fit the kernel's address. The place is then a private folder under the
    temporary one, not XDG_RUNTIME_DIR: that one is emptied at logout, and the server outlives a logout.
    """
    if len(os.fsencode(folder.socket)) <= UNIX_SOCKET_PATH_MAX:
        folder.socket_elsewhere.unlink(missing_ok=True)
        return folder.socket
    known = _known_socket(folder)
    if known != folder.socket:
        with contextlib.suppress(OSError):  # same place again: users that reconnect know this path
            known.parent.mkdir(mode=0o700, exist_ok=True)
        if _is_private(known.parent):
            return known
    for base in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(base)) + len("/tqe-xxxxxxxx/redis.sock") <= UNIX_SOCKET_PATH_MAX:
            chosen = Path(tempfile.mkdtemp(prefix="tqe-", dir=base)) / "redis.sock"
            write_file(folder.socket_elsewhere, str(chosen))
            return chosen
    raise RedisUnavailable(
        f"the path {folder.socket} is too long for a unix socket ({UNIX_SOCKET_PATH_MAX} bytes): "
        "choose a shorter folder with TQE_DATA_DIR"
    )


def _is_private(path: Path) -> bool:
    """A real folder (no link that someone else may turn), ours, closed to others."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and stat.S_IMODE(found.st_mode) & 0o077 == 0
    )


# ------------------------------------------------------------------ user's lock, keeper, server


def _now_s() -> float:
    return clock.monotonic_ns() / 1e9


def _become_user(folder: Folder, deadline_s: float) -> int:
    """Take the shared lock. It is refused only while a keeper stops its server, which takes moments."""
    while (lock := try_lock(folder.users_lock, fcntl.LOCK_SH)) is None:
        if _now_s() > deadline_s:
            raise RedisUnavailable(
                f"the embedded Redis in {folder.path} has been stopping for too long: see {folder.log}"
            )
        time.sleep(POLL_MAX_S)
    os.utime(lock)  # a mark for the keeper, which may look only after we have come and gone
    return lock


def _until_ready(folder: Folder, options: _Options, deadline_s: float, timeout_s: float) -> Mapping[str, str]:
    """The server's INFO once it serves commands; starts a keeper whenever none is there."""
    failure_before = _failure_stamp(folder)
    starts = 0
    loaded = ""
    pause_s = POLL_FIRST_S
    while True:
        lock = try_lock(folder.keeper_lock, fcntl.LOCK_EX)
        if lock is not None:
            _locks_in_transit.add(lock)
            try:
                if _failure_stamp(folder) != failure_before or starts >= KEEPER_STARTS_MAX:
                    raise RedisUnavailable(_why_it_failed(folder))
                _start_keeper(folder, options, lock)
                starts += 1
            finally:
                _locks_in_transit.discard(lock)
                os.close(lock)
        info = parse_info(ask(str(_known_socket(folder)), "INFO") or "")
        if info.get("loading") == "0":
            return info
        if info and info.get("loading_loaded_bytes", "") != loaded:
            loaded = info.get("loading_loaded_bytes", "")
            deadline_s = max(deadline_s, _now_s() + timeout_s)
        if _now_s() > deadline_s:
            raise RedisUnavailable(_why_not_ready(folder, info))
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, POLL_MAX_S)


def _start_keeper(folder: Folder, options: _Options, lock: int) -> None:
    """With keeper.lock in our hand: choose the server, write its configuration, hand the lock to a keeper."""
    written, last_used = _read_record(folder)
    binary = binaries.choose(
        data=folder.path, written=written, places=binaries.candidates(last_used=last_used)
    )
    socket_path = _place_socket(folder)
    # A server that is dying with its keeper must not answer for the next one.
    socket_path.unlink(missing_ok=True)
    write_file(folder.config, config(folder, socket_path, binary.version))
    # Before the start: a newer server converts the files at once, and from then on no older one may come.
    record = {"server": str(binary.version), "binary": str(binary.path), "host": socket.gethostname()}
    write_file(folder.server, json.dumps(record))
    _launch(folder, options, lock, binary.path, socket_path)


def _launch(folder: Folder, options: _Options, lock: int, binary: Path, socket_path: Path) -> None:
    """Run the keeper in its own session, so that neither Ctrl-C nor the end of its starter reaches it.

    What we start forks and exits at once, so the wait is short and leaves no child behind that a process
    of ours would have to reap.
    """
    if not sys.executable:
        raise RedisUnavailable("this process does not know its Python, so it cannot start the embedded Redis")
    with contextlib.suppress(FileNotFoundError):
        if folder.log.stat().st_size > LOG_MAX_BYTES:
            folder.log.replace(folder.log.with_suffix(".log.1"))
    log = os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    # By path and isolated (-I -S): no import of the user's modules, no site-packages, a small process.
    command = [sys.executable, "-I", "-S", str(Path(keeper.__file__).resolve())]
    command += ["--folder", str(folder.path), "--binary", str(binary), "--socket", str(socket_path)]
    command += ["--linger", str(options.linger_s), "--lock", str(lock)]
    command += ["--cpus", ",".join(str(cpu) for cpu in options.cpus)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            pass_fds=(lock,),
            start_new_session=True,
            check=False,
        )
    finally:
        os.close(log)
    if done.returncode != 0:
        raise RedisUnavailable(f"the keeper of the embedded Redis cannot start: see {folder.log}")


def config(folder: Folder, socket_path: Path, version: binaries.ServerVersion) -> str:
    """The server's configuration: private, nothing evicted, everything in the AOF."""
    lines = [
        "port 0",
        f"unixsocket {_quoted(socket_path)}",
        "unixsocketperm 700",
        "daemonize no",
        f"dir {_quoted(folder.path)}",
        'logfile ""',
        "always-show-logo no",
        # A log of every write; the snapshot beside it would only cost forks.
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        # Rewriting forks and copies memory: not for every doubling of a small file.
        "auto-aof-rewrite-percentage 100",
        "auto-aof-rewrite-min-size 1gb",
        "maxmemory-policy noeviction",
        # Buckets of snapshots expire with thousands of fields: freed beside the main thread.
        "lazyfree-lazy-expire yes",
        # Code and memory from outside, and a way to lose everything: nobody here needs them.
        'rename-command MODULE ""',
        'rename-command DEBUG ""',
        'rename-command REPLICAOF ""',
        'rename-command SLAVEOF ""',
    ]
    if version.numbers >= (7, 2):
        lines.append("locale-collate C")  # with "" an unknown locale in the environment prevents the start
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    """Any path as one word of redis.conf: a backslash escape for each byte that is not plain."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=@,: "
    return '"' + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(path)) + '"'


def _read_record(folder: Folder) -> tuple[binaries.ServerVersion | None, Path | None]:
    """What has written here last, and with which binary; nothing when the record is missing or damaged."""
    record = _record(folder)
    binary = record.get("binary", "")
    return binaries.ServerVersion.parse(record.get("server", "")), Path(binary) if binary else None


def _record(folder: Folder) -> Mapping[str, str]:
    try:
        record = json.loads(folder.server.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return {key: str(value) for key, value in record.items()} if isinstance(record, dict) else {}


# ------------------------------------------------------------------ what to say


def parse_info(text: str) -> Mapping[str, str]:
    """The fields of INFO; empty when the server answered with an error."""
    if text.startswith("-"):
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))
    return dict(pairs)


def _failure_stamp(folder: Folder) -> int:
    try:
        return folder.failure.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _why_it_failed(folder: Folder) -> str:
    try:
        reason = folder.failure.read_text(encoding="utf-8")
    except FileNotFoundError:
        reason = "its keeper ends as soon as it starts"
    return f"the embedded Redis in {folder.path} does not start: {reason} (log: {folder.log})"


def _why_not_ready(folder: Folder, info: Mapping[str, str]) -> str:
    if info:
        done = info.get("loading_loaded_perc", "?")
        return f"the embedded Redis in {folder.path} is still loading its data ({done} %): try again later"
    host = _record(folder).get("host", "")
    if host and host != socket.gethostname():
        return (
            f"the embedded Redis in {folder.path} runs on host {host}, out of reach from here: "
            "choose a folder of this host with TQE_DATA_DIR, or one server for all with --redis"
        )
    return f"the embedded Redis in {folder.path} does not answer: see {folder.log}"
