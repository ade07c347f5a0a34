"""fp32 rounded to bfloat16 has torch's bits: of ties, subnormals, what is too large and what is no number."""

from __future__ import annotations

import numpy as np
import pytest

from fastdp.bfloat16 import from_bfloat16, to_bfloat16

torch = pytest.importorskip("torch", reason="torch is not installed")


def by_torch(values):
    """Torch's own rounding, of numbers that lie apart: its vectorized loops leave other bits of a NaN."""
    apart = torch.from_numpy(np.repeat(values, 2))[::2]
    return apart.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def every_border():
    """The numbers halfway between all neighbours, and those right beside them; NaNs with every payload among them."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    lows = np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (high[:, None] | lows).ravel().view(np.float32)


def test_the_bits_are_torch_s_own():
    values = every_border()
    np.testing.assert_array_equal(to_bfloat16(values), by_torch(values))


def test_of_numbers_torch_s_vectorized_loops_give_the_same():
    values = every_border()
    values = values[~np.isnan(values)]
    rounded = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(values), rounded)


def test_what_is_too_large_becomes_infinite_and_every_nan_the_same():
    below, halfway = np.uint32([0x7F7F7FFF, 0x7F7F8000]).view(np.float32)  # between the largest number and the next
    given = np.float32([below, halfway, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45])
    assert [hex(bits) for bits in to_bfloat16(given)] == ["0x7f7f", "0x7f80", "0x7f80", "0xff80", "0x0", "0x8000"]
    nans = np.uint32([0x7FC00000, 0x7F800001, 0xFFC00000, 0xFFFFFFFF]).view(np.float32)
    assert set(to_bfloat16(nans)) == {0x7FC0}


def test_bits_come_back_as_they_were():
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    wide = from_bfloat16(bits)
    numbers = ~np.isnan(wide)
    np.testing.assert_array_equal(to_bfloat16(wide)[numbers], bits[numbers])
    np.testing.assert_array_equal(
        wide[numbers], torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()[numbers]
    )
    assert wide.reshape(256, 256).shape == from_bfloat16(bits.reshape(256, 256)).shape


def test_the_reduction_in_host_memory_and_the_kernels_twin_round_alike():
    from fastdp.comm.host.reduction import sum_in_order
    from fastdp.launch import reference

    values = np.float32([1.0, np.inf, np.nan, 3.3895313892515355e38, 1.0])
    others = np.float32([2.0**-9, -np.inf, 0.0, 3.3895313892515355e38, 3 * 2.0**-8])
    pair = [to_bfloat16(values), to_bfloat16(others)]
    with np.errstate(all="ignore"):
        on_host = sum_in_order(pair, "bfloat16")
    np.testing.assert_array_equal(on_host, reference.all_reduce(pair))
    assert [hex(bits) for bits in on_host] == ["0x3f80", "0x7fc0", "0x7fc0", "0x7f80", "0x3f82"]
