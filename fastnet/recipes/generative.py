"""Networks that make pictures: of a picture again, through a narrow middle, or of noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnet.data import FASHION_MNIST, MNIST
from fastnet.models import DCGAN, GAN, Autoencoder
from fastnet.models.gan import discriminator_loss, generator_loss
from fastnet.recipes.recipe import Recipe
from fastnet.recipes.tasks import Adversaries, Reconstruction

# Pixels in -1...1, as tanh has them.
DATASETS = tuple(replace(data, mean=(0.5,), std=(0.5,)) for data in (MNIST, FASHION_MNIST))


@dataclass(frozen=True)
class AdversarialLoss:
    """The halves of a GAN's loss, of logits: cross-entropy, or least squares."""

    least_squares: bool = False

    @property
    def threshold(self) -> float:
        """The logit above which a picture is taken for real."""
        return 0.5 if self.least_squares else 0.0

    def generator(self, made: Tensor) -> Tensor:
        return generator_loss(made, self.least_squares)

    def discriminator(self, real: Tensor, made: Tensor) -> Tensor:
        return discriminator_loss(real, made, self.least_squares)


AUTOENCODER = Recipe(
    name="autoencoder",
    summary="784-128-64-12-3 and back on MNIST or Fashion-MNIST; Adam, lr 0.001",
    task=Reconstruction,
    model=lambda shape, classes, backend: Autoencoder(backend=backend),  # noqa: ARG005
    optimizer=partial(torch.optim.Adam, lr=0.001, weight_decay=1e-5, fused=True),
    loss=F.mse_loss,
    datasets=DATASETS,
    epochs=20,
    batch_size=128,
)
GAN_RECIPE = Recipe(
    name="gan",
    summary="a fully connected generator against a discriminator, on MNIST or Fashion-MNIST; Adam, "
    "lr 0.0002",
    task=Adversaries,
    model=lambda shape, classes, backend: GAN(backend=backend),  # noqa: ARG005
    optimizer=partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999), fused=True),
    loss=AdversarialLoss(),
    datasets=DATASETS,
    epochs=50,
    batch_size=128,
)
LSGAN = replace(
    GAN_RECIPE,
    name="lsgan",
    summary="a GAN with the least-squares loss, on MNIST or Fashion-MNIST; Adam, lr 0.0002",
    loss=AdversarialLoss(least_squares=True),
)
DCGAN_RECIPE = replace(
    GAN_RECIPE,
    name="dcgan",
    summary="a convolutional generator against a discriminator, on MNIST or Fashion-MNIST; Adam, "
    "lr 0.0002",
    model=lambda shape, classes, backend: DCGAN(backend=backend),  # noqa: ARG005
    channels_last=True,
    epochs=20,
)
