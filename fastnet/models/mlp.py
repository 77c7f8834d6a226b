"""Fully connected networks of any widths."""

from __future__ import annotations

import itertools

from torch import nn

from fastnet.models.layers import linear_relu


def mlp(*widths: int, relu: bool = True, backend: str = "fastnet") -> nn.Sequential:
    """Linear layers from each of the widths to the next, with ReLU after each but the last.

    Args:
        widths: of the input, of the hidden layers, and the number of classes.
        relu: False leaves the activations out.
        backend: "fastnet" for the fused kernels, "torch" for torch's own.

    Shape: pictures `(batch, ...)` of `widths[0]` values each → logits `(batch, widths[-1])`.
    """
    hidden = [
        linear_relu(before, after, backend) if relu else nn.Linear(before, after)
        for before, after in itertools.pairwise(widths[:-1])
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(*widths[-2:]))
