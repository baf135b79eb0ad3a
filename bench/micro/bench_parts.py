"""The small parts under pytest-benchmark; `make bench-compare` runs them against two commits."""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro.parts import PARTS


@pytest.mark.parametrize("name", PARTS)
def test_part(benchmark: Any, name: str) -> None:
    part = PARTS[name]
    benchmark.group = name.partition(",")[0]
    benchmark.extra_info["jobs"] = part.jobs
    benchmark(part.make())
