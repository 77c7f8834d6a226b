"""convolution+ReLU+max-pool at the blocks of the document networks, around them, and from 1 KB to
1 GB.

On the GPU fastnet, too, is timed in both memory formats, as its rivals are: the better one of each
is what counts. On the CPU it is timed as tensors come, and chooses its own format inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

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
from fastnet.functional import conv_relu_pool2d


class Block(NamedTuple):
    """A convolution of square pictures and filters, with ReLU and 2 x 2 pooling."""

    in_channels: int
    size: int
    out_channels: int
    kernel: int = 3
    padding: int = 1
    needs_input: bool = True  # whether the input wants a gradient: not in a first block
    trained: bool = True


LAYERS = (
    Block(1, 28, 32, needs_input=False),  # simple-cnn, on 28 x 28
    Block(32, 14, 64),
    Block(64, 7, 128),
    Block(3, 32, 32, needs_input=False),  # on 32 x 32
    Block(32, 16, 64),
    Block(64, 8, 128),
    Block(3, 150, 32, needs_input=False),  # cats-dogs
    Block(32, 75, 64),
    Block(64, 37, 128),
    Block(128, 18, 128),
    # vgg16-transfer, whose convolutions are frozen
    Block(64, 224, 64, needs_input=False, trained=False),
    Block(128, 112, 128, needs_input=False, trained=False),
    Block(256, 56, 256, needs_input=False, trained=False),
    Block(512, 28, 512, needs_input=False, trained=False),
    Block(512, 14, 512, needs_input=False, trained=False),
)
OTHERS = (
    *((1, block) for block in LAYERS[:6]),
    (64, Block(1, 28, 6, 5, 2, needs_input=False)),  # LeNet
    (64, Block(6, 14, 16, 5, 0)),
    (64, Block(32, 14, 64, 5, 2)),
    (64, Block(3, 27, 32, needs_input=False)),  # odd sizes
    (16, Block(64, 27, 64)),
    (4, Block(64, 56, 128)),  # a block of a larger network
    (2, Block(3, 224, 64, needs_input=False)),
    (2, Block(256, 28, 512)),
)
WIDTHS = (8, 16, 32, 64, 128, 256)  # channels in and out, for 64 pictures of 8 x 8
# Pictures of 16 channels that take 1 KB to 1 GB: how many, and their size.
LADDER = ((1, 4), (1, 8), (1, 16), (1, 32), (8, 32), (64, 32), (512, 32), (4096, 32), (16384, 32))
QUICK = tuple((64, LAYERS[i]) for i in (0, 3, 1, 5))
QUICK_CUDA = QUICK + tuple((1024, block) for _, block in QUICK)
# Floating-point operations of a forward pass, beyond which a call takes seconds on a CPU. Blocks of
# which there is no other pass are timed once all the same.
MOST = 2e10


def cases(quick: bool = False) -> Iterator[Case]:
    """On the GPU where there is one, each case also as a CUDA graph; there the important ones come
    first, and of those bfloat16's, since a GPU's time may be short. On the CPU in bfloat16 those of
    the important shapes only."""
    on_gpu = torch.cuda.is_available()
    important = QUICK_CUDA if on_gpu else QUICK
    chosen = [
        (dtype, *each)
        for dtype in DTYPES
        for each in _shapes(dtype)
        if is_timed(dtype, each[0] in important, quick)
    ]
    if on_gpu:
        chosen.sort(key=lambda one: (one[1] not in important, one[0] is not torch.bfloat16))
    for dtype, shape, series, x in chosen:
        yield from cases_of(*shape, dtype, series, x)


def _shapes(dtype: torch.dtype) -> Iterator[tuple[tuple[int, Block], str, float]]:
    for block in LAYERS:
        for batch in BATCHES:
            once = not block.trained and batch == BATCHES[0]
            if once or _flops(batch, block) <= MOST or torch.cuda.is_available():
                name = f"{block.in_channels}->{block.out_channels}, {block.size}x{block.size}"
                yield (batch, block), name, batch
    for shape in OTHERS:
        yield shape, "", 0
    for width in WIDTHS:
        yield (64, Block(width, 8, width)), "width", width
    for batch, size in LADDER:
        yield (batch, Block(16, size, 16)), "ladder", batch * 16 * size * size * dtype.itemsize


def _flops(batch: int, block: Block) -> float:
    """Of the direct form of the convolution."""
    elements = batch * block.out_channels * (block.size + 2 * block.padding - block.kernel + 1) ** 2
    return 2.0 * elements * block.in_channels * block.kernel**2


def eager(input, weight, bias, padding):
    return F.max_pool2d(torch.relu(F.conv2d(input, weight, bias, padding=padding)), 2)


def fused(input, weight, bias, padding):
    return conv_relu_pool2d(input, weight, bias, padding=padding)


@torch.no_grad()
def _is_undecided(input, weight, bias, padding):
    """Where a window's largest elements are equal, rounded as eager's are, or zero: from five
    channels on, and in bfloat16, rounding may let any of them win, and its gradient come out
    elsewhere than eager's. A few windows in a thousand, or in a hundred."""
    z = F.conv2d(input.float(), weight.float(), bias.float(), padding=padding).to(input.dtype)
    z = z[..., : z.size(-2) // 2 * 2, : z.size(-1) // 2 * 2]
    most = F.max_pool2d(z, 2)
    is_largest = z == most.repeat_interleave(2, -2).repeat_interleave(2, -1)
    return (F.avg_pool2d(is_largest.float(), 2) > 0.25) | (most == 0)


def cases_of(
    batch: int,
    block: Block,
    dtype: torch.dtype = torch.float32,
    series: str = "",
    x: float = 0,
) -> Iterator[Case]:
    C, size, K, kernel, padding, needs_input, trained = block
    torch.manual_seed(0)
    draw = partial(eighths, dtype=dtype)
    pooled = (size + 2 * padding - kernel + 1) // 2
    weight, bias = draw(K, C, kernel, kernel), draw(K).requires_grad_(trained)
    elements = batch * (C * size * size + K * pooled * pooled)

    def draw_batch():
        input, grad = draw(batch, C, size, size), draw(batch, K, pooled, pooled)
        if trained:
            grad.masked_fill_(_is_undecided(input, weight, bias, padding), 0)
        return input, grad

    drawn = rotation(draw_batch, 2 * elements * dtype.itemsize)  # in two formats

    def batches(layout):
        its_weight = weight.detach().to(memory_format=layout).requires_grad_(trained)
        return [
            (
                (
                    input.detach().to(memory_format=layout).requires_grad_(needs_input),
                    its_weight,
                    bias,
                    padding,
                ),
                grad.to(memory_format=layout),
            )
            for input, grad in drawn
        ]

    plain, last = batches(torch.contiguous_format), batches(torch.channels_last)
    compiled_ = compiled(eager)
    name = f"{batch}x{C}->{K}, {size}x{size}, {kernel}x{kernel}"
    name += ", input gradient" if needs_input else ""
    name += suffix(dtype)
    case = Case(
        op="conv_relu_pool",
        case=name,
        mode="",
        sides={},
        flops=_flops(batch, block),
        bytes=(elements + weight.numel()) * dtype.itemsize,
        dtype=dtype,
        tolerance=1e-5 if dtype is torch.float32 and machine.device().type == "cpu" else 2e-2,
        series=series,
        x=x,
    )
    sides = {
        "eager": (eager, plain),
        "eager, channels_last": (eager, last),
        "compile": (compiled_, plain),
        "compile, channels_last": (compiled_, last),
        FASTNET: (fused, plain),
    }
    if machine.device().type == "cuda":
        sides[f"{FASTNET}, channels_last"] = (fused, last)
    yield from passes(case, sides, 1 + needs_input, trained)
