"""Compares, before each step, what a trace has read of Python with what is there now.

A trace reads attributes, tensors, arrays and settings once. A callback that lowers `dropout.rate`, a second `adapt()`
of a Normalization layer, another activation would be seen by an eager step and not by a captured one: so all that can
be reached from the layers and losses (`fastdp.capture.reach`) is compared, in microseconds
(`fastdp.capture.watch`), and the settings of Keras and torch that change results. What cannot be compared is
not captured.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import torch
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from fastdp.capture.own_code import HOOKS
from fastdp.capture.reach import Reach
from fastdp.capture.watch import Watch
from fastdp.errors import NotCapturable
from fastdp.program.keras import patches


class Guard:
    """What the steps of a program read, as it was when they were captured."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._watch = Watch()
        self._settings = settings()
        self._generators: list[tuple[Any, str]] = []
        self._loss: Any = None
        self._hooks: list[list[Any]] = []
        self._hooks_registered = 0

    def renew(self) -> None:
        """Take what is there now for what counts.

        Raises:
            NotCapturable: something cannot be compared before each step; the message says what.
        """
        program = self._program
        self._watch = Watch()
        reach = Reach(self._watch, program.variables, _patched())
        for layer in program.model._flatten_layers():
            reach.walk(layer, layer.name)
        for variable in program.trainable:
            reach.walk(variable, variable.path)
        self._loss = program.trainer._compile_loss
        reach.walk(self._loss, "loss")
        if program.optimizer is not None:
            self._watch.values(vars(program.optimizer), ["loss_scale_factor"], program.optimizer.name)
        self._hooks, self._hooks_registered = self._present_hooks(), RemovableHandle.next_id
        for layer in program.model._flatten_layers():
            for name in HOOKS:
                hooks = getattr(layer, name)
                if hooks:  # where there is none, none can be removed
                    reach.walk(hooks, f"a hook of {layer.name}")
                    self._watch.values(vars(layer), [name], layer.name)
        self._generators = reach.generators
        self._settings = settings()
        if self._watch.refused:
            raise NotCapturable(self._watch.refused)

    def changed(self) -> str:
        """What is not as it was, as `layer.name` or in other words; empty if everything is."""
        if settings() != self._settings:
            return _which(self._settings, settings())
        if self._program.trainer._compile_loss is not self._loss:
            return "the compiled loss"
        if RemovableHandle.next_id != self._hooks_registered:  # a hook of something has come
            self._hooks_registered = RemovableHandle.next_id
            if self._present_hooks() != self._hooks:
                return "a hook of a layer"
        return self._watch.changed()

    def _present_hooks(self) -> list[list[Any]]:
        """The hooks of all layers."""
        layers = self._program.model._flatten_layers()
        return [list(hooks.values()) for layer in layers for name in HOOKS if (hooks := getattr(layer, name))]

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Around a trace, which runs the model's code without being a step: what that code has changed is put back.

        Raises:
            NotCapturable: it has changed something that it reads, or has drawn random numbers of Python's or NumPy's.
        """
        generators = [(random, "random"), (np.random, "numpy.random"), *self._generators]
        states = [_state_of(generator) for generator, _ in generators]
        try:
            yield
        finally:
            changed, drawn = self._watch.changed(), []
            if changed:
                self._watch.restore()
            for (generator, name), state in zip(generators, states, strict=True):
                if not _same_state(_state_of(generator), state):
                    _set_state(generator, state)
                    drawn.append(name)
        if drawn:
            raise NotCapturable(f"{drawn[0]}, which the model draws random numbers from")
        if changed:
            raise NotCapturable(f"{changed}, which changes while the model trains")


def settings() -> tuple[Any, ...]:
    """The settings of Keras and torch that change what a step computes, in the order of `_SETTINGS`."""
    return (
        keras.config.floatx(),
        keras.config.epsilon(),
        keras.config.image_data_format(),
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
        len(torch_module._global_forward_hooks),
        len(torch_module._global_forward_pre_hooks),
    )


_SETTINGS = (
    "keras.config.floatx()",
    "keras.config.epsilon()",
    "keras.config.image_data_format()",
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
    "global forward hooks",
    "global forward hooks",
)


def _which(before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """The first setting that differs."""
    return next(name for name, one, other in zip(_SETTINGS, before, now, strict=True) if one != other)


def _patched() -> set[tuple[Any, str]]:
    """The functions of Keras that are others while replicas run: that is no change."""
    with patches.replica_aware():
        return {(owner, name) for owner, name, _ in patches._originals}


def _state_of(generator: Any) -> Any:
    """The state of a generator of random numbers."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState) or generator is np.random:
        return generator.get_state(legacy=False)
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    """Give a generator a state that it had."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, (np.random.RandomState, torch.Generator)) or generator is np.random:
        generator.set_state(state)
    else:
        generator.setstate(state)


def _same_state(one: Any, other: Any) -> bool:
    """Whether two states of a generator are equal: tuples, tensors, or nested dicts with arrays in them."""
    return pickle.dumps(one) == pickle.dumps(other) if not isinstance(one, torch.Tensor) else torch.equal(one, other)
