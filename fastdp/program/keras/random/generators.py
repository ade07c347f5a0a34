"""Copies the random generators that no model holds for each replica of a step.

These are Keras's global seed generator, seed generators that a layer holds where Keras does not find them, and the
global generators of torch, Python and NumPy. On one device a step reads and advances each of them once. Here every
replica advances its own copy. All copies start from the state before the step, and afterwards the host's generators
take over the state of the first replica's copies. So a step draws what one device would draw, and so does any code
after it: the script between two batches, another model, `set_random_seed`. A step that fails, or is only a trial,
leaves the generators unchanged.

A generator is read and copied only when the first draw needs it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, SeedGenerator

from fastdp.program.keras.variables import ReplicaScope
from fastdp.tensors.random import global_generator

_COMMON = 0  # the key of Keras's global generator among the seed generators
_next = SeedGenerator.next
_spare: list[SeedGenerator] = []
# Saved before the functions of these modules are replaced (`fastdp.program.keras.random.host_draws`).
_python_state, _set_python_state = random.getstate, random.setstate
_numpy_state, _set_numpy_state = np.random.get_state, np.random.set_state


class StepGenerators:
    """The states of the host thread's generators when a step began. Made on that thread, read from any thread."""

    def __init__(self) -> None:
        self.common: SeedGenerator | None = get_global_attribute(GLOBAL_SEED_GENERATOR)
        self.card = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        self._lock = threading.Lock()
        self._states: dict[Any, Any] = {}

    def state(self, key: Any, read: Callable[[], Any]) -> Any:
        """The result of `read()` at the first call for this key."""
        with self._lock:
            if key not in self._states:
                self._states[key] = read()
            return self._states[key]


