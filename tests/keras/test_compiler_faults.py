"""What goes wrong with tracing, compiling or loading ends no step: it is told once, and nothing is left behind."""

from __future__ import annotations

import errno
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import fastdp
from fastdp.capture import steps as capture_steps
from fastdp.capture import trace as capture_trace
from fastdp.capture.compile import compiler as background
from fastdp.capture.compile.compiler import BackgroundCompiler
from fastdp.capture.faults import Attempt, Compiled, in_words

L = keras.layers


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(capture_steps, "missing_compiler", lambda: None)
    before = set(threading.enumerate())
    yield
    fastdp.set_virtual_devices(0)
    assert not list(tmp_path.glob("fastdp-compile-*"))
    assert not [thread for thread in set(threading.enumerate()) - before if "compile" in thread.name]


@pytest.fixture(autouse=True)
def _ready(monkeypatch):
    """What the thread loads takes seconds, and has a test of its own."""
    monkeypatch.setattr(background, "_readying", lambda: SimpleNamespace(over=True, instruction_sets=None))


def made():
    keras.utils.set_random_seed(4)
    return keras.Sequential([keras.Input((5,)), L.Dense(4, activation="tanh"), L.Dense(2)])


def batches(count):
    generator = np.random.default_rng(0)
    return [
        (generator.normal(size=(6, 5)).astype("float32"), generator.normal(size=(6, 2)).astype("float32"))
        for _ in range(count)
    ]


def trains_right_and_says_once(said, *, mode="inductor", expected="traced", steps=6, between=lambda parallel: None):
    """Train with a fault, as plain Keras would; one warning tells of it."""
    plain = made()
    plain.compile(keras.optimizers.SGD(0.1), "mse")
    losses = [plain.train_on_batch(x, y) for x, y in batches(steps)]
    fastdp.set_virtual_devices(2)
    parallel = fastdp.wrap(made(), gpus=2, compile=mode)
    parallel.compile(keras.optimizers.SGD(0.1), "mse")
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in batches(steps):
            found.append(parallel.train_on_batch(x, y))
            between(parallel)
            deadline = time.monotonic() + 60
            while parallel.compiling and time.monotonic() < deadline:
                job = parallel._steps.captures._compiler._started[0]
                if parallel._steps.captures._compiler.done(job):
                    break
                time.sleep(0.01)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for weight, other in zip(parallel.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-5, atol=1e-6)
    caught = [one for one in caught if str(one.message).startswith("fastdp")]
    messages = [str(one.message) for one in caught]
    assert len(messages) == 1, messages
    assert said in messages[0]
    assert Path(caught[0].filename) == Path(__file__)  # the user's line
    assert {entry["how"] for entry in parallel.report()} == {expected}
    assert all(said in entry["why"] for entry in parallel.report())
    assert not parallel.compiling
    return parallel


def raising(error):
    def fails(*args, **kwargs):
        raise error

    return fails


def worker_is(monkeypatch, code):
    """Let another program be the worker; it gets the same arguments."""
    popen = subprocess.Popen

    def started(command, **options):
        return popen([sys.executable, "-c", "import os, signal, sys, time\n" + code, *command[4:]], **options)

    monkeypatch.setattr(subprocess, "Popen", started)


# Before there is a worker.


def test_no_space_for_the_graph(monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", raising(OSError(errno.ENOSPC, "No space left on device")))
    trains_right_and_says_once("No space left on device")


def test_a_folder_for_temporary_files_that_is_gone(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "deleted"))
    trains_right_and_says_once("FileNotFoundError")


def test_no_free_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", raising(BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")))
    trains_right_and_says_once("Resource temporarily unavailable")


@pytest.mark.parametrize("executable", ["", None, "/no/such/python"])
def test_a_python_that_does_not_know_where_it_is(executable, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable)
    trains_right_and_says_once("FileNotFoundError")


def test_no_free_thread(monkeypatch):
    monkeypatch.setattr(background, "_readying", raising(RuntimeError("can't start new thread")))
    trains_right_and_says_once("can't start new thread")


@pytest.mark.parametrize("error", [pickle.PicklingError("no bytes"), TypeError("no bytes"), RecursionError("no bytes")])
def test_a_graph_that_cannot_be_written(error, monkeypatch):
    monkeypatch.setattr(background, "to_bytes", raising(error))
    trains_right_and_says_once("no bytes")


def test_a_pass_for_the_compiler_that_fails(monkeypatch):
    monkeypatch.setattr(capture_trace, "for_compiler", raising(KeyError("val")))
    trains_right_and_says_once("KeyError: 'val'")


def test_indices_that_cannot_be_checked(monkeypatch):
    monkeypatch.setattr(capture_trace, "guarded", raising(NotImplementedError("indices that fastdp cannot check")))
    trains_right_and_says_once("indices that fastdp cannot check")


# The worker.


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "status -9: it said nothing"),  # for want of memory
        ("os.kill(os.getpid(), signal.SIGSEGV)", "status -11"),
        ("sys.stderr.buffer.write(bytes(range(256)) * 9); sys.exit(3)", "status 3"),
        ("sys.exit('error: g++ failed: No space left on device')", "No space left on device"),
        ("sys.exit(0)", "status 0: it said nothing"),
        ("import shutil; shutil.rmtree(os.path.dirname(sys.argv[1])); sys.exit(1)", "FileNotFoundError"),
    ],
)
def test_a_worker_that_fails(code, said, monkeypatch):
    worker_is(monkeypatch, code)
    trains_right_and_says_once(said)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04"])
