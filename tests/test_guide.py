"""The user guide: its code runs, and what it points to is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_results
import keras  # the guide's first lines need it
import numpy as np
import pytest
import torch
from trace_files import TraceFile

import fastdp
from fastdp.benchmark.result import save

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
ALL_CODE = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
CHECKPOINTS = [code for code in ALL_CODE if "Checkpoint(" in code]
CODE = [code for code in ALL_CODE if code not in CHECKPOINTS]


def code_with(part: str) -> str:
    """The guide's block that has this in it."""
    return next(code for code in CODE if part in code)


@pytest.fixture(autouse=True)
def no_devices_afterwards() -> Iterator[None]:
    yield
    fastdp.set_virtual_devices(0)


def test_the_first_lines_train_and_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).random((300, 20), np.float32)
    names: dict[str, Any] = {"x": x, "y": keras.utils.to_categorical(x[:, :10].argmax(axis=1), 10)}
    exec(CODE[0], names)
    assert len(names["parallel"].devices) == 4
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), names["model"].predict(x, verbose=0))


def test_the_lines_that_keep_checkpoints_go_on_where_they_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fastdp.set_virtual_devices(2)
    for _ in range(2):
        names: dict[str, Any] = {}
        exec(CHECKPOINTS[0], names)
        assert names["checkpoint"].position == (3, 0, 12)
        weights = torch.load(tmp_path / "run" / "step-00000012" / "model.pt")
        torch.testing.assert_close(weights, names["module"].state_dict(), rtol=0, atol=0)


def test_the_lines_that_keep_checkpoints_of_fit_leave_a_plain_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fastdp.set_virtual_devices(2)
    names: dict[str, Any] = {"fastdp": fastdp}
    exec(CHECKPOINTS[1], names)
    loaded = keras.models.load_model(tmp_path / "fit" / "step-00000012" / "model.keras")
    np.testing.assert_array_equal(loaded.get_weights()[0], names["template"].get_weights()[0])


def test_the_lines_with_augmentation_mix_labels_on_both_devices() -> None:
    names: dict[str, Any] = {}
    exec(code_with("augment=layers"), names)
    assert names["parallel"].optimizer.iterations == 2


def test_the_lines_with_a_loader_read_it_ahead() -> None:
    names: dict[str, Any] = {}
    exec(code_with("prefetch(torch.utils.data.DataLoader"), names)
    assert names["x"].shape == (16, 4)
    assert names["loader"].report()["batches"] == 4


def test_the_lines_with_rows_on_the_devices_train_a_module() -> None:
    names: dict[str, Any] = {}
    exec(code_with("collate_fn=data.collate"), names)
    assert [entry["steps"] for entry in names["parallel"].report()] == [4]
    assert float(names["loss"]) > 0


def test_the_lines_with_shards_train_and_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fastdp.set_virtual_devices(8)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    exec(CHECKPOINTS[2], {"fastdp": fastdp, "model": model, "x": np.ones((30, 6)), "y": np.ones((30, 3))})
    assert "shards=8" in CHECKPOINTS[2]
    assert (tmp_path / "run" / "step-00000001").is_dir()


def test_the_lines_of_an_own_loop_train_as_on_one_device() -> None:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    weights = []
    for count in (0, 3):
        fastdp.set_virtual_devices(count)
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, kernel_regularizer="l2")])
        parallel = fastdp.wrap(model, gpus=3) if count else model
        batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3]), batch_size=8)
        loss = torch.nn.functional.mse_loss
        exec(
            code_with("loss_function"),
            {"torch": torch, "parallel": parallel, "batches": batches, "loss_function": loss},
        )
        weights.append(model.get_weights())
    for found, wanted in zip(*weights, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_lines_that_watch_a_run_write_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fastdp.set_virtual_devices(2)
    parallel = fastdp.wrap(keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)]), gpus=2, compile=None)
    parallel.compile("sgd", "mse")
    exec(code_with('Monitor("run.csv"'), {"parallel": parallel, "x": np.ones((30, 6)), "y": np.ones((30, 3))})
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 4
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"train", "validation"}
    assert "fastdp: 2 devices, 3 training steps." in capsys.readouterr().out


