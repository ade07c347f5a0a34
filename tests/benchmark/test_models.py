"""The built-in models: published numbers of parameters in both forms, the batches that they take, and their sizes."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import torch
from small_targets import SMALL

from fastdp.benchmark.models import MODELS, build, find, is_builtin

# Of the papers or of their authors' code: ResNet50 and Xception as keras.applications counts them without the moving
# statistics, ViT-B/16 for 1,000 classes, BERT-base (uncased) with a classifier of two classes, GPT-2's smallest model.
PUBLISHED = {
    "mlp": 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10,
    "cnn": 225_034,
    "lstm": 4 * (32 * 64 + 64 * 64 + 64) + 650,
    "resnet50": 25_636_712 - 53_120,
    "xception": 22_910_480 - 54_528,
    "vit-b16": 86_567_656,
    "bert-base": 109_482_240 + 768 * 2 + 2,
    "gpt2-small": 124_439_808,
}


def test_there_are_the_models_that_the_help_names():
    assert sorted(MODELS) == sorted(PUBLISHED) == sorted(SMALL)


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_train_the_published_number_of_parameters(name):
    with torch.device("meta"):
        module = build(name, "torch")
    with keras.device("meta"):
        model = build(name, "keras")
    in_torch = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    in_keras = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    assert (in_torch, in_keras, MODELS[name].parameters) == (PUBLISHED[name],) * 3


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_its_arrays_gives_logits_for_its_labels_in_both_forms(name):
    model, rows = find(SMALL[name]), 2
    generator = np.random.default_rng(0)
    (labels,) = model.targets
    wanted = (rows, *labels.shape, labels.below)
    arrays = [one.draw(rows, generator) for one in model.inputs_of("keras")]
    assert tuple(model.build("keras")(arrays if len(arrays) > 1 else arrays[0]).shape) == wanted
    tensors = [torch.from_numpy(one.draw(rows, generator)) for one in model.inputs_of("torch")]
    assert tuple(model.build("torch")(*tensors).shape) == wanted
    assert np.dtype(labels.dtype).kind == "i"


def test_images_have_their_channels_last_in_keras_and_first_in_torch():
    model = find("cnn:size=14")
    assert [one.shape for one in model.inputs_of("keras")] == [(14, 14, 1)]
    assert [one.shape for one in model.inputs_of("torch")] == [(1, 14, 14)]


def test_sizes_change_the_model_its_arrays_and_its_title():
    small = find("resnet50:size=64,classes=10")
    assert small.title == "ResNet50, 64x64, 10 classes"
    assert small.inputs_of("torch")[0].shape == (3, 64, 64)
    assert small.targets[0].below == 10
    assert find("resnet50").title == "ResNet50, 224x224, 1000 classes"
    assert is_builtin("resnet50:size=64")
    assert not is_builtin("resnet50.py:size")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("resnet51", "no built-in model 'resnet51'. There are mlp, cnn"),
        ("resnet50:width=64", "resnet50 has no size 'width'. Its sizes: size=224, classes=1000"),
        ("resnet50:size", "must be a whole number from 1. Received: 'size'"),
        ("resnet50:size=0", "must be a whole number from 1. Received: 'size=0'"),
        ("gpt2-small:tokens=2048", "`tokens` must be at most `positions`=1024. Received: tokens=2048"),
        ("vit-b16:heads=7", "`width` must be a multiple of `heads`. Received: width=768, heads=7"),
    ],
)
@pytest.mark.parametrize("framework", ["keras", "torch"])
def test_what_does_not_fit_is_named_with_the_choices(target, said, framework):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")), torch.device("meta"):
        build(target, framework)


@pytest.mark.parametrize("name", ["mlp", "lstm", "vit-b16", "bert-base", "gpt2-small"])
def test_both_forms_compute_the_same_from_the_same_weights(name):
    model = find(SMALL[name])
    in_keras, in_torch = model.build("keras"), model.build("torch").eval()
    generator = np.random.default_rng(1)
    for variable in in_keras.trainable_variables:  # biases too
        variable.assign(generator.normal(0.0, 0.3, variable.shape))
    copy_weights(in_keras, in_torch)
    arrays = [one.draw(3, generator) for one in model.inputs_of("keras")]
    expected = in_keras(arrays if len(arrays) > 1 else arrays[0])
    if name == "vit-b16":
        arrays = [arrays[0].transpose(0, 3, 1, 2)]
    found = in_torch(*map(torch.from_numpy, arrays))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def copy_weights(model: keras.Model, module: torch.nn.Module) -> None:
    """Give a torch form the weights of a Keras form.

    Layers of one kind come in the same order in both, but for embeddings, which differ in shape.
    """
    layers = list(model._flatten_layers(include_self=False))
    weights = {kind: [] for kind in ("Dense", "LayerNormalization", "MultiHeadAttention", "Conv2D", "LSTMCell")}
    embeddings = {}
    for layer in layers:
        kind = type(layer).__name__
        if isinstance(layer, keras.layers.Embedding):
            embeddings[tuple(layer.embeddings.shape)] = layer.get_weights()[0]
        elif kind in weights:
            weights[kind].append(layer.get_weights())

    def take(kind):
        return weights[kind].pop(0)

    for part in module.modules():
        kind = type(part).__name__
        if kind == "Attention":
            set_attention(part, take("MultiHeadAttention"))
        elif kind == "Linear" and not hasattr(part, "done"):
            kernel, bias = take("Dense")
            assign(part.weight, kernel.T)
            assign(part.bias, bias)
        elif kind == "LayerNorm":
            scale, offset = take("LayerNormalization")
            assign(part.weight, scale)
            assign(part.bias, offset)
        elif kind == "Conv2d":
            kernel, bias = take("Conv2D")
            assign(part.weight, kernel.transpose(3, 2, 0, 1))
            assign(part.bias, bias)
        elif kind == "LSTM" and isinstance(part, torch.nn.LSTM):
            kernel, recurrent, bias = take("LSTMCell")  # both libraries order the gates i, f, c, o
            assign(part.weight_ih_l0, kernel.T)
            assign(part.weight_hh_l0, recurrent.T)
            assign(part.bias_ih_l0, bias)
        elif kind == "Embedding":
            assign(part.weight, embeddings.pop(tuple(part.weight.shape)))
        elif kind == "ViT":
            width = part.class_token.shape[-1]
            assign(part.class_token, embeddings.pop((1, width))[None])
            assign(part.positions, embeddings.pop((part.positions.shape[1], width))[None])
    assert not embeddings
    assert not any(weights.values())


def set_attention(part: torch.nn.Module, arrays: list[np.ndarray]) -> None:
    """Weights of Keras's attention: kernels and biases of queries, keys, values and outputs, each by head."""
    width = part.out.in_features
    kernels, biases = arrays[0::2], arrays[1::2]
    assign(part.projections.weight, np.concatenate([kernel.reshape(width, width).T for kernel in kernels[:3]]))
    assign(part.projections.bias, np.concatenate([bias.reshape(width) for bias in biases[:3]]))
    assign(part.out.weight, kernels[3].reshape(width, width).T)
    assign(part.out.bias, biases[3])
    part.projections.done = part.out.done = True


def assign(parameter: torch.Tensor, value: np.ndarray) -> None:
    """Set a parameter's values."""
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
