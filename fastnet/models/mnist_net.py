"""MnistNet: one hidden layer of 28 units."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastnet.models.layers import linear, linear_relu


class MnistNet(nn.Module):
    """784 → 28, ReLU, 28 → 10, log-softmax.

    Args:
        backend: "fastnet" for the fused kernels, "torch" for torch's own.

    Shape: pictures `(batch, 1, 28, 28)`, or anything with 784 values each → log-probabilities
    `(batch, 10)`, for `F.nll_loss`.
    """

    def __init__(self, backend: str = "fastnet") -> None:
        super().__init__()
        self.fc1 = linear_relu(28 * 28, 28, backend)
        self.fc2 = linear(28, 10, backend)

    def forward(self, pictures: Tensor) -> Tensor:
        return F.log_softmax(self.fc2(self.fc1(pictures.flatten(1))), dim=1)
