"""NumPy references of the kernels in kernels/*.cu: the same results, bit for bit, on host arrays.

The tests hold the kernels to these, and virtual devices may run them. All arithmetic is fp32 with one
rounding at the end. bfloat16 arrays are uint16 arrays of its bits, or of the dtype of that name where ml_dtypes is
installed; everywhere here uint16 means bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdp.launch import args as ka
from fastdp.shard import rank_range

__all__ = [
    "all_reduce",
    "bfloat16_bits",
    "check_finite",
    "concat_rows",
    "fused_adam",
    "fused_sgd",
    "l2_norm",
    "reduce_scatter",
    "scale_cast",
    "slice_rows",
    "to_float32",
]

Array = NDArray[Any]
_SILENT: dict[str, Any] = {"all": "ignore"}  # kernels do not warn of overflow and NaN


def bfloat16_bits(x: Array) -> NDArray[np.uint16]:
    """fp32 to the bits of bfloat16, to nearest even; every NaN becomes 0x7fff, as the hardware's does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_float32(x: Array) -> NDArray[np.float32]:
    """Any of the kernels' element types to fp32, exactly."""
    x = _bits(x)
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float32)


def _bits(x: Array) -> Array:
    """The array itself, or the bits of a bfloat16 one; a view."""
    return x.view(np.uint16) if x.dtype.name == "bfloat16" else x


def _from_float32(x: Array, dtype: np.dtype[Any]) -> Array:
    """fp32 rounded to an element type."""
    return bfloat16_bits(x) if dtype == np.uint16 else x.astype(dtype)


def _store(destination: Array, x: Array) -> None:
    """Round fp32 into an array."""
    target = _bits(destination)
    target[...] = _from_float32(x, target.dtype)


def slice_rows(
    source: Array,
    destination: Array,
    *,
    first_row: int = 0,
    index: Array | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
) -> bool:
    """Rows of one array into `destination`; the kernel does it for all arrays of a batch.

    Args:
        source: (rows, ...).
        destination: (rows wanted, ...), of the source's dtype, or a float type where the source is uint8:
            then x * scale + offset.
        first_row: of the source, or of the index.
        index: int64 row numbers for a shuffled gather.

    Returns: whether a row number was out of range; such rows are left as they were.
    """
    rows = np.arange(first_row, first_row + len(destination))
    if index is not None:
        rows = index[rows]
    valid = (rows >= 0) & (rows < len(source))
    taken = _bits(source)[rows[valid]]
    target = _bits(destination)
    if taken.dtype == target.dtype:
        target[valid] = taken
    else:
        values = taken.astype(np.float32) * np.float32(scale) + np.float32(offset)
        with np.errstate(**_SILENT):
            target[valid] = _from_float32(values, target.dtype)
    return not valid.all()


def concat_rows(source: Array, destination: Array, *, destination_row: int) -> None:
    """One replica's rows to their place in the merged array; the kernel does it for all outputs."""
    destination[destination_row : destination_row + len(source)] = source


def all_reduce(inputs: Sequence[Array], *, scale: float = 1.0) -> Array:
    """The sum over ranks in rank order, in fp32, times scale; what every rank gets from either all-reduce."""
    total = to_float32(inputs[0])
    with np.errstate(**_SILENT):
        for x in inputs[1:]:
            total = total + to_float32(x)
        return _from_float32(total * np.float32(scale), _bits(inputs[0]).dtype)


