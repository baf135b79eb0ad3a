"""Settings: precedence of the four sources, and every unknown or wrong value refused by name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tqe import cpus, settings
from tqe.errors import SettingsError
from tqe.settings import Settings, load


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(**kw: Any) -> Settings:
    kw.setdefault("env", {})
    return load(**kw)


def refusal(**kw: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        loaded(**kw)
    return str(caught.value)


def test_defaults_are_the_documented_ones() -> None:
    s = loaded()
    assert (s.redis_url, s.app, s.namespace) == (None, None, "tq")
    assert (s.lanes, s.default_lane) == (("high", "normal", "low"), "normal")
    assert (s.lease_ms, s.grace_ms, s.hard_after_ms) == (15_000, 30_000, 10_000)
    assert (s.payload_max_bytes, s.result_max_bytes, s.error_max_bytes) == (2**20, 2**16, 2**13)
    assert (s.max_retries, s.backoff_base_ms, s.backoff_cap_ms, s.crashes_max) == (3, 2_000, 3_600_000, 3)
    assert s.procs == cpus.usable()


def test_each_source_overrides_the_one_below(tmp_path: Path) -> None:
    (tmp_path / "tqe.toml").write_text("concurrency = 2\ncrashes_max = 2\nmax_retries = 2\n")
    code = {"concurrency": 1, "crashes_max": 1, "max_retries": 1, "dlq_max": 1}
    s = loaded(code=code, env={"TQE_CRASHES_MAX": "3", "TQE_MAX_RETRIES": "3"}, cli={"max_retries": 4})
    assert (s.dlq_max, s.concurrency, s.crashes_max, s.max_retries) == (1, 2, 3, 4)


def test_what_the_command_line_leaves_out_overrides_nothing() -> None:
    assert loaded(env={"TQE_PROCS": "3"}, cli={"procs": None, "redis_url": None}).procs == 3


def test_the_real_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQE_NAMESPACE", "other")
    assert load().namespace == "other"


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("TQE_REDIS_URL", "unix:///run/r.sock", "unix:///run/r.sock"),
        ("TQE_LANES", "normal, bulk", ("normal", "bulk")),
        ("TQE_METRICS_PORT", "9000", 9000),
        ("TQE_PIN", "false", False),
        ("TQE_BURST", "1", True),
        ("TQE_DATA_DIR", "/data", Path("/data")),
        ("TQE_LOG_FORMAT", "json", "json"),
        ("TQE_APP", "shop.tasks:app", "shop.tasks:app"),
    ],
)
def test_environment_takes_text(variable: str, text: str, value: object) -> None:
    assert getattr(loaded(env={variable: text}), variable.removeprefix("TQE_").lower()) == value


def test_an_empty_variable_counts_as_not_set() -> None:
    assert loaded(env={"TQE_REDIS_URL": "", "TQE_PROCS": "", "TQE_NO_SUCH": ""}) == loaded()


@pytest.mark.parametrize(
    ("sources", "parts"),
    [
        ({"code": {"leese_ms": 1}}, ["code", "leese_ms", "did you mean lease_ms?"]),
        ({"env": {"TQE_LEESE_MS": "1"}}, ["TQE_LEESE_MS", "did you mean TQE_LEASE_MS?"]),
        ({"env": {"TQE_redis_url": "redis://x"}}, ["TQE_redis_url"]),
        ({"cli": {"zzz": 1}}, ["the command line", "zzz", "there are:", "lease_ms"]),
    ],
)
def test_unknown_setting_is_refused_by_name(sources: dict[str, Any], parts: list[str]) -> None:
    text = refusal(**sources)
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lease_ms", 999),
        ("lease_ms", "15000"),
        ("lease_ms", 15000.5),
        ("lease_ms", None),
        ("lease_ms", True),
        ("procs", 0),
        ("procs", 1025),
        ("concurrency", -1),
        ("metrics_port", 65_536),
        ("pin", 1),
        ("pin", "true"),
        ("log_level", "loud"),
        ("namespace", "a{b}"),
        ("namespace", ""),
        ("redis_url", "http://example.com"),
        ("app", "app.py"),
        ("data_dir", 3),
        ("lanes", "high"),
        ("lanes", []),
        ("lanes", ["normal", "normal"]),
        ("lanes", ["Normal"]),
        ("lanes", ["x" * 17]),
        ("lanes", [f"l{i}" for i in range(17)]),
        ("result_max_bytes", 65_537),
        ("max_retries", -1),
    ],
)
def test_wrong_value_is_refused_with_name_source_and_what_is_allowed(name: str, value: object) -> None:
    text = refusal(code={name: value})
    assert text.startswith(f"code sets {name} to {value!r}; it takes ")
    assert text.endswith(settings.describe()[name])


def test_every_numeric_field_refuses_both_sides_of_its_range() -> None:
    ranged = [n for n, says in settings.describe().items() if says.startswith("a whole number from ")]
    assert len(ranged) > 20
    for name in ranged:
        low, high = settings.describe()[name].removeprefix("a whole number from ").split(":")[0].split(" to ")
        for beyond in (int(low) - 1, int(high) + 1):
            assert name in refusal(code={name: beyond})


def test_environment_names_the_variable() -> None:
    assert "TQE_LEASE_MS" in refusal(env={"TQE_LEASE_MS": "soon"})
    assert "TQE_PIN" in refusal(env={"TQE_PIN": "perhaps"})


def test_toml_is_checked_and_named(tmp_path: Path) -> None:
    path = tmp_path / "tqe.toml"
    path.write_text('lanes = ["normal", "bulk"]\napp = "demo:app"\n')
    assert loaded().lanes == ("normal", "bulk")
    path.write_text("lease_ms = '15000'\n")
    assert "tqe.toml sets lease_ms to '15000'" in refusal()
    path.write_text("[worker]\nprocs = 3\n")
    assert "tqe.toml sets worker, which is not a setting" in refusal()
    path.write_text("lease_ms = = 3\n")
    assert "not valid TOML" in refusal()
    path.write_bytes(b"app = '\xff'\n")
    assert "not valid TOML" in refusal()


def test_toml_that_was_named_must_exist(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(toml_path=tmp_path / "none.toml")
    other = tmp_path / "other.toml"
    other.write_text("procs = 7\n")
    assert loaded(toml_path=other).procs == 7


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ({"lanes": ["high", "low"]}, "default_lane = 'normal': it takes one of lanes, which are high, low"),
        ({"backoff_cap_ms": 1_000}, "may not be below backoff_base_ms, which is 2000"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(code: dict[str, Any], part: str) -> None:
    assert part in refusal(code=code)


def test_a_settings_built_by_hand_is_checked_too() -> None:
    with pytest.raises(SettingsError, match="namespace"):
        Settings(namespace="a{b}")


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({"HOME": "/h"}, "/h/.local/share/tqe"),
        ({"HOME": "/h", "XDG_DATA_HOME": "/x"}, "/x/tqe"),
        ({"HOME": "/h", "XDG_DATA_HOME": "relative"}, "/h/.local/share/tqe"),
        ({"HOME": "/h", "TQE_DATA_DIR": "/d"}, "/d"),
    ],
)
def test_data_dir_follows_xdg(env: Mapping[str, str], folder: str) -> None:
    assert loaded(env=env).data_dir == Path(folder)


def test_data_dir_without_a_home_is_still_a_folder() -> None:
    assert loaded(env={}).data_dir.is_absolute()


def test_tilde_in_data_dir_is_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert loaded(cli={"data_dir": "~/q"}).data_dir == Path("/h/q")


def test_a_password_shows_nowhere() -> None:
    s = loaded(code={"redis_url": "redis://u:secret@h:1/0"})
    assert "secret" not in repr(s)
    assert settings.redacted(s.redis_url or "") == "redis://u:***@h:1/0"
    assert settings.redacted("redis://:secret@h") == "redis://:***@h"
    assert "secret" not in refusal(code={"redis_url": "http://u:secret@h"})


def test_settings_do_not_change() -> None:
    s = loaded()
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.procs = 3  # type: ignore[misc]
    assert isinstance(loaded(code={"lanes": ["normal"]}).lanes, tuple)


def test_every_setting_says_what_it_takes() -> None:
    described = settings.describe()
    assert list(described) == [f.name for f in dataclasses.fields(Settings)]
    assert [name for name, says in described.items() if len(says) < 10] == []


def test_reserved_variables_pass_and_crashpoint_is_read() -> None:
    env = {"TQE_CRASHPOINT": "settle.sent"}
    assert loaded(env=env) == loaded()
    assert settings.crashpoint(env) == "settle.sent"
    assert settings.crashpoint({}) is None


@pytest.mark.parametrize("text", ["auto", "3"])
def test_procs_may_be_what_we_may_use(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "usable", lambda: 5)
    expected = 5 if text == "auto" else 3
    assert loaded(cli={"procs": text}).procs == expected
    assert loaded(env={"TQE_PROCS": text}).procs == expected
    assert loaded(code={"procs": "auto"}).procs == 5


def test_autoscale_brings_its_most_as_procs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpus, "usable", lambda: 5)
    assert (loaded(cli={"autoscale": "1,8"}).autoscale, loaded(cli={"autoscale": "1,8"}).procs) == ((1, 8), 8)
    assert loaded(env={"TQE_AUTOSCALE": " 2 , auto "}).autoscale == (2, 5)
    (tmp_path / "tqe.toml").write_text('autoscale = [2, "auto"]\ndrain_target_ms = 5000\n')
    assert (loaded().autoscale, loaded().procs, loaded().drain_target_ms) == ((2, 5), 5, 5_000)
    # a fixed number that is said later counts, one that was said earlier does not
    fixed = loaded(cli={"procs": "3"})
    assert (fixed.autoscale, fixed.procs) == (None, 3)
    assert loaded(code={"procs": 3}).procs == 5


@pytest.mark.parametrize("text", ["8", "8,1", "0,4", "1,2,3", "a,b", "1,1025", ",", "9,auto"])
def test_bounds_that_are_none_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "usable", lambda: 5)
    assert "it takes MIN,MAX" in refusal(cli={"autoscale": text})


def test_procs_that_are_not_the_most_contradict_autoscale() -> None:
    with pytest.raises(SettingsError, match="with autoscale it is the most workers"):
        Settings(procs=3, autoscale=(1, 8))
