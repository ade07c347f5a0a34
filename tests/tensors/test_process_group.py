"""The connection of several processes: what an error of it leaves behind."""

from __future__ import annotations

import atexit
import gc
import socket
import threading
import types

import numpy as np
import pytest

from fastdp.errors import ProcessError
from fastdp.tensors import process_group


@pytest.fixture
def both(monkeypatch):
    """Both ends of a connection, in one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(process_group, "PATIENCE", 0.2)
    found: dict[int, process_group.ProcessGroups] = {}

    def connect(rank: int) -> None:
        found[rank] = process_group.ProcessGroups(rank, 2)

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    yield [found[0], found[1]]
    for one in found.values():
        atexit.unregister(one._leave)
        one._leave()


def _frames() -> int:
    gc.collect()
    return sum(isinstance(one, types.TracebackType) for one in gc.get_objects())


def test_a_collective_to_which_nobody_comes_keeps_neither_frames_nor_gloo_s_work(both):
    first, _ = both
    before = _frames()
    wait = first.sum(np.ones(3, np.float32), "float32")
    with pytest.raises(ProcessError, match="process 1 does not answer"):
        wait(0.05, "a sum")
    with pytest.raises(ProcessError, match="lost the others at a sum"):
        first.gather(None, "the next step", 1.0)
    (begun,) = [
        cell.cell_contents for cell in wait.__closure__ or () if isinstance(cell.cell_contents, process_group._Begun)
    ]
    assert begun.work is None
    del wait
    assert _frames() == before
