"""Moments over replicas are those of the whole batch, forward and backward, with masks and without."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from fastdp.comm.rendezvous import Rendezvous
from fastdp.shard import split_rows
from fastdp.tensors.moments import Moments, combine, count_of, global_moments, unbiased
from fastdp.tensors.replica_sums import by_exchange, of_one

ROWS, REPLICAS = 11, 3
AXES = (0, 1)


def batch(seed=0):
    torch.manual_seed(seed)
    return torch.randn(ROWS, 4, 5, dtype=torch.float64) * 3 + 7


def parts_of(values):
    return [values[rows.start : rows.stop] for rows in split_rows(ROWS, REPLICAS)]


def test_the_sums_of_replicas_give_the_moments_of_the_whole_batch():
    x = batch()
    found = [Moments(x.mean(AXES), x.var(AXES, correction=0), count_of(x, None, AXES)) for x in parts_of(x)]
    sums = sum(one.sums() for one in found)
    mean, variance = combine(sums)
    np.testing.assert_allclose(mean, x.mean(AXES).numpy(), rtol=1e-13)
    np.testing.assert_allclose(variance, x.var(AXES, correction=0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(variance * unbiased(sums[0]), x.var(AXES).numpy(), rtol=1e-12)


def test_a_batch_without_values_has_moments_of_zero():
    mean, variance = combine(np.zeros(5))
    assert mean.tolist() == variance.tolist() == [0.0, 0.0]
    assert unbiased(1) == 1.0


@pytest.mark.parametrize(
    ("mask", "count"),
    [(None, 44.0), (torch.arange(44).reshape(ROWS, 4) % 3 > 0, 29.0), (torch.arange(ROWS)[:, None] % 2 > 0, 20.0)],
)
def test_a_mask_says_how_many_values_count(mask, count):
    assert count_of(batch(), mask, AXES) == count


def together(work):
    """What `work(exchange, rank)` gives on each of several threads that meet."""
    rendezvous, results = Rendezvous(REPLICAS, 10.0), [None] * REPLICAS

    def run(rank):
        results[rank] = work(lambda value, place: rendezvous.exchange(rank, value, place), rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(REPLICAS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert None not in results
    return results


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sum_dtype", [None, torch.float64])
def test_global_moments_and_their_gradients_are_those_of_one_device(masked, sum_dtype):
    x, mask = batch().requires_grad_(), torch.arange(ROWS * 4).reshape(ROWS, 4) % 3 > 0 if masked else None
    kept = x if mask is None else x[mask]
    mean, variance = kept.mean(AXES if mask is None else 0), kept.var(AXES if mask is None else 0, correction=0)
    (mean.sin().sum() + (variance * torch.arange(5.0)).sum()).backward()
    masks = [None] * REPLICAS if mask is None else parts_of(mask)

    def replica(exchange, rank):
        own = parts_of(x.detach())[rank].clone().requires_grad_()
        found = global_moments(own, masks[rank], AXES, by_exchange(exchange), "a layer", sum_dtype)
        # Each replica's loss is a part of the whole one.
        share = (1.0, 2.0, 4.0)[rank] / 7.0
        loss = share * (found[0].sin().sum() + (found[1] * torch.arange(5.0)).sum())
        torch.autograd.backward([loss])
        return found, own.grad

    results = together(replica)
    for found, _ in results:
        torch.testing.assert_close(found, (mean, variance), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in results]), x.grad, rtol=1e-10, atol=1e-14)


def test_moments_are_in_the_dtype_of_the_inputs():
    x = batch().float()
    mean, variance = global_moments(x, None, AXES, of_one, "a layer", torch.float64)
    assert mean.dtype == variance.dtype == torch.float32
