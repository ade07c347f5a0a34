"""The public collectives: on 1, 2, 3 and 8 devices against plain torch on the whole batch."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import fastdp
from fastdp import replica
from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.shard import split_rows
from fastdp.tensors.collectives import StepPeers, peers_scope

X = torch.randn(11, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def on_replicas(work, devices):
    """The results of `work(rows)` on threads that meet each other as the replicas of a step do."""
    shards = split_rows(len(X), devices)
    meeting, found, failed = Rendezvous(devices, 10.0), [None] * devices, []

    def run(rank, rows):
        context = Context(rank, rows, 0, meeting, devices, Batch([], None, len(X)))
        try:
            with peers_scope(StepPeers(context)):
                found[rank] = work(rows)
        except (RuntimeError, ValueError) as error:
            failed.append(error)
            meeting.abort(error)

    threads = [threading.Thread(target=run, args=one) for one in enumerate(shards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def value_and_gradient(loss, rows, share):
    own = X[rows].clone().requires_grad_()
    value = loss(own)
    (value * share).backward()
    return value.detach(), own.grad


LOSSES = {
    "a count over all rows": lambda x: replica.all_reduce((x * x).sum()) / replica.all_reduce(x.exp().sum()),
    "a mean over all rows": lambda x: (replica.all_reduce(x.mean(0), "mean") ** 3).sum(),
    "the largest of all rows": lambda x: replica.all_reduce(x.amax(0), "max").exp().sum(),
    "the smallest of all rows": lambda x: replica.all_reduce(x.amin(0), "min").exp().sum(),
    "logits of all pairs": lambda x: torch.logsumexp(replica.all_gather(x) @ replica.all_gather(x).T, 1).sum(),
    "along the second axis": lambda x: replica.all_gather(x.T, axis=1).cumsum(1).square().sum(),
}


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("case", LOSSES)
def test_values_and_gradients_are_those_of_the_whole_batch(case, devices):
    expected, gradient = value_and_gradient(LOSSES[case], slice(None), 1.0)
    found = on_replicas(
        lambda rows: value_and_gradient(LOSSES[case], slice(rows.start, rows.stop), rows.share), devices
    )
    for value, _ in found:
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.cat([own for _, own in found]), gradient, rtol=0, atol=1e-9)


def test_a_scalar_is_gathered_into_one_entry_per_replica():
    found = on_replicas(lambda rows: replica.all_gather(torch.tensor(replica.rank())), 3)
    assert [one.tolist() for one in found] == [[0, 1, 2]] * 3


def test_replicas_know_their_rank_number_and_rows():
    found = on_replicas(lambda rows: (replica.rank(), replica.count(), replica.rows() == rows), 3)
    assert found == [(0, 3, True), (1, 3, True), (2, 3, True)]


def test_counts_and_truths_are_reduced_in_their_own_dtype():
    found = on_replicas(lambda rows: replica.all_reduce(torch.tensor(rows.count)), 3)
    assert all(one.dtype == torch.int64 and one == 11 for one in found)
    found = on_replicas(lambda rows: replica.all_reduce(torch.tensor(rows.start == 0), "max"), 3)
    assert all(one.dtype == torch.bool and one for one in found)


def test_outside_of_a_step_every_function_is_the_identity():
    assert replica.all_gather(X) is X
    assert replica.all_reduce(X, "mean") is X
    assert (replica.rank(), replica.count(), replica.rows()) == (0, 1, None)
    assert fastdp.replica is replica


def test_what_cannot_be_reduced_is_an_error():
    with pytest.raises(ValueError, match="`op` must be one of"):
        replica.all_reduce(X, "median")
    with pytest.raises(TypeError, match="`tensor` must be a torch tensor"):
        replica.all_gather([1.0])


class Padded(torch.nn.Module):
    """A loss inside of the module, over the entries that count; and a value relative to the mean of all rows."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, mask):
        y = self.linear(x)
        y = y - replica.all_reduce(y.mean(0), "mean")
        loss = replica.all_reduce((y**2 * mask).sum()) / replica.all_reduce(mask.sum())
        return loss, y


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_a_module_that_calls_collectives_trains_as_on_one_device(devices):
    torch.manual_seed(0)
    module = Padded().double()
    reference = copy.deepcopy(module)
    mask = torch.ones(11, 4, dtype=torch.float64)
    mask[3:] = 0.0  # on 8 devices most replicas are all padding
    loss = lambda outputs: outputs[0] + (outputs[1] ** 3).sum()  # noqa: E731
    parallel = fastdp.wrap(module, gpus=devices, rows={"output[0]": "same"})
    step = parallel.train_step(loss, lambda p: torch.optim.SGD(p, lr=0.05))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        expected = loss(reference(X, mask))
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(step((X, mask)), expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.state_dict(), reference.state_dict(), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(parallel(X, mask), reference(X, mask), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_collectives_meet_in_the_users_own_loop_too(devices):
    torch.manual_seed(0)
    module = Padded().double()
    reference = copy.deepcopy(module)
    mask = torch.ones(11, 4, dtype=torch.float64)
    mask[3:] = 0.0
    parallel = fastdp.wrap(module, gpus=devices, rows={"output[0]": "same"})
    for model in (parallel, reference):
        first, second = model(X, mask)
        (first + (second**3).sum()).backward()
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
