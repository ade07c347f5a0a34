"""scale_cast, l2_norm and check_finite equal their NumPy twins bit for bit, at every size and alignment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp import launch
from fastdp.launch import reference as twins

FLOATS = ("float32", "float16", "bfloat16")
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "uint8": np.uint8}
SIZES = st.one_of(st.integers(0, 40), st.integers(1, 30_000))


def random_array(dtype: str, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "uint8":
        return rng.integers(0, 256, n, np.uint8)
    values = (rng.standard_normal(n) * 10.0 ** rng.uniform(-4, 4, n)).astype(np.float32)
    out = np.empty(n, NUMPY[dtype])
    twins.scale_cast(values, out)
    return out


def all_bit_patterns() -> np.ndarray:
    return np.arange(65536, dtype=np.uint32).astype(np.uint16)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit; any NaN equals any other."""
    actual32, expected32 = twins.to_float32(actual), twins.to_float32(expected)
    nan = np.isnan(expected32)
    assert np.array_equal(np.isnan(actual32), nan)
    unsigned = {4: np.uint32, 2: np.uint16, 1: np.uint8}[actual.itemsize]
    assert np.array_equal(actual.view(unsigned)[~nan], expected.view(unsigned)[~nan])


@given(
    n=SIZES,
    x_dtype=st.sampled_from([*FLOATS, "uint8"]),
    y_dtype=st.sampled_from(FLOATS),
    leads=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    device_scale=st.sampled_from([None, 0.125, -3.0]),
    seed=st.integers(0, 99),
)
def test_scale_cast_equals_its_twin(host, n, x_dtype, y_dtype, leads, device_scale, seed):
    x = random_array(x_dtype, n, seed)
    expected = np.zeros(n, NUMPY[y_dtype])
    twins.scale_cast(x, expected, scale=1 / 255, device_scale=device_scale)
    with host.scope():
        y = host.empty(expected.nbytes, leads[1] * expected.itemsize)
        launch.scale_cast(
            host.kernels,
            x=host.put(x, leads[0] * x.itemsize),
            y=y,
            n=n,
            x_dtype=x_dtype,
            y_dtype=y_dtype,
            scale=1 / 255,
            device_scale=0 if device_scale is None else host.put(np.float32([device_scale])),
            stream=0,
        )
        assert_same_bits(host.get(y, expected), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number_becomes_the_fp32_of_equal_value(host, dtype):
    x = all_bit_patterns()
    x = x.view(np.float16) if dtype == "float16" else x
    expected = twins.to_float32(x)
    with host.scope():
        y = host.empty(expected.nbytes)
        launch.scale_cast(host.kernels, x=host.put(x), y=y, n=x.size, x_dtype=dtype, y_dtype="float32", stream=0)
        assert_same_bits(host.get(y, expected), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fp32_is_rounded_to_the_nearest_16_bit_number_and_ties_to_even(host, dtype):
    exact = all_bit_patterns().view(np.float16) if dtype == "float16" else all_bit_patterns()
    exact = twins.to_float32(exact)
    exact = np.sort(exact[np.isfinite(exact)])
    halfway = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    near = np.concatenate(
        [halfway, np.nextafter(halfway, np.float32(np.inf)), np.nextafter(halfway, np.float32(-np.inf))]
    )
    x = np.concatenate([near, np.float32([65519.9, 65520, -65520, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan])])
    expected = np.empty(x.size, NUMPY[dtype])
    twins.scale_cast(x, expected)
    with host.scope():
        y = host.empty(expected.nbytes)
        launch.scale_cast(host.kernels, x=host.put(x), y=y, n=x.size, x_dtype="float32", y_dtype=dtype, stream=0)
        assert_same_bits(host.get(y, expected), expected)


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [("float32", "float32"), ("float16", "bfloat16")])
def test_scale_cast_works_in_place_where_the_element_sizes_are_equal(host, x_dtype, y_dtype):
    x = random_array(x_dtype, 10_000, 5)
    expected = np.zeros(x.size, NUMPY[y_dtype])
    twins.scale_cast(x, expected, scale=0.5)
    with host.scope():
        at = host.put(x)
        launch.scale_cast(host.kernels, x=at, y=at, n=x.size, x_dtype=x_dtype, y_dtype=y_dtype, scale=0.5, stream=0)
        assert_same_bits(host.get(at, expected), expected)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@given(n=SIZES.filter(bool), dtype=st.sampled_from(FLOATS), lead=st.integers(0, 7), where=st.floats(0, 0.999))
def test_check_finite_finds_one_bad_element_anywhere(host, bad, n, dtype, lead, where):
    x = random_array(dtype, n, 3)
    x[int(where * n)] = twins.bfloat16_bits(np.float32([bad]))[0] if dtype == "bfloat16" else bad
    assert twins.check_finite(x)
    assert finite_flag(host, x, dtype, lead) == 1


@given(n=SIZES, dtype=st.sampled_from(FLOATS), lead=st.integers(0, 7))
def test_check_finite_leaves_the_flag_for_finite_elements(host, n, dtype, lead):
    x = random_array(dtype, n, 4)
    if n:
        x[-1] = {"float32": 3.4028235e38, "float16": 65504, "bfloat16": 0x7F7F}[dtype]
    assert not twins.check_finite(x)
    assert finite_flag(host, x, dtype, lead) == 0
    assert finite_flag(host, x, dtype, lead, before=1) == 1  # sticky


def finite_flag(host, x: np.ndarray, dtype: str, lead: int, before: int = 0) -> int:
    with host.scope():
        found = host.put(np.uint32([before]))
        launch.check_finite(
            host.kernels, x=host.put(x, lead * x.itemsize), n=x.size, dtype=dtype, found=found, stream=0
        )
        return int(host.get(found, np.zeros(1, np.uint32))[0])


def run_l2_norm(host, arrays, dtypes, lead, clip_norm):
    with host.scope():
        count = sum(launch.l2_norm_blocks(x.size, x.itemsize) for x in arrays)
        partials = host.empty(8 * count)
        norm, scale = host.empty(4), host.empty(4)
        buffers = [(host.put(x, lead * x.itemsize), x.size, dtype) for x, dtype in zip(arrays, dtypes, strict=True)]
        launch.l2_norm(host.kernels, buffers, partials=partials, norm=norm, scale=scale, clip_norm=clip_norm, stream=0)
        one = np.zeros(1, np.float32)
        return host.get(norm, one)[0], host.get(scale, one)[0]


L2_CASES = [
    ([("float32", 10_007)], 0, None),
    ([("float32", 9)], 1, 0.5),
    ([("float32", 4096), ("float16", 12_001), ("bfloat16", 1)], 1, 3.0),
    ([("bfloat16", 20_000), ("float32", 0)], 3, 1e9),
    ([("float32", 0)], 0, 1.0),
    ([], 0, None),
]


@pytest.mark.parametrize(("buffers", "lead", "clip_norm"), L2_CASES)
def test_l2_norm_equals_its_twin_bit_for_bit(host, buffers, lead, clip_norm):
    arrays = [random_array(dtype, n, seed) for seed, (dtype, n) in enumerate(buffers)]
    expected = twins.l2_norm(arrays, clip_norm=clip_norm)
    actual = run_l2_norm(host, arrays, [dtype for dtype, _ in buffers], lead, clip_norm)
    assert_same_bits(np.float32(actual), np.float32(expected))


@pytest.mark.parametrize(("buffers", "lead", "clip_norm"), L2_CASES)
def test_the_twin_of_l2_norm_is_the_norm_in_double_precision_to_1e_6(buffers, lead, clip_norm):
    arrays = [random_array(dtype, n, seed) for seed, (dtype, n) in enumerate(buffers)]
    norm, scale = twins.l2_norm(arrays, clip_norm=clip_norm)
    exact = np.sqrt(sum(np.sum(np.square(twins.to_float32(x).astype(np.float64))) for x in arrays))
    assert norm == pytest.approx(exact, rel=1e-6)
    assert scale == pytest.approx(1.0 if clip_norm is None else min(1.0, clip_norm / max(exact, 1e-30)), rel=1e-6)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_norm_that_is_not_finite_gives_a_scale_that_is_nan(host, bad):
    x = np.float32([1, bad, 2])
    norm, scale = run_l2_norm(host, [x], ["float32"], 0, 1.0)
    assert not np.isfinite(norm)
    assert np.isnan(scale)
    assert_same_bits(np.float32([norm, scale]), np.float32(twins.l2_norm([x], clip_norm=1.0)))
