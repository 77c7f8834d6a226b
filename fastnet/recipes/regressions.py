"""Networks without a hidden layer: linear, softmax and logistic regression, also all by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fastnet.data import FASHION_MNIST, MNIST, Dataset, Samples
from fastnet.models import mlp, scratch
from fastnet.recipes import plots
from fastnet.recipes.recipe import Recipe
from fastnet.recipes.tasks import Classification, Regression

TRUE_WEIGHT, TRUE_BIAS, NOISE = (2.0, -3.4), 4.2, 0.01
# Pixels in 0...1.
DIGITS, CLOTHES = (replace(data, mean=(0.0,), std=(1.0,)) for data in (MNIST, FASHION_MNIST))


def load_line(data_dir: Path | None = None, *, download: bool = False) -> tuple[Samples, Samples]:  # noqa: ARG001
    """1,000 samples to train and 200 to test: features from N(0, 1), `(N, 2)`; values w x + b and
    some noise, `(N, 1)`."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Samples:
        inputs = torch.randn(count, len(TRUE_WEIGHT), generator=generator)
        noise = NOISE * torch.randn(count, 1, generator=generator)
        values = inputs @ torch.tensor(TRUE_WEIGHT).view(-1, 1) + TRUE_BIAS + noise
        return Samples(inputs, values, (), "samples of w = [2, -3.4], b = 4.2")

    return draw(1000), draw(200)


def estimation_errors(network: nn.Module) -> str:
    weight = torch.tensor(TRUE_WEIGHT) - network.weight.detach().cpu().flatten()
    bias = TRUE_BIAS - network.bias.item()
    return (
        f"estimation errors: of w [{', '.join(f'{w:.5f}' for w in weight.tolist())}], "
        f"of b {bias:.5f}"
    )


def _regression(std: Callable[[int], float]) -> Callable[..., nn.Sequential]:
    """One linear layer, its weights drawn from a normal distribution of a deviation that follows
    from the number of features, its biases 0."""

    def model(shape: tuple[int, ...], classes: int, backend: str) -> nn.Sequential:
        features = math.prod(shape)
        network = mlp(features, classes, backend=backend)
        nn.init.normal_(network[-1].weight, std=std(features))
        nn.init.zeros_(network[-1].bias)
        return network

    return model


LINEAR_REGRESSION = Recipe(
    name="linear-regression",
    summary="a line through synthetic points, all by hand; SGD, lr 0.03",
    task=Regression,
    model=lambda shape, classes, backend: scratch.LinearRegression(*shape),  # noqa: ARG005
    optimizer=partial(scratch.SGD, lr=0.03),
    loss=scratch.squared_loss,
    datasets=(Dataset("synthetic", load_line),),
    epochs=3,
    batch_size=10,
    report=estimation_errors,
)
SOFTMAX_REGRESSION = Recipe(
    name="softmax-regression",
    summary="784-10 on Fashion-MNIST, or MNIST; SGD, lr 0.1",
    task=Classification,
    model=_regression(lambda features: 0.01),  # noqa: ARG005
    optimizer=partial(torch.optim.SGD, lr=0.1, fused=True),
    loss=F.cross_entropy,
    datasets=(CLOTHES, DIGITS),
    epochs=10,
    batch_size=256,
)
SOFTMAX_REGRESSION_SCRATCH = replace(
    SOFTMAX_REGRESSION,
    name="softmax-regression-scratch",
    summary="784-10 with softmax, cross-entropy, accuracy and SGD written by hand",
    model=lambda shape, classes, backend: scratch.SoftmaxRegression(math.prod(shape), classes),  # noqa: ARG005
    optimizer=partial(scratch.SGD, lr=0.1),
    loss=scratch.cross_entropy,
    accuracy=scratch.accuracy,
)
LOGISTIC_REGRESSION = replace(
    SOFTMAX_REGRESSION,
    name="logistic-regression",
    summary="784-10 on MNIST; SGD, lr 0.1",
    datasets=(DIGITS,),
    model=_regression(lambda features: 1 / math.sqrt(features)),
    epochs=1,
    batch_size=100,
    pictures={"templates.png": plots.weight_templates},
)
LOGISTIC_REGRESSION_SCRATCH = replace(
    LOGISTIC_REGRESSION,
    name="logistic-regression-scratch",
    summary="784-10 with log-softmax, its loss and SGD written by hand",
    model=lambda shape, classes, backend: scratch.LogisticRegression(math.prod(shape), classes),  # noqa: ARG005
    optimizer=partial(scratch.SGD, lr=0.1),
    loss=scratch.nll,
    accuracy=scratch.accuracy,
)
