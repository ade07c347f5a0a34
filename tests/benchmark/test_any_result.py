"""Whatever a checked result holds, it is shown: values of the wrong kind in its free parts, zeros, and huge numbers."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import benchmark_results
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdp.benchmark.comparison import compare
from fastdp.benchmark.display import comparison_blocks, result_blocks
from fastdp.benchmark.html import comparison_page, report_page
from fastdp.benchmark.result import check
from fastdp.rendering.text import as_text

SMALL = benchmark_results.gpu_result()
SMALL["entries"] = [SMALL["entries"][1], SMALL["entries"][-1]]
SMALL["entries"][0]["verbs"].pop()

ODD = [
    *(None, 0, -1, 10**400, 1e308, 1e-300, float("nan"), float("inf"), True, "", "<b>\x1b", "x" * 5000, [], {}, [None]),
    *({"a": None}, [{"name": 1}]),
]


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values inside a value are."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, one in inner for found in [(*place, key), *places(one, (*place, key))]]


def changed(result: dict[str, Any], place: tuple[Any, ...], odd: Any) -> bool:
    """Change a result at a place, if it is still there and the result is still one; returns whether it was."""
    inner: Any = result
    try:
        for key in place[:-1]:
            inner = inner[key]
        before, inner[place[-1]] = inner[place[-1]], odd
    except (KeyError, IndexError, TypeError):  # an earlier change took the place away
        return False
    try:
        check(result, "the result")
    except ValueError:
        inner[place[-1]] = before
        return False
    return True


@functools.cache
def fitting() -> list[tuple[tuple[Any, ...], Any]]:
    """The changes after which a result is still one. Found at the first test, since it takes a second."""
    return [(place, odd) for place in places(SMALL) for odd in ODD if changed(copy.deepcopy(SMALL), place, odd)]


@given(st.deferred(lambda: st.lists(st.sampled_from(fitting()), min_size=1, max_size=8)))
@settings(max_examples=100, deadline=None)
def test_a_result_that_is_checked_is_shown(changes: list[tuple[Any, Any]]) -> None:
    result = copy.deepcopy(SMALL)
    for place, odd in changes:
        changed(result, place, odd)
    as_text(result_blocks(result)).encode("utf-8")
    report_page(result).encode("utf-8")
    for pair in ([SMALL, result], [result, SMALL]):
        comparison = compare(pair, ["a", "b"])
        as_text(comparison_blocks(comparison)).encode("utf-8")
        comparison_page(comparison).encode("utf-8")
        json.dumps(comparison.to_dict(), allow_nan=False)


def test_there_are_many_changes_to_try() -> None:
    assert len(fitting()) > 500
