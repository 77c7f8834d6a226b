"""SimpleCNN: three convolutions, each with ReLU and pooling, and three linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from fastnet.models.layers import conv_relu_pool, linear, linear_relu


class SimpleCNN(nn.Module):
    """3 x 3 convolutions of 32, 64 and 128 filters, each followed by ReLU and 2 x 2 max-pooling,
    then linear layers of 512, 64 and `classes` units.

    Args:
        channels: of the pictures, 1 or 3.
        size: height and width of the pictures, in pixels; at least 8.
        classes: how many there are.
        backend: "fastnet" for the fused kernels, "torch" for torch's own.

    Shape: pictures `(batch, channels, size, size)` → logits `(batch, classes)`.
    """

    def __init__(
        self, channels: int = 1, size: int = 28, classes: int = 10, backend: str = "fastnet"
    ) -> None:
        super().__init__()
        if size < 8:
            raise ValueError(f"size must be at least 8 pixels, for three poolings, not {size}")
        self.conv1 = conv_relu_pool(channels, 32, backend)
        self.conv2 = conv_relu_pool(32, 64, backend)
        self.conv3 = conv_relu_pool(64, 128, backend)
        self.fc1 = linear_relu(128 * (size // 8) ** 2, 512, backend)
        self.fc2 = linear_relu(512, 64, backend)
        self.fc3 = linear(64, classes, backend)

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.conv3(self.conv2(self.conv1(pictures)))
        return self.fc3(self.fc2(self.fc1(features.flatten(1))))
