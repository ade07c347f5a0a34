"""Every kernel of fastdp.launch against its NumPy twin, bit for bit, on whatever device it is given.

A device has the interface of tests/kernels/host_device.py. Cases are drawn from a seed, so that they run where
hypothesis is not installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdp import launch
from fastdp.launch import SIGNALS_NBYTES, PeerGroup, RowPiece, RowSlice
from fastdp.launch import reference as twins

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "uint8": np.uint8}
FLOATS = ("float32", "float16", "bfloat16")
PAIRS = [
    ("float32", "float32"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
]
POISON = 0xCD


def values(dtype: str, n: int, rng: np.random.Generator, *, positive: bool = False) -> np.ndarray:
    """Random numbers of a kernel's element type, over a wide range of magnitudes."""
    if dtype == "uint8":
        return rng.integers(0, 256, n, np.uint8)
    magnitudes = np.exp2(np.arange(-10, 11, dtype=np.float32))
    wide = rng.standard_normal(n, np.float32) * magnitudes[rng.integers(0, 21, n, np.uint8)]
    out = np.empty(n, NUMPY[dtype])
    twins.scale_cast(np.abs(wide) if positive else wide, out)
    return out


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


def scale_cast(device: Any, n: int, x_dtype: str, y_dtype: str, device_scale: float | None, lead: int) -> None:
    """y = cast(x * scale)."""
    x = values(x_dtype, n, np.random.default_rng(n))
    expected = np.zeros(n, NUMPY[y_dtype])
    twins.scale_cast(x, expected, scale=1 / 255, device_scale=device_scale)
    with device.scope():
        y = device.empty(expected.nbytes, lead * expected.itemsize)
        factor = 0 if device_scale is None else device.put(np.float32([device_scale]))
        launch.scale_cast(
            device.kernels,
            x=device.put(x, lead * x.itemsize),
            y=y,
            n=n,
            x_dtype=x_dtype,
            y_dtype=y_dtype,
            scale=1 / 255,
            device_scale=factor,
            stream=0,
        )
        same_bits(device.get(y, expected), expected)


def all_16_bit_numbers(device: Any, dtype: str) -> None:
    """Each of the 65,536 becomes the fp32 of equal value, and comes back."""
    x = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    x = x.view(np.float16) if dtype == "float16" else x
    wide = twins.to_float32(x)
    with device.scope():
        y, z = device.empty(wide.nbytes), device.empty(x.nbytes)
        launch.scale_cast(device.kernels, x=device.put(x), y=y, n=x.size, x_dtype=dtype, y_dtype="float32", stream=0)
        launch.scale_cast(device.kernels, x=y, y=z, n=x.size, x_dtype="float32", y_dtype=dtype, stream=0)
        same_bits(device.get(y, wide), wide)
        same_bits(device.get(z, x), x)


