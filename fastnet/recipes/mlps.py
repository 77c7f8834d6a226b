"""Fully connected networks on logits: regressions without a hidden layer, and two with two."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from fastnet.data import FASHION_MNIST, MNIST
from fastnet.models import mlp
from fastnet.recipes.training import Recipe

# Pixels in -1...1, and in 0...1.
CENTRED, PLAIN = {"mean": 0.5, "std": 0.5}, {"mean": 0.0, "std": 1.0}


def _sgd(lr: float):
    # One kernel for all parameters.
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, fused=True)


SOFTMAX_REGRESSION = Recipe(
    name="softmax-regression",
    summary="784-10 on Fashion-MNIST, or MNIST; SGD, lr 0.1",
    model=partial(mlp, 784, 10),
    optimizer=_sgd(0.1),
    loss=F.cross_entropy,
    datasets=(replace(FASHION_MNIST, **PLAIN), replace(MNIST, **PLAIN)),
    epochs=10,
    batch_size=256,
    test_batch_size=1000,
)
LOGISTIC_REGRESSION = replace(
    SOFTMAX_REGRESSION,
    name="logistic-regression",
    summary="784-10 on MNIST, one epoch; SGD, lr 0.1",
    datasets=(replace(MNIST, **PLAIN),),
    epochs=1,
    batch_size=100,
)
SIMPLE_NET = Recipe(
    name="simple-net",
    summary="784-300-100-10 without activations on MNIST; SGD, lr 0.01",
    model=partial(mlp, 784, 300, 100, 10, relu=False),
    optimizer=_sgd(0.01),
    loss=F.cross_entropy,
    datasets=(replace(MNIST, **CENTRED),),
    epochs=20,
    batch_size=64,
    test_batch_size=1000,
)
ACTIVATION_NET = replace(
    SIMPLE_NET,
    name="activation-net",
    summary="784-300-100-10 with ReLU on MNIST; SGD, lr 0.01",
    model=partial(mlp, 784, 300, 100, 10),
)
