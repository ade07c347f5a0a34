"""What torch.fx keeps of each graph module goes with what was captured, and models that are dropped leave nothing."""

from __future__ import annotations

import gc
import linecache

import pytest
import torch
from torch import fx

from fastdp.capture.graph.sources import Sources


def kept():
    """The names of the sources that torch keeps."""
    return {name for name in linecache.cache if name.startswith("<eval_with_key>")} | set(
        fx.graph_module._loader.eval_cache
    )


def double():
    return fx.symbolic_trace(lambda x: 2 * x)


class Owner:
    """What a block may leave its sources to."""


def test_sources_of_a_block_are_freed_at_its_end():
    before = kept()
    with Sources():
        module = double()
        assert kept() - before
    assert kept() == before
    assert module(torch.ones(1)).item() == 2


def test_sources_that_belong_to_an_owner_go_with_it():
    gc.collect()  # sources of what other tests have left
    owner, before = Owner(), kept()
    with Sources() as sources:
        double()
        sources.belong_to(owner)
        double()
    assert len(kept() - before) == 2
    del owner
    gc.collect()
    assert kept() == before


def test_sources_of_others_stay():
    with Sources():
        with pytest.raises(KeyError), Sources():
            raise KeyError
        inner = double()
    assert not kept() & {type(inner).forward.__code__.co_filename}
    module = double()
    assert type(module).forward.__code__.co_filename in kept()
