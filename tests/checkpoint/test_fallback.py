"""A checkpoint with right checksums and damaged content is left out whole, and the one before it is used."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile

import checkpoint_fuzzer
import numpy as np
import pytest
import torch
from torch import nn

import fastdp
from fastdp.checkpoint import folders, store
from fastdp.checkpoint.folders import name_of


class Torch:
    """A module and an optimizer with a state, whose values tell the step."""

    def __init__(self, value):
        self.module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        self.optimizer = torch.optim.SGD(self.module.parameters(), 0.1, momentum=0.9)
        for parameter in self.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.set(value)

    def set(self, value):
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.fill_(value)

    def tensors(self):
        slots = [self.optimizer.state[parameter]["momentum_buffer"] for parameter in self.module.parameters()]
        return [*self.module.parameters(), *slots]

    def values(self):
        return [float(value) for tensor in self.tensors() for value in tensor.detach().reshape(-1)]

    def parts(self):
        return {"model": self.module, "optimizer": self.optimizer}


@pytest.fixture
def run(tmp_path):
    """Checkpoints of steps 1 to 3, all of whose values are the step."""
    one = Torch(0)
    with fastdp.Checkpoint(tmp_path / "run", every_steps=1, **one.parts()) as checkpoint:
        for step in (1, 2, 3):
            one.set(step)
            torch.manual_seed(step)
            checkpoint.step()
    return tmp_path / "run"


def restored(folder, one, steps=0):
    """Where the run goes on, after which it makes so many steps."""
    with fastdp.Checkpoint(folder, every_steps=1, keep=2, **one.parts()) as checkpoint:
        found = checkpoint.restore()
        for _ in range(steps):
            checkpoint.step()
        return found


def other_shape(path):
    """The second parameter of another shape: torch has copied the first one when it finds that."""
    state = torch.load(path)
    state["1.weight"] = state["1.weight"][:, :2].clone()
    torch.save(state, path)


def without_position(path):
    path.write_text(path.read_text().replace('"position"', '"place"'))


HARMS = {
    "other shape": ("model.pt", other_shape),
    "no archive": ("model.pt", lambda path: path.write_bytes(b"damaged")),
    "no json": ("state.json", lambda path: path.write_text("{")),
    "no position": ("state.json", without_position),
    "no arrays": ("state.npz", lambda path: path.write_bytes(path.read_bytes()[:-30])),
    "generator": ("state.json", lambda path: path.write_text(path.read_text().replace('"python"', '"other"'))),
}


def harm(folder, step, kind):
    name, change = HARMS[kind]
    change(folder / name_of(step) / name)
    checkpoint_fuzzer._sign(folder / name_of(step))
    assert folders.what_is_wrong(folder / name_of(step)) is None


@pytest.mark.parametrize("kind", HARMS)
def test_the_one_before_a_damaged_one_is_loaded_with_a_warning_that_names_the_file_and_the_cause(run, kind):
    harm(run, 3, kind)
    one = Torch(9)
    with pytest.warns(UserWarning, match="step-00000003 is left out, and step-00000002 is used: "):
        assert restored(run, one).step == 2
    assert set(one.values()) == {2}
    drawn = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("kind", HARMS)
def test_where_none_can_be_loaded_the_newest_ones_error_is_raised_and_nothing_has_changed(run, kind):
    for step in (1, 2, 3):
        harm(run, step, kind)
    one = Torch(9)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with pytest.raises((ValueError, RuntimeError), match=r"step-00000003|size mismatch for 1.weight"):
        restored(run, one)
    assert set(one.values()) == {9}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_damaged_one_is_removed_when_newer_ones_are_there_and_none_is_written_beside_another_run(run):
    harm(run, 3, "no json")
    one = Torch(9)
    with pytest.warns(UserWarning, match="is left out"):
        restored(run, one, steps=2)
    assert sorted(folders.steps_in(run)) == [3, 4]
    assert folders.what_is_wrong(run / name_of(3)) is None
    assert restored(run, one).step == 4
    for step in (3, 4):
        harm(run, step, "no json")
    with fastdp.Checkpoint(run, every_steps=1, **one.parts()) as checkpoint:
        with pytest.raises(ValueError, match="step-00000004 cannot be read, though its checksums are right"):
            checkpoint.restore()
        with pytest.raises(ValueError, match="checkpoints of another run, up to step 4"):
            checkpoint.step()
        checkpoint._saved = checkpoint.position  # the end saves nothing


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_troubles_of_the_machine_end_in_an_error_and_take_no_older_one(run, monkeypatch, number):
    digest = folders._digest_of_file

    def refused(path):
        if path.parent.name == name_of(3):
            raise OSError(number, os.strerror(number), str(path))
        return digest(path)

    monkeypatch.setattr(folders, "_digest_of_file", refused)
    one = Torch(9)
    with pytest.raises(OSError, match="step-00000003 cannot be read now, and no older one is used") as caught:
        restored(run, one)
    assert caught.value.errno == number
    monkeypatch.undo()
    assert restored(run, one).step == 3


class Others:
    """Two more processes, one of which cannot load a step."""

    def __init__(self, fails):
        self.fails, self.found = fails, None

    def gather(self, value, what, timeout, known=()):
        if what == "the newest checkpoint":
            self.found = value
        wrong = what == "loading the checkpoint" and self.found == self.fails
        return [value, "its disk is damaged" if wrong else None, None]


def test_a_checkpoint_that_another_process_cannot_load_is_loaded_by_none(run, monkeypatch):
    others = Others(3)
    monkeypatch.setattr(store, "several", lambda: True)
    monkeypatch.setattr(store, "_processes", lambda: others)
    one = Torch(9)
    with pytest.warns(
        UserWarning, match="step-00000002 is used: Process 1 cannot load .*step-00000003: its disk is damaged"
    ):
        assert restored(run, one).step == 2
    assert set(one.values()) == {2}


def test_an_object_in_extra_is_not_asked_for_its_state_before_it_is_loaded(tmp_path):
    class Loader:
        asked = 0
        loaded = None

        def state_dict(self):
            self.asked += 1
            return {"at": 3}

        def load_state_dict(self, state):
            self.loaded = state

    with fastdp.Checkpoint(tmp_path, model=nn.Linear(1, 1), extra={"data": Loader()}) as checkpoint:
        checkpoint.step()
    with fastdp.Checkpoint(tmp_path, model=nn.Linear(1, 1), extra={"data": Loader()}) as checkpoint:
        checkpoint.restore()
        (loader,) = checkpoint._parts["extra data"]
        assert (loader.asked, loader.loaded) == (0, {"at": 3})


# Keras: the HDF5 file in a model's archive.


def keras_fit(folder, epochs, model=None):
    from fastdp.callbacks import Checkpoint

    model = checkpoint_fuzzer._keras_model() if model is None else model
    x = np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3)
    model.fit(x, x[:, :2], 4, epochs, 0, shuffle=False, callbacks=[Checkpoint(folder, every_steps=1)])
    return model


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with the checkpoints of three epochs, the model after it, and the virtual devices."""
    pytest.importorskip("keras")
    fastdp.set_virtual_devices(2)
    folder = tmp_path_factory.mktemp("fit")
    yield folder, keras_fit(folder, 3)
    fastdp.set_virtual_devices(0)


