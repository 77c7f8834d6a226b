"""One file per op: its fake kernels, and the autograd.Function above its raw ops."""

from fastnet.ops.linear_relu import LinearReLU

__all__ = ["LinearReLU"]
