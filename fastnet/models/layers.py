"""One layer, two backends."""

from __future__ import annotations

from torch import nn

import fastnet

BACKENDS = ("fastnet", "torch")


def linear_relu(in_features: int, out_features: int, backend: str) -> nn.Module:
    """A linear layer and its ReLU. Either backend has the same parameters under the same names."""
    if backend == "fastnet":
        return fastnet.Linear(in_features, out_features, activation="relu")
    if backend == "torch":
        return _LinearThenReLU(in_features, out_features)
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")


class _LinearThenReLU(nn.Linear):
    def forward(self, input):
        return super().forward(input).relu()
