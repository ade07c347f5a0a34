"""A pytest plugin: `-p simulated_gpus` runs any tests with virtual devices on the simulated CUDA instead of the host.

Every violation raises where it happens, and so fails the test that it happens in.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_cupy import installed
from gpus import Gpus
from simulation import Simulation

from fastdp.launch import cubin, nvrtc

_open = contextlib.ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """Start the simulation, for the whole session."""
    patch = _open.enter_context(pytest.MonkeyPatch.context())
    patch.setenv("FASTDP_VIRTUAL_KIND", "gpu")
    patch.setattr(cubin, "cubin", lambda name, architecture, compiler=None: name.encode())
    patch.setattr(nvrtc, "load", lambda newest_major=None, architecture=None: None)
    config.simulation = _open.enter_context(installed(Simulation(2)))  # type: ignore[attr-defined]
    Gpus(config.simulation, patch)  # type: ignore[attr-defined]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A violation that somebody swallowed fails the session."""
    simulation = session.config.simulation  # type: ignore[attr-defined]
    if simulation.violations:
        session.config.issue_config_time_warning(UserWarning(str(simulation.violations)), stacklevel=2)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
