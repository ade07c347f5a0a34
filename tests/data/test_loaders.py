"""`fastdp.data.prefetch`: the same batches of any loader, ahead where that changes no result."""

import dataclasses
import random
import threading

import numpy as np
import pytest
import torch
from ahead_threads import alive, wait_until
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fastdp
from fastdp.data import ahead_guard, prefetch

ROWS = torch.arange(24.0).reshape(12, 2)


@pytest.fixture(autouse=True)
def _looks_at_each_batch(monkeypatch):
    monkeypatch.setattr(ahead_guard, "LOOK_SECONDS", 0.0)
    yield
    wait_until(lambda: not alive())


class Rows(Dataset):
    def __init__(self, draws=None):
        self.draws, self.ahead = draws, []

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        self.ahead.append(bool(alive()) and threading.current_thread() in alive())
        return ROWS[i] + (self.draws() if self.draws is not None else 0)


class Stream(IterableDataset):
    def __iter__(self):
        yield from ROWS


class Records:
    """By the protocol of Hugging Face data sets: rows by number, and several at once."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return {"x": ROWS[i].numpy(), "label": int(i)}

    def __getitems__(self, numbers):
        return [self[i] for i in numbers]


class Pipeline:
    """By the protocol of grain and WebDataset: an iterable that begins anew each time."""

    def __iter__(self):
        for i in range(0, 12, 2):
            yield {"x": ROWS[i : i + 2].numpy(), "text": ["a", "b"]}


def generator():
    for i in range(6):
        yield ROWS[2 * i : 2 * i + 2].numpy(), np.full((2,), i, np.uint8)


LOADERS = {
    "tensors": lambda: DataLoader(TensorDataset(ROWS), 2, shuffle=True),
    "rows": lambda: DataLoader(Rows(), 2, shuffle=True),
    "own generator": lambda: DataLoader(Rows(), 2, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "stream": lambda: DataLoader(Stream(), 2),
    "records": lambda: DataLoader(Records(), 2, shuffle=True),
    "pipeline": Pipeline,
    "list": lambda: [torch.ones(2), torch.zeros(2)] * 3,
    "generator": generator,
}


def equal(one, other):
    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(other) and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_are_those_of_the_loader_in_its_order_and_read_ahead(kind):
    passes = 1 if kind == "generator" else 2
    torch.manual_seed(3)
    loader = LOADERS[kind]()
    wanted = [list(loader) for _ in range(passes)]
    torch.manual_seed(3)
    ahead = prefetch(LOADERS[kind]())
    found = [list(ahead) for _ in range(passes)]
    assert equal(found, wanted)
    report = ahead.report()
    assert report["batches"] == 6 * passes
    assert report["read_ahead"] >= 4 * passes - 1
    assert report["how"].endswith("by a thread, 2 batches ahead")
    assert 0.0 <= report["share"] <= 1.0


GENERATORS = {
    "Python's": random.random,
    "NumPy's": np.random.rand,
    "torch's": lambda: torch.rand(()),
}


@pytest.mark.parametrize("whose", GENERATORS)
@pytest.mark.parametrize("by", ["data", "loop"])
def test_while_a_generator_moves_nothing_is_read_ahead_and_draws_stay_in_order(whose, by):
    draw, results = GENERATORS[whose], []
    for wrap in (list, prefetch, lambda loader: prefetch(loader, 0)):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        data = Rows(draw if by == "data" else None)
        loader = DataLoader(data, 2, shuffle=True)
        batches = wrap(loader) if wrap is not list else loader
        results.append([(batch.tolist(), float(draw())) for batch in batches])
        assert not any(data.ahead)
        if wrap is prefetch:
            assert whose in batches.report()["how"]
    assert results[0] == results[1] == results[2]


def test_data_that_begin_to_draw_are_read_no_further_ahead():
    calls = []

    def late():
        calls.append(None)
        return random.random() if len(calls) > 10 else 0.0

    data = Rows(late)
    random.seed(4)
    ahead = prefetch(DataLoader(data, 1))
    found = [float(batch[0, 0]) for batch in ahead]
    random.seed(4)
    assert found == pytest.approx([float(row[0]) + (random.random() if i >= 10 else 0) for i, row in enumerate(ROWS)])
    assert "Python's generator moves" in ahead.report()["how"]
    assert data.ahead[3]


def test_code_that_refers_to_a_model_is_not_read_ahead():
    model = torch.nn.Linear(2, 2)

    def asks():
        for i in range(6):
            yield ROWS[i] @ model.weight.detach()

    class Holds(Rows):
        def __init__(self):
            super().__init__()
            self.embed = {"by": [model]}

    for loader in (asks(), DataLoader(Holds(), 2)):
        ahead = prefetch(loader)
        assert len(list(ahead)) == 6
        assert ahead.report()["read_ahead"] == 0
        assert "refers to the model or layer Linear" in ahead.report()["how"]


def test_transforms_without_weights_are_no_model():
    class Flip(torch.nn.Module):
        def forward(self, x):
            return x.flip(0)

    data = Rows()
    data.transform = Flip()
    ahead = prefetch(DataLoader(data, 2))
    assert len(list(ahead)) == 6
    assert ahead.report()["read_ahead"] == 4


def test_a_loader_with_workers_reads_ahead_itself():
    ahead = prefetch(DataLoader(TensorDataset(ROWS), 6, num_workers=1))
    assert equal(list(ahead), [[ROWS[:6]], [ROWS[6:]]])
    assert ahead.report()["how"].endswith("by its 1 worker processes")


def test_data_may_fill_the_same_array_again():
    def fills():
        same = np.empty((2, 2), np.float32)
        for i in range(6):
            same[...] = i
            yield same

    assert [batch.tolist() for batch in prefetch(fills(), 3)] == [[[i] * 2] * 2 for i in range(6)]


def test_an_object_that_is_handed_out_again_is_not_read_ahead():
    class Box:
        value = -1

    def fills():
        box = Box()
        for i in range(6):
            box.value = i
            yield box

    ahead = prefetch(fills())
    assert [box.value for box in ahead] == list(range(6))
    assert "the same Box again" in ahead.report()["how"]


def test_floats_are_cast_on_the_way_and_images_are_not():
    @dataclasses.dataclass
    class Other:
        text: str

    batch = (np.ones(2), {"x": torch.ones(2, dtype=torch.float64)}, np.ones(2, np.uint8), Other("a"))
    x, named, image, other = next(iter(prefetch([batch], dtype=torch.float32)))
    assert (x.dtype, named["x"].dtype, image.dtype, other) == (np.float32, torch.float32, np.uint8, Other("a"))


def test_a_loop_that_ends_early_leaves_no_thread_and_loses_no_batch_of_an_iterator():
    numbers = prefetch(iter(range(12)), 3)
    for number in numbers:
        if number == 5:
            break
    wait_until(lambda: not alive())
    assert list(numbers) == list(range(6, 12))
    with pytest.raises(ZeroDivisionError):
        [1 / (number - 4) for number in prefetch(range(12))]


def test_settings_of_the_callers_thread_count_in_the_thread():
    def looks():
        for _ in range(5):
            yield torch.is_grad_enabled(), torch.is_inference_mode_enabled(), np.geterr()["over"]

    with torch.inference_mode(), np.errstate(over="ignore"):
        assert list(prefetch(looks())) == [(False, True, "ignore")] * 5
    with torch.autocast("cpu"):
        ahead = prefetch(looks())
        list(ahead)
    assert "inside torch.autocast" in ahead.report()["how"]


def test_a_loop_goes_on_in_mid_epoch_from_a_checkpoint(tmp_path):
    def run(stop=None):
        torch.manual_seed(1)
        model = torch.nn.Linear(2, 1)
        loader = prefetch(DataLoader(TensorDataset(ROWS), 2, shuffle=True))
        seen = []
        with fastdp.Checkpoint(tmp_path / str(stop is not None), model=model, every_steps=1) as checkpoint:
            checkpoint.restore()
            for _ in checkpoint.epochs(2):
                for (x,) in checkpoint.batches(loader):
                    seen.append(x.tolist())
                    checkpoint.step()
                    if len(seen) == stop:
                        return seen
        return seen

    whole = run()
    first = run(stop=4)
    assert [*first, *run(stop=99)] == whole


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "`loader` must be an iterable"),
        (([], -1), ValueError, "batches=-1"),
        (([], 1.5), TypeError, "float"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        prefetch(*arguments)
    with pytest.raises(ValueError, match="dtype='int32'"):
        prefetch([], dtype="int32")
    with pytest.raises(ValueError, match="timeout=0"):
        prefetch([], timeout=0)
