"""The buckets of fp32 gradients of the built-in models, known without building them.

Arrays are never split, so that an embedding, whose gradient comes last, is left after backward as a whole. Tests make
the buckets anew from the torch forms; those of the Keras forms differ little.
"""

from __future__ import annotations

_BLOCK = (25_982_976, 18_911_232, 18_902_016, 21_258_240)  # three encoder layers of width 768 in four buckets

# Bytes by the names of fastdp.benchmark.models, in the order in which backward fills the buckets.
KNOWN_BUCKETS: dict[str, tuple[int, ...]] = {
    "mlp": (22_568, 2_656_256),
    "cnn": (900_136,),
    "lstm": (101_928,),
    "resnet50": (4_000, 26_079_232, 17_862_656, 25_218_048, 24_483_840, 8_686_592),
    "xception": (4_000, 20_858_880, 25_252_320, 25_823_616, 19_484_992),
    "vit-b16": (4_000, 24_351_744, *_BLOCK, *_BLOCK, *_BLOCK, 25_982_976, 18_911_232, 21_857_280),
    "bert-base": (9_224, 23_632_896, *_BLOCK, *_BLOCK, *_BLOCK, 25_982_976, 18_911_232, 20_471_808, 93_763_584),
    "gpt2-small": (21_504, 21_258_240, *_BLOCK, *_BLOCK, *_BLOCK, 25_982_976, 18_911_232, 22_032_384, 154_389_504),
}
