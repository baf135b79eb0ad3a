"""Commands as they go over the wire to Redis, by both backends."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tqe import _pure

_fast = pytest.importorskip("tqe._fast", reason="the extension is not built")

both = pytest.mark.parametrize("backend", [_fast, _pure], ids=["compiled", "pure"])
ARGUMENTS = st.one_of(
    st.binary(max_size=300),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    st.integers(),
    st.floats(allow_nan=False),
)


def read(packed: bytes) -> list[bytes]:
    """What Redis takes from it."""
    head, _, rest = packed.partition(b"\r\n")
    assert head[:1] == b"*"
    found = []
    for _ in range(int(head[1:])):
        size, _, rest = rest.partition(b"\r\n")
        assert size[:1] == b"$"
        found.append(rest[: int(size[1:])])
        assert rest[int(size[1:]) :][:2] == b"\r\n"
        rest = rest[int(size[1:]) + 2 :]
    assert rest == b""
    return found


@both
@given(arguments=st.lists(ARGUMENTS, max_size=12))
def test_redis_reads_what_was_meant(backend: ModuleType, arguments: list[Any]) -> None:
    meant = [argument if isinstance(argument, bytes) else str(argument).encode() for argument in arguments]
    assert read(backend.pack_command(tuple(arguments))) == meant


@both
@pytest.mark.parametrize("size", [0, 1, 9, 10, 99, 100, 999, 1_000, 100_000])
def test_lengths_of_any_number_of_digits(backend: ModuleType, size: int) -> None:
    assert read(backend.pack_command((b"x" * size, "SET"))) == [b"x" * size, b"SET"]
    assert read(backend.pack_command((b"a",) * size)) == [b"a"] * size


@both
def test_subclasses_of_bytes_and_text(backend: ModuleType) -> None:
    class Bytes(bytes):
        pass

    class Text(str):
        pass

    assert read(backend.pack_command((Bytes(b"a"), Text("b")))) == [b"a", b"b"]


@both
@pytest.mark.parametrize("odd", [None, True, [], object(), {}])
def test_what_redis_cannot_take_is_refused(backend: ModuleType, odd: object) -> None:
    with pytest.raises(TypeError):
        backend.pack_command((b"SET", odd))
