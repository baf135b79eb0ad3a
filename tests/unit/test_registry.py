"""What a function takes, how its payload is decoded, and what is refused at registration."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tqe.errors import ArgumentsError, InvalidOption, RegistrationError
from tqe.formats import TASKS_MAX
from tqe.registry import Registry, Task, TaskOptions, task_options


class Order(msgspec.Struct):
    number: int
    note: str = ""


class Foreign:
    """A class that msgspec cannot decode."""


def plain(to: str, subject: str = "", *, urgent: bool = False) -> str:
    return f"{to} {subject} {urgent}"


def call(task: Task[..., Any], payload: bytes) -> Any:
    """What a worker does with a task's description."""
    decoded = task.decoder.decode(payload)
    if task.mode == "struct":
        return task.func(decoded)
    if task.mode == "kwargs":
        return task.func(**decoded)
    return task.func(
        *(getattr(decoded, name) for name in task.positional),
        **{name: getattr(decoded, name) for name in task.keyword_only},
    )


class TestModes:
    def test_fields_in_the_order_of_the_call(self) -> None:
        task = Task("EMAIL", plain)
        assert (task.mode, task.positional, task.keyword_only) == ("fields", ("to", "subject"), ("urgent",))
        assert not task.is_async
        assert call(task, b'{"to":"a"}') == "a  False"
        assert call(task, b'{"urgent":true,"subject":"s","to":"a"}') == "a s True"
        assert task("x", subject="y") == "x y False"

    def test_no_parameters(self) -> None:
        task = Task("TICK", lambda: 7)
        assert call(task, b"{}") == 7
        with pytest.raises(ArgumentsError, match="TICK has no argument x; it takes no arguments"):
            task.validate(b'{"x":1}')

    def test_one_struct(self) -> None:
        def take(order: Order) -> Order:
            return order

        task = Task("ORDER", take)
        assert (task.mode, task.struct) == ("struct", Order)
        assert call(task, b'{"number":3}') == Order(3)
        with pytest.raises(ArgumentsError, match="number is missing; it takes the fields of Order: number"):
            task.validate(b"{}")

    def test_a_struct_beside_another_parameter_is_a_field(self) -> None:
        def take(order: Order, times: int = 1) -> Any:
            return order, times

        task = Task("ORDER", take)
        assert task.mode == "fields"
        assert call(task, b'{"order":{"number":3}}') == (Order(3), 1)
        with pytest.raises(ArgumentsError, match=r"argument order\.number is wrong: Expected int, got str"):
            task.validate(b'{"order":{"number":"3"}}')

    def test_keywords_of_any_name_take_the_dict(self) -> None:
        def take(a: int, **more: Any) -> Any:
            return a, more

        task = Task("ANY", take)
        assert task.mode == "kwargs"
        assert call(task, b'{"a":1,"b":2}') == (1, {"b": 2})
        with pytest.raises(ArgumentsError, match="missing a required argument: 'a'"):
            task.validate(b'{"b":2}')

    def test_defaults_may_be_mutable_and_required_ones_may_follow_them(self) -> None:
        seen: list[int] = [1]

        def take(a: list[int] = seen, *, b: int) -> Any:
            return a, b

        assert call(Task("X", take), b'{"b":2}') == (seen, 2)

    def test_async_functions_and_callable_objects(self) -> None:
        async def later(a: int) -> None: ...

        class Caller:
            async def __call__(self, a: "int") -> None: ...

        assert Task("A", later).is_async
        task = Task("B", Caller())
        assert task.is_async and task.positional == ("a",)
        with pytest.raises(ArgumentsError, match="argument a is wrong"):
            task.validate(b'{"a":"x"}')
        assert call(Task("C", functools.partial(plain, subject="s")), b'{"to":"a"}') == "a s False"


class TestAnnotations:
    def test_text_annotations_are_resolved(self) -> None:
        def take(order: "Order", path: "Nowhere", n: "int") -> Any:  # type: ignore[name-defined]  # noqa: F821
            return order, path, n

        task = Task("X", take)
        assert call(task, b'{"order":{"number":1},"path":[1],"n":2}') == (Order(1), [1], 2)
        with pytest.raises(ArgumentsError, match="argument n is wrong"):
            task.validate(b'{"order":{"number":1},"path":[1],"n":"2"}')

    @pytest.mark.parametrize("annotation", [Foreign, list[Foreign], dict[str, Foreign | None], Path, "1/0"])
    def test_what_cannot_be_decoded_is_any(self, annotation: Any) -> None:
        def take(a: Any) -> Any:
            return a

        take.__annotations__["a"] = annotation
        assert call(Task("X", take), b'{"a":{"b":[1]}}') == {"b": [1]}

    def test_strict_types_are_the_contract(self) -> None:
        def take(n: int) -> None: ...

        task = Task("X", take)
        for payload in (b'{"n":"5"}', b'{"n":5.5}', b'{"n":true}', b'{"n":null}', b'{"n":[]}'):
            with pytest.raises(ArgumentsError, match="X: the argument n is wrong: Expected int"):
                task.validate(payload)


