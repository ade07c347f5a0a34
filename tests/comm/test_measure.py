"""Measuring algorithms, the limits that follow, and when they are used."""

from __future__ import annotations

import numpy as np
import pytest

from fastdp.cli.devices import table
from fastdp.comm import kept_table, measure, tuning
from fastdp.comm.algorithm import Choice, Limits, built_in
from fastdp.comm.host.communicator import HostCommunicator
from fastdp.comm.measure import SIZES, best_limits
from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.host.device import HostDevice
from fastdp.settings import ALL_REDUCE

KIB = 1024
BUILT_IN = Limits(256 * KIB, 2048 * KIB)
TUNABLE = {"kernels": True, "nccl": True, "apart": True}


def times(**columns):
    """Seconds by size and algorithm, from microseconds in the order of the sizes; None where there are none."""
    return {
        (nbytes, way.replace("_", "-")): value * 1e-6
        for way, column in columns.items()
        for nbytes, value in zip(SIZES, column, strict=False)
        if value is not None
    }


AS_PUBLISHED = {
    "one_shot": [9, 9, 10, 18, 60, None],
    "two_shot": [14, 14, 14, 15, 30, 110],
    "nccl": [39, 39, 39, 39, 50, 70],
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (128 * KIB, 2048 * KIB)),
        ({"nccl": [1, 1, 1, 1, 1, 1]}, (-1, -1)),
        ({"two_shot": [1, 1, 1, 1, 1, 1]}, (-1, 8192 * KIB)),
        ({"two_shot": [99, 99, 99, 99, 99, 999]}, (512 * KIB, 512 * KIB)),
    ],
)
def test_the_limits_are_those_of_the_fastest(change, expected):
    assert best_limits(times(**{**AS_PUBLISHED, **change}), Limits(-1, -1)) == Limits(*expected)


@pytest.mark.parametrize("seed", range(5))
def test_noise_below_a_tenth_does_not_move_the_built_in_limits(seed):
    noise = np.random.default_rng(seed)
    equal = {key: 1e-5 * noise.uniform(1, 1.09) for key in times(**AS_PUBLISHED)}
    assert best_limits(equal, BUILT_IN) == BUILT_IN
    assert best_limits({}, BUILT_IN) == BUILT_IN


@pytest.fixture
def hosts():
    devices = [HostDevice(i) for i in range(3)]
    yield devices
    for device in devices:
        device.close(10.0)


def test_virtual_devices_are_measured_within_the_time_that_is_given(hosts):
    found = measure.measure(HostCommunicator(hosts), hosts, 20.0)
    assert list(found) == [(nbytes, "host") for nbytes in SIZES]
    assert min(found.values()) > 0
    assert measure.measure(HostCommunicator(hosts), hosts, 0.0) == {}


def test_an_all_reduce_that_does_not_end_is_given_up_with_a_warning(hosts, monkeypatch):
    aborted = []

    def abort(self):
        aborted.append(self)

    monkeypatch.setattr(HostCommunicator, "abort", abort)
    monkeypatch.setattr(measure, "joined", lambda events: type("Stuck", (), {"synchronize": staticmethod(never)})())
    comm = HostCommunicator(hosts)
    with pytest.warns(RuntimeWarning, match="was not measured .*no end.*built-in sizes"):
        assert tuning.measured_anew(comm, hosts) is None
    assert aborted == [comm]
    assert all(device.unsettled for device in hosts)


def never(timeout):
    assert timeout <= 10.0
    raise DeviceTimeoutError("no end")


class Cards(HostCommunicator):
    """Virtual devices that pass for cards with algorithms to choose between."""

    def __init__(self, devices, fast):
        super().__init__(devices, Choice(**TUNABLE))
        self.fast, self.runs = fast, 0

    def all_reduce_by(self, way, buffers, bucket):
        self.runs += 1
        super().all_reduce_by(way, buffers, bucket)


