"""Fully connected networks of any widths."""

from __future__ import annotations

import itertools

from torch import nn

from fastnet.models.layers import linear, linear_relu


def mlp(
    *widths: int, relu: bool = True, batch_norm: bool = False, backend: str = "fastnet"
) -> nn.Sequential:
    """Linear layers from each of the widths to the next, with ReLU after each but the last.

    Args:
        widths: of the input, of the hidden layers, and the number of classes.
        relu: False leaves the activations out.
        batch_norm: whether to normalise what each but the last gives, before its ReLU, which is
            fused with nothing then, on either backend.
        backend: "fastnet" for the fused kernels, "torch" for torch's own.

    Shape: pictures `(batch, ...)` of `widths[0]` values each → logits `(batch, widths[-1])`.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths[:-1]):
        if batch_norm:
            layers += [linear(before, after, backend), nn.BatchNorm1d(after)]
            if relu:
                layers.append(nn.ReLU())
        else:
            layers.append((linear_relu if relu else linear)(before, after, backend))
    return nn.Sequential(*layers, linear(*widths[-2:], backend))
