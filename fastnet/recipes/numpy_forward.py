"""The forward pass of a network of 2-2-2-1 units by hand in NumPy, and the same from torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

INPUT = np.array([3.0, 5.0])
# One row for each unit; there are no biases.
WEIGHTS = (
    np.array([[2.0, 4.0], [4.0, -5.0]]),
    np.array([[-1.0, 1.0], [2.0, 2.0]]),
    np.array([[-3.0, 7.0]]),
)


def forward(values: np.ndarray) -> list[np.ndarray]:
    """What each layer gives, of an input `(2,)`: `(2,)`, `(2,)` after tanh, and `(1,)`."""
    layers = []
    for number, weight in enumerate(WEIGHTS):
        values = weight @ values
        if number < len(WEIGHTS) - 1:
            values = np.tanh(values)
        layers.append(values)
    return layers


def network() -> nn.Sequential:
    """The same of torch's modules, in float64."""
    layers: list[nn.Module] = []
    for weight in WEIGHTS:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        linear.weight.data.copy_(torch.from_numpy(weight))
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def run() -> str:
    """Both, for people."""
    layers = forward(INPUT)
    with torch.no_grad():
        of_torch = network()(torch.from_numpy(INPUT)).item()
    lines = [f"input            {INPUT.tolist()}"]
    lines += [f"hidden layer {n}   {np.round(v, 6).tolist()}" for n, v in enumerate(layers[:-1], 1)]
    return "\n".join(
        [*lines, f"output, NumPy    {layers[-1].item()!r}", f"output, torch    {of_torch!r}"]
    )
