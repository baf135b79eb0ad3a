"""The keeper: a small detached program that owns the one redis-server of one data folder.

It needs nothing but the standard library, so that `tqe.store.embedded` can run it by its path in an isolated
interpreter (no site-packages, no PYTHON* variables, a few MB); `python -m tqe.store.keeper` runs the same.

The locks, all `flock`, so that the kernel drops them with the process that held them:

    keeper.lock  held by the keeper for life. The starter takes it and hands the descriptor down, so there is
                 no moment in which a second starter could start a second keeper.
    server.lock  held by redis-server itself (the one descriptor that it inherits) and by the children that it
                 forks. A new server starts only when the old one is gone, whatever became of its keeper.
    users.lock   held shared by every process that uses the server. The keeper may stop the server only while
                 it holds it exclusively, so it can never stop under a user.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
UNIX_SOCKET_PATH_MAX = 107  # sun_path has 108 bytes and the last one is NUL

START_ATTEMPTS_MAX = 5
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
STABLE_AFTER_S = 60.0  # a server that lived this long starts again without a history
TICK_MAX_S = 1.0
SOCKET_PATIENCE_S = 10.0  # a server makes its socket before it loads its data
STOP_PATIENCE_S = 60.0  # a shutdown writes and syncs the rest of the AOF: slow disks need time
ORPHAN_PATIENCE_S = 0.3
WORDS_MAX = 500

OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class Folder:
    """Names of what lies in the private folder of an embedded server."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keeper_lock = path / "keeper.lock"
        self.server_lock = path / "server.lock"
        self.users_lock = path / "users.lock"
        self.config = path / "redis.conf"
        self.log = path / "keeper.log"
        self.failure = path / "keeper.failure"  # why the last keeper gave up, for those who wait for it
        self.socket = path / "redis.sock"
        self.socket_elsewhere = path / "redis.sock.path"  # holds the path, where `socket` would be too long
        self.server = path / "server.json"  # the newest server that has written here


# ------------------------------------------------------------------ locks and sockets


def try_lock(path: Path, operation: int) -> int | None:
    """A descriptor that holds the lock on `path`, or None when another process has it."""
    while True:
        descriptor = os.open(path, OPEN_FLAGS, 0o600)
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise
        if is_same_file(descriptor, path):
            return descriptor
        os.close(descriptor)  # the folder was wiped between open and flock: this lock guards nothing


