"""linear+ReLU at the layers of the document networks, and up to where the product dominates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.harness import FASTNET, Case, graphed
from fastnet.functional import linear_relu

# (batch, in_features, out_features, whether the input wants a gradient: not in a first layer)
SHAPES = [
    (64, 784, 28, False),
    (64, 784, 28, True),
    (64, 784, 300, False),
    (64, 784, 300, True),
    (64, 300, 100, True),
    (16, 784, 28, False),
    (256, 784, 28, False),
    (1024, 784, 28, False),
    (16, 3072, 1000, False),
    (16, 1000, 500, True),
    (256, 784, 300, False),
    (1024, 784, 300, False),
    (256, 1024, 1024, True),
    (1024, 4096, 4096, True),
]


def eager(input, weight, bias):
    return torch.relu(F.linear(input, weight, bias))


QUICK = (0, 1, 2, 3, 4, 12)


def cases(quick: bool = False) -> Iterator[Case]:
    """On the GPU where there is one, in float32 and bfloat16, each case also as a CUDA graph."""
    shapes = [SHAPES[i] for i in QUICK] if quick else SHAPES
    on_gpu = torch.cuda.is_available()
    for M, K, N, needs_input in shapes:
        for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
            yield from _cases(M, K, N, needs_input, "cuda" if on_gpu else "cpu", dtype)


def _cases(
    M: int, K: int, N: int, needs_input: bool, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    torch.manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        # Multiples of 1/8, whose sums of products are exact in float32: the sides have the same
        # signs before the ReLU, and so the same masks, in whatever order they add.
        return (torch.randint(-8, 9, size, device=device) / 8).to(dtype)

    weight = draw(N, K).requires_grad_()
    bias = draw(N).requires_grad_()
    # Eight batches in turn: a training does not see the same one twice in a row.
    count = 8 if M * (K + N) < 1 << 21 else 2
    inputs = [draw(M, K).requires_grad_(needs_input) for _ in range(count)]
    grads = [draw(M, N) for _ in range(count)]
    name = f"{M}x{K}->{N}" + (", input gradient" if needs_input else "")
    name += "" if dtype is torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    products = 2 + needs_input  # forward, weight gradient, input gradient
    flops = 2.0 * M * K * N
    moved = (M * K + N * K + M * N) * weight.element_size()  # by each product, at least
    seconds = 0.4 if device == "cuda" else 1.2 if flops < 1e9 else 4.0
    tuned = {"mode": "max-autotune-no-cudagraphs"} if device == "cuda" else {}
    # For this shape alone: compiled calls share their code, which would turn general, then eager.
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False, fullgraph=True, **tuned)
    functions = {"eager": eager, "compile": compiled, FASTNET: linear_relu}

    def forward(function):
        turn = itertools.cycle(inputs)

        def once():
            with torch.no_grad():
                return [function(next(turn), weight, bias)]

        return once

    def forward_backward(function):
        turn = itertools.cycle(zip(inputs, grads, strict=True))

        def once():
            input, grad = next(turn)
            input.grad = weight.grad = bias.grad = None
            function(input, weight, bias).backward(grad)
            return [t.grad for t in (input, weight, bias) if t.grad is not None]

        return once

    for mode, build, times in (
        ("forward", forward, 1),
        ("forward+backward", forward_backward, products),
    ):
        sides = {side: build(function) for side, function in functions.items()}
        case = Case(
            op="linear_relu",
            case=name,
            mode=mode,
            sides=sides,
            flops=times * flops,
            bytes=times * moved,
            # Sums of hundreds of products in another order, rounded to the dtype.
            tolerance=1e-5 if device == "cpu" else 2e-2,
            seconds=seconds,
        )
        yield case
        if device == "cuda":
            # Of calls that begin with the first batch: those above have gone on to others.
            graphs = {side: graphed(build(function)) for side, function in functions.items()}
            yield replace(case, mode=f"{mode}, graph", sides=graphs)
    yield replace(
        case,
        mode="operators",
        sides=_operators(
            [t.detach() for t in inputs], grads, weight.detach(), bias.detach(), needs_input
        ),
    )


def _operators(inputs, grads, weight, bias, needs_input):
    """Forward and backward as calls of operators, without autograd's own cost on either side."""
    turns = [itertools.cycle(zip(inputs, grads, strict=True)) for _ in range(2)]
    forward = torch.ops.fastnet.linear_relu_forward.default
    backward = torch.ops.fastnet.linear_relu_backward.default

    def native():
        input, grad = next(turns[0])
        output = torch.relu(F.linear(input, weight, bias))
        grad_z = torch.ops.aten.threshold_backward(grad, output, 0)
        results = [output, grad_z.t() @ input, grad_z.sum(0)]
        return [*results, grad_z @ weight] if needs_input else results

    def fused():
        input, grad = next(turns[1])
        output = forward(input, weight, bias)
        grad_input, grad_weight, grad_bias = backward(
            grad, output, input, weight if needs_input else None, True
        )
        results = [output, grad_weight, grad_bias]
        return [*results, grad_input] if needs_input else results

    return {"eager": native, FASTNET: fused}
