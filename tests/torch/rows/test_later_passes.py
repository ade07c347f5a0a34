"""What forward keeps from pass to pass: it may begin as a zero, lie in a container, or have the rows of a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastdp

DOUBLE = torch.float64


def batches(rows=(7, 7, 7)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 4, generator=generator, dtype=DOUBLE) for count in rows]


class Keeps(nn.Module):
    """Keeps something in the way that a function says."""

    def __init__(self, keep, start):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.keep, self.kept = keep, start
        self.register_buffer("state", torch.zeros(3, dtype=DOUBLE))

    def forward(self, x):
        h = self.layer(x)
        return self.keep(self, h)


def adds_to_a_tuple(module, h):
    module.kept = (module.kept[0] + h.detach().sum(), module.kept[1] + len(h))
    return h


def adds_to_a_dict(module, h):
    module.kept = {
        "sum": module.kept["sum"] + float(h.detach().sum()),
        "most": max(module.kept["most"], float(h.max())),
    }
    return h


def adds_to_elements(module, h):
    module.kept[0] = module.kept[0] + h.detach().sum(0)
    module.kept[1] += h.shape[0]
    return h


def moves_means_in_a_tuple(module, h):
    module.kept = (0.9 * module.kept[0] + 0.1 * h.detach().mean(0), module.kept[1] + 1)
    return h


EXACT = {
    "a tuple": (adds_to_a_tuple, lambda: (torch.zeros((), dtype=DOUBLE), 0)),
    "a dict": (adds_to_a_dict, lambda: {"sum": 0.0, "most": 0.0}),
    "elements": (adds_to_elements, lambda: [torch.zeros(3, dtype=DOUBLE), 0]),
    "means": (moves_means_in_a_tuple, lambda: (torch.zeros(3, dtype=DOUBLE), 0)),
}


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("kind", EXACT)
def test_what_is_added_to_values_in_containers_is_that_of_one_device_after_several_passes(kind, devices):
    keep, start = EXACT[kind]
    module = Keeps(keep, start())
    plain = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=devices)
    for x in batches():
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(module.kept, plain.kept)


def decays_a_buffer(module, h):
    module.state.mul_(0.9).add_((h > 0).double().sum(0), alpha=0.1)
    return h


def decays_an_attribute(module, h):
    module.kept = 0.9 * module.kept + (h > 0).double().sum(0)
    return h


def decays_in_a_tuple(module, h):
    module.kept = (0.9 * module.kept[0] + (h > 0).double().sum(0),)
    return h


DECAYS = {
    "state": (decays_a_buffer, None),
    "kept": (decays_an_attribute, torch.zeros(3, dtype=DOUBLE)),
    "kept in a tuple": (decays_in_a_tuple, (torch.zeros(3, dtype=DOUBLE),)),
}


@pytest.mark.parametrize("kind", DECAYS)
def test_a_sum_that_decays_is_refused_though_it_begins_as_zero(kind):
    model = fastdp.wrap(Keeps(*DECAYS[kind]), gpus=2)
    with pytest.raises(ValueError, match=rf"`{kind.split()[0]}` .*by the rows of the batch.*all_reduce"):
        model(batches()[0])


def reads_the_last_rows(module, h):
    last, module.kept = module.kept, h.detach()
    return h if last is None else h + last.mean(0)


def reads_a_bank(module, h):
    found = h + torch.cat(module.kept).mean(0) if module.kept else h
    module.kept.append(h.detach())
    return found


def reads_the_last_rows_of_all(module, h):
    last, module.kept = module.kept, fastdp.replica.all_gather(h.detach())
    return h if last is None else h + last.mean(0)


def makes_positions_for_the_rows(module, h):
    if module.kept is None or len(module.kept) != len(h):
        module.kept = torch.arange(3, dtype=DOUBLE).expand(len(h), 3)
    return h + module.kept


@pytest.mark.parametrize(("keep", "start"), [(reads_the_last_rows, None), (reads_a_bank, [])])
def test_rows_that_the_next_forward_reads_are_refused(keep, start):
    model = fastdp.wrap(Keeps(keep, start), gpus=2)
    with pytest.raises(ValueError, match="forward sets `kept` to values with the rows of the batch, and the next"):
        model(batches()[0])


@pytest.mark.parametrize("keep", [reads_the_last_rows_of_all, makes_positions_for_the_rows])
def test_rows_of_all_devices_and_a_cache_by_the_number_of_rows_may_be_read(keep):
    module = Keeps(keep, None)
    plain = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=3)
    for x in batches((7, 7, 5, 7)):
        torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(module.kept, plain.kept)


def adds_in_place(module, h):
    module.kept += h.detach().sum()  # a number at first, then a tensor
    return h


def counts_in_place(module, h):
    module.kept = torch.zeros(()) if module.kept is None else module.kept
    module.kept += 1
    return h


def test_a_tensor_that_forward_makes_and_the_next_one_changes_by_rows_is_refused():
    with pytest.raises(ValueError, match=r"makes the tensor `kept`.*self.total \+ value in place of \+="):
        fastdp.wrap(Keeps(adds_in_place, 0), gpus=2)(batches()[0])
    module = Keeps(adds_in_place, torch.zeros((), dtype=DOUBLE))
    plain = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=2)
    counted = Keeps(counts_in_place, None)
    counts = fastdp.wrap(counted, gpus=2)
    for x in batches():
        torch.testing.assert_close((model(x), module.kept), (plain(x), plain.kept))
        counts(x)
    assert counted.kept == 3