def is_same_file(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def ask(path: str, command: str, *, timeout_s: float = 1.0) -> str | None:
    """The server's reply to one inline command (an error as it stands), or None when there is none."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(path)
            connection.sendall(command.encode() + b"\r\n")
            with connection.makefile("rb") as stream:
                head = stream.readline()
                body = stream.read(int(head[1:])) if head.startswith(b"$") else head
    except (OSError, ValueError):
        return None
    return body.decode("utf-8", "replace").strip() or None


def lock_holders(path: Path) -> list[int]:
    """Processes of this user, other than this one, that hold the flock on `path`.

    A process that merely reads the file (a backup) has it open without the lock, and is not named.
    """
    wanted = os.stat(path)
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and _holds_lock(pid, wanted)]


def _holds_lock(pid: int, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):  # it is gone meanwhile, or another user's
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found = os.stat(f"/proc/{pid}/fd/{descriptor}")
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return "FLOCK" in Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text()
    return False


def backoff_s(failures: int, uniform: Callable[[float, float], float] = random.uniform) -> float:
    """Half fixed and half random, so that several keepers of one host do not start in step."""
    whole = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(failures, 16))
    return whole / 2 + uniform(0, whole / 2)


# ------------------------------------------------------------------ the keeper


class Keeper:
    """Starts the server, restarts it when it dies, stops it when it has had no user for `linger_s`."""

    def __init__(self, folder: Folder, *, binary: str, socket_path: str, linger_s: float, lock: int) -> None:
        self.folder = folder
        self.binary = binary
        self.socket_path = socket_path
        self.linger_s = linger_s
        self.tick_s = min(TICK_MAX_S, max(linger_s / 4, 0.02))
        self.lock = lock
        self.users = os.open(folder.users_lock, OPEN_FLAGS, 0o600)
        self.users_stamp = 0
        self.used_at_s = time.monotonic()
        self.terminations = 0  # how often we were asked to end by a signal
        self.child: subprocess.Popen[bytes] | None = None
        self.libc = ctypes.CDLL(None, use_errno=True)  # loaded here: a forked child must not load anything
        self.wakeup = self._catch_signals()

    def run(self) -> int:
        say(f"keeper {os.getpid()} takes over {self.folder.path} with {self.binary}")
        deaths = mute_deaths = 0  # since it was last stable; in a row without having answered once
        while True:
            server_lock = self._take_server_lock()
            if server_lock is None:
                return self._stop("told to stop")
            log_start = self._log_size()
            started_s = time.monotonic()
            answered, ending = self._start_and_watch(server_lock)
            if ending:
                return self._stop(ending)
            deaths = 1 if time.monotonic() - started_s > STABLE_AFTER_S else deaths + 1
            mute_deaths = 0 if answered else mute_deaths + 1
            if mute_deaths >= START_ATTEMPTS_MAX:
                return self._give_up(mute_deaths, log_start)
            delay_s = backoff_s(deaths - 1)
            say(f"redis-server {self._how_it_ended()}; starting it again in {delay_s:.2f} s")
            self._sleep(delay_s)

    # -------------------------------------------------------------- start and watch

    def _take_server_lock(self) -> int | None:
        """Take server.lock; kill what still holds it. None when there is a reason to stop instead.

        A server outlives its keeper only for the moment between the keeper's end and the kernel's SIGKILL, or
        in an uninterruptible write; a child that it forked for an AOF rewrite may run on for longer, and
        nobody will ever use its file. All of them work for a folder that is ours now.
        """
        patience_s = 0.0
        while (lock := try_lock(self.folder.server_lock, fcntl.LOCK_EX)) is None:
            if self.terminations > 1 or self._wiped():
                return None
            if patience_s >= ORPHAN_PATIENCE_S:
                for pid in lock_holders(self.folder.server_lock):
                    say(f"killing process {pid}, left over from an earlier server of this folder")
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._sleep(0.05)
            patience_s += 0.05
        return lock

    def _start_and_watch(self, server_lock: int) -> tuple[bool, str]:
        """Run one server to its end: whether it ever answered, and why we should end, if we should."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket_path)
        try:
            # By stdin: Redis takes the name of a file for a pattern when it has a `?`, `*` or `[`.
            with open(self.folder.config, "rb") as config:
                self.child = subprocess.Popen(
                    [self.binary, "-"],
                    stdin=config,
                    cwd="/",
                    pass_fds=(server_lock,),
                    preexec_fn=self._die_with_keeper(),
                )
        except (OSError, subprocess.SubprocessError) as error:
            self.child = None
            say(f"cannot run {self.binary}: {error}")
            return False, ""
        finally:
            os.close(server_lock)  # from here on the server's copy is the lock
        return self._watch(self.child)

    def _watch(self, child: subprocess.Popen[bytes]) -> tuple[bool, str]:
        answered = False
        socket_seen_s = time.monotonic()
        while child.poll() is None:
            if not answered:
                answered = ask(self.socket_path, "PING", timeout_s=self.tick_s) is not None
                if answered:
                    say(f"redis-server {child.pid} answers")
            if os.path.exists(self.socket_path):
                socket_seen_s = time.monotonic()
            elif time.monotonic() - socket_seen_s > (2 * self.tick_s if answered else SOCKET_PATIENCE_S):
                say(f"{self.socket_path} was removed, nobody can connect: starting the server anew")
                self._stop_server(child)
                return True, ""
            if self._wiped():
                return answered, "the folder was removed"
            if self.terminations > 1:
                return answered, "told twice to stop"
            if self._unused():
                return answered, "no user is left"
            self._sleep(self.tick_s if answered else min(self.tick_s, 0.05))
        return answered, ""

    def _die_with_keeper(self) -> Callable[[], None]:
        """For the child before exec: SIGKILL when the keeper dies, so that no server runs without a keeper.

        SIGKILL and not SIGTERM: it needs no cooperation of a server that is busy or stopped, and the AOF
        already holds all that was acknowledged, because Redis writes it before it replies.
        """
        keeper, libc = os.getpid(), self.libc

        def arm() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:  # it died before prctl: no signal will ever come
                os._exit(1)

        return arm

    # -------------------------------------------------------------- users

    def _unused(self) -> bool:
        """True once no user was there for `linger_s`: then the users' lock is ours, and we keep it.

        A user that came and went between two ticks has left its mark in the file's mtime.
        """
        try:
            fcntl.flock(self.users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.used_at_s = time.monotonic()
            return False
        stamp = os.fstat(self.users).st_mtime_ns
        if stamp != self.users_stamp:
            self.users_stamp = stamp
            self.used_at_s = time.monotonic()
        if self.terminations or time.monotonic() - self.used_at_s >= self.linger_s:
            return True
        fcntl.flock(self.users, fcntl.LOCK_UN)
        return False

    def _wiped(self) -> bool:
        """True when someone deleted the folder: its locks guard nothing any more, another keeper may run."""
        return not (
            is_same_file(self.lock, self.folder.keeper_lock)
            and is_same_file(self.users, self.folder.users_lock)
        )

    # -------------------------------------------------------------- ends

    def _stop(self, reason: str) -> int:
        say(f"{reason}: stopping the server")
        if self.child is not None and self._wiped():
            # No SIGTERM here: on its way out Redis would unlink the socket path, which may be that of a
            # server which another keeper has started in a new folder of this name.
            self.child.kill()
            self.child.wait()
        elif self.child is not None:
            self._stop_server(self.child)
            with contextlib.suppress(OSError):
                os.unlink(self.socket_path)
        say(f"keeper {os.getpid()} ends")
        return 0

    def _stop_server(self, child: subprocess.Popen[bytes]) -> None:
        """SIGTERM is Redis' SHUTDOWN: it flushes and syncs the AOF, then exits."""
        child.terminate()
        try:
            child.wait(STOP_PATIENCE_S)
        except subprocess.TimeoutExpired:
            say(f"redis-server {child.pid} did not stop in {STOP_PATIENCE_S:.0f} s: killing it")
            child.kill()
            child.wait()

    def _give_up(self, failures: int, log_start: int) -> int:
        words = self._last_words(log_start)
        reason = f"redis-server did not start in {failures} attempts ({self._how_it_ended()})"
        say(f"giving up: {reason}")
        text = f"{reason}; its last words: {words}" if words else reason
        write_file(self.folder.failure, text)
        return 1

    def _how_it_ended(self) -> str:
        code = None if self.child is None else self.child.poll()
        if code is None:
            return "could not be run"
        return f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"

    def _log_size(self) -> int:
        try:
            return os.stat(self.folder.log).st_size
        except OSError:
            return 0

    def _last_words(self, log_start: int) -> str:
        """The last thing that the server wrote to the log, if any: a warning, or the end of a plain text."""
        try:
            written = self.folder.log.read_bytes()[log_start:].decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.strip() for line in written.splitlines() if line.strip() and ":K " not in line]
        warnings = [line for line in lines if " # " in line]
        return (warnings or lines or [""])[-1][-WORDS_MAX:]

    # -------------------------------------------------------------- signals

    def _catch_signals(self) -> int:
        """SIGTERM: end when the last user is gone. A second one: end now. Ctrl-C and hang-ups: ignored.

        At the shutdown of a host or a systemd unit everyone gets SIGTERM at once; users that drain still
        need the server to settle.
        """
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the starter may be a process that blocks signals
        return reader

    def _on_terminate(self, number: int, frame: object) -> None:
        self.terminations += 1

    def _sleep(self, seconds: float) -> None:
        """Until the time is over or a signal came (the server's death is one)."""
        if select.select([self.wakeup], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self.wakeup, 4096)


# ------------------------------------------------------------------ the log


def say(text: str) -> None:
    """One line in the log, beside the server's own lines and in their form; stderr is that file."""
    stamp = time.strftime("%d %b %Y %H:%M:%S")
    os.write(2, f"{os.getpid()}:K {stamp} * {text}\n".encode("utf-8", "replace"))


def write_file(path: Path, text: str) -> None:
    """Replace a private file as a whole: a reader sees the old text or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(beside, path)


# ------------------------------------------------------------------ the program


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tqe.store.keeper", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--linger", type=float, default=60.0, help="seconds without a user before it stops")
    parser.add_argument("--cpus", default="", help="CPUs that keeper and server may use, as 0,1,2")
    parser.add_argument("--lock", type=int, help="inherited descriptor that holds keeper.lock")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    os.umask(0o077)
    folder = Folder(options.folder)
    lock = options.lock
    if lock is None:
        lock = try_lock(folder.keeper_lock, fcntl.LOCK_EX)
        if lock is None:
            say("another keeper has this folder")
            return 1
    else:
        os.set_inheritable(lock, False)
        # The starter waits for this parent: nobody has to reap the keeper, and it is no session leader.
        if os.fork():
            os._exit(0)
    if options.cpus:
        with contextlib.suppress(OSError):  # CPUs that were taken from us meanwhile
            os.sched_setaffinity(0, {int(cpu) for cpu in options.cpus.split(",")})
    keeper = Keeper(
        folder, binary=options.binary, socket_path=options.socket, linger_s=options.linger, lock=lock
    )
    try:
        return keeper.run()
    except OSError as error:
        # The disk is full, the folder became read-only: say it to those who wait, end, and let them retry.
        say(f"giving up: {error}")
        with contextlib.suppress(OSError):
            write_file(folder.failure, f"the keeper cannot work: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
