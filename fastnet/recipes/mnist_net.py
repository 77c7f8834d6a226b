"""MnistNet on handwritten digits: Adam, batches of 64, ten epochs, test accuracy above 90 %."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from fastnet.data import MNIST
from fastnet.models import MnistNet
from fastnet.recipes.recipe import Recipe
from fastnet.recipes.tasks import Classification

MNIST_NET = Recipe(
    name="mnist-net",
    summary="784-28-10 with ReLU and log-softmax on MNIST; Adam, lr 0.001",
    task=Classification,
    model=lambda shape, classes, backend: MnistNet(backend),  # noqa: ARG005
    # One kernel for all parameters, where the default makes a dozen calls for each.
    optimizer=partial(torch.optim.Adam, lr=0.001, fused=True),
    loss=F.nll_loss,
    datasets=(MNIST,),
    epochs=10,
    batch_size=64,
)
