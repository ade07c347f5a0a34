"""Copies the random generators that no model holds for each replica of a step.

Keras's global seed generator, seed generators that a layer keeps where Keras does not find them, torch's global
generator, Python's and NumPy's: on one device a step reads and moves each of them once. Here every replica moves a
copy of its own, all copies start from the state before the step, and afterwards the host's generators take over the
state of the first replica's copies. So a step draws what one device would draw, and whoever draws after it too: the
script between two batches, another model, `set_random_seed`. A step that fails leaves the generators as they were
before it, and so does a step that is only tried.

Nothing is read or copied before a draw asks for it.
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
# Taken before functions of these modules stand for a replica's generators (`fastdp.program.keras.random.host_draws`).
_python_state, _set_python_state = random.getstate, random.setstate
_numpy_state, _set_numpy_state = np.random.get_state, np.random.set_state


class StepGenerators:
    """The generators of the host thread as they were when a step began; made on that thread. From any thread."""

    def __init__(self) -> None:
        self.common: SeedGenerator | None = get_global_attribute(GLOBAL_SEED_GENERATOR)
        self.card = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        self._lock = threading.Lock()
        self._states: dict[Any, Any] = {}

    def state(self, key: Any, read: Callable[[], Any]) -> Any:
        """What `read()` gave when the first replica asked for it."""
        with self._lock:
            if key not in self._states:
                self._states[key] = read()
            return self._states[key]


class Generators:
    """One replica's copies of the generators that the model does not hold.

    Args:
        step: where they start.
        branch: of a part of a replica that runs beside its other parts, in no order in time: its number. It draws from
            streams of its own, which are not those of one device.
    """

    def __init__(self, step: StepGenerators | None = None, branch: int = 0) -> None:
        self.step = step or StepGenerators()
        self._branch = branch
        self._seeds: dict[
            int, tuple[SeedGenerator | None, torch.Tensor]
        ] = {}  # the generators are held: ids stay theirs
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
        """The same, in the same state, to be moved apart from it."""
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
        """Generators for parts that run at the same time. Each step has others."""
        return [Generators(self.step, 1 + number) for number in range(count)]

    def join(self, branches: list[Generators]) -> None:
        """Move on past what branches have drawn, by one draw of each kind."""
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
        """`SeedGenerator.next` of a generator that is none of the model's; None is Keras's global one.

        Where nobody has drawn from that since `set_random_seed`, Keras makes it, from Python's generator.
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
            variable = generator.state  # made in the step, it has no value yet

            def present() -> tuple[SeedGenerator, torch.Tensor]:
                value = variable.value if variable._value is None else variable._value
                return generator, value.detach().to("cpu", copy=True)

            state = self.step.state(key, present)[1]
        return state + self._branch * 7919

    # torch.

    def with_torch(self, generator: torch.Generator | None, draw: Callable[[], Any], device: Any = "cpu") -> Any:
        """What `draw()` gives, which draws from torch's global generator of a device, or from `generator`.

        It runs alone, with the generator in the replica's own state.
        """
        device = torch.device(device)
        target = generator if generator is not None else self._default(device)
        key = id(generator) if generator is not None else device.type
        with global_generator:
            before = target.get_state()
            target.set_state(self._torch_state(key, generator, device))
            try:
                # Whoever watches torch's functions on this thread would take it for a draw of the model's.
                with torch._C.DisableTorchFunction():
                    return draw()
            finally:
                self._torch[key] = generator if generator is not None else device.type, target.get_state()
                target.set_state(before)

    def _torch_state(self, key: Any, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
        """The state of the replica's copy of a generator of torch."""
        if key in self._torch:
            return self._torch[key][1]
        host = generator if generator is not None else self._default(torch.device(device.type))
        state = self.step.state(("torch", key), host.get_state)
        if self._branch:
            seed = int(state.to(torch.int64).sum()) + 7919 * self._branch
            state = torch.Generator(device).manual_seed(seed).get_state()
        return state

    def _default(self, device: torch.device) -> torch.Generator:
        """Torch's global generator of a device; without a number, of that which the host thread works on."""
        if device.type != "cuda":
            return torch.default_generator
        return torch.cuda.default_generators[self.step.card if device.index is None else device.index]

    def draw_number(self) -> tuple[int, int]:
        """The key of a draw that owes nobody particular numbers: the step's, from torch's generator, and a count."""
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
        """Give the host's generators the state of these. On the host thread, after the step."""
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
    """A generator that is lent to whoever needs Keras's arithmetic before Keras has made its own."""
    if not _spare:
        _spare.append(_new_generator())
    return _spare[0]


def _made_global() -> SeedGenerator:
    """Keras's global generator of this thread, made as Keras makes it."""
    generator = _new_generator()
    set_global_attribute(GLOBAL_SEED_GENERATOR, generator)
    return generator


def _new_generator() -> SeedGenerator:
    """A generator without a seed of its own, made outside of any scope. It takes nothing from Python's generator."""
    scope = get_global_attribute("stateless_scope")
    set_global_attribute("stateless_scope", None)
    try:
        generator = SeedGenerator(seed=1)
    finally:
        set_global_attribute("stateless_scope", scope)
    generator._initial_seed = None
    return generator


class CommonGenerator:
    """Stands for Keras's global generator where a replica draws."""

    _initial_seed = None

    def __init__(self, generators: Generators) -> None:
        self._generators = generators

    def next(self, ordered: bool = True) -> torch.Tensor:
        """Keras's own numbers."""
        return self._generators.next_seed(None, ordered)


def is_held_by_scope(generator: SeedGenerator) -> bool:
    """Whether the present scope has a value for a generator's state: it is one of the model's."""
    scope = get_global_attribute("stateless_scope")
    return not isinstance(scope, ReplicaScope) or scope.get_current_value(generator.state) is not None
