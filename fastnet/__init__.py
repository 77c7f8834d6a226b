"""Fused kernels that make small and mid-size PyTorch networks train faster."""

from fastnet import functional, optim
from fastnet._library import build_info
from fastnet._version import __version__
from fastnet.acceleration import accelerate, accelerate_report
from fastnet.modules import ConvReLUPool2d, CrossEntropyLoss, Linear
from fastnet.trainer import MLPTrainer

__all__ = [
    "ConvReLUPool2d",
    "CrossEntropyLoss",
    "Linear",
    "MLPTrainer",
    "__version__",
    "accelerate",
    "accelerate_report",
    "build_info",
    "functional",
    "optim",
]
