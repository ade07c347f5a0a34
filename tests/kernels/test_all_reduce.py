"""The all-reduces and the reduce-scatter give every rank the twin's bits, in any timing, and never hang."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastdp import launch
from fastdp.bfloat16 import to_bfloat16
from fastdp.comm.tree import sum_in_tree
from fastdp.launch import SIGNALS_NBYTES, PeerGroup, coresident_blocks
from fastdp.launch import reference as twins

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
STAGING_NBYTES = 2 * 4096
KINDS = ["one_shot", "two_shot", "reduce_scatter"]


def random_array(dtype: str, n: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(n).astype(np.float32) * 100
    return to_bfloat16(values) if dtype == "bfloat16" else values.astype(NUMPY[dtype])


class Ranks:
    """Virtual ranks on one device: each has a stream, and all see each other's memory."""

    def __init__(self, host, count: int, *, max_blocks: int = 2, threads: int = 8, **options) -> None:
        self.host = host
        staging = tuple(host.empty(STAGING_NBYTES) for _ in range(count))
        signals = tuple(host.put(np.zeros(SIGNALS_NBYTES, np.uint8)) for _ in range(count))
        self.groups = [
            PeerGroup(
                rank=rank,
                staging=staging,
                staging_nbytes=STAGING_NBYTES,
                signals=signals,
                error=host.put(np.zeros(1, np.uint32)),
                max_blocks=max_blocks,
                threads=threads,
                **options,
            )
            for rank in range(count)
        ]

    def enqueue(self, kind, inputs, outputs, n, dtype, scale=1.0, ranks=None):
        """One all-reduce on every rank's stream, or on those of `ranks`."""
        for group in self.groups if ranks is None else [self.groups[rank] for rank in ranks]:
            options = {"y": outputs[group.rank], "n": n, "dtype": dtype, "scale": scale, "stream": group.rank}
            if kind == "one_shot":
                launch.all_reduce_one_shot(self.host.kernels, group, x=inputs[group.rank], **options)
            elif kind == "reduce_scatter":
                launch.reduce_scatter(self.host.kernels, group, inputs=inputs, **options)
            else:
                launch.all_reduce_two_shot(self.host.kernels, group, inputs=inputs, **options)

    def errors(self) -> list[int]:
        return [int(self.host.get(group.error, np.zeros(1, np.uint32))[0]) for group in self.groups]


def reduced(kind, arrays, before, scale=1.0, *, tree=False):
    """What each rank's output holds afterwards; a reduce-scatter leaves what is not the rank's own."""
    if kind != "reduce_scatter":
        return [twins.all_reduce(arrays, scale=scale, tree=tree)] * len(arrays)
    results = [x.copy() for x in before]
    for rank, result in enumerate(results):
        twins.reduce_scatter(arrays, result, rank, scale=scale, tree=tree)
    return results


def check_once(host, kind, count, n, dtype, *, in_place=False, lead=0, scale=1.0, tree=False, **options):
    arrays = [random_array(dtype, n, seed) for seed in range(count)]
    with host.scope():
        ranks = Ranks(host, count, tree=tree, **options)
        inputs = [host.put(x, lead * x.itemsize) for x in arrays]
        before = arrays if in_place else [np.full_like(x, 7) for x in arrays]
        outputs = inputs if in_place else [host.put(x, lead * x.itemsize) for x in before]
        ranks.enqueue(kind, inputs, outputs, n, dtype, scale)
        for output, expected in zip(outputs, reduced(kind, arrays, before, scale, tree=tree), strict=True):
            assert host.get(output, expected).tobytes() == expected.tobytes()
        assert ranks.errors() == [0] * count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_rank_gets_the_bits_of_the_sum_in_rank_order(host, kind, dtype, count):
    for n in (1, 7, 130, 1000):
        check_once(host, kind, count, n, dtype, scale=1 / count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_shards_are_added_in_a_tree(host, kind, count):
    check_once(host, kind, count, 130, "float32", tree=True)
    check_once(host, kind, count, 130, "bfloat16", tree=True)


def test_a_tree_has_other_bits_than_the_order_of_ranks():
    arrays = [random_array("float32", 1000, seed) for seed in range(8)]
    in_tree = twins.all_reduce(arrays, tree=True)
    a, b, c, d, e, f, g, h = arrays
    assert in_tree.tobytes() == (((a + b) + (c + d)) + ((e + f) + (g + h))).tobytes()
    assert in_tree.tobytes() == sum_in_tree(arrays).tobytes()
    assert in_tree.tobytes() != twins.all_reduce(arrays).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [0, 1])