def check_finite(device: Any, n: int, dtype: str, bad: float | None) -> None:
    """The flag is set by one bad element, and by nothing else."""
    x = values(dtype, n, np.random.default_rng(n))
    if bad is not None:
        x[2 * n // 3] = twins.bfloat16_bits(np.float32([bad]))[0] if dtype == "bfloat16" else bad
    with device.scope():
        found = device.put(np.uint32([0]))
        launch.check_finite(device.kernels, x=device.put(x), n=n, dtype=dtype, found=found, stream=0)
        assert device.get(found, np.zeros(1, np.uint32))[0] == int(bad is not None)


def l2_norm(device: Any, sizes: list[tuple[str, int]], clip_norm: float | None) -> None:
    """Norm and clip factor over several buffers."""
    rng = np.random.default_rng(7)
    arrays = [values(dtype, n, rng) for dtype, n in sizes]
    expected = twins.l2_norm(arrays, clip_norm=clip_norm)
    with device.scope():
        count = sum(launch.l2_norm_blocks(x.size, x.itemsize) for x in arrays)
        partials, norm, scale = device.empty(8 * count), device.empty(4), device.empty(4)
        buffers = [(device.put(x), x.size, dtype) for x, (dtype, _) in zip(arrays, sizes, strict=True)]
        for _ in range(2):  # it repeats bit for bit
            launch.l2_norm(
                device.kernels, buffers, partials=partials, norm=norm, scale=scale, clip_norm=clip_norm, stream=0
            )
            one = np.zeros(1, np.float32)
            same_bits(np.concatenate([device.get(norm, one), device.get(scale, one)]), np.float32(expected))


def fused_sgd(device: Any, n: int, pair: tuple[str, str], momentum: float, nesterov: bool, clip: float | None) -> None:
    """Three steps, the second skipped."""
    rng = np.random.default_rng(n)
    w, g, m = values(pair[0], n, rng), values(pair[1], n, rng), values(pair[0], n, rng)
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": 0.01}
    with device.scope():
        weights, gradients, momentums = (device.put(x) for x in (w, g, m))
        lr, skip = device.put(np.float32([0.1])), device.put(np.uint32([0]))
        scale = 0 if clip is None else device.put(np.float32([clip]))
        for step in range(3):
            device.write(skip, np.uint32([step == 1]))
            launch.fused_sgd(
                device.kernels,
                weights=weights,
                gradients=gradients,
                momentums=momentums if momentum else 0,
                learning_rate=lr,
                n=n,
                dtype=pair[0],
                gradient_dtype=pair[1],
                clip_scale=scale,
                skip=skip,
                stream=0,
                **options,
            )
            slots = {"momentums": m if momentum else None, "clip_scale": 1.0 if clip is None else clip}
            twins.fused_sgd(w, g, learning_rate=0.1, skip=step == 1, **slots, **options)
            assert device.get(weights, w).tobytes() == w.tobytes()
            assert device.get(momentums, m).tobytes() == m.tobytes()


def fused_adam(device: Any, n: int, pair: tuple[str, str], amsgrad: bool, clip: float | None) -> None:
    """Three steps from a late iteration on."""
    rng = np.random.default_rng(n)
    w, g, m = values(pair[0], n, rng), values(pair[1], n, rng), values(pair[0], n, rng)
    v, hat = values(pair[0], n, rng, positive=True), values(pair[0], n, rng, positive=True)
    with device.scope():
        at = [device.put(x) for x in (w, m, v, hat, g)]
        lr, iterations = device.put(np.float32([0.01])), device.empty(8)
        scale = 0 if clip is None else device.put(np.float32([clip]))
        for step in (0, 1, 2**33):
            device.write(iterations, np.int64([step]))
            launch.fused_adam(
                device.kernels,
                weights=at[0],
                momentums=at[1],
                velocities=at[2],
                velocity_hats=at[3] if amsgrad else 0,
                gradients=at[4],
                learning_rate=lr,
                iterations=iterations,
                n=n,
                dtype=pair[0],
                gradient_dtype=pair[1],
                weight_decay=0.01,
                clip_scale=scale,
                stream=0,
            )
            hats = {"velocity_hats": hat if amsgrad else None, "clip_scale": 1.0 if clip is None else clip}
            twins.fused_adam(w, m, v, g, learning_rate=0.01, iterations=step, weight_decay=0.01, **hats)
            for address, expected in zip(at, (w, m, v, hat, g), strict=True):
                assert device.get(address, expected).tobytes() == expected.tobytes()


def all_reduce(
    device: Any, kind: str, ranks: int, n: int, dtype: str, *, blocks: int, threads: int, turns: int
) -> None:
    """Launches back to back on shared staging, in place every other time, by virtual ranks on one card."""
    per_pack = 16 // np.dtype(NUMPY[dtype]).itemsize
    staged = n if kind == "one_shot" else -(-n // per_pack // ranks + 1) * per_pack + per_pack
    half = -(-staged * np.dtype(NUMPY[dtype]).itemsize // 16) * 16
    with device.scope():
        staging = tuple(device.empty(2 * half) for _ in range(ranks))
        signals = tuple(device.put(np.zeros(SIGNALS_NBYTES, np.uint8)) for _ in range(ranks))
        errors = [device.put(np.zeros(1, np.uint32)) for _ in range(ranks)]
        groups = [
            PeerGroup(rank, staging, 2 * half, signals, errors[rank], blocks, threads, spin_limit=5_000_000)
            for rank in range(ranks)
        ]
        # Each rank alone first: CUDA may load a kernel at its first launch, and wait for running ones meanwhile.
        alone = PeerGroup(0, staging[:1], 2 * half, (device.put(np.zeros(SIGNALS_NBYTES, np.uint8)),), errors[0], 1, 32)
        scratch = device.put(np.zeros(per_pack, NUMPY[dtype]))
        _issue(device, kind, alone, [scratch], scratch, 1, dtype, 1.0)
        device.synchronize()
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
        given_up = [int(device.get(error, np.zeros(1, np.uint32))[0]) for error in errors]
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
