"""Every kernel of fastdp.launch against its NumPy twin, bit for bit, on whatever device it is given.

A device has the interface of tests/kernels/host_device.py. Cases are drawn from a seed, so that they run where
hypothesis is not installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdp import launch
from fastdp.bfloat16 import to_bfloat16
from fastdp.launch import SIGNALS_NBYTES, PeerGroup, RowPiece, RowSlice
from fastdp.launch import reference as twins

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "uint8": np.uint8}
FLOATS = ("float32", "float16", "bfloat16")
POISON = 0xCD


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 numbers rounded to a kernel's element type."""
    with np.errstate(all="ignore"):
        return to_bfloat16(values) if dtype == "bfloat16" else values.astype(NUMPY[dtype])


def values(dtype: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Random numbers of a float type, over a wide range of magnitudes."""
    magnitudes = np.exp2(np.arange(-10, 11, dtype=np.float32))
    return stored(rng.standard_normal(n, np.float32) * magnitudes[rng.integers(0, 21, n, np.uint8)], dtype)


def same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit; any NaN equals any other."""
    a, b = twins.to_float32(actual), twins.to_float32(expected)
    nan = np.isnan(b)
    np.testing.assert_array_equal(np.isnan(a), nan)
    unsigned = {4: np.uint32, 2: np.uint16, 1: np.uint8}[expected.itemsize]
    np.testing.assert_array_equal(actual.view(unsigned)[~nan], expected.view(unsigned)[~nan])


def slice_rows(device: Any, row: int, cast: str | None, *, shuffled: bool, leads: tuple[int, int], seed: int) -> None:
    """Rows 3 to 14 of 23, or a shuffled gather of as many."""
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 256, (23, row), np.uint8)
    dtype = NUMPY[cast or "uint8"]
    expected = np.full(11 * row * np.dtype(dtype).itemsize, POISON, np.uint8).view(dtype).reshape(11, row)
    index = rng.integers(0, 23, 23).astype(np.int64) if shuffled else None
    assert not twins.slice_rows(source, expected, first_row=3, index=index, scale=1 / 127.5, offset=-1.0)
    with device.scope():
        lead = leads[1] // expected.itemsize * expected.itemsize
        out = device.empty(expected.nbytes, lead)
        one = RowSlice(device.put(source, leads[0]), out, 11, row, 23, 3, cast, 1 / 127.5, -1.0)
        error = device.put(np.uint32([0]))
        launch.slice_rows(device.kernels, [one], index=device.put(index) if shuffled else 0, error=error, stream=0)
        assert device.get(out, expected).tobytes() == expected.tobytes()
        assert device.get(error, np.zeros(1, np.uint32))[0] == 0


def slice_rows_out_of_range(device: Any) -> None:
    """A row number outside sets the flag, and that row stays as it was."""
    source = np.arange(64, dtype=np.uint8).reshape(4, 16)
    expected = np.full((4, 16), POISON, np.uint8)
    index = np.int64([2, 4, -1, 0])
    assert twins.slice_rows(source, expected, index=index)
    with device.scope():
        out, error = device.empty(64), device.put(np.uint32([0]))
        one = RowSlice(device.put(source), out, 4, 16, 4)
        launch.slice_rows(device.kernels, [one], index=device.put(index), error=error, stream=0)
        assert device.get(out, expected).tobytes() == expected.tobytes()
        assert device.get(error, np.zeros(1, np.uint32))[0] == 1