def test_an_artifact_that_is_cut_off(content, monkeypatch):
    worker_is(monkeypatch, f"open(sys.argv[2], 'wb').write({content!r})")
    trains_right_and_says_once("the compiled step cannot be loaded")


@pytest.mark.parametrize("error", [OSError("libgomp.so.1: cannot open"), ImportError("noexec"), AttributeError("x")])
def test_an_artifact_that_cannot_be_loaded(error, monkeypatch):
    worker_is(monkeypatch, "open(sys.argv[2], 'wb').write(b'something')")
    monkeypatch.setattr(background, "_artifact_class", lambda: SimpleNamespace(load=raising(error)))
    trains_right_and_says_once(in_words(error))


def test_a_torch_without_its_compiler(monkeypatch):
    worker_is(monkeypatch, "open(sys.argv[2], 'wb').write(b'something')")
    real = importlib.import_module

    def imported(name, *args):
        if name.startswith("torch._inductor"):
            raise ImportError("No module named torch._inductor")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", imported)
    trains_right_and_says_once("No module named torch._inductor")


def test_a_worker_that_hangs_is_killed(monkeypatch):
    worker_is(monkeypatch, "time.sleep(600)")
    monkeypatch.setattr(capture_steps, "BackgroundCompiler", lambda: BackgroundCompiler(timeout=0.05))
    processes = []

    def between(parallel):
        processes.extend(job.process for job in parallel._steps.captures._compiler._started)

    trains_right_and_says_once("longer than 0.05 seconds", between=between)
    assert processes
    assert all(process.poll() is not None for process in processes)


def test_a_compiled_step_that_fails_later_goes_back_to_the_traced_one(monkeypatch):
    calls = []

    def run(*arguments):
        calls.append(1)
        raise RuntimeError("the kernel is no more")

    worker_is(monkeypatch, "open(sys.argv[2], 'wb').write(b'something')")
    monkeypatch.setattr(background, "_artifact_class", lambda: SimpleNamespace(load=lambda **_: run))
    trains_right_and_says_once("the kernel is no more")
    assert 1 <= len(calls) <= 2  # both replicas share it


def test_a_compiled_step_that_gives_something_else_is_not_used():
    step = Compiled(lambda *_: [1, 2], lambda *_: ["traced"], 3)
    assert step() == ["traced"]
    assert "gave 1 results, not 3" in step.failed


def test_the_cleaning_up_fails(monkeypatch):
    worker_is(monkeypatch, "time.sleep(600)")
    fastdp.set_virtual_devices(2)
    parallel = fastdp.wrap(made(), gpus=2, compile="inductor")
    parallel.compile("sgd", "mse")
    for x, y in batches(2):
        parallel.train_on_batch(x, y)
    (job,) = parallel._steps.captures._compiler._started
    job.process.kill()
    job.process.wait()
    monkeypatch.setattr(job.process, "poll", lambda: None)  # it seems to be at work
    parallel.compile("sgd", "mse")  # killpg finds nobody
    assert not job.folder.exists()


def test_a_forked_process_leaves_the_worker_alone(monkeypatch):
    worker_is(monkeypatch, "time.sleep(600)")
    compiler = BackgroundCompiler()
    job = background.Job(b"", [], 1)
    compiler._waiting.append(job)
    compiler._start_next()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    background._end([job], compiler._waiting)
    assert job.process.poll() is None
    assert job.folder.exists()
    monkeypatch.undo()
    compiler.close()
    assert job.process.poll() is not None
    assert not job.folder.exists()


@pytest.mark.parametrize("name", ["HOME", "TORCHINDUCTOR_CACHE_DIR"])
def test_what_the_loading_thread_fails_with_ends_nothing(name, monkeypatch):
    def imported(module, *args):
        raise OSError(f"{name}: read-only file system")

    monkeypatch.setattr(importlib, "import_module", imported)
    thread = background._Ready()
    thread.start()
    thread.join()
    assert thread.over


# Tracing.


@pytest.mark.parametrize("error", [TypeError("a fake tensor"), KeyError("val"), AssertionError(), MemoryError("much")])
def test_an_error_of_the_tracer_leaves_steps_eager(error, monkeypatch):
    monkeypatch.setattr(capture_trace, "optimized", raising(error))
    trains_right_and_says_once(type(error).__name__, mode="trace", expected="eager")


def test_an_error_of_the_users_layer_on_values_that_are_none_leaves_steps_eager():
    class Own(Exception):
        """Not one of Python's."""

    class Picky(keras.layers.Layer):
        def call(self, x):
            if type(x).__name__ != "Tensor":
                raise Own("a tensor, please")
            return x

    fastdp.set_virtual_devices(2)
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    model = keras.Model(inputs, L.Dense(2)(inputs))
    picky = Picky()
    parallel = fastdp.wrap(keras.Sequential([model, picky]), gpus=2, compile="trace")
    parallel.compile("sgd", "mse")
    first, second, *others = batches(4)
    parallel.train_on_batch(*first)
    with pytest.warns(UserWarning, match="Own: a tensor, please"):
        parallel.train_on_batch(*second)
    for batch in others:
        parallel.train_on_batch(*batch)
    assert [entry["how"] for entry in parallel.report()] == ["eager"]


def test_an_interrupt_is_no_fault():
    with pytest.raises(KeyboardInterrupt), Attempt():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit), Attempt():
        sys.exit(1)
    with Attempt() as attempt:
        raise ValueError("two\nlines\x00")
    assert attempt.why == "ValueError: two lines"
