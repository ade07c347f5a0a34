"""Lets a layer draw from Python's and NumPy's global generators on a replica.

While replicas run, the functions of the modules `random` and `numpy.random` are patched. In a thread that runs a
replica, they draw from the replica's own copies of these generators (`fastdp.program.keras.random.generators`). A NumPy
draw whose shape follows the rows is made for the whole batch, and the replica keeps its own rows. Functions that a
script imported by name from these modules, and generators that a layer holds, cannot be patched; the trial of a model
detects draws from them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
import numpy as np

from fastdp.program.keras.replica import ReplicaContext, running
from fastdp.tensors.random import own_rows, whole_shape
from fastdp.tensors.row_effects import NotByRowsError

# The position of the size among the arguments of NumPy's functions.
_SIZE_AT = {
    **dict.fromkeys(("random_sample", "random", "standard_normal", "standard_exponential", "standard_cauchy"), 0),
    **dict.fromkeys(("exponential", "rayleigh", "poisson", "geometric", "chisquare", "pareto", "weibull", "power"), 1),
    **dict.fromkeys(("zipf", "standard_t", "standard_gamma", "logseries", "choice", "dirichlet"), 1),
    **dict.fromkeys(("uniform", "normal", "gamma", "beta", "binomial", "negative_binomial", "laplace", "logistic"), 2),
    **dict.fromkeys(("lognormal", "gumbel", "vonmises", "wald", "f", "noncentral_chisquare", "multinomial"), 2),
    **dict.fromkeys(("multivariate_normal", "randint", "random_integers"), 2),
    **dict.fromkeys(("triangular", "hypergeometric", "noncentral_f"), 3),
}
_BY_DIMENSIONS = ("rand", "randn")
_HELD = (np.random.Generator, np.random.RandomState, random.Random)


def _python(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of the module `random`."""

    def function(*args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is None:
            return original(*args, **kwargs)
        state.not_captured("a draw by Python's random generator")
        return getattr(state.generators.python, name)(*args, **kwargs)

    return function


def _numpy(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of the module `numpy.random`."""

    def function(*args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is None:
            return original(*args, **kwargs)
        state.not_captured("a draw by NumPy's random generator")
        draw = getattr(state.generators.numpy, name)
        if name in _BY_DIMENSIONS:
            per_row = state.entries_per_row(args)
            whole = whole_shape(args, per_row, state.context.rows) if per_row else args
            return _own(draw(*whole), per_row, state)
        if name not in _SIZE_AT:
            return draw(*args, **kwargs)
        at, given = _SIZE_AT[name], dict(kwargs)
        size = given.pop("size", args[at] if len(args) > at else None)
        shape = () if size is None else tuple(np.atleast_1d(size).tolist())
        per_row = state.entries_per_row(shape)
        if not per_row:
            _check_parameters(state, name, args[:at])
            return draw(*args, **kwargs)
        whole = whole_shape(shape, per_row, state.context.rows)
        return _own(draw(*args[:at], *args[at + 1 :], size=whole, **given), per_row, state)

    return function


def _own(drawn: Any, per_row: int, state: ReplicaContext) -> Any:
    return own_rows(drawn, per_row, state.context.rows).copy() if per_row else drawn


def _check_parameters(state: ReplicaContext, name: str, parameters: Any) -> None:
    """Refuse a draw with parameters for each row, because a replica has only the parameters of its own rows."""
    if any(state.entries_per_row(np.shape(value)) for value in parameters):
        raise NotByRowsError(
            f"A layer calls numpy.random.{name} with parameters for each row of the batch. Draw with fixed parameters "
            "and size=, and scale the numbers, or train the model itself on one device (model.fit)."
        )


def _functions_of(owner: Any, generator: Any) -> list[str]:
    """The functions of a module that are methods of its global generator."""
    return [name for name in dir(owner) if getattr(getattr(owner, name), "__self__", None) is generator]


# What replaces the functions of both modules: owner, name, replacement of the original.
PYTHON_AND_NUMPY: list[tuple[Any, str, Callable[[Any], Any]]] = [
    *((random, name, partial(_python, name)) for name in _functions_of(random, random._inst)),
    *((np.random, name, partial(_numpy, name)) for name in _functions_of(np.random, np.random.mtrand._rand)),
]


@contextmanager
def held_generators_stay(model: keras.Model) -> Iterator[None]:
    """Restore the generators that layers hold, and the global ones; refuse a model that draws from them.

    Raises:
        NotByRowsError: the model drew from one. Replicas would draw from it in no defined order.
    """
    held = [
        (value, f"a generator that the layer {layer.name!r} holds as {name!r}")
        for layer in model._flatten_layers()
        for name, value in vars(layer).items()
        if isinstance(value, _HELD)
    ]
    held += [(random._inst, "a function of the module random, imported by name")]
    held += [(np.random.mtrand._rand, "a function of the module numpy.random, imported by name")]
    before = [_state(generator) for generator, _ in held]
    try:
        yield
        moved = [
            what for (generator, what), state in zip(held, before, strict=True) if not _same(_state(generator), state)
        ]
    finally:
        for (generator, _), state in zip(held, before, strict=True):
            _set_state(generator, state)
    if moved:
        raise NotByRowsError(
            f"The model draws random numbers by {moved[0]}, which all devices would share. Draw by keras.random, "
            "torch, random.function() or numpy.random.function(), or train the model itself on one device (model.fit)."
        )


def _state(generator: Any) -> Any:
    """The state of a generator: a copy of its own, in which arrays stay arrays."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator._bit_generator
    return copy.deepcopy(bits.state)


def _same(a: Any, b: Any) -> bool:
    """Whether two states are equal in every word."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(value, b[name]) for name, value in a.items())
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)


def _set_state(generator: Any, state: Any) -> None:
    """Restore a generator's state."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator._bit_generator
        bits.state = state
