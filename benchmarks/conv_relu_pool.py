"""convolution+ReLU+max-pool at the blocks of the document networks, and around them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.harness import FASTNET, Case, graphed
from fastnet.functional import conv_relu_pool2d
from fastnet.models import SimpleCNN

# (batch, in_channels, height = width, out_channels, kernel, padding, whether the input wants a
# gradient: not in a first block)
BLOCKS = [
    (64, 1, 28, 32, 3, 1, False),
    (64, 3, 32, 32, 3, 1, False),
    (64, 32, 14, 64, 3, 1, True),
    (64, 64, 8, 128, 3, 1, True),
]
SHAPES = [
    *BLOCKS,
    *((batch, *block[1:]) for batch in (1, 1024) for block in BLOCKS),
    (64, 1, 28, 6, 5, 2, False),  # LeNet
    (64, 6, 14, 16, 5, 0, True),
    (64, 32, 14, 64, 5, 2, True),
    (64, 3, 27, 32, 3, 1, False),  # odd sizes
    (64, 32, 7, 64, 3, 1, True),
    (16, 64, 27, 64, 3, 1, True),
    (4, 64, 56, 128, 3, 1, True),  # a block of a larger network
    (2, 3, 224, 64, 3, 1, False),
    (2, 256, 28, 512, 3, 1, True),
]


def eager(input, weight, bias, padding):
    return F.max_pool2d(torch.relu(F.conv2d(input, weight, bias, padding=padding)), 2)


def fused(input, weight, bias, padding):
    return conv_relu_pool2d(input, weight, bias, padding=padding)


def cases(quick: bool = False) -> Iterator[Case]:
    """On the GPU where there is one, in float32 and bfloat16, each case also as a CUDA graph."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        for shape in SHAPES[:4] + ([] if quick else SHAPES[8:12]):
            for dtype in (torch.float32, torch.bfloat16):
                yield from _cases(shape, "cuda", dtype)
        return
    for shape in BLOCKS if quick else SHAPES:
        yield from _cases(shape, "cpu", torch.float32)
    yield _step()


def _cases(shape, device: str, dtype: torch.dtype) -> Iterator[Case]:
    batch, C, size, K, kernel, padding, needs_input = shape
    torch.manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        # Multiples of 1/8, whose sums of products are exact in float32, in Winograd's form too: the
        # sides find the same winners, in whatever order they add.
        return (torch.randint(-8, 9, sizes, device=device) / 8).to(dtype)

    weight, bias = draw(K, C, kernel, kernel), draw(K)
    pooled = (size + 2 * padding - kernel + 1) // 2
    count = 4 if batch * C * size * size < 1 << 21 else 2
    inputs = [draw(batch, C, size, size) for _ in range(count)]
    grads = [draw(batch, K, pooled, pooled) for _ in range(count)]
    name = f"{batch}x{C}->{K}, {size}x{size}, {kernel}x{kernel}"
    name += ", input gradient" if needs_input else ""
    name += "" if dtype is torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    flops = 8.0 * batch * pooled * pooled * K * C * kernel * kernel  # of the direct form
    products = 2 + needs_input  # forward, weight gradient, input gradient
    seconds = 0.4 if device == "cuda" else 1.5 if flops < 1e9 else 4.0
    torch._dynamo.reset()
    tuned = {"mode": "max-autotune-no-cudagraphs"} if device == "cuda" else {}
    # For this shape alone: compiled calls share their code, which would turn general, then eager.
    compiled = torch.compile(eager, dynamic=False, fullgraph=True, **tuned)
    sides = {
        "eager": (eager, torch.contiguous_format),
        "eager, channels_last": (eager, torch.channels_last),
        "compile": (compiled, torch.contiguous_format),
        "compile, channels_last": (compiled, torch.channels_last),
        FASTNET: (fused, torch.contiguous_format),
    }

    def forward(side):
        function, layout = sides[side]
        turn = itertools.cycle([t.to(memory_format=layout) for t in inputs])
        weight_ = weight.to(memory_format=layout)

        def once():
            with torch.no_grad():
                return [function(next(turn), weight_, bias, padding)]

        return once

    def forward_backward(side):
        function, layout = sides[side]
        turn = itertools.cycle(
            [
                (
                    x.detach().to(memory_format=layout).requires_grad_(needs_input),
                    g.to(memory_format=layout),
                )
                for x, g in zip(inputs, grads, strict=True)
            ]
        )
        weight_ = weight.detach().to(memory_format=layout).requires_grad_()
        bias_ = bias.detach().clone().requires_grad_()

        def once():
            input, grad = next(turn)
            input.grad = weight_.grad = bias_.grad = None
            function(input, weight_, bias_, padding).backward(grad)
            return [t.grad for t in (input, weight_, bias_) if t.grad is not None]

        return once

    for mode, build, times in (
        ("forward", forward, 1),
        ("forward+backward", forward_backward, products),
    ):
        case = Case(
            op="conv_relu_pool",
            case=name,
            mode=mode,
            sides={side: build(side) for side in sides},
            flops=times * flops,
            tolerance=1e-5 if dtype is torch.float32 and device == "cpu" else 2e-2,
            seconds=seconds,
        )
        yield case
        if device == "cuda":
            yield replace(
                case, mode=f"{mode}, graph", sides={side: graphed(build(side)) for side in sides}
            )


def _step() -> Case:
    """SimpleCNN on pictures of 3 x 32 x 32, batch 64: forward, loss and backward, no optimizer."""
    torch.manual_seed(0)
    pictures, target = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    torch._dynamo.reset()
    sides = {}
    for side in ("eager", "eager, channels_last", "compile", "compile, channels_last", FASTNET):
        torch.manual_seed(1)
        model = SimpleCNN(3, 32, backend=FASTNET if side == FASTNET else "torch")
        called, x = model, pictures
        if "channels_last" in side:
            model, x = (
                model.to(memory_format=torch.channels_last),
                x.contiguous(memory_format=torch.channels_last),
            )
        if side.startswith("compile"):
            called = torch.compile(model, dynamic=False)
        sides[side] = _one_step(model, called, x, target)
    return Case(
        "conv_relu_pool", "SimpleCNN, 64x3x32x32", "step", sides, tolerance=1e-3, seconds=6.0
    )


def _one_step(model, called, pictures, target):
    def once():
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(called(pictures), target)
        loss.backward()
        # Not the gradients: where two elements of a window are equal but for rounding, another one
        # wins on each side, and eager torch's two memory formats differ by a tenth.
        return [loss.detach()]

    return once
