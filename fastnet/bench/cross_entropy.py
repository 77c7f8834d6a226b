"""cross_entropy, from the document networks' ten classes to a language model's vocabulary, and from
1 KB to 1 GB."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from fastnet.bench import machine
from fastnet.bench.harness import FASTNET, Case
from fastnet.bench.passes import BATCHES, DTYPES, compiled, is_timed, passes, rotation, suffix
from fastnet.functional import cross_entropy, linear_cross_entropy
from fastnet.ops.cross_entropy import _makes_gradient

# Of cats and dogs, of digits, of CIFAR-100, of ImageNet.
CLASSES = (2, 10, 100, 1000)
# Logits' shapes beyond those.
SHAPES = [
    (2048, 10),
    (16384, 10),
    (16, 21, 64, 64),  # a segmentation
    (1, 131072),
    (2048, 32000),
]
WIDTHS = (4, 32, 256, 2048, 16384)  # classes, for 256 rows
# Rows of 256 logits, 1 KB: up to 1 GB.
LADDER = (1, 8, 64, 512, 4096, 32_768, 262_144, 1_048_576)
CUDA_SHAPES = [(8192, 1000), (8192, 32000), (8192, 131072)]
QUICK = ((64, 10), (1024, 1000), (2048, 32000), (8192, 32000))


def cases(quick: bool = False) -> Iterator[Case]:
    """On the GPU where there is one, each case also as a CUDA graph; on the CPU in bfloat16 those
    of the important shapes only."""
    for dtype in DTYPES:
        for shape, series, x in _shapes(dtype):
            if is_timed(dtype, shape in QUICK, quick):
                yield from cases_of(shape, dtype, series, x)
    if not quick:
        yield _linear_case(2048, 512, 32_000)


def _shapes(dtype: torch.dtype) -> Iterator[tuple[tuple[int, ...], str, float]]:
    for classes in CLASSES:
        for batch in BATCHES:
            yield (batch, classes), f"{classes} classes", batch
    for shape in SHAPES + CUDA_SHAPES * torch.cuda.is_available():
        yield shape, "", 0
    for classes in WIDTHS:
        yield (256, classes), "width", classes
    for rows in LADDER:
        yield (rows, 256), "ladder", rows * 256 * dtype.itemsize


def cases_of(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    series: str = "",
    x: float = 0,
    others: dict[str, Callable] | None = None,
) -> Iterator[Case]:
    """Logits of this shape.

    Args:
        shape, dtype: of the logits.
        series, x: see `Case`.
        others: further sides (`benchmarks/peers.py` has some), each on logits of its own.
    """
    torch.manual_seed(0)
    where = machine.device()

    def draw():
        logits = torch.randn(shape, device=where).to(dtype).requires_grad_()
        return (logits, torch.randint(shape[1], (shape[0], *shape[2:]), device=where)), None

    count = math.prod(shape)
    batches = rotation(draw, count * dtype.itemsize)
    name = "x".join(map(str, shape))
    name += suffix(dtype)
    case = Case(
        op="cross_entropy",
        case=name,
        mode="operators",
        sides=_operators(batches),
        flops=4.0 * count,  # compare, subtract, exp, add
        bytes=count * dtype.itemsize,
        dtype=dtype,
        tolerance=1e-5 if dtype is torch.float32 else 2e-2,
        series=series,
        x=x,
    )
    functions = {"eager": F.cross_entropy, "compile": compiled(F.cross_entropy)}
    sides = {side: (function, batches) for side, function in functions.items()}
    if len(shape) == 4:
        # A convolution that ends in these classes would give them in this format.
        last = [
            ((logits.detach().to(memory_format=torch.channels_last).requires_grad_(), target), None)
            for (logits, target), _ in batches
        ]
        sides.update({f"{side}, channels_last": (f, last) for side, f in functions.items()})
    for side, function in (others or {}).items():
        own = [((x.detach().clone().requires_grad_(), target), None) for (x, target), _ in batches]
        sides[side] = (function, own)
    sides[FASTNET] = (cross_entropy, batches)
    # Forward reads the logits, and the gradient is written: two transfers, which is what an op must
    # move at least; in which pass the gradient is made is for each side to choose. Who makes it in
    # the backward pass, as fastnet does on a GPU with all but the largest logits, reads them again
    # there, a third transfer: two thirds of a copy's rate at best where no cache holds them.
    for timed in passes(case, sides):
        yield replace(timed, flops=0, bytes=0) if timed.mode == "backward" else timed
    yield replace(case, flops=2 * case.flops, bytes=2 * case.bytes)


def _operators(batches):
    """Forward and backward as calls of operators, without autograd's own cost on either side."""
    pairs = [(x.detach(), t) for (x, t), _ in batches]
    turns = [itertools.cycle(pairs) for _ in range(2)]
    aten, fastnet = torch.ops.aten, torch.ops.fastnet
    x = pairs[0][0]
    flat = x.dim() == 2
    nll = aten.nll_loss_forward.default if flat else aten.nll_loss2d_forward.default
    nll_backward = aten.nll_loss_backward.default if flat else aten.nll_loss2d_backward.default
    one = torch.ones((), device=x.device, dtype=x.dtype)
    one_wide = one.float()

    def native():
        logits, target = next(turns[0])
        log_p = aten._log_softmax.default(logits, 1, False)
        _, total = nll(log_p, target, None, 1, -100)
        grad = nll_backward(one, log_p, target, None, 1, -100, total)
        return [aten._log_softmax_backward_data.default(grad, log_p, 1, x.dtype)]

    def fused():
        logits, target = next(turns[1])
        if _makes_gradient(logits, target, 1, 0.0):  # as a training calls it
            gradient = fastnet.cross_entropy_with_gradient(logits, target, None, 1, -100, 0.0)[1]
            if not x.is_cpu:
                fastnet.cross_entropy_scale.default(gradient, one_wide, target, -100)
            return [gradient]
        _, statistics = fastnet.cross_entropy_forward.default(logits, target, None, 1, -100, 0.0)
        return [
            fastnet.cross_entropy_backward.default(
                one_wide, logits, target, None, statistics, 1, -100, 0.0
            )
        ]

    return {"eager": native, FASTNET: fused}


def _linear_case(N: int, K: int, C: int) -> Case:
    """The last layer and the loss, against both ops, and against torch's own chunks."""
    torch.manual_seed(0)
    where = machine.device()
    x = torch.randn(N, K, device=where, requires_grad=True)
    weight = (torch.randn(C, K, device=where) * K**-0.5).requires_grad_()
    target = torch.randint(C, (N,), device=where)

    def two_ops(x, weight, target):
        return F.cross_entropy(F.linear(x, weight), target)

    functions = {
        "eager": two_ops,
        "compile": compiled(two_ops),
        "fastnet, two ops": lambda x, w, t: cross_entropy(F.linear(x, w), t),
        FASTNET: linear_cross_entropy,
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        functions["torch's chunks"] = lambda x, w, t: F.linear_cross_entropy(
            x, w, t, options=options
        )
    case = Case(
        op="linear_cross_entropy",
        case=f"{N}x{K}->{C}",
        mode="",
        sides={},
        flops=2.0 * N * K * C,
        tolerance=1e-4,
    )
    batches = [((x, weight, target), None)]
    sides = {side: (function, batches) for side, function in functions.items()}
    return next(c for c in passes(case, sides, backward=2) if c.mode == "forward+backward")
