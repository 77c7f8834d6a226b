"""Regressions by hand: no layer, loss or optimizer of torch's, only its tensors and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class _Affine(nn.Module):
    """`X W + b`: weights from a normal distribution around 0, biases 0."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, input: Tensor) -> Tensor:
        return input.flatten(1) @ self.weight + self.bias


class LinearRegression(_Affine):
    """One number from several, `X w + b`; trained with `squared_loss`.

    Args:
        in_features: numbers in each sample.

    Shape: `(N, in_features)` → `(N, 1)`.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 1, 0.01)


class SoftmaxRegression(_Affine):
    """Probabilities of the classes, `softmax(X W + b)`; trained with `cross_entropy`.

    Args:
        in_features: values in each picture.
        classes: how many there are.

    Shape: pictures `(N, ...)` of `in_features` values each → probabilities `(N, classes)`.
    """

    def __init__(self, in_features: int = 784, classes: int = 10) -> None:
        super().__init__(in_features, classes, 0.01)

    def forward(self, pictures: Tensor) -> Tensor:
        return softmax(super().forward(pictures))


class LogisticRegression(_Affine):
    """Log-probabilities of the classes, `log_softmax(X W + b)`; trained with `nll`.

    Args:
        in_features: values in each picture.
        classes: how many there are.

    Shape: pictures `(N, ...)` of `in_features` values each → log-probabilities `(N, classes)`.
    """

    def __init__(self, in_features: int = 784, classes: int = 10) -> None:
        super().__init__(in_features, classes, 1 / math.sqrt(in_features))

    def forward(self, pictures: Tensor) -> Tensor:
        return log_softmax(super().forward(pictures))


def softmax(logits: Tensor) -> Tensor:
    """`exp(logits)`, divided by its sum in each row. Shape: `(N, classes)` → the same."""
    exponentials = _below_zero(logits).exp()
    return exponentials / exponentials.sum(1, keepdim=True)


def log_softmax(logits: Tensor) -> Tensor:
    """The logarithm of `softmax(logits)`. Shape: `(N, classes)` → the same."""
    logits = _below_zero(logits)
    return logits - logits.exp().sum(1, keepdim=True).log()


def _below_zero(logits: Tensor) -> Tensor:
    # Softmax stays the same whatever is taken from a row; with its maximum, exp cannot overflow.
    return logits - logits.detach().amax(1, keepdim=True)


def cross_entropy(probabilities: Tensor, targets: Tensor) -> Tensor:
    """The mean of `-log p` over the probabilities `p` of the targets.

    Shape: probabilities `(N, classes)` and class indices `(N)` → a scalar.
    """
    p = _of_targets(probabilities, targets)
    # A softmax may round to 0, and log 0 would make an infinity of the mean and NaN of gradients.
    return -p.clamp_min(torch.finfo(p.dtype).tiny).log().mean()


def nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """The mean of the targets' log-probabilities, negated.

    Shape: log-probabilities `(N, classes)` and class indices `(N)` → a scalar.
    """
    return -_of_targets(log_probabilities, targets).mean()


def _of_targets(output: Tensor, targets: Tensor) -> Tensor:
    return output[torch.arange(len(targets), device=targets.device), targets]


def squared_loss(output: Tensor, targets: Tensor) -> Tensor:
    """The mean of `(output - target)² / 2`.

    Shape: `(N, 1)` and as many targets, `(N, 1)` or `(N)` → a scalar.
    """
    # Reshaped, lest (N, 1) - (N) be all N x N differences.
    return ((output - targets.reshape(output.shape)) ** 2 / 2).mean()


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """The share of rows whose largest value stands at the target.

    Shape: logits, probabilities or their logarithms `(N, classes)` and class indices `(N)` → a
    scalar.
    """
    return (output.argmax(1) == targets).float().mean()


class SGD(torch.optim.Optimizer):
    """Minibatch stochastic gradient descent: `p -= lr * gradient`.

    Args:
        params: parameters, or groups of them.
        lr: the learning rate.

    Raises:
        ValueError: for a negative learning rate.
    """

    def __init__(self, params: Iterable, lr: float) -> None:
        if lr < 0:
            raise ValueError(f"lr must not be negative, as {lr} is")
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Changes every parameter that has a gradient; `closure`, if given, computes the loss and
        the gradients first, and the loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad
        return loss
