"""The fused optimizer steps over flat buffers; the rules of functions.py hold here too.

Keras can exclude variables from weight decay: keep them in a flat buffer, or a run of one, of their own.
"""

from __future__ import annotations

from fastdp.launch import args as ka
from fastdp.launch.loader import Kernels

__all__ = ["fused_adam", "fused_sgd"]


def fused_sgd(
    kernels: Kernels,
    *,
    weights: int,
    gradients: int,
    learning_rate: int,
    n: int,
    dtype: str,
    gradient_dtype: str | None = None,
    momentums: int = 0,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clip_scale: int = 0,
    skip: int = 0,
    stream: int,
) -> None:
    """One step of Keras's SGD over a flat buffer, in place; see kernels/fused_sgd.cu for the formula.

    Args:
        weights, momentums: n elements of `dtype`; momentums is 0 exactly where momentum is 0.
        gradients: n elements of `gradient_dtype` (None: `dtype`; fp16 and bf16 also go with fp32 weights).
        learning_rate, clip_scale: fp32 in device memory, read when the kernel runs; 0 for no clipping.
        skip: uint32 in device memory; nonzero leaves everything as it is.
        stream: on which the step is enqueued.

    Raises:
        ValueError: a pair of element types without a kernel, or a momentum without its slots.
    """
    if bool(momentums) != (momentum != 0.0):
        raise ValueError(
            f"momentum={momentum} with momentums={momentums:#x}: expected slots just where momentum is not 0"
        )
    entry = f"fused_sgd_{_update_types(dtype, gradient_dtype or dtype)}"
    args = ka.FusedSgdArgs(
        weights=weights,
        momentums=momentums,
        gradients=gradients,
        learning_rate=learning_rate,
        clip_scale=clip_scale,
        skip=skip,
        n=n,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
    )
    if n:
        kernels.launch("fused_sgd", entry, kernels.grid(n, ka.ITEMSIZE[dtype]), args, stream)


def fused_adam(
    kernels: Kernels,
    *,
    weights: int,
    momentums: int,
    velocities: int,
    gradients: int,
    learning_rate: int,
    iterations: int,
    n: int,
    dtype: str,
    gradient_dtype: str | None = None,
    velocity_hats: int = 0,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float = 0.0,
    clip_scale: int = 0,
    skip: int = 0,
    stream: int,
) -> None:
    """One step of Keras's Adam (AdamW with a weight decay) over a flat buffer, in place; see fused_adam.cu.

    Args, where they differ from fused_sgd:
        velocity_hats: n elements for amsgrad, 0 without it.
        iterations: int64 in device memory, the steps made before this one; the caller advances it.

    Raises:
        ValueError: a pair of element types without a kernel.
    """
    entry = f"fused_adam_{_update_types(dtype, gradient_dtype or dtype)}"
    args = ka.FusedAdamArgs(
        weights=weights,
        momentums=momentums,
        velocities=velocities,
        velocity_hats=velocity_hats,
        gradients=gradients,
        learning_rate=learning_rate,
        iterations=iterations,
        clip_scale=clip_scale,
        skip=skip,
        n=n,
        beta_1=beta_1,
        beta_2=beta_2,
        one_minus_beta_1=1 - beta_1,
        one_minus_beta_2=1 - beta_2,
        epsilon=epsilon,
        weight_decay=weight_decay,
    )
    if n:
        kernels.launch("fused_adam", entry, kernels.grid(n, ka.ITEMSIZE[dtype]), args, stream)


def _update_types(dtype: str, gradient_dtype: str) -> str:
    """The suffix of an optimizer kernel's entry."""
    types = (ka.float_type(dtype, "dtype"), ka.float_type(gradient_dtype, "gradient_dtype"))
    if dtype not in ("float32", gradient_dtype):
        raise ValueError(
            f"gradient_dtype={gradient_dtype!r} with dtype={dtype!r}: expected the same, or float32 weights"
        )
    return f"{ka.SUFFIX[types[0]]}_{ka.SUFFIX[types[1]]}"