class TestRefusals:
    def test_parameters_by_position_only(self) -> None:
        def slash(a: int, /) -> None: ...
        def star(*many: int) -> None: ...

        with pytest.raises(RegistrationError, match=r"slash.*takes a by position only"):
            Task("X", slash)
        with pytest.raises(RegistrationError, match=r"star.*takes \*many by position only"):
            Task("X", star)

    def test_generators_would_never_run(self) -> None:
        def gen() -> Any:
            yield 1

        async def agen() -> Any:
            yield 1

        for func in (gen, agen):
            with pytest.raises(RegistrationError, match="would never run"):
                Task("X", func)

    @pytest.mark.parametrize("name", ["", "a b", "ü", "x" * 65, "a,b", "a\n"])
    def test_names(self, name: str) -> None:
        with pytest.raises(RegistrationError, match="cannot name a task"):
            Task(name, plain)

    def test_structs_that_are_arrays(self) -> None:
        class Row(msgspec.Struct, array_like=True):
            a: int

        def take(row: Row) -> None: ...

        with pytest.raises(RegistrationError, match="array_like"):
            Task("X", take)

    @pytest.mark.parametrize(
        ("payload", "fault"),
        [
            (b"{}", "missing"),
            (b'{"to":"a","x":1}', "unknown"),
            (b'{"to":1}', "wrong"),
            (b"[]", "wrong"),
            (b"\xff", "wrong"),
            (b"", "wrong"),
            (b'{"to":"\xff"}', "wrong"),
            (b'{"to":' + b"[" * 10**5, "wrong"),
        ],
    )
    def test_faults_are_told_apart_because_only_some_wait_for_another_version(
        self, payload: bytes, fault: str
    ) -> None:
        task = Task("EMAIL", plain)
        with pytest.raises(Exception) as caught:
            task.decoder.decode(payload)
        kind, text = task.explain(caught.value)
        assert kind == fault and "EMAIL" in text
        with pytest.raises(ArgumentsError):
            task.validate(payload)


class TestPayloadOf:
    def test_positional_arguments_get_their_names(self) -> None:
        task = Task("EMAIL", plain)
        assert task.payload_of(("a", "s"), {"urgent": True}) == {"to": "a", "subject": "s", "urgent": True}
        for args, kwargs in ((("a", "s", True), {}), (("a",), {"to": "b"})):
            with pytest.raises(ArgumentsError):
                task.payload_of(args, kwargs)

    def test_a_struct_is_the_payload(self) -> None:
        def take(order: Order) -> None: ...

        assert Task("O", take).payload_of((Order(1),), {}) == Order(1)
        assert Task("O", take).payload_of((), {"number": 1}) == {"number": 1}


class TestOptions:
    def test_all(self) -> None:
        found = task_options(
            "X",
            {
                "timeout": 30,
                "hard_after": 2,
                "max_retries": 5,
                "priority": "High",
                "retry_on": (OSError, KeyError),
                "no_retry_on": ValueError,
                "backoff": 0.5,
                "backoff_max": 60,
                "track": False,
            },
        )
        assert found == TaskOptions(
            timeout_ms=30_000,
            hard_after_ms=2_000,
            max_retries=5,
            lane="high",
            retry_on=(OSError, KeyError),
            no_retry_on=(ValueError,),
            backoff_base_ms=500,
            backoff_cap_ms=60_000,
            track=False,
        )
        assert task_options("X", {}) == TaskOptions()

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"retries": 3}, "task X: retries is not an option"),
            ({"priority": "so much"}, "takes the name of a lane"),
            ({"retry_on": "OSError"}, "takes exception classes"),
            ({"track": "no"}, "track takes"),
            ({"timeout": -1}, "timeout is negative"),
            ({"max_retries": 2000}, "max_retries takes"),
        ],
    )
    def test_wrong_ones(self, given: dict[str, Any], says: str) -> None:
        with pytest.raises((RegistrationError, InvalidOption), match=says):
            task_options("X", given)


class TestRegistry:
    def test_lookup_by_name_and_by_bytes(self) -> None:
        registry, task = Registry(), Task("EMAIL", plain)
        registry.add(task)
        assert registry.get("EMAIL") is task is registry.lookup(b"EMAIL")
        assert registry.lookup(b"SMS") is None and "SMS" not in registry
        assert registry.names == ("EMAIL",) and list(registry) == [task] and len(registry) == 1

    def test_twice_is_refused_and_both_places_are_named(self) -> None:
        def other() -> None: ...

        registry = Registry()
        registry.add(Task("EMAIL", plain))
        with pytest.raises(RegistrationError) as caught:
            registry.add(Task("EMAIL", other))
        assert "test_registry.plain" in str(caught.value) and "other" in str(caught.value)
        assert str(caught.value).count(f"{Path(__file__).name}:") == 2

    def test_after_the_freeze_nothing_is_added(self) -> None:
        registry = Registry()
        registry.freeze()
        with pytest.raises(RegistrationError, match="too late"):
            registry.add(Task("EMAIL", plain))


def test_what_a_task_says_of_itself() -> None:
    def documented() -> None:
        """It does."""

    task: Callable[..., Any] = Task("X", documented)
    assert task.__doc__ == "It does." and task.__name__ == "documented"
    assert "<Task X: " in repr(task) and "documented" in repr(task)


def test_more_tasks_than_a_worker_can_count_are_refused() -> None:
    registry = Registry()
    for n in range(TASKS_MAX):
        registry.add(Task(f"T{n}", lambda: None))
    with pytest.raises(RegistrationError, match="at most 512 tasks, ONE_MORE"):
        registry.add(Task("ONE_MORE", lambda: None))


def test_more_parameters_than_a_call_can_pass_are_refused() -> None:
    made: dict[str, Any] = {}
    exec(f"def wide({', '.join(f'a{k}' for k in range(256))}): ...", made)
    with pytest.raises(RegistrationError, match="more than 255 parameters"):
        Task("WIDE", made["wide"])
