"""Fully connected networks with two hidden layers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from fastnet.data import CIFAR10, MNIST
from fastnet.models import mlp
from fastnet.recipes import plots
from fastnet.recipes.recipe import Recipe
from fastnet.recipes.tasks import Classification


def _mlp(*hidden: int, **options):
    return lambda shape, classes, backend: mlp(
        math.prod(shape), *hidden, classes, **options, backend=backend
    )


SIMPLE_NET = Recipe(
    name="simple-net",
    summary="784-300-100-10 without activations on MNIST; SGD, lr 0.01",
    task=Classification,
    model=_mlp(300, 100, relu=False),
    optimizer=partial(torch.optim.SGD, lr=0.01, fused=True),
    loss=F.cross_entropy,
    datasets=(replace(MNIST, mean=(0.5,), std=(0.5,)),),  # pixels in -1...1
    epochs=20,
    batch_size=64,
)
ACTIVATION_NET = replace(
    SIMPLE_NET,
    name="activation-net",
    summary="784-300-100-10 with ReLU on MNIST; SGD, lr 0.01",
    model=_mlp(300, 100),
)
BATCH_NET = replace(
    SIMPLE_NET,
    name="batch-net",
    summary="784-300-100-10 with BatchNorm and ReLU on MNIST; SGD, lr 0.01",
    model=_mlp(300, 100, batch_norm=True),
)
CIFAR_MLP = Recipe(
    name="cifar-mlp",
    summary="3072-1000-500-10 with ReLU on CIFAR-10; Adam, lr 0.0001",
    task=Classification,
    model=_mlp(1000, 500),
    optimizer=partial(torch.optim.Adam, lr=1e-4, fused=True),
    loss=F.cross_entropy,
    datasets=(CIFAR10,),
    epochs=10,
    batch_size=16,
    pictures={"batch.png": plots.batch_with_names},
)
