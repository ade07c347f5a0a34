"""What all tests share: Keras on torch, GPU tests skipped with a reason, no thread left behind."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"  # before any import that could bring Keras in
# Before CUDA, which Keras starts: devices that wait for each other need both (fastdp.runtime.environment).
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# Algorithms by size, and not by what a machine at work measures.
os.environ.setdefault("FASTDP_ALL_REDUCE", "fixed")
# Steps as in a first run: what an earlier run of the tests has decided or compiled must not matter.
os.environ.setdefault("FASTDP_REMEMBER", "off")
# Keras's import without what no test needs of it, here and in the processes that tests start.
LEAN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shared", "lean")
if LEAN not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [LEAN, os.environ.get("PYTHONPATH")]))
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch: OpenMP's threads that wait for work awake would take the cores from the other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import ast
import functools
import gc
import importlib.util
import json
import runpy
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    from hypothesis import settings
except ImportError:  # a GPU machine that runs the `gpu` tests alone
    settings = None

# What a test file needs when it imports a name at its top. A file whose need is not installed is left out,
# and the summary says so.
NEEDS = {
    "bench.gpu.keras_ways": ("keras", "torch"),
    "cupy": ("cupy",),
    "fastdp.keras": ("keras", "torch"),
    "fastdp.callbacks": ("keras", "torch"),
    "fastdp.capture": ("torch",),
    "fastdp.program.keras": ("keras", "torch"),
    "fastdp.program.torch": ("torch",),
    "fastdp.tensors": ("torch",),
    "fastdp.torch": ("torch",),
    "file_fuzzer": ("keras", "torch"),
    "hypothesis": ("hypothesis",),
    "keras": ("keras", "torch"),
    "linear_step": ("torch",),
    "matplotlib": ("matplotlib",),
    "pytest_benchmark": ("pytest_benchmark",),
    "PIL": ("PIL",),
    "process_runs": ("keras", "torch"),
    "rich": ("rich",),
    "sklearn": ("sklearn",),
    "tensorboard": ("tensorboard",),
    "torch": ("torch",),
}

left_out: dict[str, str] = {}

if getattr(sys.modules.get("sitecustomize"), "__file__", None) != os.path.join(LEAN, "sitecustomize.py"):
    runpy.run_path(os.path.join(LEAN, "sitecustomize.py"))
# Of what test files may need, what is not installed: most files are not even parsed.
NOT_INSTALLED = {need for needs in NEEDS.values() for need in needs if importlib.util.find_spec(need) is None}

# A run in the background inherits that interrupts are ignored, and tests and their child processes send some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if settings is not None:
    # ci: the same examples on every machine; dev: others in each run. `--hypothesis-profile thorough` looks longer.
    # Without a deadline, since a loaded machine is not a bug.
    settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
    settings.register_profile("dev", deadline=None, max_examples=25)
    settings.register_profile("thorough", deadline=None, max_examples=300)
    settings.load_profile("ci" if os.environ.get("CI") else "dev")


def missing_needs(source: str) -> list[str]:
    """The libraries that a test file's imports at its top need and that are not installed."""
    if not any(key.rpartition(".")[2] in source for key, needs in NEEDS.items() if not NOT_INSTALLED.isdisjoint(needs)):
        return []
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    needed = {need for key, needs in NEEDS.items() for need in needs if any(_within(n, key) for n in names)}
    return sorted(needed & NOT_INSTALLED)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out a test file, or a folder by its conftest, that cannot be imported for want of a library."""
    own = collection_path / "conftest.py"
    if own.is_file() and own != Path(__file__):
        missing = missing_needs(own.read_text(encoding="utf-8"))
        if missing:
            left_out[f"{collection_path.name}/"] = ", ".join(missing)
        return True if missing else None
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    missing = missing_needs(collection_path.read_text(encoding="utf-8"))
    if not missing:
        return None
    left_out[collection_path.name] = ", ".join(missing)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In one of several processes (pytest-xdist): tell the first, which reads no test file, what was left out."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the first of several processes: one of the others has ended."""
    left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the files left out: a run without Keras must not look like a full one."""
    if left_out:
        terminalreporter.section("left out: not installed here")
        for name, missing in sorted(left_out.items()):
            terminalreporter.line(f"{name}: needs {missing}")


@functools.cache
def gpu_count() -> tuple[int, str]:
    """How many GPUs CuPy reaches, and the reason where it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns of a missing CUDA library or NCCL: the tests find out
        try:
            import cupy
        except ImportError as error:
            return 0, f"CuPy cannot be imported ({error})"
        try:
            return cupy.cuda.runtime.getDeviceCount(), "no GPU"
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return 0, f"CuPy reaches no GPU ({error})"