def test_the_lines_that_trace_steps_write_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fastdp.set_virtual_devices(2)
    parallel = fastdp.wrap(keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)]), gpus=2, compile=None)
    parallel.compile("sgd", "mse")
    exec(
        code_with("fastdp.trace("),
        {"fastdp": fastdp, "parallel": parallel, "x": np.ones((600, 6)), "y": np.ones((600, 3))},
    )
    found = [TraceFile(tmp_path / f"{name}.json").check().named("train step") for name in ("steps", "three")]
    assert [len(steps) for steps in found] == [3, 3]


def test_the_lines_that_show_a_benchmark_in_a_notebook_make_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(benchmark_results.result(), tmp_path / "results" / "result.json")
    value = compile(code_with("report_page").replace("\nPage(", "\npage = Page("), "guide", "exec")
    names: dict[str, Any] = {}
    exec(value, names)
    assert "MLP of 3 layers" in names["page"]._repr_html_()


def test_the_lines_for_a_torch_module_train_it() -> None:
    fastdp.set_virtual_devices(4)
    module = torch.nn.Linear(6, 3)
    before = module.weight.detach().clone()
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.argmax(dim=1) % 3), batch_size=8)
    names: dict[str, Any] = {"fastdp": fastdp, "torch": torch, "module": module, "loader": loader}
    exec(code_with("dp.train_step("), names)
    assert len(names["dp"].devices) == 4
    assert float(names["loss"]) > 0
    assert not torch.equal(module.weight, before)


def test_the_line_that_leaves_out_steps_with_a_nan_leaves_the_weights() -> None:
    fastdp.set_virtual_devices(8)
    names: dict[str, Any] = {"fastdp": fastdp, "model": keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])}
    exec(code_with("on_nonfinite"), names)
    names["parallel"].compile("sgd", "mse")
    before = names["model"].get_weights()
    with pytest.warns(UserWarning, match="a step changed nothing"):
        names["parallel"].train_on_batch(np.full((8, 6), np.nan), np.ones((8, 3)))
    for one, other in zip(names["model"].get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_lines_for_data_on_the_devices_convert_them_there() -> None:
    fastdp.set_virtual_devices(2)
    images, sizes = np.full((6, 4), 51, np.uint8), np.ones((6, 2), np.float32)
    inputs = {"image": keras.Input((4,), name="image"), "size": keras.Input((2,), name="size")}
    outputs = keras.layers.Dense(1, kernel_initializer="ones")(keras.layers.concatenate(list(inputs.values())))
    parallel = fastdp.wrap(keras.Model(inputs, outputs), gpus=2, compile=None)
    parallel.compile("sgd", "mse")
    names: dict[str, Any] = {"fastdp": fastdp, "parallel": parallel, "images": images, "sizes": sizes}
    found: dict[str, Any] = names | {"labels": np.full((6, 1), 2.8, np.float32)}
    exec(code_with("DeviceDataset("), found)
    assert parallel.evaluate(found["data"], batch_size=6, verbose=0) == pytest.approx(0, abs=1e-9)  # 4 x 51 / 255 + 2


def test_the_lines_for_the_profiler_of_torch_write_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done: list[Any] = []
    exec(
        code_with("torch.profiler"),
        {"step": lambda x, y: done.append(x @ y), "x": torch.ones(3, 3), "y": torch.ones(3)},
    )
    assert len(done) == 1
    assert "aten::" in (tmp_path / "torch.json").read_text(encoding="utf-8")


def test_every_script_of_the_faq_is_in_the_guide_and_every_one_named_there_exists() -> None:
    named = set(re.findall(r"`(\w+\.py)`", GUIDE))
    there = {path.name for path in (ROOT / "examples" / "faq").glob("*.py")}
    assert named == there


def test_every_name_of_fastdp_in_the_guide_exists() -> None:
    for name in set(re.findall(r"fastdp\.((?:utils\.|backend\.)?[a-z]\w+)", GUIDE)):
        thing: Any = fastdp
        for part in name.split("."):
            thing = getattr(thing, part)