@pytest.fixture
def cards(hosts, monkeypatch, tmp_path):
    """`cards(fast)`: a communicator that finds `fast` the fastest; the same machine each time."""
    monkeypatch.setenv("FASTDP_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(ALL_REDUCE, "measured")
    monkeypatch.setattr(tuning, "key_of", lambda devices, libraries: {"cards": "here"})
    monkeypatch.setattr(
        tuning,
        "measure",
        lambda comm, devices, seconds: {(n, way): 1.0 + (way != comm.fast) for n in SIZES for way in comm.choice.ways},
    )
    return lambda fast: Cards(hosts, fast)


def test_the_first_process_measures_and_later_ones_choose_as_it_did(hosts, cards):
    for fast in ("nccl", "one-shot", "two-shot"):
        comm = cards(fast)
        assert comm.choice.untuned
        tuning.tune(comm, hosts)
        assert (comm.choice.limits, comm.choice.untuned) == (Limits(-1, -1), False)
    other = cards("two-shot")
    tuning.measured_anew(other, hosts)
    assert other.choice.limits == Limits(-1, SIZES[-1])
    again = cards("nccl")
    tuning.tune(again, hosts)
    assert again.choice.limits == other.choice.limits


@pytest.mark.parametrize("limits", [[2, 1], [1], [1.0, 2.0], [True, True], "12", None])
def test_a_table_without_limits_is_measured_anew(hosts, cards, limits):
    kept_table.keep({"cards": "here"}, {"limits": limits}, replace=True)
    comm = cards("nccl")
    tuning.tune(comm, hosts)
    assert comm.choice.limits == Limits(-1, -1)


def test_without_a_file_nothing_is_measured_and_the_built_in_limits_hold(hosts, cards, monkeypatch, tmp_path):
    """Two processes would choose differently."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTDP_CACHE_DIR", str(tmp_path / "file"))
    comm = cards("nccl")
    with pytest.warns(RuntimeWarning, match="cannot keep what all-reduces take"):
        tuning.tune(comm, hosts)
    assert (comm.choice.limits, comm.choice.untuned) == (None, False)
    assert comm.choice.how("float32", 4) == built_in().way(4) == "one-shot"


@pytest.mark.parametrize(
    ("asked", "ways"), [("fixed", ["one-shot", "nccl"]), ("kernels", ["one-shot", "two-shot"]), ("nccl", ["nccl"] * 2)]
)
def test_what_the_user_asks_for_is_not_measured(monkeypatch, asked, ways):
    monkeypatch.setenv(ALL_REDUCE, f" {asked}")
    choice = Choice(**TUNABLE)
    assert not choice.untuned
    choice.use(Limits(3, 5))
    assert [choice.how("float32", nbytes) for nbytes in (4, 64 << 20)] == ways


def test_an_unknown_choice_of_the_user_s_is_refused(monkeypatch):
    monkeypatch.setenv(ALL_REDUCE, "ring")
    with pytest.raises(ValueError, match=r"FASTDP_ALL_REDUCE must be one of .*'ring'"):
        Choice(**TUNABLE)


@pytest.mark.parametrize("lacks", list(TUNABLE))
def test_only_cards_of_their_own_with_all_algorithms_are_measured(monkeypatch, lacks):
    monkeypatch.setenv(ALL_REDUCE, "")
    assert Choice(**TUNABLE).untuned
    assert not Choice(**{**TUNABLE, lacks: False}).untuned


def test_the_table_marks_what_is_used():
    lines = table(
        {(4096, "one-shot"): 1e-5, (4096, "nccl"): 4e-5, (2 << 20, "nccl"): 5e-5}, {4096: "nccl", 2 << 20: "nccl"}
    )
    assert [line.split() for line in lines] == [
        ["size", "one-shot", "nccl"],
        ["4", "KiB", "10.0", "(0.41)", "*", "40.0", "(0.10)"],
        ["2", "MiB", "-", "*", "50.0", "(41.94)"],
    ]
