"""Knows the modules of torch that keep rows apart and assign nothing but running statistics."""

from __future__ import annotations

from torch import nn

from fastdp.program.torch.reach import GLOBAL_HOOKS, HOOKS

_NAMES = (
    "Sequential Identity Linear Bilinear Flatten Unflatten Embedding LayerNorm GroupNorm RMSNorm LocalResponseNorm "
    "BatchNorm1d BatchNorm2d BatchNorm3d Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d "
    "MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d "
    "AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d Dropout Dropout1d Dropout2d Dropout3d "
    "AlphaDropout FeatureAlphaDropout ReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU SiLU Mish Sigmoid Tanh Softplus "
    "Softsign Hardtanh Hardswish Hardsigmoid LogSigmoid Tanhshrink Softshrink Hardshrink Threshold Upsample "
    "PixelShuffle PixelUnshuffle ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d "
    "ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d"
)
_PLAIN = frozenset(getattr(nn, name) for name in _NAMES.split())


def keeps_rows_apart(module: nn.Module) -> bool:
    """Whether a module consists only of torch's own parts that compute each row by itself, without hooks."""
    return all(
        type(part) in _PLAIN
        and not getattr(part, "inplace", False)  # the first one would change the batch
        and "forward" not in vars(part)
        and not any(vars(part)[hooks] for hooks in HOOKS)
        for part in module.modules()
    ) and not any(GLOBAL_HOOKS)


def is_torchs_hook(hook: object) -> bool:
    """Whether a hook is torch's own, such as the one of `spectral_norm`: a part of what the module computes."""
    return type(hook).__module__.startswith("torch.") or getattr(hook, "__module__", "").startswith("torch.")
