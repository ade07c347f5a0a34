"""The blocks of transformers from Keras's own layers, without dropout."""

from __future__ import annotations

from typing import Any

import keras

layers, ops = keras.layers, keras.ops


def block(
    x: Any,
    width: int,
    heads: int,
    wide: int,
    *,
    causal: bool = False,
    norm_first: bool = True,
    approximate: bool = False,
    epsilon: float = 1e-6,
    std: float | None = None,
) -> Any:
    """Attention and two dense layers, each beside a sum.

    Args:
        x: of shape (rows, tokens, width).
        width, heads: of the attention.
        wide: width of the hidden dense layer.
        causal: each token sees itself and those before it.
        norm_first: normalize before attention and dense layers (ViT, GPT-2), else after the sums (BERT).
        approximate: whether GELU is GPT-2's, by tanh.
        epsilon: of the normalization.
        std: standard deviation of normal weights; None for Keras's default weights.
    """
    if width % heads:
        raise ValueError(f"`width` must be a multiple of `heads`. Received: width={width}, heads={heads}")
    weights = {} if std is None else {"kernel_initializer": normal(std)}

    def attend(y: Any) -> Any:
        return layers.MultiHeadAttention(heads, width // heads, **weights)(y, y, use_causal_mask=causal)

    def transform(y: Any) -> Any:
        hidden = ops.gelu(layers.Dense(wide, **weights)(y), approximate=approximate)
        return layers.Dense(width, **weights)(hidden)

    def normalize(y: Any) -> Any:
        return layers.LayerNormalization(epsilon=epsilon)(y)

    if norm_first:
        x = x + attend(normalize(x))
        return x + transform(normalize(x))
    x = normalize(x + attend(x))
    return normalize(x + transform(x))


def normal(std: float = 0.02) -> keras.Initializer:
    """Normal weights. A new initializer for each layer: one that is used twice draws the same numbers twice."""
    return keras.initializers.RandomNormal(stddev=std)


def positions_of(tokens: Any) -> Any:
    """The numbers 0, 1, 2, ... of the tokens of each row, for tokens of shape (rows, tokens)."""
    return ops.cumsum(ops.ones_like(tokens, dtype="int32"), axis=1) - 1
