"""Times matrix products by torch's BLAS and by oneDNN when a step is compiled, and remembers which one was faster.

What was measured holds for the process, is kept in the user's cache folder for later runs, and goes into checkpoints:
the two libraries round differently, and a run that goes on must round as it would have.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastdp.capture.compile import kept_code
from fastdp.capture.graph.products import Product
from fastdp.tensors.threads import intra_op_threads

FOLDER = "product-times"
MOST_NBYTES = 1 << 20
MOST_KNOWN = 4096
FEWEST_MULTIPLICATIONS = 1 << 18  # below, calling oneDNN takes longer than the product
# OneDNN has to be faster by this factor: it is called through Python, and times of two equal libraries vary.
GAIN = 1.15
_SECONDS, _GRAPH_SECONDS = 0.03, 1.5
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 30

_known: dict[str, bool] = {}


def measured(threads: int) -> Callable[[Product], bool]:
    """A function for the products of one graph that says whether oneDNN is faster than torch's BLAS.

    It measures what is not known yet, on the calling thread, for about 0.03 s for each product and at most 1.5 s
    altogether; products that come later go to torch's BLAS and are measured with the next graph that has them.

    Args:
        threads: the cores that a product may use.
    """
    return _Measured(threads)


def never(product: Product) -> bool:
    """Says that oneDNN is not faster: for steps whose bits must not depend on a measurement."""
    return False


def state_dict() -> dict[str, bool]:
    """What is known in this process, by product and cores."""
    return dict(_known)


def load_state_dict(state: Mapping[str, bool]) -> None:
    """Let what another process has measured hold in this one."""
    _known.update({str(key): bool(value) for key, value in state.items()})


class _Measured:
    """As `measured`."""

    def __init__(self, threads: int) -> None:
        self._threads, self._end = threads, time.perf_counter() + _GRAPH_SECONDS

    def __call__(self, product: Product) -> bool:
        if product.multiplications < FEWEST_MULTIPLICATIONS:
            return False
        key = f"{self._threads} {product}"
        if key not in _known:
            _recall(self._threads)
        if key not in _known:
            if time.perf_counter() > self._end:
                return False
            with intra_op_threads(self._threads):
                blas, onednn = best_seconds(product)
            _known[key] = onednn * GAIN < blas
            _keep(self._threads)
        return _known[key]


def best_seconds(product: Product) -> tuple[float, float]:
    """Seconds by torch's BLAS and by oneDNN: the shortest of some rounds that take turns.

    The shortest one, since other processes take time from some. The first round does not count.
    """
    ways = _ways(product)
    with torch.inference_mode():
        for way in ways:
            way()
        best, end = [float("inf")] * len(ways), time.perf_counter() + _SECONDS
        for number in range(_MOST_ROUNDS):
            if number >= _FEWEST_ROUNDS and time.perf_counter() > end:
                break
            for at, way in enumerate(ways):
                began = time.perf_counter()
                way()
                best[at] = min(best[at], time.perf_counter() - began)
    return best[0], best[1]


def _ways(product: Product) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions that compute a product of ones by torch's BLAS and by oneDNN."""
    a, b = (torch.empty_strided(*operand).fill_(1.0) for operand in (product.a, product.b))
    out, bias = torch.ones(a.shape[0], b.shape[1]), torch.ones(b.shape[1]) if product.has_bias else None
    operations = torch.ops.fastdp
    if product.stored:
        return (
            lambda: operations.mm_into.default(out, a, b),
            lambda: operations.onednn_mm_into.default(out, a, b),
        )
    if bias is not None:
        return lambda: torch.addmm(bias, a, b), lambda: operations.onednn_mm.default(a, b, bias)
    return lambda: torch.mm(a, b), lambda: operations.onednn_mm.default(a, b, None)


# What earlier runs have measured: one file for each number of cores.


@functools.cache
def _recall(threads: int) -> None:
    """Read, once, what earlier runs on this machine have measured. What this one knows holds."""
    try:
        found = json.loads(kept_code.found(FOLDER, _name(threads), MOST_NBYTES) or b"{}")
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return
    if isinstance(found, dict):
        for key, value in list(found.items())[:MOST_KNOWN]:
            if isinstance(value, bool):
                _known.setdefault(key, value)


def _keep(threads: int) -> None:
    """Write what is known for this number of cores, the latest where it is too much."""
    mine = {key: value for key, value in _known.items() if key.startswith(f"{threads} ")}
    content = json.dumps(dict(list(mine.items())[-MOST_KNOWN:])).encode()
    kept_code.put(FOLDER, _name(threads), content)


def _name(threads: int) -> str:
    return kept_code.digest("products", threads, kept_code.machine())
