"""Fused kernels that make small and mid-size PyTorch networks train faster.

    accelerate(model)     an existing network on the fused kernels; accelerate_report(model) tells
    Linear, ConvReLUPool2d, CrossEntropyLoss    drop-in modules
    functional            the same as functions, and linear_cross_entropy
    optim                 Adam, AdamW and SGD whose step is one call
    MLPTrainer            whole epochs of fully connected networks in native code
    build_info()          what this build is, and what of it runs here

`fastnet.data`, `fastnet.models` and `fastnet.recipes` hold the trainings of `fastnet train`.
"""

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