def test_the_output_may_be_the_input_at_any_alignment(host, kind, lead):
    check_once(host, kind, 4, 999, "float32", in_place=True, lead=lead)
    check_once(host, kind, 3, 999, "bfloat16", in_place=True, lead=lead)


@pytest.mark.parametrize("kind", KINDS)
def test_one_thread_in_one_block_is_enough(host, kind):
    check_once(host, kind, 8, 50, "float32", max_blocks=1, threads=1)


def run_sequence(host, count: int, rounds: int) -> None:
    """Launches of all kinds and of changing sizes, back to back on shared staging, without a host reset."""
    sizes = [600, 3, 1000, 64, 999, 8]
    with host.scope():
        ranks = Ranks(host, count)
        results = []
        for turn in range(rounds):
            n, kind = sizes[turn % len(sizes)], KINDS[(turn // 2) % 3]
            arrays = [random_array("float32", n, turn * count + rank) for rank in range(count)]
            inputs = [host.put(x) for x in arrays]
            before = arrays if turn % 4 == 0 else [np.full_like(x, 7) for x in arrays]
            outputs = inputs if turn % 4 == 0 else [host.put(x) for x in before]
            ranks.enqueue(kind, inputs, outputs, n, "float32")
            results.append((outputs, reduced(kind, arrays, before)))
        host.synchronize()
        for outputs, wanted in results:
            for output, expected in zip(outputs, wanted, strict=True):
                assert host.get(output, expected).tobytes() == expected.tobytes()
        assert ranks.errors() == [0] * count


def test_launches_back_to_back_share_the_staging_without_mixing(host):
    run_sequence(host, count=3, rounds=24)


def test_no_data_race_between_ranks_launch_after_launch(racing_host):
    """Under the thread sanitizer: every access to peer memory is ordered by a release and an acquire."""
    run_sequence(racing_host, count=3, rounds=24)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_launch_replays_with_the_same_bytes(host, kind):
    """A CUDA graph repeats the argument bytes: the epoch must come from device memory."""
    count, n = 3, 500
    with host.scope():
        ranks = Ranks(host, count)
        inputs = [host.empty(4 * n) for _ in range(count)]
        before = [np.full(n, 7, np.float32)] * count
        outputs = [host.put(x) for x in before]
        ranks.enqueue(kind, inputs, outputs, n, "float32")
        recorded = list(host.launches)
        for turn in range(4):
            arrays = [random_array("float32", n, turn * count + rank) for rank in range(count)]
            for address, x in zip(inputs, arrays, strict=True):
                host.write(address, x)
            if turn:
                for stream, launched in enumerate(recorded):
                    host.launch(*launched, stream=stream)
            for output, expected in zip(outputs, reduced(kind, arrays, before), strict=True):
                assert host.get(output, expected).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_never_comes_sets_the_error_flag_and_leaves_the_output(host, kind):
    n = 300
    with host.scope():
        ranks = Ranks(host, 3, spin_limit=2000)
        inputs = [host.put(random_array("float32", n, rank)) for rank in range(3)]
        outputs = [host.put(np.full(n, 7, np.float32)) for _ in range(3)]
        ranks.enqueue(kind, inputs, outputs, n, "float32", ranks=[0, 2])
        host.synchronize()
        first, missing, third = ranks.errors()
        assert first in (2, 3)  # 1 + a rank it waited for in vain: on a busy machine the late one too
        assert missing == 0
        assert third in (1, 2)
        for rank in (0, 2):
            assert (host.get(outputs[rank], np.zeros(n, np.float32)) == 7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_time_out_all_ranks_fail_at_the_latest_one_launch_later_and_a_reset_mends_it(host, kind):
    n = 300
    arrays = [random_array("float32", n, rank) for rank in range(2)]
    wanted = reduced(kind, arrays, [np.full(n, 7, np.float32)] * 2)
    with host.scope():
        ranks = Ranks(host, 2, spin_limit=2000)
        inputs = [host.put(x) for x in arrays]
        outputs = [host.put(np.full(n, 7, np.float32)) for _ in range(2)]
        ranks.enqueue(kind, inputs, outputs, n, "float32", ranks=[0])
        assert ranks.errors() == [2, 0]  # 1 + the missing rank
        for _ in range(2):
            host.synchronize()
            ranks.enqueue(kind, inputs, outputs, n, "float32")
        assert min(ranks.errors()) > 0
        assert (host.get(outputs[0], wanted[0]) == 7).all()
        for group in ranks.groups:
            host.write(group.signals[group.rank], np.zeros(SIGNALS_NBYTES, np.uint8))
            host.write(group.error, np.zeros(1, np.uint32))
        ranks.groups = [replace(group, spin_limit=50_000_000) for group in ranks.groups]
        ranks.enqueue(kind, inputs, outputs, n, "float32")
        for output, expected in zip(outputs, wanted, strict=True):
            assert host.get(output, expected).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_launched_for_no_elements(host, kind):
    with host.scope():
        Ranks(host, 2).enqueue(kind, [4096] * 2, [4096] * 2, 0, "float32")
        assert host.launches == []


def test_all_ranks_of_a_card_fit_on_it_at_once():
    for sm_count in (1, 16, 46, 80, 108, 132):
        for ranks in range(1, min(8, sm_count) + 1):
            assert 1 <= coresident_blocks(sm_count, ranks) * ranks <= sm_count or ranks == 1
            assert coresident_blocks(sm_count, ranks) <= 64
    with pytest.raises(ValueError, match="ranks_on_card=9"):
        coresident_blocks(8, 9)


def test_the_grid_keeps_the_bound_of_blocks(host):
    with host.scope():
        ranks = Ranks(host, 1, max_blocks=2, threads=8)
        at = host.put(np.zeros(1000, np.float32))
        ranks.enqueue("one_shot", [at], [at], 1000, "float32")
        ranks.enqueue("one_shot", [at], [at], 1, "float32")
        assert [grid for _, grid, _, _ in host.launches] == [2, 1]


@pytest.mark.parametrize(("kind", "n"), [("one_shot", 1025), ("two_shot", 2049)])
def test_a_staging_buffer_that_is_too_small_is_refused(host, kind, n):
    with host.scope():
        ranks = Ranks(host, 2)
        with pytest.raises(ValueError, match="staging_nbytes=8192 for"):
            ranks.enqueue(kind, [4096] * 2, [4096] * 2, n, "float32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 2}, "expected a rank of 1 to 8"),
        ({"staging": (16,)}, "one of each per rank"),
        ({"staging": (16, 24)}, "aligned to 16 bytes"),
        ({"max_blocks": 65}, "1 to 64 blocks"),
        ({"threads": 513}, "1 to 512 threads"),
        ({"error": 0}, "the address of an error flag"),
        ({"signals": (16,) * 9, "staging": (16,) * 9}, "use NCCL for more ranks"),
    ],
)
def test_a_group_that_cannot_be_is_refused(change, said):
    fields = {"rank": 0, "staging": (16, 32), "staging_nbytes": 64, "signals": (16, 32), "error": 16}
    with pytest.raises(ValueError, match=said):
        PeerGroup(**{**fields, "max_blocks": 1, **change})
