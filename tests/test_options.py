"""The options of a parallel model: one list of defaults, checked once."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest

import fastdp
from fastdp.options import Options

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}


def keywords(function):
    """The keyword arguments of a function that are options, with their defaults."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if name in DEFAULTS}


def test_wrap_takes_every_option_with_its_default():
    assert keywords(fastdp.wrap) == DEFAULTS


def test_the_engine_has_the_same_defaults():
    names = ["timeout", "update", "cpu_merge", "merge_device", "cpu_relocation", "check_replicas", "shards"]
    names += ["on_nonfinite", "fingerprint", "grad_dtype", "on_oom", "on_device_loss"]
    assert keywords(fastdp.DataParallel) == {name: DEFAULTS[name] for name in names}


def test_multi_gpu_model_has_the_same_defaults():
    pytest.importorskip("keras")
    pytest.importorskip("torch")
    names = ("cpu_merge", "cpu_relocation", "on_oom", "on_device_loss")
    assert keywords(fastdp.multi_gpu_model) == {name: DEFAULTS[name] for name in names}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "compile",
            "fast",
            r"`compile` must be one of \(None, 'trace', 'inductor', 'auto'\)\. Received: compile='fast'",
        ),
        ("graph", "all", r"`graph` must be one of \('auto', 'bucket', 'step', None\)\. Received: graph='all'"),
        ("update", "all", r"`update` must be one of \('first', 'each', None\)\. Received: update='all'"),
        (
            "on_nonfinite",
            "stop",
            r"`on_nonfinite` must be one of \(None, 'raise', 'skip'\)\. Received: on_nonfinite='stop'",
        ),
        (
            "grad_dtype",
            "half",
            r"`grad_dtype` must be one of \(None, 'bfloat16', 'float16'\)\. Received: grad_dtype='half'",
        ),
        ("on_oom", "halve", r"`on_oom` must be one of \('raise', 'split'\)\. Received: on_oom='halve'"),
        ("on_device_loss", "go on", r"`on_device_loss` must be one of .*\. Received: on_device_loss='go on'"),
        ("timeout", 0, r"`timeout` must be a number of seconds above 0\. Received: timeout=0"),
        ("rows", "merged", r"`rows` must be one of \(None, 'merge', 'replica'\)\. Received: rows='merged'"),
    ],
)
def test_an_unknown_choice_is_a_value_error(name, value, expected):
    with pytest.raises(ValueError, match=expected):
        Options(**{name: value})


@pytest.mark.parametrize("value", [np.arange(3), [], b"auto", 2])
@pytest.mark.parametrize("name", ["compile", "graph", "update", "on_nonfinite", "on_oom", "on_device_loss", "rows"])
def test_a_choice_of_another_type_is_a_value_error_that_names_it(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be one of"):
        Options(**{name: value})


@pytest.mark.parametrize("value", ["no", None, 2, 0.0, np.arange(2)])
@pytest.mark.parametrize("name", [name for name, value in DEFAULTS.items() if isinstance(value, bool)])
def test_a_flag_that_is_neither_true_nor_false_is_an_error(name, value):
    with pytest.raises(TypeError, match=f"`{name}` must be True or False"):
        Options(**{name: value})
    assert getattr(Options(**{name: 1}), name)


@pytest.mark.parametrize("value", [None, 1.0, "1", slice(None)])
def test_the_device_that_merges_is_an_index(value):
    with pytest.raises(TypeError, match="`merge_device` must be an index"):
        Options(merge_device=value)


def test_options_do_not_change():
    options = Options(rows="merge")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.rows = "replica"


def program():
    def train(parameters, batch):
        return batch[0].sum(), {"w": parameters["w"]}, []

    return fastdp.FunctionProgram({"w": np.zeros(2)}, train, lambda p, s, g: (p, s), lambda p, batch: [])


@pytest.fixture
def two_devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


@pytest.mark.usefixtures("two_devices")
def test_an_engine_takes_its_options_one_by_one_or_in_one():
    one_by_one = fastdp.DataParallel(program(), 2, timeout=60.0, update="each", check_replicas=True)
    in_one = fastdp.DataParallel(program(), 2, options=Options(timeout=60.0, update="each", check_replicas=True))
    for engine in (one_by_one, in_one):
        assert (engine.timeout, engine.update, engine.check_replicas) == (60.0, "each", True)


@pytest.mark.usefixtures("two_devices")
def test_an_engine_refuses_a_keyword_beside_its_options():
    with pytest.raises(TypeError, match=r"`options` holds all options\..*timeout=60\.0"):
        fastdp.DataParallel(program(), 2, timeout=60.0, options=Options(update="each"))
