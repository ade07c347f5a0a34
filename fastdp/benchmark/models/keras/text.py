"""Language models from Keras's own layers: BERT as a classifier, and GPT-2. They end in logits."""

from __future__ import annotations

import keras

from fastdp.benchmark.models.keras.attention import block, normal, positions_of

layers = keras.layers
BERT_EPSILON, GPT2_EPSILON, STD = 1e-12, 1e-5, 0.02


def bert(
    *,
    tokens: int,
    vocabulary: int,
    width: int,
    depth: int,
    heads: int,
    wide: int,
    positions: int,
    classes: int,
) -> keras.Model:
    """BERT (Devlin et al., 2019), fine-tuned as a classifier: the pooled first token, and a dense layer."""
    if tokens > positions:
        raise ValueError(f"`tokens` must be at most `positions`={positions}. Received: tokens={tokens}")
    words = layers.Input((tokens,), dtype="int32", name="tokens")
    segments = layers.Input((tokens,), dtype="int32", name="segments")
    embeddings = [
        layers.Embedding(count, width, embeddings_initializer=normal(STD))(numbers)
        for count, numbers in ((vocabulary, words), (positions, positions_of(words)), (2, segments))
    ]
    x = layers.LayerNormalization(epsilon=BERT_EPSILON)(layers.Add()(embeddings))
    for _ in range(depth):
        x = block(x, width, heads, wide, norm_first=False, epsilon=BERT_EPSILON, std=STD)
    pooled = layers.Dense(width, activation="tanh", kernel_initializer=normal(STD))(x[:, 0])
    logits = layers.Dense(classes, kernel_initializer=normal(STD))(pooled)
    return keras.Model([words, segments], logits)


def gpt2(*, tokens: int, vocabulary: int, width: int, depth: int, heads: int, positions: int) -> keras.Model:
    """GPT-2 (Radford et al., 2019). The head is the embedding of the words."""
    if tokens > positions:
        raise ValueError(f"`tokens` must be at most `positions`={positions}. Received: tokens={tokens}")
    words = layers.Input((tokens,), dtype="int32", name="tokens")
    embedding = layers.ReversibleEmbedding(vocabulary, width, embeddings_initializer=normal(STD))
    x = embedding(words) + layers.Embedding(positions, width, embeddings_initializer=normal(STD))(positions_of(words))
    for _ in range(depth):
        x = block(x, width, heads, 4 * width, causal=True, approximate=True, epsilon=GPT2_EPSILON, std=STD)
    x = layers.LayerNormalization(epsilon=GPT2_EPSILON)(x)
    return keras.Model(words, embedding(x, reverse=True))
