"""GANs for digits, fully connected and convolutional, and their losses.

A discriminator gives logits: the losses apply the sigmoid, where it cannot overflow.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastnet.models.layers import linear, linear_relu
from fastnet.models.mlp import mlp


class _Adversaries(nn.Module):
    """A generator and a discriminator; called, it generates."""

    def __init__(self, latent_features: int, generator: nn.Module, discriminator: nn.Module):
        super().__init__()
        self.latent_features = latent_features
        self.generator = generator
        self.discriminator = discriminator

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one picture's noise."""
        return (self.latent_features,)

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)


class GAN(_Adversaries):
    """A `generator` of two hidden layers of 256 units with ReLU and a tanh at the end, and a
    `discriminator` of as many with leaky ReLU.

    Args:
        latent_features: numbers of noise for each picture.
        backend: "fastnet" for the fused kernels, "torch" for torch's own.

    Shape: noise `(batch, latent_features)` → pictures `(batch, 1, 28, 28)` in -1...1. The
    discriminator's: such pictures → logits `(batch)`, of being real.
    """

    def __init__(self, latent_features: int = 100, backend: str = "fastnet") -> None:
        generator = mlp(latent_features, 256, 256, 28 * 28, backend=backend)
        super().__init__(
            latent_features,
            generator.extend([nn.Tanh(), nn.Unflatten(1, (1, 28, 28))]),
            nn.Sequential(
                nn.Flatten(),
                linear(28 * 28, 256, backend),
                nn.LeakyReLU(0.2),
                linear(256, 256, backend),
                nn.LeakyReLU(0.2),
                linear(256, 1, backend),
                nn.Flatten(0),
            ),
        )


class DCGAN(_Adversaries):
    """The same with convolutions: a `generator` of two linear layers and two transposed
    convolutions, with ReLU and batch normalisation between, and a `discriminator` of two 5 x 5
    convolutions with leaky ReLU and 2 x 2 max-pooling, and two linear layers.

    Args:
        latent_features: numbers of noise for each picture.
        backend: "fastnet" for the fused kernels, "torch" for torch's own.

    Shape: noise `(batch, latent_features)` → pictures `(batch, 1, 28, 28)` in -1...1. The
    discriminator's: such pictures → logits `(batch)`, of being real.
    """

    def __init__(self, latent_features: int = 96, backend: str = "fastnet") -> None:
        super().__init__(
            latent_features,
            nn.Sequential(
                linear_relu(latent_features, 1024, backend),
                nn.BatchNorm1d(1024),
                linear_relu(1024, 128 * 7 * 7, backend),
                nn.BatchNorm1d(128 * 7 * 7),
                nn.Unflatten(1, (128, 7, 7)),
                nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
                nn.ReLU(),
                nn.BatchNorm2d(64),
                nn.ConvTranspose2d(64, 1, 4, stride=2, padding=1),
                nn.Tanh(),
            ),
            nn.Sequential(
                nn.Conv2d(1, 32, 5),
                nn.LeakyReLU(0.01),
                nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 5),
                nn.LeakyReLU(0.01),
                nn.MaxPool2d(2),
                nn.Flatten(),
                linear(64 * 4 * 4, 64 * 4 * 4, backend),
                nn.LeakyReLU(0.01),
                linear(64 * 4 * 4, 1, backend),
                nn.Flatten(0),
            ),
        )


def generator_loss(logits_fake: Tensor, least_squares: bool = False) -> Tensor:
    """How far the discriminator is from taking generated pictures for real ones.

    Args:
        logits_fake: the discriminator's, of generated pictures.
        least_squares: half the mean of `(logit - 1)²` instead of the mean of
            `-log(sigmoid(logit))`.

    Shape: `(batch)` → a scalar.
    """
    if least_squares:
        return (logits_fake - 1).square().mean() / 2
    return -F.logsigmoid(logits_fake).mean()


def discriminator_loss(
    logits_real: Tensor, logits_fake: Tensor, least_squares: bool = False
) -> Tensor:
    """How far the discriminator is from telling real pictures from generated ones: the sum of what
    it loses on both.

    Args:
        logits_real: the discriminator's, of real pictures.
        logits_fake: of generated ones.
        least_squares: half the means of `(logit - 1)²` and `logit²` instead of the means of
            `-log(sigmoid(logit))` and `-log(1 - sigmoid(logit))`.

    Shape: `(batch)` twice → a scalar.
    """
    if least_squares:
        return ((logits_real - 1).square().mean() + logits_fake.square().mean()) / 2
    return -F.logsigmoid(logits_real).mean() - F.logsigmoid(-logits_fake).mean()
