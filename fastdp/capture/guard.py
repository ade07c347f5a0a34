"""Compares, before each step, what a trace has read of Python with what is there now.

A trace reads attributes, tensors, arrays and settings once. An eager step would see a callback lower `dropout.rate`, a
second `adapt()` of a Normalization layer or another activation; a captured step would not. So the guard compares all
that the step reads (`PureStep.watch`), in microseconds (`fastdp.capture.watch`), and the settings of torch that change
results. A step that reads something incomparable is not captured.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastdp.capture.pure_step import PureFunction
from fastdp.capture.watch import Watch
from fastdp.errors import NotCapturable
from fastdp.tensors.thread_state import flushes_subnormals


class Guard:
    """The values that a step reads, as they were when it was captured."""

    def __init__(self, step: PureFunction) -> None:
        self._step = step
        self._watch = Watch()
        self._settings = settings()

    def renew(self) -> None:
        """Record the present values as the expected ones.

        Raises:
            NotCapturable: a value cannot be compared before each step; the message names it.
        """
        self._watch = Watch()
        self._step.watch(self._watch)
        self._settings = settings()
        if self._watch.refused:
            raise NotCapturable(self._watch.refused)

    def changed(self) -> str:
        """The name of a value that has changed; empty if none has."""
        now = settings()
        return _which(self._settings, now) if now != self._settings else self._watch.changed()

    def changed_values(self) -> str:
        """As `changed`, but for the settings of torch."""
        return self._watch.changed()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Hold this during a trace, which runs the model's code outside of a step. Changes by that code are undone.

        Raises:
            NotCapturable: the code changed something that it reads, or drew random numbers from Python or NumPy.
        """
        generators = [(random, "random"), (np.random, "numpy.random"), *self._watch.generators]
        states = [_state_of(generator) for generator, _ in generators]
        kept = [(tensor, tensor._version, tensor.detach().clone()) for tensor, _ in self._watch.tensors]
        failure: Exception | None = None
        try:
            yield
        except (NotCapturable, RuntimeError, NotImplementedError) as error:
            failure = error
        finally:
            changed, drawn = self._watch.changed(), []
            if changed:
                self._watch.restore()
            for tensor, version, value in kept:
                if tensor._version != version:
                    tensor.detach().copy_(value)
            for (generator, name), state in zip(generators, states, strict=True):
                if not _same_state(_state_of(generator), state):
                    _set_state(generator, state)
                    drawn.append(name)
        if drawn:
            raise NotCapturable(f"{drawn[0]}, which the model draws random numbers from") from failure
        if changed:
            raise NotCapturable(f"{changed}, which changes while the model trains") from failure
        if failure is not None:
            raise failure


def settings() -> tuple[Any, ...]:
    """The settings of torch that change what a step computes, in the order of `_SETTINGS`."""
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._get_fp32_precision_getter("cuda", "matmul"),
        torch._C._get_fp32_precision_getter("cuda", "conv"),
        torch._C._get_fp32_precision_getter("mkldnn", "matmul"),
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cudnn_enabled(),
        torch._C._get_cudnn_benchmark(),
        torch._C._get_cudnn_deterministic(),
        torch._C._get_mkldnn_enabled(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        flushes_subnormals(),
    )


_SETTINGS = (
    "torch.get_default_dtype()",
    "torch.autocast",
    "torch.autocast",
    "torch.use_deterministic_algorithms()",
    "torch.set_float32_matmul_precision()",
    "torch.backends.cudnn.allow_tf32",
    "torch.set_float32_matmul_precision()",
    "torch.backends.cuda.matmul",
    "torch.backends.cudnn.enabled",
    "torch.backends.cudnn.benchmark",
    "torch.backends.cudnn.deterministic",
    "torch.backends.mkldnn",
    "torch.backends.cuda.enable_flash_sdp()",
    "torch.backends.cuda.enable_mem_efficient_sdp()",
    "torch.backends.cuda.enable_math_sdp()",
    "torch.set_flush_denormal()",
)


def _which(before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """The first setting that differs."""
    return next(name for name, one, other in zip(_SETTINGS, before, now, strict=True) if one != other)


def _state_of(generator: Any) -> Any:
    """The state of a generator of random numbers."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState) or generator is np.random:
        return generator.get_state(legacy=False)
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    """Restore a generator's state."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, (np.random.RandomState, torch.Generator)) or generator is np.random:
        generator.set_state(state)
    else:
        generator.setstate(state)


def _same_state(one: Any, other: Any) -> bool:
    """Whether two states of a generator are equal: tuples, tensors, or nested dicts with arrays in them."""
    return pickle.dumps(one) == pickle.dumps(other) if not isinstance(one, torch.Tensor) else torch.equal(one, other)