def reduce_scatter(inputs: Sequence[Array], output: Array, rank: int, *, scale: float = 1.0) -> None:
    """Write the rank's part of the sum over ranks into the output; the parts are those of shard.rank_range."""
    first, last = rank_range(output.size, rank, len(inputs), ka.PART_NBYTES // output.itemsize)
    output[first:last] = all_reduce([x[first:last] for x in inputs], scale=scale)


def fused_sgd(
    weights: Array,
    gradients: Array,
    *,
    learning_rate: float,
    momentums: Array | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clip_scale: float = 1.0,
    skip: bool = False,
) -> None:
    """One step of Keras's SGD, in place on weights and momentums; source: keras/src/optimizers/sgd.py."""
    if skip:
        return
    lr, beta = np.float32(learning_rate), np.float32(momentum)
    with np.errstate(**_SILENT):
        w = _decayed(to_float32(weights), weight_decay, lr)
        step = to_float32(gradients) * np.float32(clip_scale) * lr
        if momentums is None:
            _store(weights, w - step)
            return
        velocity = to_float32(momentums) * beta - step
        _store(momentums, velocity)
        _store(weights, w + (velocity * beta - step if nesterov else velocity))


def fused_adam(
    weights: Array,
    momentums: Array,
    velocities: Array,
    gradients: Array,
    *,
    learning_rate: float,
    iterations: int,
    velocity_hats: Array | None = None,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float = 0.0,
    clip_scale: float = 1.0,
    skip: bool = False,
) -> None:
    """One step of Keras's Adam or AdamW, in place; source: keras/src/optimizers/adam.py, 3.15.

    `iterations` counts the steps made before this one.
    """
    if skip:
        return
    lr, one = np.float32(learning_rate), np.float32(1)
    beta_1_power, beta_2_power = _power(beta_1, iterations + 1), _power(beta_2, iterations + 1)
    with np.errstate(**_SILENT):
        alpha = lr * np.sqrt(one - beta_2_power) / (one - beta_1_power)
        g = to_float32(gradients) * np.float32(clip_scale)
        w = _decayed(to_float32(weights), weight_decay, lr)
        m, v = to_float32(momentums), to_float32(velocities)
        m = m + (g - m) * np.float32(1 - beta_1)
        v = v + (g * g - v) * np.float32(1 - beta_2)
        _store(momentums, m)
        _store(velocities, v)
        if velocity_hats is not None:
            v = np.maximum(to_float32(velocity_hats), v)
            _store(velocity_hats, v)
        _store(weights, w - m * alpha / (np.sqrt(v) + np.float32(epsilon)))


def _decayed(w: Array, weight_decay: float, lr: np.float32) -> Array:
    """Decoupled weight decay; source: keras/src/optimizers/base_optimizer.py, 3.15."""
    return w - w * np.float32(weight_decay) * lr if weight_decay else w


def _power(base: float, exponent: int) -> np.float32:
    """base in fp32 to an integer power, in fp64 by repeated squaring, rounded to fp32."""
    result, square = np.float64(1), np.float64(np.float32(base))
    with np.errstate(**_SILENT):
        while exponent:
            if exponent % 2:
                result = result * square
            square = square * square
            exponent //= 2
    return np.float32(result)


def scale_cast(x: Array, y: Array, *, scale: float = 1.0, device_scale: float | None = None) -> None:
    """y = cast(x * scale), written into y."""
    factor = np.float32(scale)
    with np.errstate(**_SILENT):
        if device_scale is not None:
            factor = factor * np.float32(device_scale)
        _store(y, to_float32(x) * factor)


def l2_norm(buffers: Sequence[Array], *, clip_norm: float | None = None) -> tuple[np.float32, np.float32]:
    """The Euclidean norm over all buffers and the factor of Keras's global_clipnorm, in the kernel's order.

    Source of the factor: clip_by_global_norm in keras/src/optimizers/base_optimizer.py, 3.15.
    """
    with np.errstate(**_SILENT):
        partials = np.concatenate([np.zeros(0), *(_partials(x) for x in buffers)])
        rows = -(-partials.size // ka.THREADS)
        threads = np.pad(partials, (0, rows * ka.THREADS - partials.size)).reshape(rows, ka.THREADS)
        norm = np.float32(np.sqrt(_tree(_sum_in_order(threads, np.float64))))
        if clip_norm is None:
            return norm, np.float32(1)
        inverse, clip_inverse = np.float32(1) / norm, np.float32(1 / clip_norm)
        shrink = inverse if inverse < clip_inverse else clip_inverse
        return norm, np.float32(clip_norm) * shrink + (norm - norm)


def _partials(x: Array) -> NDArray[np.float64]:
    """Each block's sum of squares."""
    blocks = ka.l2_norm_blocks(x.size, x.itemsize)
    per_pack = ka.PACK_NBYTES // x.itemsize
    turn = blocks * ka.THREADS * per_pack
    if not turn:
        return np.zeros(0)
    turns = -(-x.size // turn)
    squares = np.square(to_float32(x.ravel()))
    squares = np.pad(squares, (0, turns * turn - x.size)).reshape(turns, blocks, ka.THREADS, per_pack)
    ordered = squares.transpose(0, 3, 1, 2).reshape(turns * per_pack, blocks, ka.THREADS)
    return _tree(_sum_in_order(ordered, np.float32))


def _sum_in_order(rows: Array, dtype: Any) -> NDArray[np.float64]:
    """The sum over the first axis, one row after the other, as fp64."""
    total = np.zeros(rows.shape[1:], dtype)
    for row in rows:
        total = total + row
    return total.astype(np.float64)


def _tree(threads: NDArray[np.float64]) -> Any:
    """The sum over the last axis, by halves."""
    while threads.shape[-1] > 1:
        half = threads.shape[-1] // 2
        threads = threads[..., :half] + threads[..., half:]
    return threads[..., 0]


def check_finite(x: Array) -> bool:
    """Whether any element is an infinity or a NaN."""
    return not np.isfinite(to_float32(x)).all()
