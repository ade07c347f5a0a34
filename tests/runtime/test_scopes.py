"""Contexts of a step are left in the other order, all of them, and see what has failed."""

from __future__ import annotations

import pytest

from fastdp.runtime.scopes import Scopes


class Context:
    def __init__(self, name, seen, fails=False):
        self.name, self.seen, self.fails = name, seen, fails

    def __enter__(self):
        self.seen.append(f"in {self.name}")
        return self.name

    def __exit__(self, kind, error, traceback):
        self.seen.append((self.name, kind, error))
        if self.fails:
            raise OSError(self.name)
        return True  # is not asked for


def test_all_are_left_the_last_one_first_with_the_error():
    scopes, seen, error = Scopes(), [], ValueError("of the step")
    assert [scopes.enter(Context(name, seen)) for name in "ab"] == ["a", "b"]
    scopes.leave(error)
    assert seen == ["in a", "in b", ("b", ValueError, error), ("a", ValueError, error)]
    scopes.leave()
    assert len(seen) == 4


def test_one_that_fails_keeps_no_other_from_being_left():
    scopes, seen = Scopes(), []
    for name in "abc":
        scopes.enter(Context(name, seen, fails=name == "b"))
    with pytest.raises(OSError, match="b"):
        scopes.leave()
    assert [one[0] for one in seen[3:]] == ["c", "b", "a"]
