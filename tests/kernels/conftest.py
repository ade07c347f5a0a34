"""The CPU that stands in for a GPU in the kernel tests: built once, one process for the session."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def _load_sibling(name: str) -> ModuleType:
    """A module of this folder, which is no package and not on sys.path."""
    spec = importlib.util.spec_from_file_location(f"fastdp_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


host_device = _load_sibling("host_device")


def _device(config: pytest.Config, folder: Path, sanitizer: str, files: list[str] | None = None):
    if shutil.which("g++") is None:
        pytest.skip("no g++ here: the kernels' arithmetic is not checked")
    cache = getattr(config, "cache", None)
    builds = folder if cache is None else Path(cache.mkdir("fastdp-kernels"))
    runner = host_device.build_runner(builds, sanitizer, files)
    return host_device.HostDevice(runner, folder / "stderr.txt")


@pytest.fixture(scope="session")
def host(pytestconfig, tmp_path_factory) -> Iterator[host_device.HostDevice]:
    """All kernels under the address and the undefined-behaviour sanitizer."""
    device = _device(pytestconfig, tmp_path_factory.mktemp("host"), host_device.ADDRESS)
    yield device
    device.close()


@pytest.fixture(scope="session")
def racing_host(pytestconfig, tmp_path_factory) -> Iterator[host_device.HostDevice]:
    """The all-reduces under the thread sanitizer."""
    files = ["all_reduce_one_shot", "all_reduce_two_shot", "reduce_scatter"]
    device = _device(pytestconfig, tmp_path_factory.mktemp("racing"), host_device.THREAD, files)
    try:
        device.synchronize()
    except AssertionError as error:
        if "unexpected memory mapping" in str(error):
            pytest.skip("this kernel's address space layout is unknown to g++'s thread sanitizer")
        raise
    yield device
    device.close()
