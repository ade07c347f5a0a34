"""Peer access: enabled once for each pair of the listed GPUs, and believed only after a copy."""

from __future__ import annotations

import re
import warnings

import pytest

from fastdp.errors import DeviceTimeoutError


@pytest.fixture
def peers(fake_cuda):
    def start(count, devices, timeout=60.0, setup=None, **options):
        sim = fake_cuda(count, **options)
        from fastdp.runtime.cuda.peer_access import PeerAccess

        if setup is not None:
            setup(sim)
        return sim, PeerAccess(devices, timeout)

    return start


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_all_pairs_of_the_listed_gpus_and_no_other(peers, seed):
    sim, access = peers(4, [3, 1, 3], contexts_on=[1, 3], seed=seed)
    assert access.devices == (3, 1)
    assert access.complete
    assert access.direct(1, 3)
    assert access.direct(3, 3)
    assert sim.peers == {(1, 3), (3, 1)}
    assert sim.calls["deviceEnablePeerAccess"] == 2


def test_one_gpu_asks_for_nothing(peers):
    sim, access = peers(2, [1])
    assert access.complete
    assert not sim.calls["deviceEnablePeerAccess"]
    assert sim.contexts == set()


def test_access_that_was_enabled_already_is_fine(peers):
    _, access = peers(2, [0, 1], setup=lambda sim: sim.peers.add((0, 1)))
    assert access.complete


def test_a_pair_without_access_goes_through_the_host_with_one_warning(peers):
    with pytest.warns(UserWarning, match="GPU 0 and GPU 2: CUDA reports no peer access.*host memory") as said:
        sim, access = peers(3, [0, 1, 2], cannot_access=[(0, 2), (2, 0)])
    assert len(said) == 1
    assert not access.direct(0, 2)
    assert not access.direct(2, 0)
    assert access.direct(0, 1)
    assert not access.complete
    assert sim.peers == {(0, 1), (1, 0), (1, 2), (2, 1)}


@pytest.mark.parametrize("broken", [(0, 1), (1, 0)])
def test_access_that_is_reported_falsely_is_found_by_the_copy(peers, broken):
    with pytest.warns(UserWarning, match="GPU 0 and GPU 1: .* a copied pattern did not arrive"):
        _, access = peers(2, [0, 1], broken_access=[broken])
    assert not access.direct(0, 1)
    assert not access.direct(1, 0)


def test_more_than_eight_peers_go_through_the_host(peers):
    with pytest.warns(UserWarning, match=re.escape("CUDA does not enable it (cudaErrorTooManyPeers")) as said:
        _, access = peers(10, range(10))
    assert len(said) == 1
    assert access.direct(0, 8)
    assert not access.direct(0, 9)


def test_a_copy_that_hangs_is_a_time_out_and_nothing_waits_for_it(peers):
    sims = []

    def hold(sim):
        sim.held = True
        sims.append(sim)

    with pytest.raises(DeviceTimeoutError, match=r"GPU \d was not over within timeout=0.01"):
        peers(2, [0, 1], timeout=0.01, setup=hold)
    (sim,) = sims
    assert sim.calls["free"] == sim.calls["freeHost"] == sim.calls["streamDestroy"] == 0
    sim.held = False
    for stream in list(sim.streams):
        sim.synchronize(stream)
        del sim.streams[stream]
    sim.events.clear()
    for allocation in sim.memory.alive():
        sim.release(allocation.lo, pinned=allocation.device is None)


def test_the_trial_leaves_nothing_behind(peers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sim, _ = peers(3, [0, 1, 2])
    assert sim.check_end() == []