def slice_rows_to_places(device: Any, row: int, cast: str | None, leads: tuple[int, int] = (0, 0)) -> None:
    """Rows of three sources that take turns in one destination."""
    rng, dtype = np.random.default_rng(row), NUMPY[cast or "uint8"]
    expected = np.full(14 * row * np.dtype(dtype).itemsize, POISON, np.uint8).view(dtype).reshape(14, row)
    index, places = rng.integers(0, 23, 14).astype(np.int64), rng.permutation(14).astype(np.int64)
    with device.scope():
        out = device.empty(expected.nbytes, leads[1] // expected.itemsize * expected.itemsize)
        slices = []
        for first, count in ((0, 3), (3, 10), (13, 1)):
            source = rng.integers(0, 256, (23, row), np.uint8)
            taken = {"first_row": first, "index": index, "places": places, "rows": count}
            assert not twins.slice_rows(source, expected, **taken, scale=1 / 127.5, offset=-1.0)
            slices.append(RowSlice(device.put(source, leads[0]), out, count, row, 23, first, cast, 1 / 127.5, -1.0))
        error, where = device.put(np.uint32([0])), {"index": device.put(index), "places": device.put(places)}
        launch.slice_rows(device.kernels, slices, **where, destination_rows=14, error=error, stream=0)
        assert device.get(out, expected).tobytes() == expected.tobytes()
        assert device.get(error, np.zeros(1, np.uint32))[0] == 0


def concat_rows(device: Any, counts: list[int], row: int, lead: int, seed: int) -> None:
    """Ragged rows of replicas to their places."""
    rng = np.random.default_rng(seed)
    expected = np.full((sum(counts), row), POISON, np.uint8)
    with device.scope():
        out, pieces = device.empty(expected.nbytes, lead), []
        for replica, rows in enumerate(counts):
            source, place = rng.integers(0, 256, (rows, row), np.uint8), sum(counts[:replica])
            twins.concat_rows(source, expected, destination_row=place)
            pieces.append(RowPiece(device.put(source, replica), out, rows, row, place))
        launch.concat_rows(device.kernels, pieces, stream=0)
        assert device.get(out, expected).tobytes() == expected.tobytes()


def all_16_bit_numbers(device: Any, dtype: str) -> None:
    """Each of the 65,536 becomes the fp32 of equal value, and comes back: the sum over one rank."""
    x = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    x = x.view(np.float16) if dtype == "float16" else x
    same_bits(reduced_once(device, [x], dtype), x)


def rounding(device: Any, dtype: str) -> None:
    """fp32 becomes the nearest 16-bit number, and ties go to even: halfway between all neighbours, and beside that."""
    numbers = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    numbers = numbers.view(np.float16) if dtype == "float16" else numbers
    wide = twins.to_float32(numbers)
    order = np.argsort(wide[np.isfinite(wide)])
    numbers = numbers[np.isfinite(wide)][order]
    low, high = np.tile(numbers[:-1], 3), np.tile(numbers[1:], 3)
    with np.errstate(all="ignore"):
        least = np.spacing(np.abs(twins.to_float32(low) + twins.to_float32(high)))
        beside = least * np.repeat(np.float32([0, 1, -1]), len(numbers) - 1)
    arrays = [low, high, stored(np.where(np.isfinite(beside), beside, np.float32(0)), dtype)]
    same_bits(reduced_once(device, arrays, dtype, 0.5), twins.all_reduce(arrays, scale=0.5))


def overflow_and_nan(device: Any, dtype: str) -> None:
    """Beyond the largest number lies infinity; what is no number has the bits that torch gives it, in bfloat16."""
    largest, half = {"float16": (65504.0, 16.0), "bfloat16": (3.3895313892515355e38, 2.0**119)}[dtype]
    inf, nan = np.inf, np.nan
    first = stored(np.float32([largest, largest, -largest, inf, -inf, inf, nan, -nan]), dtype)
    second = stored(np.float32([half, half * 0.99, -half, 1.0, 1.0, -inf, 1.0, nan]), dtype)
    found = reduced_once(device, [first, second], dtype)
    np.testing.assert_array_equal(
        twins.to_float32(found), np.float32([inf, np.float32(largest), -inf, inf, -inf, nan, nan, nan])
    )
    same_bits(found, twins.all_reduce([first, second]))
    if dtype == "bfloat16":
        assert [hex(bits) for bits in found[5:]] == ["0x7fc0"] * 3


def reduced_once(device: Any, arrays: list[np.ndarray], dtype: str, scale: float = 1.0) -> np.ndarray:
    """What the one-shot all-reduce of these arrays, one a rank, gives the first rank."""
    n = arrays[0].size
    with device.scope():
        groups = _ranks(device, "one_shot", len(arrays), arrays[0].nbytes, dtype, blocks=2, threads=8)
        inputs = [device.put(x) for x in arrays]
        outputs = [device.empty(x.nbytes) for x in arrays]
        for group in groups:
            _issue(device, "one_shot", group, inputs, outputs[group.rank], n, dtype, scale)
        device.synchronize()
        return device.get(outputs[0], arrays[0])


def _ranks(
    device: Any, kind: str, ranks: int, staged_nbytes: int, dtype: str, *, blocks: int, threads: int
) -> list[PeerGroup]:
    """Virtual ranks on one card, whose kernel is loaded."""
    half = -(-staged_nbytes // 16) * 16
    staging = tuple(device.empty(2 * half) for _ in range(ranks))
    signals = tuple(device.put(np.zeros(SIGNALS_NBYTES, np.uint8)) for _ in range(ranks))
    errors = [device.put(np.zeros(1, np.uint32)) for _ in range(ranks)]
    # Each rank alone first: CUDA may load a kernel at its first launch, and wait for running ones meanwhile.
    alone = PeerGroup(0, staging[:1], 2 * half, (device.put(np.zeros(SIGNALS_NBYTES, np.uint8)),), errors[0], 1, 32)
    scratch = device.put(np.zeros(8, NUMPY[dtype]))
    _issue(device, kind, alone, [scratch], scratch, 1, dtype, 1.0)
    device.synchronize()
    return [
        PeerGroup(rank, staging, 2 * half, signals, errors[rank], blocks, threads, spin_limit=5_000_000)
        for rank in range(ranks)
    ]


def all_reduce(
    device: Any, kind: str, ranks: int, n: int, dtype: str, *, blocks: int, threads: int, turns: int
) -> None:
    """Launches back to back on shared staging, in place every other time, by virtual ranks on one card."""
    itemsize = np.dtype(NUMPY[dtype]).itemsize
    per_pack = 16 // itemsize
    staged = n if kind == "one_shot" else -(-n // per_pack // ranks + 1) * per_pack + per_pack
    with device.scope():
        groups = _ranks(device, kind, ranks, staged * itemsize, dtype, blocks=blocks, threads=threads)
        sets = []
        for turn in range(turns):
            arrays = [values(dtype, n, np.random.default_rng(100 * turn + rank)) for rank in range(ranks)]
            inputs = [device.put(x) for x in arrays]
            outputs = inputs if turn % 2 else [device.empty(x.nbytes) for x in arrays]
            # What the kernel leaves alone is compared too.
            before = arrays if turn % 2 else [np.full_like(x, 7) for x in arrays]
            for address, x in zip(outputs, before, strict=True):
                device.write(address, x)
            sets.append((inputs, outputs, [_reduced(kind, arrays, x, r, 1 / ranks) for r, x in enumerate(before)]))
        for inputs, outputs, _ in sets:
            for group in groups:
                _issue(device, kind, group, inputs, outputs[group.rank], n, dtype, 1 / ranks)
        device.synchronize()
        given_up = [int(device.get(group.error, np.zeros(1, np.uint32))[0]) for group in groups]
        assert given_up == [0] * ranks, "a rank waited in vain for another"
        for _, outputs, wanted in sets:
            for output, expected in zip(outputs, wanted, strict=True):
                same_bits(device.get(output, expected), expected)


def _reduced(kind, arrays, before, rank, scale):
    """What a rank's output holds afterwards."""
    expected = before.copy()
    if kind == "reduce_scatter":
        twins.reduce_scatter(arrays, expected, rank, scale=scale)
    else:
        expected[:] = twins.all_reduce(arrays, scale=scale)
    return expected


def _issue(device, kind, group, inputs, y, n, dtype, scale):
    options = {"y": y, "n": n, "dtype": dtype, "scale": scale, "stream": group.rank}
    if kind == "one_shot":
        launch.all_reduce_one_shot(device.kernels, group, x=inputs[group.rank], **options)
    elif kind == "reduce_scatter":
        launch.reduce_scatter(device.kernels, group, inputs=inputs, **options)
    else:
        launch.all_reduce_two_shot(device.kernels, group, inputs=inputs, **options)
