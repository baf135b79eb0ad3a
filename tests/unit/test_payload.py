"""Payloads: what is encoded, what is refused and with which words, compression and its bounds."""

import dataclasses
import datetime
import random
import threading
import uuid
from types import ModuleType
from typing import Any

import msgspec
import pytest
import zstandard

from tqe import _pure
from tqe.codec import payload as codec
from tqe.errors import InvalidPayload, PayloadTooLarge

_fast = pytest.importorskip("tqe._fast", reason="the extension is not built")


@pytest.fixture(params=[_fast, _pure], ids=["compiled", "pure"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: ModuleType = request.param
    monkeypatch.setattr(codec, "_backend", module)
    return module


def nested(levels: int, *, arrays: bool = False) -> dict[str, Any]:
    """A payload of so many levels, itself included."""
    value: Any = 1
    for _ in range(levels - 1):
        value = [value] if arrays else {"a": value}
    return {"a": value}


class Color(msgspec.Struct):
    name: str


@dataclasses.dataclass
class Address:
    to: str
    weight: float = 1.0


# --- encoding ---

SOUND: dict[str, Any] = {
    "empty": {},
    "plain": {"to": "a@example.com", "n": 1, "f": 1.5, "yes": True, "no": False, "none": None, "l": [1, "x"]},
    "deepest": nested(64),
    "deepest, arrays": nested(64, arrays=True),
    "smallest and largest number": {"a": -(2**63), "b": 2**64 - 1},
    "text with a colon and quotes": {'a":"b': 'c":"\\"d'},
    "beyond ASCII": {"ü": "😀\x00\x1f\u2028"},
    "text that says null": {"a": "null", "b": None},
}


@pytest.mark.parametrize("payload", SOUND.values(), ids=SOUND)
def test_what_is_encoded_comes_back(payload: dict[str, Any]) -> None:
    encoded = codec.encode(payload)
    assert codec.decode(encoded) == payload
    assert codec.parse_json(encoded) == payload
    lines = codec.encode_lines([payload, {}, payload])
    # A number that needs the 64th bit is sound, and not surely so.
    assert lines in ((b"%b\n{}\n%b\n" % (encoded, encoded), len(encoded)), None)
    assert (lines is None) == (2**64 - 1 in payload.values())


def test_rich_data_arrives_as_what_it_encodes_to() -> None:
    key = uuid.UUID(int=7)
    payload = {
        "when": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "tuple": (1, 2),
        "struct": Color("red"),
        "key": key,
        "bytes": b"x",
    }
    assert codec.decode(codec.encode(payload)) == {
        "when": "2024-01-02T03:04:05",
        "tuple": [1, 2],
        "struct": {"name": "red"},
        "key": str(key),
        "bytes": "eA==",
    }
    assert codec.decode(codec.encode(Address("x"))) == {"to": "x", "weight": 1.0}


BAD: dict[str, tuple[Any, str]] = {
    "array": ([1], "a payload is a JSON object, and list is none"),
    "text": ("x", "a payload is a JSON object, and str is none"),
    "none": (None, "a payload is a JSON object, and NoneType is none"),
    "NaN": ({"a": float("nan")}, "'a' is nan, which JSON has not"),
    "infinity, inside": ({"a": {"b": [0, float("-inf")]}}, r"'a\.b\[1\]' is -inf"),
    "NaN in a dataclass": (Address("x", float("nan")), "'weight' is nan"),
    "NaN in a tuple": ({"a": (float("nan"),)}, r"'a\[0\]' is nan"),
    "number as key": ({1: 2}, "the payload has the key 1, and keys are texts"),
    "number as key, inside": ({"a": [{1.5: 2}]}, r"'a\[0\]' has the key 1.5"),
    "tuple as key": ({"a": {(1, 2): 3}}, "cannot be written as JSON"),
    "number below 64 bits": ({"a": -(2**63) - 1}, "'a' is a number beyond 64 bits"),
    "number above 64 bits": ({"a": 2**64}, "'a' is a number beyond 64 bits"),
    "one level too many": (nested(65), "nested deeper than 64 levels"),
    "one level too many, arrays": (nested(65, arrays=True), "nested deeper than 64 levels"),
    "nesting bomb": (nested(100_000), "nested deeper than 64 levels"),
    "unknown class": ({"a": object()}, "cannot be written as JSON"),
    "half a surrogate": ({"a": "\ud800"}, "half of a surrogate pair"),
    "half a surrogate as key": ({"\udfff": 1.0, "b": {1}}, "half of a surrogate pair"),
}


@pytest.mark.parametrize(("payload", "refusal"), BAD.values(), ids=BAD)
def test_what_would_not_survive_is_refused(payload: Any, refusal: str) -> None:
    with pytest.raises(InvalidPayload, match=refusal):
        codec.encode(payload)
    assert codec.encode_lines([{"a": 1}, payload, {"a": 2}]) is None


def test_a_payload_that_holds_itself_is_refused() -> None:
    payload: dict[str, Any] = {}
    payload["me"] = [payload]
    with pytest.raises(InvalidPayload, match="nested deeper"):
        codec.encode(payload)


def test_the_limit_is_that_of_the_encoded_bytes() -> None:
    assert len(codec.encode({"a": "xy"}, payload_max_bytes=10)) == 10
    with pytest.raises(PayloadTooLarge, match="11 bytes and the limit is 10") as refused:
        codec.encode({"a": "xyz"}, payload_max_bytes=10)
    assert (refused.value.size_bytes, refused.value.limit_bytes) == (11, 10)
    assert codec.encode_lines([{"a": "xy"}, {"a": "x"}], payload_max_bytes=10) == (
        b'{"a":"xy"}\n{"a":"x"}\n',
        10,
    )
    assert codec.encode_lines([{"a": "x"}, {"a": "xyz"}], payload_max_bytes=10) is None


def test_lines_end_only_where_payloads_do() -> None:
    lines = codec.encode_lines([{"a\n": "\n\r\u2028"}, {"b": "\x85"}])
    assert lines is not None and lines[0].count(b"\n") == 2 and lines[0].endswith(b"\n")
    assert [codec.decode(line) for line in lines[0].splitlines()] == [{"a\n": "\n\r\u2028"}, {"b": "\x85"}]


def test_no_payloads_encode_to_nothing() -> None:
    assert codec.encode_lines([]) == (b"", 0)


def test_the_quick_look_stops_at_what_it_does_not_know(backend: ModuleType) -> None:
    good = [payload for name, payload in SOUND.items() if "largest number" not in name]
    assert backend.plain_payloads(good) == len(good)
    assert backend.plain_payloads([]) == 0
    odd = [payload for name, (payload, _) in BAD.items() if "surrogate" not in name]
    for payload in [*odd, {"a": 2**63}, {"a": {1}}, Address("x"), {"a": b"x"}]:
        assert backend.plain_payloads([*good, payload, *good]) == len(good), payload
    with pytest.raises(TypeError):
        backend.plain_payloads(None)


def test_the_quick_look_is_the_same_in_both(seed: int = 5) -> None:
    seeded = random.Random(seed)
    leaves = [1, "x", None, True, 1.5, float("inf"), 2**63, -(2**63), b"", object(), {1: 1}, (), [], {}]

    def tree(depth: int) -> Any:
        if depth == 0 or seeded.random() < 0.2:
            return seeded.choice(leaves) if seeded.random() < 0.1 else seeded.choice(leaves[:5])
        inside = [tree(depth - 1) for _ in range(seeded.randrange(3))]
        return seeded.choice([inside, tuple(inside), dict(zip("abc", inside, strict=False))])

    answers = set()
    for _ in range(2000):
        payloads = [{"a": tree(5)}]
        answers.add(_fast.plain_payloads(payloads))
        assert _fast.plain_payloads(payloads) == _pure.plain_payloads(payloads), payloads
    assert answers == {0, 1}


# --- JSON that people write ---

UNREADABLE: dict[str, tuple[bytes | str, str]] = {
    "empty": ("", "not JSON"),
    "cut off": ('{"a":', "not JSON"),
    "more behind it": ('{"a":1} x', "not JSON"),
    "array": ("[1]", "the payload is no JSON object"),
    "null": ("null", "the payload is no JSON object"),
    "NaN": ('{"a":NaN}', "not JSON"),
    "infinite": ('{"a":1e999}', "cannot be read: Number out of range"),
    "number beyond 64 bits": ('{"a":18446744073709551616}', "'a' is a number beyond 64 bits"),
    "endless number": ('{"a":%s}' % ("9" * 5000), "cannot be read: Integer value out of range"),
    "key twice": ('{"a":1,"b":2,"a":1}', "a key occurs twice"),
    "key twice, inside": ('{"a":[{"b":1,"c":[],"b":1}]}', "a key occurs twice"),
    "key twice, spelled in two ways": (r'{"a":1,"\u0061":1}', "a key occurs twice"),
    "not UTF-8": (b'{"a":"\xff"}', "not JSON"),
    "half a surrogate": (r'{"a":"\ud800"}', "not JSON"),
    "half a surrogate in the text": ('{"a":"\ud800"}', "not JSON"),
    "one level too many": ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64 levels"),
    "nesting bomb": ('{"a":' + "[" * 500_000, "nested deeper than 64 levels"),
}


@pytest.mark.parametrize(("text", "refusal"), UNREADABLE.values(), ids=UNREADABLE)
def test_bad_json_is_refused(text: bytes | str, refusal: str) -> None:
    with pytest.raises(InvalidPayload, match=refusal):
        codec.parse_json(text)


def test_json_is_read_from_text_and_bytes() -> None:
    expected = {"a": {"b": [1, {"c": "x:y"}]}, "b\\": '"', "d": {"a": 1}}
    text = ' {"a" : {"b":[1,{"c":"x:y"}]} , "b\\\\":"\\"", "d":{"a":1}}\n'
    assert codec.parse_json(text) == codec.parse_json(text.encode()) == expected


def test_long_json_is_refused_before_it_is_read() -> None:
    with pytest.raises(PayloadTooLarge):
        codec.parse_json("[" * 11, payload_max_bytes=10)


@pytest.mark.parametrize("text", [b"", b"[]", b"nul", b'{"a":', b'{"a":"\xff"}', b"[" * 100_000])
def test_stored_bytes_that_are_no_payload_are_refused(text: bytes) -> None:
    with pytest.raises(InvalidPayload):
        codec.decode(text)


def test_the_order_of_keys_does_not_matter_in_canonical_json() -> None:
    one = codec.encode({"b": 1, "a": {"d": [1, {"y": 0, "x": 0}], "c": "ü"}})
    two = codec.encode({"a": {"c": "ü", "d": [1, {"x": 0, "y": 0}]}, "b": 1})
    assert codec.canonical(one) == codec.canonical(two)
    assert codec.canonical(one) == '{"a":{"c":"ü","d":[1,{"x":0,"y":0}]},"b":1}'.encode()
    assert codec.canonical(codec.encode({"a": [1, 2]})) != codec.canonical(codec.encode({"a": [2, 1]}))


# --- compression ---


def test_compression_from_the_threshold_on_where_it_shrinks() -> None:
    long = codec.encode({"a": "x" * 2000})
    stored, compressed = codec.compress(long)
    assert compressed and len(stored) < 100
    assert codec.decompress(stored) == long
    short = codec.encode({"a": "x" * 900})
    assert codec.compress(short) == (short, False)
    assert codec.compress(short, zstd_threshold_bytes=len(short))[1]
    noise = random.Random(1).randbytes(4000)
    assert codec.compress(noise) == (noise, False)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 20_000
    with pytest.raises(PayloadTooLarge, match="268435456 bytes"):
        codec.decompress(bomb)


def test_a_bomb_that_hides_its_size_is_refused() -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24))
    with pytest.raises(InvalidPayload, match="does not state its size"):
        codec.decompress(bomb)


def test_a_bomb_that_lies_about_its_size_is_refused() -> None:
    bomb = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(300)))
    stated = zstandard.get_frame_parameters(bytes(bomb)).content_size
    assert stated == 300
    at = bomb.index((300 - 256).to_bytes(2, "little"))
    bomb[at : at + 2] = b"\x01\x00"
    assert zstandard.get_frame_parameters(bytes(bomb)).content_size == 257
    with pytest.raises(InvalidPayload, match="damaged"):
        codec.decompress(bytes(bomb))


def test_damaged_compression_is_refused() -> None:
    stored, _ = codec.compress(codec.encode({"a": "xyz" * 2000}))
    for bad in (b"", b"{}", stored[:-1], stored[:5], stored + b"\0", stored + stored, stored[:-4] + b"!!!!"):
        with pytest.raises(InvalidPayload, match="damaged"):
            codec.decompress(bad)


def test_threads_do_not_share_a_compressor() -> None:
    texts = [codec.encode({"a": f"{i}" * 20_000}) for i in range(8)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if codec.decompress(codec.compress(texts[i])[0]) != texts[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