# The files that take longest. They come first, as a process that begins one at the end would keep the others waiting.
LONGEST = (
    "cuda/test_gpu_tests_on_rig.py",
    "cuda/test_step_graphs.py",
    "cuda/test_graphs.py",
    "capture/test_compile.py",
    "engine/test_survival_compiled.py",
    "bench/test_gpu_steps.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect tests without collecting garbage: imports and lists of tests leave next to none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files. Skip `gpu` tests without a GPU and `peer` tests without two, and say why."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    for item in items:
        needed = 2 if item.get_closest_marker("peer") else 1 if item.get_closest_marker("gpu") else 0
        if not needed:
            continue
        count, reason = gpu_count()
        if count < needed:
            why = reason if count == 0 else f"{count} GPU here"
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s): {why}"))


# Modules that were loaded when the garbage collector last left out all that there was, and the file of the latest test.
LEFT_OUT_AT = pytest.StashKey[int]()
LATEST_FILE = pytest.StashKey[Path]()
MANY_MODULES = 100


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave what lasts longer than a file out of garbage collections, and look at it again after each large import.

    Torch, Keras and the test files are a million objects, which a full collection looks at each time: up to half a
    second, and the tests of memory ask for several each. What a test makes comes later, and is collected as ever.
    At the beginning of a file nothing of the earlier one is in use: what is left then are tables of libraries.
    """
    stash = item.config.stash
    if len(sys.modules) >= stash.get(LEFT_OUT_AT, 0) + MANY_MODULES:
        gc.unfreeze()
        stash[LEFT_OUT_AT], stash[LATEST_FILE] = len(sys.modules), Path()
    if stash.get(LATEST_FILE, None) != item.path:
        gc.collect()
        gc.freeze()
        stash[LATEST_FILE] = item.path
    threads = sys.modules.get("fastdp.tensors.threads")
    if threads is not None:  # graphs that an earlier test has left keep torch at a device's share of the cores
        threads._given.passes.clear()
        threads.end_share()


def fastdp_threads() -> list[str]:
    """The names of fastdp's threads that are alive, but for those that last until the end of the process.

    NCCL's, the watchdog, and those that compute parts of an operation's rows.
    """
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("fastdp")]
    return sorted(name for name in names if not name.startswith(("fastdp-exit", "fastdp-watchdog", "fastdp-rows")))


@pytest.fixture(scope="session", autouse=True)
def no_thread_outlives_the_session() -> Iterator[None]:
    """After the last test, once the process's own virtual devices are closed, no fastdp thread is alive."""
    yield
    gc.unfreeze()  # what was kept out of collections may have become garbage, with a thread
    gc.collect()
    device = sys.modules.get("fastdp.runtime.select")
    if device is not None:
        device.set_virtual_devices(0)
    alive = fastdp_threads()
    if alive:
        pytest.fail(f"threads left alive by the tests, close what owns them: {alive}", pytrace=False)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """`measured()`: the lines that the benchmarks of bench/gpu/*.py have written in this test."""
    log = tmp_path / "measured.jsonl"
    monkeypatch.setenv("FASTDP_GPU_LOG", str(log))
    return lambda: [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
