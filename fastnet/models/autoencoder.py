"""Autoencoder: pictures through a few numbers and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastnet.models.mlp import mlp


class Autoencoder(nn.Module):
    """An `encoder` of linear layers with ReLU between, 784-128-64-12-3 unless told otherwise, and
    a `decoder` of the same widths backwards, with a tanh at its end.

    Args:
        in_features: values in each picture.
        widths: of the encoder's layers; the last one is the code's.
        backend: "fastnet" for the fused kernels, "torch" for torch's own.

    Shape: pictures `(batch, 1, 28, 28)`, or anything with `in_features` values each → the same,
    in -1...1. The encoder's part of it: → codes `(batch, widths[-1])`.
    """

    def __init__(
        self,
        in_features: int = 28 * 28,
        widths: Sequence[int] = (128, 64, 12, 3),
        backend: str = "fastnet",
    ) -> None:
        super().__init__()
        self.encoder = mlp(in_features, *widths, backend=backend)
        self.decoder = mlp(*reversed(widths), in_features, backend=backend).append(nn.Tanh())

    def forward(self, pictures: Tensor) -> Tensor:
        return self.decoder(self.encoder(pictures)).reshape(pictures.shape)