class Generators:
    """One replica's copies of the generators that the model does not hold.

    Args:
        step: the states from which the copies start.
        branch: number of a part of the replica that runs concurrently with its other parts. It draws from its own
            streams, which differ from those of one device. 0 for the whole replica.
    """

    def __init__(self, step: StepGenerators | None = None, branch: int = 0) -> None:
        self.step = step or StepGenerators()
        self._branch = branch
        self._seeds: dict[
            int, tuple[SeedGenerator | None, torch.Tensor]
        ] = {}  # holds the generators, so that their ids stay unique
        self._torch: dict[Any, tuple[torch.Generator, torch.Tensor]] = {}
        self._python: random.Random | None = None
        self._numpy: np.random.RandomState | None = None
        self._key: int | None = None
        self._made = 0

    @property
    def used(self) -> bool:
        """Whether anything was drawn."""
        return bool(self._seeds or self._torch or self._python or self._numpy)

    def copy(self) -> Generators:
        """A copy in the same state that advances independently."""
        twin = Generators(self.step, self._branch)
        twin._seeds, twin._torch = dict(self._seeds), dict(self._torch)
        twin._key, twin._made = self._key, self._made
        if self._python is not None:
            twin._python = random.Random()
            twin._python.setstate(self._python.getstate())
        if self._numpy is not None:
            twin._numpy = np.random.RandomState()
            twin._numpy.set_state(self._numpy.get_state())
        return twin

    def branches(self, count: int) -> list[Generators]:
        """Generators for parts that run at the same time. They differ in each step."""
        return [Generators(self.step, 1 + number) for number in range(count)]

    def join(self, branches: list[Generators]) -> None:
        """Advance by one draw of each kind that the branches have used."""
        if any(one._seeds for one in branches):
            self.next_seed(None, ordered=False)
        if any(one._torch or one._key is not None for one in branches):
            self.draw_number()
        if any(one._python is not None for one in branches):
            self.python.random()
        if any(one._numpy is not None for one in branches):
            self.numpy.random_sample()

    # Keras.

    def next_seed(self, generator: SeedGenerator | None, ordered: bool) -> torch.Tensor:
        """`SeedGenerator.next` for a generator that does not belong to the model; None is Keras's global one.

        Keras makes the global one from Python's generator at the first draw after `set_random_seed`.
        """
        key = _COMMON if generator is None else id(generator)
        if generator is None:
            generator = self.step.common
        if key not in self._seeds:
            self._seeds[key] = generator, self._first_seed(key, generator)
        state = self._seeds[key][1]
        moving = generator or _spare_generator()
        with keras.device("cpu"), ReplicaScope([(moving.state, state)], set()) as scope:
            number = _next(moving, ordered=ordered)
            self._seeds[key] = generator, scope.get_current_value(moving.state)
        return number

    def _first_seed(self, key: int, generator: SeedGenerator | None) -> torch.Tensor:
        """The state of a seed generator before the step."""
        if generator is None:
            state = torch.tensor([self.python.randint(1, int(1e9)), 0], dtype=torch.int32)  # as `make_default_seed`
        else:
            variable = generator.state  # has no value yet if it was made in the step

            def present() -> tuple[SeedGenerator, torch.Tensor]:
                value = variable.value if variable._value is None else variable._value
                return generator, value.detach().to("cpu", copy=True)

            state = self.step.state(key, present)[1]
        return state + self._branch * 7919

    # torch.

    def with_torch(self, generator: torch.Generator | None, draw: Callable[[], Any], device: Any = "cpu") -> Any:
        """The result of `draw()`, which draws from torch's global generator of a device, or from `generator`.

        The generator is set to the replica's state for the draw, and no other thread draws meanwhile.
        """
        device = torch.device(device)
        target = generator if generator is not None else self._default(device)
        key = id(generator) if generator is not None else device.type
        with global_generator:
            before = target.get_state()
            target.set_state(self._torch_state(key, generator, device))
            try:
                # A function mode on this thread would handle it as a draw of the model.
                with torch._C.DisableTorchFunction():
                    return draw()
            finally:
                self._torch[key] = generator if generator is not None else device.type, target.get_state()
                target.set_state(before)

    def _torch_state(self, key: Any, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
        """The state of the replica's copy of a torch generator."""
        if key in self._torch:
            return self._torch[key][1]
        host = generator if generator is not None else self._default(torch.device(device.type))
        state = self.step.state(("torch", key), host.get_state)
        if self._branch:
            seed = int(state.to(torch.int64).sum()) + 7919 * self._branch
            state = torch.Generator(device).manual_seed(seed).get_state()
        return state

    def _default(self, device: torch.device) -> torch.Generator:
        """Torch's global generator of a device; of the host thread's current GPU if the device has no index."""
        if device.type != "cuda":
            return torch.default_generator
        return torch.cuda.default_generators[self.step.card if device.index is None else device.index]

    def draw_number(self) -> tuple[int, int]:
        """The key of an unseeded draw: a number of the step, drawn from torch's generator, and a count."""
        if self._key is None:
            self._key = self.with_torch(None, lambda: int(torch.randint(2**62, (), dtype=torch.int64)))
        self._made += 1
        return self._key, self._made

    # Python and NumPy.

    @property
    def python(self) -> random.Random:
        """The replica's copy of Python's generator."""
        if self._python is None:
            self._python = random.Random()
            self._python.setstate(self.step.state("python", _python_state))
            if self._branch:
                self._python.seed(self._python.getrandbits(64) + self._branch)
        return self._python

    @property
    def numpy(self) -> np.random.RandomState:
        """The replica's copy of NumPy's global generator."""
        if self._numpy is None:
            self._numpy = np.random.RandomState()
            self._numpy.set_state(self.step.state("numpy", _numpy_state))
            if self._branch:
                self._numpy.seed((int(self._numpy.randint(2**31)) + self._branch) % 2**32)
        return self._numpy

    def keep(self) -> None:
        """Copy the states to the host's generators. Called on the host thread, after the step."""
        for key, (generator, state) in self._seeds.items():
            if generator is None:
                generator = _made_global()
            elif key == _COMMON and get_global_attribute(GLOBAL_SEED_GENERATOR) is not generator:
                continue  # replaced meanwhile
            if generator.state._value is None:
                generator.state._deferred_initialize()
            generator.state.assign(state)
        for where, state in self._torch.values():
            host = where if isinstance(where, torch.Generator) else self._default(torch.device(where))
            host.set_state(state)
        if self._python is not None:
            _set_python_state(self._python.getstate())
        if self._numpy is not None:
            _set_numpy_state(self._numpy.get_state())


def _spare_generator() -> SeedGenerator:
    """A generator used for Keras's arithmetic before Keras has made its global one."""
    if not _spare:
        _spare.append(_new_generator())
    return _spare[0]


def _made_global() -> SeedGenerator:
    """Make Keras's global generator of this thread, as Keras does."""
    generator = _new_generator()
    set_global_attribute(GLOBAL_SEED_GENERATOR, generator)
    return generator


def _new_generator() -> SeedGenerator:
    """An unseeded generator, made outside any scope and without a draw from Python's generator."""
    scope = get_global_attribute("stateless_scope")
    set_global_attribute("stateless_scope", None)
    try:
        generator = SeedGenerator(seed=1)
    finally:
        set_global_attribute("stateless_scope", scope)
    generator._initial_seed = None
    return generator


class CommonGenerator:
    """Replaces Keras's global generator on a replica."""

    _initial_seed = None

    def __init__(self, generators: Generators) -> None:
        self._generators = generators

    def next(self, ordered: bool = True) -> torch.Tensor:
        """The next seed of the replica's copy of Keras's global generator."""
        return self._generators.next_seed(None, ordered)


def is_held_by_scope(generator: SeedGenerator) -> bool:
    """Whether the current scope has a value for a generator's state, because the generator belongs to the model."""
    scope = get_global_attribute("stateless_scope")
    return not isinstance(scope, ReplicaScope) or scope.get_current_value(generator.state) is not None
