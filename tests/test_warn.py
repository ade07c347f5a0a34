"""Warnings name the line of the user's script, not one of fastdp's, Keras's or torch's."""

from __future__ import annotations

import threading
import types
import warnings

import pytest

from fastdp.warn import warn_user


def module(name: str, source: str) -> types.ModuleType:
    """A module of that name, with this source."""
    made = types.ModuleType(name)
    made.__dict__["warn_user"] = warn_user
    exec(compile(source, f"/{name.replace('.', '/')}.py", "exec"), made.__dict__)
    return made


def test_the_line_is_the_innermost_outside_fastdp_keras_and_torch() -> None:
    inner = module("fastdp.program.example", "def work():\n    warn_user('said')\n")
    keras = module("keras.src.example", "def fit(work):\n    work()\n")
    script = module("__main__", "def main(fit, work):\n\n    fit(work)\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script.main(keras.fit, inner.work)
    assert [(w.filename, w.lineno, str(w.message)) for w in caught] == [("/__main__.py", 3, "said")]


def test_a_caller_of_the_users_own_is_named_itself() -> None:
    with pytest.warns(DeprecationWarning, match="said") as caught:
        warn_user("said", DeprecationWarning)
    assert caught[0].filename == __file__


def test_a_thread_without_a_line_of_the_users_still_warns() -> None:
    inner = module("fastdp.program.example", "def work():\n    warn_user('said')\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=inner.work)
        thread.start()
        thread.join(10)
    assert [str(w.message) for w in caught] == ["said"]
