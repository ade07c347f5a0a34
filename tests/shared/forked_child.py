"""Runs a function in a forked child process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[[], Any]) -> Any:
    """The result of work in a forked child, or its error as text."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def run() -> None:
        try:
            theirs.send(work())
        except RuntimeError as error:
            theirs.send(f"RuntimeError: {error}")

    child = context.Process(target=run)
    child.start()
    try:
        assert ours.poll(60), "the child hangs"
        return ours.recv()
    finally:
        child.kill()
        child.join(10)
        child.close()
        ours.close()
        theirs.close()
