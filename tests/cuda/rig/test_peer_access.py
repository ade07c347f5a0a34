"""Peer access: enabled once for each pair of the listed GPUs, and believed only after a copy."""

from __future__ import annotations

import re
import warnings

import pytest

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.cuda.peer_access import PeerAccess

# Of the ten cards 7 and 9 do not reach each other, and 8 and 9 say that they do (tests/cuda/test_gpu_tests_on_rig.py).
APART, FALSELY = (7, 9), (8, 9)


@pytest.fixture(autouse=True)
def parted(cards):
    cards.part_all()
    yield
    cards.part_all()


def test_all_pairs_of_the_listed_gpus_and_no_other(cards):
    access = PeerAccess([3, 1, 3], 60.0)
    assert access.devices == (3, 1)
    assert access.complete
    assert access.direct(1, 3)
    assert access.direct(3, 3)
    assert cards.peers == {(1, 3), (3, 1)}
    assert cards.calls["deviceEnablePeerAccess"] == 2


def test_one_gpu_asks_for_nothing(cards):
    assert PeerAccess([1], 60.0).complete
    assert not cards.calls["deviceEnablePeerAccess"]


def test_access_that_was_enabled_already_is_fine(cards, runtime):
    runtime.enable_peer_access(0, 1)
    runtime.enable_peer_access(0, 1)
    assert cards.peers == {(0, 1)}
    assert PeerAccess([0, 1], 60.0).complete
    with pytest.raises(runtime.CudaError, match="PeerAccessUnsupported"):
        runtime.enable_peer_access(*APART)


def test_a_pair_without_access_goes_through_the_host_with_one_warning(cards):
    with pytest.warns(UserWarning, match="GPU 7 and GPU 9: CUDA reports no peer access.*host memory") as said:
        access = PeerAccess([7, 0, 9], 60.0)
    assert len(said) == 1
    assert not access.direct(7, 9)
    assert not access.direct(9, 7)
    assert access.direct(0, 7)
    assert not access.complete
    assert cards.peers == {(0, 7), (7, 0), (0, 9), (9, 0)}


@pytest.mark.parametrize("order", [FALSELY, FALSELY[::-1]])
def test_access_that_is_reported_falsely_is_found_by_the_copy(order):
    with pytest.warns(UserWarning, match=r"GPU \d and GPU \d: .* a copied pattern did not arrive"):
        access = PeerAccess(order, 60.0)
    assert not access.direct(*order)
    assert not access.direct(*order[::-1])


def test_more_than_eight_peers_go_through_the_host(cards):
    with pytest.warns(UserWarning, match=re.escape("CUDA does not enable it (cudaErrorTooManyPeers")) as said:
        access = PeerAccess(range(cards.count), 60.0)
    assert len(said) == 1
    assert access.direct(0, 8)
    assert not access.direct(0, 9)


def test_a_copy_that_hangs_is_a_time_out_and_nothing_waits_for_it(cards, runtime, monkeypatch):
    made = []
    for name in ("malloc", "hostAlloc"):
        call = getattr(runtime.cudart, name)
        monkeypatch.setattr(
            runtime.cudart, name, lambda *given, call=call, name=name: made.append((name, call(*given))) or made[-1][1]
        )
    cards.hold(True)
    with pytest.raises(DeviceTimeoutError, match=r"GPU \d was not over within timeout=0.01"):
        PeerAccess([0, 1], 0.01)
    assert cards.calls["free"] == cards.calls["freeHost"] == cards.calls["streamDestroy"] == 0
    cards.hold(False)
    for name, address in made:
        {"malloc": runtime.free, "hostAlloc": runtime.host_free}[name](address)


def test_the_trial_leaves_nothing_behind(cards):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeerAccess([0, 1, 2], 60.0)
    assert cards.alive() == []