def weights_file(place, change):
    """Change the HDF5 file in the archive, and sign it."""
    path = place / "model.keras"
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["model.weights.h5"] = change(parts["model.weights.h5"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    checkpoint_fuzzer._sign(place)


def without_a_slot(content):
    """Keras would begin with a new optimizer, and warn."""
    import io

    import h5py

    file = io.BytesIO(content)
    with h5py.File(file, "a") as h5:
        del h5["optimizer/vars/1"]
    return file.getvalue()


DAMAGES = {"zeros": lambda content: bytes(len(content)), "cut": lambda c: c[:900], "a slot is gone": without_a_slot}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_of_keras_let_the_checkpoint_before_be_used(fitted, tmp_path, damage):
    folder, trained = fitted
    shutil.copytree(folder, tmp_path / "run")
    for step in (3, 2):
        weights_file(tmp_path / "run" / name_of(step), DAMAGES[damage])
    with pytest.warns(UserWarning, match=r"(?s)step-0000000. is left out, and step-00000001 is used: .*model\.keras"):
        again = keras_fit(tmp_path / "run", 3)
    assert again.optimizer.iterations.numpy() == 3
    for one, other in zip(again.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_no_weights_of_keras_can_be_loaded_the_model_is_as_before(fitted, tmp_path, damage):
    shutil.copytree(fitted[0], tmp_path / "run")
    for step in (1, 2, 3):
        weights_file(tmp_path / "run" / name_of(step), DAMAGES[damage])
    model = checkpoint_fuzzer._keras_model()
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"step-00000003.model\.keras does not fit this model, or is damaged"):
        keras_fit(tmp_path / "run", 3, model)
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert model.optimizer.iterations.numpy() == 0


@pytest.mark.parametrize("name", ["callbacks", "data", "variables", "global seed", "generators"])
def test_odd_states_of_keras_let_the_checkpoint_before_be_used(fitted, tmp_path, name):
    folder, trained = fitted
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / name_of(3) / "state.json"
    told = json.loads(path.read_text())
    next(pair for pair in told["dict"] if pair[0] == name)[1] = "odd"
    path.write_text(json.dumps(told))
    checkpoint_fuzzer._sign(path.parent)
    with pytest.warns(UserWarning, match="step-00000003 is left out, and step-00000002 is used: "):
        again = keras_fit(tmp_path / "run", 3)
    for one, other in zip(again.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
