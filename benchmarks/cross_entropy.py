"""cross_entropy, from the document networks' ten classes to a language model's vocabulary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.harness import FASTNET, Case, graphed
from fastnet.functional import cross_entropy, linear_cross_entropy

# Logits' shapes. On the CPU the first two are native on either side but for the mode "operators":
# the kernels would gain less than their calls cost.
SHAPES = [
    (64, 10),
    (256, 10),
    (2048, 10),
    (16384, 10),
    (256, 100),
    (1024, 100),
    (64, 1000),
    (1024, 1000),
    (16, 21, 64, 64),  # a segmentation
    (1, 131072),
    (2048, 32000),
]
CUDA_SHAPES = [(64, 1000), (8192, 1000), (8192, 32000), (8192, 131072)]
QUICK = ((64, 10), (1024, 1000), (2048, 32000))
CUDA_QUICK = ((64, 10), (1024, 1000), (8192, 32000))


def cases(quick: bool = False) -> Iterator[Case]:
    if torch.cuda.is_available():
        for dtype in (torch.float32, torch.bfloat16):
            for shape in CUDA_QUICK if quick else (*SHAPES, *CUDA_SHAPES):
                yield from _cases(shape, "cuda", dtype)
    else:
        for shape in QUICK if quick else SHAPES:
            yield from _cases(shape, "cpu", torch.float32)
        if not quick:
            yield from _cases((1024, 1000), "cpu", torch.bfloat16)
    if not quick:
        yield _linear_case(2048, 512, 32_000)


def _cases(shape, device: str, dtype: torch.dtype) -> Iterator[Case]:
    torch.manual_seed(0)
    logits_bytes = math.prod(shape) * (2 if dtype is torch.bfloat16 else 4)
    # Several batches in turn, where caches could hold one.
    count = 8 if logits_bytes < 1 << 20 else 2 if logits_bytes < 1 << 26 else 1
    inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(count)]
    targets = [torch.randint(shape[1], (shape[0], *shape[2:]), device=device) for _ in range(count)]
    name = "x".join(map(str, shape))
    name += "" if dtype is torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    torch._dynamo.reset()
    tuned = {"mode": "max-autotune-no-cudagraphs"} if device == "cuda" else {}
    compiled = torch.compile(F.cross_entropy, dynamic=False, fullgraph=True, **tuned)
    functions = {"eager": F.cross_entropy, "compile": compiled, FASTNET: cross_entropy}

    def forward(function):
        turn = itertools.cycle(zip(inputs, targets, strict=True))

        def once():
            with torch.no_grad():
                return [function(*next(turn))]

        return once

    def forward_backward(function):
        turn = itertools.cycle(zip(inputs, targets, strict=True))

        def once():
            logits, target = next(turn)
            function(logits, target).backward()
            gradient, logits.grad = logits.grad, None  # gone before the next one, as in a training
            return [gradient]

        return once

    # Forward reads the logits; backward reads them and writes the gradient.
    for mode, build, times in (("forward", forward, 1), ("forward+backward", forward_backward, 3)):
        case = Case(
            op="cross_entropy",
            case=name,
            mode=mode,
            sides={side: build(function) for side, function in functions.items()},
            bytes=times * logits_bytes,
            tolerance=1e-5 if dtype is torch.float32 else 2e-2,
            seconds=0.5 if device == "cuda" else 1.2 if logits_bytes < 1 << 24 else 20.0,
        )
        yield case
        if device == "cuda":
            graphs = {side: graphed(build(function)) for side, function in functions.items()}
            yield replace(case, mode=f"{mode}, graph", sides=graphs)
    yield replace(case, mode="operators", sides=_operators(inputs, targets))


def _operators(inputs, targets):
    """Forward and backward as calls of operators, without autograd's own cost on either side."""
    pairs = [(x.detach(), t) for x, t in zip(inputs, targets, strict=True)]
    turns = [itertools.cycle(pairs) for _ in range(2)]
    aten, fastnet = torch.ops.aten, torch.ops.fastnet
    x = inputs[0]
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(N, K, device=device, requires_grad=True)
    weight = (torch.randn(C, K, device=device) * K**-0.5).requires_grad_()
    target = torch.randint(C, (N,), device=device)
    torch._dynamo.reset()

    def two_ops(x, weight, target):
        return F.cross_entropy(F.linear(x, weight), target)

    functions = {
        "eager": two_ops,
        "compile": torch.compile(two_ops, dynamic=False, fullgraph=True),
        "fused cross_entropy": lambda x, w, t: cross_entropy(F.linear(x, w), t),
        FASTNET: linear_cross_entropy,
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        functions["torch's chunks"] = lambda x, w, t: F.linear_cross_entropy(
            x, w, t, options=options
        )

    def build(function):
        def once():
            x.grad = weight.grad = None
            function(x, weight, target).backward()
            return [x.grad, weight.grad]

        return once

    return Case(
        op="linear_cross_entropy",
        case=f"{N}x{K}->{C}",
        mode="forward+backward",
        sides={side: build(function) for side, function in functions.items()},
        flops=6.0 * N * K * C,
        tolerance=1e-4,
        seconds=30.0,
    )
