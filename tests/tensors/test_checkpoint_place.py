"""The generator of non-reentrant checkpoints is replaced under the name by which the installed torch calls it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch.utils import checkpoint as torch_checkpoint

from fastdp.patching import Patch
from fastdp.tensors import checkpoint_place as module
from fastdp.tensors.checkpoint_place import checkpoint_place


def noting(calls):
    """A replacement that notes what it is called with, and goes on to the original without preserving."""

    def replacement_of(original):
        def generator(function, preserve, *args, **kwargs):
            calls.append((function, preserve))
            yield from original(function, False, *args, **kwargs)

        return generator

    return replacement_of


@pytest.mark.parametrize("preserve", [True, False])
def test_this_torchs_checkpoint_runs_the_replacement_once(preserve):
    calls, x = [], torch.ones(3, requires_grad=True)
    part = torch.nn.Tanh()
    with Patch([checkpoint_place(noting(calls))]):
        torch_checkpoint.checkpoint(part, x, use_reentrant=False, preserve_rng_state=preserve).sum().backward()
    assert calls == [(part, preserve)]
    torch.testing.assert_close(x.grad, 1 - torch.tanh(torch.ones(3)) ** 2)


def test_since_torch_2_14_the_later_name_is_replaced_which_takes_preserve_by_name(monkeypatch):
    def later(fn, args, kwargs, *, preserve_rng_state=True, debug=False):
        yield fn, args, kwargs, preserve_rng_state, debug

    monkeypatch.setattr(module, "checkpoint", SimpleNamespace(**{module._LATER: later, module._EARLIER: None}))
    owner, name, replacement_of = checkpoint_place(noting(calls := []))
    assert (owner, name) == (module.checkpoint, module._LATER)
    generator = replacement_of(later)
    assert list(generator("part", (1, 2), {"a": 3}, preserve_rng_state=True, debug=True)) == [
        ("part", (1, 2), {"a": 3}, False, True)
    ]
    list(generator("part", (), {}))
    assert calls == [("part", True), ("part", True)]


def test_torch_has_one_of_both_names():
    owner, name, _ = checkpoint_place(lambda original: original)
    assert owner is torch_checkpoint
    assert name in inspect.getsource(torch_checkpoint._checkpoint_impl if name == module._LATER else owner.checkpoint)
