"""CatsDogsCNN: four convolutions, each with ReLU and pooling, dropout, and two linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from fastnet.models.layers import conv_relu_pool, linear, linear_relu


class CatsDogsCNN(nn.Module):
    """3 x 3 convolutions of 32, 64, 128 and 128 filters, each followed by ReLU and 2 x 2
    max-pooling, then dropout of one half, and linear layers of 512 and `classes` units.

    Args:
        size: height and width of the pictures, in pixels; at least 16.
        classes: how many there are.
        backend: "fastnet" for the fused kernels, "torch" for torch's own.

    Shape: pictures `(batch, 3, size, size)` → logits `(batch, classes)`.

    Raises:
        ValueError: for pictures too small.
    """

    def __init__(self, size: int = 150, classes: int = 2, backend: str = "fastnet") -> None:
        super().__init__()
        if size < 16:
            raise ValueError(f"size must be at least 16 pixels, for four poolings, not {size}")
        self.conv1 = conv_relu_pool(3, 32, backend)
        self.conv2 = conv_relu_pool(32, 64, backend)
        self.conv3 = conv_relu_pool(64, 128, backend)
        self.conv4 = conv_relu_pool(128, 128, backend)
        self.dropout = nn.Dropout(0.5)
        self.fc1 = linear_relu(128 * (size // 16) ** 2, 512, backend)
        self.fc2 = linear(512, classes, backend)

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.conv4(self.conv3(self.conv2(self.conv1(pictures))))
        return self.fc2(self.fc1(self.dropout(features.flatten(1))))
