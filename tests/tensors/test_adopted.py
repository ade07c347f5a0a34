"""Tensors that live in flat buffers stay the same tensors, and whoever changes them is noticed."""

from __future__ import annotations

import gc

import torch

from fastdp.runtime.host.device import HostDevice
from fastdp.tensors.adopted import Adopted, Homes
from fastdp.tensors.arrays import spec_of


class Tensors(Adopted):
    """Tensors in a list."""

    def __init__(self, tensors, device):
        self.tensors, self.refused = tensors, []
        super().__init__([spec_of(str(i), tensor) for i, tensor in enumerate(tensors)], device)

    def present(self):
        return self.tensors

    def marks(self, present):
        return [tensor._version for tensor in present]

    def check(self, value, kept):
        self.refused.append((value is self.tensors[0], value.dtype == kept.dtype))


def test_tensors_keep_their_identity_and_get_the_memory_of_the_home():
    given = [torch.arange(6.0).reshape(2, 3), torch.ones(4), torch.empty(0), torch.tensor(7)]
    ids, before = [*map(id, given)], [tensor.clone() for tensor in given]
    home = Tensors(given, HostDevice(0)).home
    assert [*map(id, given)] == ids
    for tensor, old, view in zip(given, before, home.variables.views, strict=True):
        assert torch.equal(tensor, old)
        view += 1
        assert torch.equal(tensor, old + 1)


def test_an_assignment_is_noticed_once_it_was_noted():
    adopted = Tensors([torch.zeros(3), torch.zeros(2)], HostDevice(0))
    assert adopted.changed()
    adopted.note()
    assert not adopted.changed()
    adopted.tensors[1].add_(1)
    assert adopted.changed()
    adopted.note()
    adopted.tensors[0].data = torch.full((3,), 5.0)  # other memory: it is moved back, and looked at before
    assert adopted.changed()
    assert adopted.refused[-1] == (True, True)
    assert adopted.home.variables.views[0].tolist() == [5.0] * 3
    adopted.note()
    adopted.tensors[0].fill_(2)
    assert adopted.home.variables.views[0].tolist() == [2.0] * 3


def test_an_owner_has_one_home_as_long_as_its_tensors_are_the_same():
    class Owner:
        pass

    homes, made, owner = Homes(), [], Owner()

    def make():
        made.append(Tensors([torch.zeros(1)], HostDevice(0)))
        return made[-1]

    first = homes.of(owner, ["a"], make)
    assert homes.of(owner, ["a"], make) is first
    assert homes.of(owner, ["a", "b"], make) is not first
    assert homes.of(Owner(), ["a", "b"], make) is made[-1]
    del owner
    gc.collect()
    assert len(homes._homes) == 0
