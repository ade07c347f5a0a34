"""`augment=` of a Keras model: layers on each device, with the numbers of plain Keras on the whole batch."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import fastdp
from fastdp.data import Augment, DeviceDataset

L = keras.layers
ROWS = 9
rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (ROWS, 10, 10, 3)).astype("uint8")
LABELS = keras.utils.to_categorical(rng.integers(0, 4, ROWS), 4)


@pytest.fixture(scope="module", autouse=True)
def _devices():
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


@keras.saving.register_keras_serializable("fastdp_tests")
class Kept(keras.metrics.Metric):
    """Keeps what it gets."""

    def __init__(self):
        super().__init__(name="kept")
        self.seen = []

    def update_state(self, y_true, y_pred, sample_weight=None):
        arrays = (np.array(keras.ops.convert_to_numpy(one)) for one in (y_pred, y_true))
        self.seen.append(tuple(arrays))

    def result(self):
        return 0.0

    def reset_state(self):
        pass


class Gain(L.Layer):
    """The input times a weight that stays one."""

    def build(self, shape):
        self.gain = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return x * self.gain


def looking(size=8):
    """A model whose output is its input, and its optimizer, which moves nothing."""
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((size, size, 3)), Gain()]), keras.optimizers.SGD(0.0)


def classifier():
    keras.utils.set_random_seed(1)
    layers = [L.Conv2D(3, 3, activation="relu"), L.GlobalAveragePooling2D(), L.Dropout(0.3), L.Dense(4, "softmax")]
    return keras.Sequential([keras.Input((8, 8, 3)), *layers])


GRAY = {"value_range": (0, 255)}
CHAINS = {
    "places": lambda: [
        L.RandomFlip(seed=1),
        L.RandomRotation(0.2, seed=2),
        L.RandomTranslation(0.2, 0.2, seed=3),
        L.RandomZoom(0.3, seed=4),
        L.RandomShear(0.3, 0.3, seed=5),
        L.RandomPerspective(seed=6),
        L.RandomErasing(**GRAY, seed=7),
        L.RandomCrop(8, 8, seed=8),
    ],
    "colors": lambda: [
        L.Resizing(8, 8),
        L.RandomBrightness(0.3, **GRAY, seed=1),
        L.RandomContrast(0.3, **GRAY, seed=2),
        L.RandomColorJitter(**GRAY, brightness_factor=0.2, contrast_factor=0.2, hue_factor=0.2, seed=3),
        L.RandomHue(0.3, **GRAY, seed=4),
        L.RandomPosterization(4, **GRAY, seed=5),
        L.RandomGaussianBlur(**GRAY, seed=6),
        L.RandomGrayscale(seed=7),
        L.Solarization(0.2, 0.4, **GRAY, seed=8),
    ],
    "policies": lambda: keras.Sequential(
        [
            L.CenterCrop(8, 8),
            L.Pipeline([L.RandAugment(**GRAY, seed=1), L.RandomSharpness(0.4, **GRAY, seed=2)]),
            L.Normalization(mean=[100.0] * 3, variance=[400.0] * 3),
        ]
    ),
    "mixed": lambda: [
        L.CenterCrop(8, 8),
        L.MixUp(seed=1),
        L.RandomFlip(seed=3),
        L.CutMix(seed=2),
        L.Rescaling(1 / 255),
    ],
}


def by_hand(layers, images, labels, steps):
    """What the layers make of a batch in plain Keras, step by step."""
    stages = [one for part in layers for one in (part.layers if isinstance(part, L.Pipeline) else [part])]
    found = []
    for _ in range(steps):
        x, y = images, labels
        for stage in stages:
            if isinstance(stage, (L.MixUp, L.CutMix)):
                mixed = stage({"images": x, "labels": y}, training=True)
                x, y = mixed["images"], mixed["labels"]
            else:
                x = stage(x, training=True) if stage._call_has_training_arg else stage(x)
        found.append((keras.ops.convert_to_numpy(x), keras.ops.convert_to_numpy(y)))
    return found


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.filterwarnings("ignore:.*Tensor.T is deprecated on 0-D tensors:UserWarning")
def test_every_number_of_devices_gets_the_batch_of_plain_keras_to_the_bit(name):
    keras.utils.set_random_seed(2)  # the layers inside of others have no seed of their own
    made = CHAINS[name]()
    keras.utils.set_random_seed(3)
    expected = by_hand(made.layers if isinstance(made, keras.Sequential) else made, IMAGES, LABELS, 2)
    for gpus in (1, 2, 3, 8):
        model, optimizer = looking()
        kept = Kept()
        keras.utils.set_random_seed(2)
        parallel = fastdp.wrap(model, gpus=gpus, augment=CHAINS[name](), compile=None)
        parallel.compile(optimizer, lambda y, y_pred: keras.ops.mean(y_pred, (1, 2, 3)), metrics=[kept])
        keras.utils.set_random_seed(3)
        for _ in range(2):
            parallel.train_on_batch(IMAGES, LABELS)
        for (x, y), (found, target) in zip(expected, kept.seen[-2:], strict=True):  # not what Keras builds metrics with
            np.testing.assert_array_equal(found, x, err_msg=f"{gpus} devices")
            np.testing.assert_array_equal(target, y, err_msg=f"{gpus} devices")


def mixing():
    return [L.RandomFlip(seed=3), L.RandomCrop(8, 8, seed=4), L.MixUp(seed=5), L.Rescaling(1 / 255)]


def trained(gpus, source="arrays", **options):
    model = classifier()
    layers = mixing()
    parallel = fastdp.wrap(model, gpus=gpus, augment=layers, **options)
    parallel.compile("sgd", "categorical_crossentropy", metrics=["mae"])
    data = {"x": IMAGES, "y": LABELS}
    if source == "devices":
        data = {"x": DeviceDataset((IMAGES, LABELS), parallel)}
    history = parallel.fit(**data, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    found = [*history["loss"], *history["mae"], *parallel.evaluate(**data, verbose=0)]
    seeds = [keras.ops.convert_to_numpy(layer.generator.state) for layer in layers[:3]]
    return found, model.get_weights(), seeds, parallel


@pytest.fixture(scope="module")
def of_one_device(_devices):
    return trained(1, compile=None)[:3]


@pytest.mark.parametrize(("gpus", "how"), [(3, "eager"), (2, "trace"), (2, "devices"), (3, "shards")])
def test_fit_trains_as_one_device_and_captured_steps_do_too(gpus, how, of_one_device):
    expected, weights, seeds = of_one_device
    options = {"trace": {"compile": "trace"}, "shards": {"compile": None, "shards": 4}}.get(how, {"compile": None})
    found, other, states, parallel = trained(gpus, how, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for ours, theirs in zip(other, weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(states, seeds, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if how == "trace":
        assert "traced" in {entry["how"] for entry in parallel.report()}


def test_the_same_data_go_to_evaluate_predict_and_calls_which_draw_nothing():
    _, _, seeds, parallel = trained(2, compile=None)
    x = keras.ops.convert_to_numpy(L.Rescaling(1 / 255)(IMAGES))
    expected = parallel.template.predict(x, verbose=0)
    np.testing.assert_allclose(parallel.predict(IMAGES, verbose=0), expected, rtol=1e-5)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(parallel(IMAGES)), expected, rtol=1e-5)
    np.testing.assert_allclose(
        parallel.test_on_batch(IMAGES, LABELS)[0], parallel.evaluate(IMAGES, LABELS, verbose=0)[0]
    )
    layers = parallel._augmented.stages
    for layer, state in zip(layers, seeds, strict=False):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.generator.state), state)


def test_masks_and_boxes_move_along():
    marks = (IMAGES[..., 0] > 128).astype("int64")
    boxes = {"boxes": np.tile(np.array([1.0, 2, 4, 7], "float32"), (ROWS, 2, 1)), "labels": np.ones((ROWS, 2), "int32")}
    found = []
    for gpus in (1, 3):
        keras.utils.set_random_seed(1)
        x = keras.Input((10, 10, 3))
        model = keras.Model(x, {"segmentation_masks": L.Reshape((10, 10))(L.Conv2D(1, 1)(x))})
        kept = Kept()
        augment = Augment([L.RandomFlip(seed=1), L.RandomTranslation(0.3, 0.3, seed=2), L.Rescaling(1 / 255)])
        parallel = fastdp.wrap(model, gpus=gpus, augment=augment)
        parallel.compile("sgd", {"segmentation_masks": "mse"}, metrics={"segmentation_masks": kept})
        for _ in range(2):
            parallel.train_on_batch(IMAGES, {"segmentation_masks": marks})
        found.append([y for _, y in kept.seen[-2:]])
    np.testing.assert_array_equal(found[1], found[0])
    assert found[0][0].dtype == np.int64
    assert (found[0][0] != marks).any()
    flipped = []
    for gpus in (1, 3):
        x = keras.Input((10, 10, 3))
        pooled = L.GlobalAveragePooling2D()(x)
        outputs = {"boxes": L.Reshape((2, 4))(L.Dense(8)(pooled)), "labels": L.Dense(2)(pooled)}
        model, kept = keras.Model(x, {"bounding_boxes": outputs}), Kept()
        parallel = fastdp.wrap(model, gpus=gpus, augment=L.RandomFlip("horizontal", bounding_box_format="xyxy", seed=1))
        parallel.compile(
            "sgd",
            {"bounding_boxes": {"boxes": "mse", "labels": "mse"}},
            metrics={"bounding_boxes": {"boxes": kept, "labels": None}},
        )
        parallel.train_on_batch(IMAGES, {"bounding_boxes": boxes})
        flipped.append(kept.seen[-1][1])
    np.testing.assert_array_equal(flipped[1], flipped[0])
    turned = {tuple(box) for box in flipped[0][:, 0].tolist()}
    assert turned == {(1.0, 2.0, 4.0, 7.0), (6.0, 2.0, 9.0, 7.0)}


def wrapped(augment, **options):
    parallel = fastdp.wrap(classifier(), gpus=2, augment=augment, **options)
    parallel.compile("sgd", lambda y, y_pred: keras.ops.mean(y_pred, -1))
    return parallel


def test_targets_that_cannot_move_along_are_refused():
    half = IMAGES[:, :8, :8]
    with pytest.raises(ValueError, match=r"weights of rows .*no meaning.*Leave them out"):
        wrapped(L.MixUp()).train_on_batch(half, LABELS, sample_weight=np.ones(ROWS))
    with pytest.raises(ValueError, match=r"labels of the shape \(rows, classes\).*to_categorical.*Received: \(\d,\)"):
        wrapped(L.MixUp()).train_on_batch(half, np.arange(ROWS) % 4)
    with pytest.raises(ValueError, match="CutMix cannot mix targets of the kind 'segmentation_masks'"):
        wrapped(Augment(L.CutMix(), targets="segmentation_masks")).train_on_batch(half, half[..., 0])
    with pytest.raises(ValueError, match=r"moves pixels.*targets=\"segmentation_masks\".*targets=\"keep\""):
        wrapped(L.RandomFlip()).train_on_batch(half, half[..., 0])
    with pytest.raises(ValueError, match=r"`images`.*must be the key.*images='picture', and x has Tensor"):
        wrapped(Augment(L.RandomFlip(), images="picture")).train_on_batch(half, LABELS)


def test_what_is_no_augmentation_is_refused():
    with pytest.raises(TypeError, match=r"`augment` must be a Keras layer, a list.*Received: 'flip'"):
        wrapped("flip")
    dense = L.Dense(3)
    dense.build((None, 3))
    with pytest.raises(ValueError, match=r"weights that would be trained.*trainable = False"):
        wrapped(dense)
    with pytest.raises(ValueError, match=r"`targets` must be of the kinds.*Received: 'mask'"):
        Augment(L.RandomFlip(), targets="mask")
    with pytest.raises(TypeError, match="`targets` must be None"):
        Augment(L.RandomFlip(), targets=3)

    class Own(keras.Model):
        def call(self, x):
            return x

        def compute_loss(self, **kwargs):
            return 0.0

    model = Own()
    model(IMAGES[:1].astype("float32"))
    with pytest.raises(ValueError, match=r"`augment` is for models whose steps are Keras's own.*compute_loss"):
        fastdp.wrap(model, gpus=2, augment=L.RandomFlip())


def test_one_of_several_inputs_and_a_loss_of_the_merged_outputs():
    def contrast(y, y_pred):
        return keras.ops.mean(keras.ops.square(y - y_pred)) / (1.0 + keras.ops.std(y_pred))

    found = []
    for gpus in (1, 3):
        keras.utils.set_random_seed(1)
        inputs = {"image": keras.Input((8, 8, 3), name="image"), "more": keras.Input((2,), name="more")}
        joined = L.Concatenate()([L.GlobalAveragePooling2D()(inputs["image"]), inputs["more"]])
        model = keras.Model(inputs, L.Dense(4)(joined))
        augment = Augment([L.CenterCrop(8, 8), L.MixUp(seed=2), L.Rescaling(1 / 255)], images="image")
        parallel = fastdp.wrap(model, gpus=gpus, augment=augment)
        parallel.compile("sgd", contrast)
        data = {"image": IMAGES, "more": np.ones((ROWS, 2), "float32")}
        found.append([float(parallel.train_on_batch(data, LABELS)) for _ in range(2)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_a_run_goes_on_with_the_draws_that_it_would_have_made(tmp_path):
    def run(epochs):
        model = classifier()
        layers = mixing()
        parallel = fastdp.wrap(model, gpus=2, augment=layers, compile=None)
        parallel.compile("sgd", "categorical_crossentropy")
        parallel.fit(
            IMAGES, LABELS, batch_size=4, epochs=epochs, verbose=0, callbacks=[fastdp.callbacks.Checkpoint(tmp_path)]
        )
        return model.get_weights()

    run(1)
    resumed = run(3)
    for file in sorted(tmp_path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    for ours, theirs in zip(resumed, run(3), strict=True):
        np.testing.assert_array_equal(ours, theirs)
