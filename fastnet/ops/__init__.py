"""One file per op: its fake kernels, and the autograd.Function above its raw ops."""

from fastnet.ops.conv_relu_pool import ConvReLUPool
from fastnet.ops.cross_entropy import CrossEntropy
from fastnet.ops.linear_cross_entropy import LinearCrossEntropy
from fastnet.ops.linear_relu import LinearReLU

__all__ = ["ConvReLUPool", "CrossEntropy", "LinearCrossEntropy", "LinearReLU"]
