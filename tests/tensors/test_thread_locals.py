"""Threads of replicas have what the user's thread keeps in `threading.local` objects."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fastdp.tensors.thread_locals import ThreadLocals


def on_a_thread(locals_: ThreadLocals, work: Any = lambda: None) -> None:
    """Run on another thread with these attributes; raises what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with locals_.applied():
                work()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if errors:
        raise errors[0]


def test_a_set_is_the_same_in_whatever_order_it_gives_its_elements():
    local = threading.local()
    local.names = {1, 8}  # their order depends on the size that the set has grown to
    for number in range(100, 200):
        local.names.add(number)
    for number in range(100, 200):
        local.names.remove(number)
    assert list(local.names) != list(set(map(int, local.names))), "the order of this set is that of its copy"
    on_a_thread(ThreadLocals([local]))


@pytest.mark.parametrize("change", [lambda local: local.names.add(3), lambda local: local.names.clear()])
def test_a_set_that_is_changed_is_refused(change):
    local = threading.local()
    local.names = {1, 2}
    with pytest.raises(RuntimeError, match=r"changes the attribute 'names' of a threading\.local"):
        on_a_thread(ThreadLocals([local]), lambda: change(local))
    assert local.names == {1, 2}
