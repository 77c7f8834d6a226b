"""linear+ReLU at the layers of the document networks, and from 1 KB to 1 GB; and their last layers,
which have no ReLU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from fastnet.bench import machine
from fastnet.bench.harness import FASTNET, Case
from fastnet.bench.passes import (
    BATCHES,
    DTYPES,
    compiled,
    eighths,
    is_timed,
    passes,
    rotation,
    suffix,
)
from fastnet.functional import linear, linear_relu

# (in_features, out_features, whether the input wants a gradient: not in a first layer)
LAYERS = (
    (784, 28, False),  # mnist-net
    (784, 300, False),  # activation-net
    (300, 100, True),
    (1152, 512, True),  # simple-cnn, on 28 x 28
    (2048, 512, True),  # on 32 x 32
    (512, 64, True),
    (3072, 1000, False),  # cifar-mlp
    (1000, 500, True),
    (10368, 512, True),  # cats-dogs
    (784, 128, False),  # autoencoder
    (128, 64, True),
    (64, 12, True),
    (3, 12, True),
    (12, 64, True),
    (64, 128, True),
    (100, 256, False),  # gan
    (256, 256, True),
    (96, 1024, False),  # dcgan
    (1024, 6272, True),
    (8192, 256, False),  # vgg16-features
    (25088, 4096, False),  # vgg16-transfer
    (4096, 4096, True),
)
# In the middle of a network, where the first layers of the above would be.
INSIDE = ((64, 784, 28, True), (64, 784, 300, True))
WIDTHS = (32, 128, 512, 1024, 2048)  # in and out, for 256 rows
# Rows of 64 values, 256 bytes: from 1 KB to 1 GB.
LADDER = (4, 32, 256, 2048, 16384, 131_072, 1_048_576, 4_194_304)
QUICK = (
    (64, 784, 28, False),
    (64, 784, 28, True),
    (64, 784, 300, False),
    (64, 784, 300, True),
    (64, 300, 100, True),
    (256, 1024, 1024, True),
)
# Floating-point operations of a forward pass, beyond which a call takes seconds on a CPU.
MOST = 6e10
# The networks' last layers.
LAST = ((28, 10, True), (784, 10, False), (100, 10, True), (500, 10, True), (512, 2, True))


def cases(quick: bool = False) -> Iterator[Case]:
    """On the GPU where there is one, each case also as a CUDA graph; on the CPU in bfloat16 those
    of the important shapes only."""
    for dtype in DTYPES:
        for shape, series, x in _shapes(dtype):
            if is_timed(dtype, shape in QUICK, quick):
                yield from cases_of(*shape, dtype, series, x)
    if not torch.cuda.is_available():  # where it is torch's own
        for K, N, needs_input in LAST:
            for M in (64,) if quick else BATCHES:
                yield from cases_of(M, K, N, needs_input, op="linear")


def _shapes(dtype: torch.dtype) -> Iterator[tuple[tuple[int, int, int, bool], str, float]]:
    for K, N, needs_input in LAYERS:
        for M in BATCHES:
            if 2.0 * M * K * N <= MOST or torch.cuda.is_available():
                yield (M, K, N, needs_input), f"{K}->{N}", M
    for shape in INSIDE:
        yield shape, "", 0
    for width in WIDTHS:
        yield (256, width, width, True), "width", width
    for rows in LADDER:
        yield (rows, 64, 64, True), "ladder", rows * 64 * dtype.itemsize


def eager(input, weight, bias):
    return torch.relu(F.linear(input, weight, bias))


# Eager torch's function and fastnet's.
FUNCTIONS = {"linear_relu": (eager, linear_relu), "linear": (F.linear, linear)}


def cases_of(
    M: int,
    K: int,
    N: int,
    needs_input: bool,
    dtype: torch.dtype = torch.float32,
    series: str = "",
    x: float = 0,
    op: str = "linear_relu",
) -> Iterator[Case]:
    torch.manual_seed(0)
    native, fused = FUNCTIONS[op]
    draw = partial(eighths, dtype=dtype)
    weight, bias = draw(N, K).requires_grad_(), draw(N).requires_grad_()
    size = weight.element_size()
    batches = rotation(
        lambda: ((draw(M, K).requires_grad_(needs_input), weight, bias), draw(M, N)),
        M * (K + N) * size,
    )
    name = f"{M}x{K}->{N}" + (", input gradient" if needs_input else "")
    name += suffix(dtype)
    case = Case(
        op=op,
        case=name,
        mode="operators",
        sides=_operators(batches, op),
        flops=2.0 * M * K * N,
        bytes=(M * K + N * K + M * N) * size,  # as each of the two or three products has, at least
        dtype=dtype,
        # Sums of hundreds of products in another order, rounded to the dtype.
        tolerance=1e-5 if dtype is torch.float32 and machine.device().type == "cpu" else 2e-2,
        series=series,
        x=x,
    )
    sides = {"eager": native, "compile": compiled(native), FASTNET: fused}
    backward = 1 + needs_input
    yield from passes(case, {side: (f, batches) for side, f in sides.items()}, backward)
    times = 1 + backward
    yield replace(case, flops=times * case.flops, bytes=times * case.bytes)


def _operators(batches, op: str):
    """Forward and backward as calls of operators, without autograd's own cost on either side."""
    plain = [tuple(t.detach() for t in (*arguments, grad)) for arguments, grad in batches]
    needs_input = batches[0][0][0].requires_grad
    turns = [itertools.cycle(plain) for _ in range(2)]
    has_relu = op == "linear_relu"
    native_forward, _ = FUNCTIONS[op]
    forward = getattr(torch.ops.fastnet, f"{op}_forward").default
    backward = getattr(torch.ops.fastnet, f"{op}_backward").default

    def native():
        input, weight, bias, grad = next(turns[0])
        output = native_forward(input, weight, bias)
        grad_z = torch.ops.aten.threshold_backward(grad, output, 0) if has_relu else grad
        results = [output, grad_z.t() @ input, grad_z.sum(0)]
        return [*results, grad_z @ weight] if needs_input else results

    def fused():
        input, weight, bias, grad = next(turns[1])
        output = forward(input, weight, bias)
        saved = (output,) if has_relu else ()
        grad_input, grad_weight, grad_bias = backward(
            grad, *saved, input, weight if needs_input else None, True
        )
        results = [output, grad_weight, grad_bias]
        return [*results, grad_input] if needs_input else results

    return {"eager": native, FASTNET: fused}
