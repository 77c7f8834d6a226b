"""Layers, each on two backends, with the same parameters under the same names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

import fastnet

BACKENDS = ("fastnet", "torch")


def linear(in_features: int, out_features: int, backend: str) -> nn.Module:
    """A linear layer."""
    if backend == "fastnet":
        return fastnet.Linear(in_features, out_features)
    if backend == "torch":
        return nn.Linear(in_features, out_features)
    raise _unknown(backend)


def linear_relu(in_features: int, out_features: int, backend: str) -> nn.Module:
    """A linear layer and its ReLU."""
    if backend == "fastnet":
        return fastnet.Linear(in_features, out_features, activation="relu")
    if backend == "torch":
        return _LinearThenReLU(in_features, out_features)
    raise _unknown(backend)


def conv_relu_pool(in_channels: int, out_channels: int, backend: str) -> nn.Module:
    """A 3 x 3 convolution that keeps the size, its ReLU, and 2 x 2 max-pooling."""
    if backend == "fastnet":
        return fastnet.ConvReLUPool2d(in_channels, out_channels, 3, padding=1)
    if backend == "torch":
        return _ConvThenReLUThenPool(in_channels, out_channels, 3, padding=1)
    raise _unknown(backend)


def accelerated(network: nn.Module, backend: str) -> nn.Module:
    """A network of torch's layers, on either backend: it is changed in place."""
    if backend == "fastnet":
        return fastnet.accelerate(network, inplace=True)
    if backend == "torch":
        return network
    raise _unknown(backend)


def _unknown(backend: str) -> ValueError:
    return ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")


class _LinearThenReLU(nn.Linear):
    def forward(self, input):
        return super().forward(input).relu()


class _ConvThenReLUThenPool(nn.Conv2d):
    def forward(self, input):
        return F.max_pool2d(super().forward(input).relu(), 2)
