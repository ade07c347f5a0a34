"""The `gpus` argument of multi_gpu_model: one test for each row of the compatibility table."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

import fastdp


@pytest.fixture(autouse=True)
def four_visible() -> Iterator[None]:
    fastdp.set_virtual_devices(4)
    yield
    fastdp.set_virtual_devices(8)


def model() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


def ordinals(gpus: Any) -> list[int]:
    return [device.index for device in fastdp.multi_gpu_model(model(), gpus=gpus).devices]


@pytest.mark.parametrize("visible", [0, 1])
def test_none_with_fewer_than_two_devices_is_a_value_error_that_names_virtual_devices(visible: int) -> None:
    """keras-team/keras #11644: what was found is named."""
    fastdp.set_virtual_devices(visible)
    with pytest.raises(ValueError, match="set_virtual_devices"):
        fastdp.multi_gpu_model(model(), gpus=None)


@pytest.mark.parametrize("gpus", [None, 0, [], ()])
def test_none_zero_and_empty_mean_all_visible_devices(gpus: Any) -> None:
    assert ordinals(gpus) == [0, 1, 2, 3]


@pytest.mark.parametrize("gpus", [1, -3, True])
def test_fewer_than_two_is_a_value_error(gpus: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"gpus={gpus}")):
        fastdp.multi_gpu_model(model(), gpus=gpus)


@pytest.mark.parametrize("gpus", [[0], (0,)])
def test_a_list_of_one_is_a_value_error_that_shows_it(gpus: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"gpus={gpus}")):
        fastdp.multi_gpu_model(model(), gpus=gpus)


@pytest.mark.parametrize("gpus", [[1, 3], (3, 1)])
def test_the_order_of_a_list_is_the_order_of_the_rows(gpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ordinals(gpus) == list(gpus)
    first = f"fastdp-virtual:{gpus[0]}"  # the caller may do its part

    class Where(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            name = threading.current_thread().name.replace("MainThread", first)
            print(name, int(x[0, 0]))  # noqa: T201 - all devices would write a list
            return x

    parallel = fastdp.multi_gpu_model(keras.Sequential([keras.Input((1,)), Where()]), gpus=gpus)
    x = np.arange(4, dtype="float32")[:, None]
    parallel.predict_on_batch(x)  # on the first batch rows are tried out on the host
    capsys.readouterr()
    parallel.predict_on_batch(x)
    seen = sorted(capsys.readouterr().out.split("\n"), key=lambda line: line[-1:])
    assert seen == ["", f"fastdp-virtual:{gpus[0]} 0", f"fastdp-virtual:{gpus[1]} 2"]


def test_a_device_named_twice_is_a_value_error_that_says_virtual_devices() -> None:
    with pytest.raises(ValueError, match="set_virtual_devices"):
        fastdp.multi_gpu_model(model(), gpus=[0, 0])


@pytest.mark.parametrize("gpus", [[0, 7], 8])
def test_missing_devices_are_a_value_error_that_names_wanted_available_and_remedy(gpus: Any) -> None:
    """keras-team/keras #8213 #10548 #13302: say what was found."""
    with pytest.raises(ValueError, match=r"wants.*virtual:3.*(fewer|0 to 3)"):
        fastdp.multi_gpu_model(model(), gpus=gpus)


def test_a_whole_number_of_numpys_is_a_number() -> None:
    assert ordinals(np.int64(2)) == [0, 1]


@pytest.mark.parametrize("gpus", [range(2), np.array([0, 1])])
def test_ranges_and_arrays_of_ints_work_as_lists(gpus: Any) -> None:
    assert ordinals(gpus) == [0, 1]


@pytest.mark.parametrize("gpus", [2.0, "2", {0, 1}, np.array([0.0, 1.0]), [0, "1"], object()])
def test_anything_else_is_a_value_error(gpus: Any) -> None:
    with pytest.raises(ValueError, match="`gpus` must be"):
        fastdp.multi_gpu_model(model(), gpus=gpus)


def test_wrap_takes_the_same_and_one_device_too() -> None:
    for gpus, expected in ((1, [0]), ([2], [2]), (None, [0, 1, 2, 3]), ((3, 1), [3, 1])):
        assert [device.index for device in fastdp.wrap(model(), gpus=gpus).devices] == expected


def test_errors_of_wrap_name_it() -> None:
    with pytest.raises(ValueError, match=r"`fastdp\.wrap` with gpus=9 wants the devices"):
        fastdp.wrap(model(), gpus=9)
    with pytest.raises(ValueError, match=r"`fastdp\.wrap` got a model that is parallel already"):
        fastdp.wrap(fastdp.wrap(model(), gpus=2), gpus=2)


def test_the_documented_idiom_falls_back_to_the_model_itself() -> None:
    fastdp.set_virtual_devices(1)
    made = model()
    try:
        parallel: keras.Model = fastdp.multi_gpu_model(made)
    except ValueError:
        parallel = made
    assert parallel is made
