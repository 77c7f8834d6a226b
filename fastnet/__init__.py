"""Fused kernels that make small and mid-size PyTorch networks train faster."""

from fastnet import functional
from fastnet._library import build_info
from fastnet._version import __version__
from fastnet.modules import ConvReLUPool2d, CrossEntropyLoss, Linear

__all__ = [
    "ConvReLUPool2d",
    "CrossEntropyLoss",
    "Linear",
    "__version__",
    "build_info",
    "functional",
]
