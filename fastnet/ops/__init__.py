"""One file per op: its fake kernels, the autograd.Function above its raw ops (where it has
gradients), and `apply`, which is that or the same in C++ (csrc/autograd)."""

from fastnet.ops import (
    conv_relu_pool,
    cross_entropy,
    gather_pictures,
    linear,
    linear_cross_entropy,
    linear_relu,
)

__all__ = [
    "conv_relu_pool",
    "cross_entropy",
    "gather_pictures",
    "linear",
    "linear_cross_entropy",
    "linear_relu",
]
