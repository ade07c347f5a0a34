"""fused_sgd and fused_adam equal their twins bit for bit, and the twins follow Keras's formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp import launch
from fastdp.launch import reference as twins

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
PAIRS = [
    ("float32", "float32"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
]
SIZES = st.one_of(st.integers(0, 40), st.integers(1, 20_000))
common = {
    "n": SIZES,
    "pair": st.sampled_from(PAIRS),
    "leads": st.lists(st.integers(0, 7), min_size=5, max_size=5),
    "weight_decay": st.sampled_from([0.0, 0.01]),
    "clip_scale": st.sampled_from([None, 0.25]),
    "skip": st.sampled_from([None, 0]),
    "seed": st.integers(0, 99),
}


def random_array(dtype: str, n: int, rng: np.random.Generator, positive: bool = False) -> np.ndarray:
    values = rng.standard_normal(n).astype(np.float32)
    out = np.empty(n, NUMPY[dtype])
    twins.scale_cast(np.abs(values) if positive else values, out)
    return out


def on_device(host, arrays, leads):
    return [host.put(x, lead * x.itemsize) for x, lead in zip(arrays, leads, strict=False)]


def scalars(host, clip_scale, skip):
    return {
        "clip_scale": 0 if clip_scale is None else host.put(np.float32([clip_scale])),
        "skip": 0 if skip is None else host.put(np.uint32([skip])),
    }


def twin_scalars(clip_scale, skip):
    return {"clip_scale": 1.0 if clip_scale is None else clip_scale, "skip": bool(skip)}


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@given(**common)
def test_fused_sgd_equals_its_twin(host, n, pair, leads, weight_decay, clip_scale, skip, seed, momentum, nesterov):
    rng = np.random.default_rng(seed)
    w, g, m = random_array(pair[0], n, rng), random_array(pair[1], n, rng), random_array(pair[0], n, rng)
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    with host.scope():
        weights, gradients, momentums = on_device(host, (w, g, m), leads)
        lr = host.put(np.float32([0.1]))
        launch.fused_sgd(
            host.kernels,
            weights=weights,
            gradients=gradients,
            momentums=momentums if momentum else 0,
            learning_rate=lr,
            n=n,
            dtype=pair[0],
            gradient_dtype=pair[1],
            stream=0,
            **options,
            **scalars(host, clip_scale, skip),
        )
        slots = {"momentums": m if momentum else None}
        twins.fused_sgd(w, g, learning_rate=0.1, **slots, **options, **twin_scalars(clip_scale, skip))
        assert host.get(weights, w).tobytes() == w.tobytes()
        assert host.get(momentums, m).tobytes() == m.tobytes()


@pytest.mark.parametrize("amsgrad", [False, True])
@given(iterations=st.one_of(st.integers(0, 20), st.integers(0, 2**40)), **common)
def test_fused_adam_equals_its_twin(host, n, pair, leads, weight_decay, clip_scale, skip, seed, amsgrad, iterations):
    rng = np.random.default_rng(seed)
    w, g, m = random_array(pair[0], n, rng), random_array(pair[1], n, rng), random_array(pair[0], n, rng)
    v, v_hat = random_array(pair[0], n, rng, positive=True), random_array(pair[0], n, rng, positive=True)
    with host.scope():
        weights, gradients, momentums, velocities, hats = on_device(host, (w, g, m, v, v_hat), leads)
        launch.fused_adam(
            host.kernels,
            weights=weights,
            momentums=momentums,
            velocities=velocities,
            velocity_hats=hats if amsgrad else 0,
            gradients=gradients,
            learning_rate=host.put(np.float32([0.01])),
            iterations=host.put(np.int64([iterations])),
            n=n,
            dtype=pair[0],
            gradient_dtype=pair[1],
            weight_decay=weight_decay,
            stream=0,
            **scalars(host, clip_scale, skip),
        )
        twins.fused_adam(
            w,
            m,
            v,
            g,
            learning_rate=0.01,
            iterations=iterations,
            velocity_hats=v_hat if amsgrad else None,
            weight_decay=weight_decay,
            **twin_scalars(clip_scale, skip),
        )
        for address, expected in ((weights, w), (momentums, m), (velocities, v), (hats, v_hat)):
            assert host.get(address, expected).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_set_skip_flag_leaves_everything_as_it_is(host, kind):
    rng = np.random.default_rng(0)
    arrays = [random_array("float32", 100, rng, positive=True) for _ in range(5)]
    with host.scope():
        weights, gradients, momentums, velocities, hats = on_device(host, arrays, (0,) * 5)
        options = {
            "weights": weights,
            "gradients": gradients,
            "momentums": momentums,
            "learning_rate": host.put(np.float32([0.1])),
            "skip": host.put(np.uint32([1])),
            "weight_decay": 0.1,
            "n": 100,
            "dtype": "float32",
            "stream": 0,
        }
        if kind == "sgd":
            launch.fused_sgd(host.kernels, momentum=0.9, **options)
        else:
            slots = {"velocities": velocities, "velocity_hats": hats, "iterations": host.put(np.int64([3]))}
            launch.fused_adam(host.kernels, **slots, **options)
        assert len(host.launches) == 1
        for address, before in zip((weights, gradients, momentums, velocities, hats), arrays, strict=True):
            assert host.get(address, before).tobytes() == before.tobytes()


def test_a_replayed_launch_reads_the_learning_rate_and_the_step_of_the_day(host):
    """A CUDA graph repeats the same argument bytes: what changes from step to step is in device memory."""
    rng = np.random.default_rng(0)
    w, m, v, g = (random_array("float32", 100, rng, positive=True) for _ in range(4))
    with host.scope():
        weights, momentums, velocities, gradients = on_device(host, (w, m, v, g), (0, 0, 0, 0))
        lr, iterations = host.empty(4), host.empty(8)
        for step in range(3):
            host.write(lr, np.float32([0.1 / (step + 1)]))
            host.write(iterations, np.int64([step]))
            if step == 0:
                launch.fused_adam(
                    host.kernels,
                    weights=weights,
                    momentums=momentums,
                    velocities=velocities,
                    gradients=gradients,
                    learning_rate=lr,
                    iterations=iterations,
                    n=100,
                    dtype="float32",
                    stream=0,
                )
            else:
                host.launch(*host.launches[0], stream=0)
            twins.fused_adam(w, m, v, g, learning_rate=0.1 / (step + 1), iterations=step)
            assert host.get(weights, w).tobytes() == w.tobytes()


def keras_sgd(w, g, m, lr, momentum, nesterov, weight_decay):
    w = w - w * weight_decay * lr
    if not momentum:
        return w - lr * g, m
    m = momentum * m - lr * g
    return (w + momentum * m - lr * g if nesterov else w + m), m


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_50_steps_of_the_twin_of_sgd_equal_keras_s_formula_in_double_precision(momentum, nesterov):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(100).astype(np.float32)
    m = np.zeros(100, np.float32)
    w64, m64 = w.astype(np.float64), m.astype(np.float64)
    slots = {"momentums": m, "momentum": momentum} if momentum else {}
    for _ in range(50):
        g = rng.standard_normal(100).astype(np.float32)
        twins.fused_sgd(w, g, learning_rate=0.01, nesterov=nesterov, weight_decay=0.004, **slots)
        w64, m64 = keras_sgd(w64, g.astype(np.float64), m64, 0.01, momentum, nesterov, 0.004)
    np.testing.assert_allclose(w, w64, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_50_steps_of_the_twin_of_adam_equal_keras_s_formula_in_double_precision(amsgrad):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(100).astype(np.float32)
    m, v, v_hat = (np.zeros(100, np.float32) for _ in range(3))
    w64, m64, v64, hat64 = (x.astype(np.float64) for x in (w, m, v, v_hat))
    for t in range(1, 51):
        g = rng.standard_normal(100).astype(np.float32)
        hats = {"velocity_hats": v_hat} if amsgrad else {}
        twins.fused_adam(w, m, v, g, learning_rate=0.01, iterations=t - 1, weight_decay=0.004, **hats)
        w64 -= w64 * 0.004 * 0.01
        m64 += (g - m64) * (1 - 0.9)
        v64 += (g.astype(np.float64) ** 2 - v64) * (1 - 0.999)
        hat64 = np.maximum(hat64, v64)
        alpha = 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        w64 -= m64 * alpha / (np.sqrt(hat64 if amsgrad else v64) + 1e-7)
    np.testing.assert_allclose(w, w64, rtol=2e-5, atol=1e-6)


def test_the_twins_equal_keras_s_own_optimizers_after_50_steps():
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    assert keras.backend.backend() == "torch"
    rng = np.random.default_rng(0)
    start = rng.standard_normal(64).astype(np.float32)
    gradients = rng.standard_normal((50, 64)).astype(np.float32)
    cases = [
        (keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True, weight_decay=0.004), "sgd"),
        (keras.optimizers.AdamW(0.01, weight_decay=0.004, amsgrad=True), "adam"),
    ]
    for optimizer, kind in cases:
        variable = keras.Variable(start)
        w = start.copy()
        m, v, v_hat = (np.zeros(64, np.float32) for _ in range(3))
        for step, g in enumerate(gradients):
            optimizer.apply([keras.ops.convert_to_tensor(g)], [variable])
            if kind == "sgd":
                options = {"momentums": m, "momentum": 0.9, "nesterov": True, "weight_decay": 0.004}
                twins.fused_sgd(w, g, learning_rate=0.01, **options)
            else:
                options = {"velocity_hats": v_hat, "weight_decay": 0.004}
                twins.fused_adam(w, m, v, g, learning_rate=0.01, iterations=step, **options)
        np.testing.assert_allclose(w, variable.value.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "gradient_dtype"), [("float16", "float32"), ("float16", "bfloat16")])
def test_a_pair_of_types_without_a_kernel_is_refused(host, dtype, gradient_dtype):
    with pytest.raises(ValueError, match="expected the same, or float32 weights"):
        launch.fused_sgd(
            host.kernels,
            weights=4096,
            gradients=4096,
            learning_rate=4096,
            n=1,
            dtype=dtype,
            gradient_dtype=gradient_dtype,
            stream=0,
        )


@pytest.mark.parametrize(("momentum", "momentums"), [(0.9, 0), (0.0, 4096)])
def test_momentum_without_slots_and_slots_without_momentum_are_refused(host, momentum, momentums):
    with pytest.raises(ValueError, match="expected slots just where momentum is not 0"):
        launch.fused_sgd(
            host.kernels,
            weights=4096,
            gradients=4096,
            momentums=momentums,
            momentum=momentum,
            learning_rate=4096,
            n=1,
            dtype="float32",
            stream=0,
        )
