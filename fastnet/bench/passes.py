"""An op's two passes as cases: each alone, and both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fastnet.bench import machine
from fastnet.bench.harness import Case, Sequel, graphed

T = TypeVar("T")
# The arguments of one call, and the gradient that its result gets; None for a scalar's own, 1.
Batch = tuple[tuple, Tensor | None]
# At which every layer of the document networks is timed.
BATCHES = (16, 64, 256, 1024)
# What batches in turn may take together.
ROTATION = 256 << 20


def rotation(make: Callable[[], T], nbytes: int) -> list[T]:
    """Batches to be used in turn, as a training does not see the same one twice in a row.

    Eight: what went into a step is written right before it and still near, but no step finds its
    signs and cache lines as they were eight steps ago. Of batches larger than a cache (`nbytes`
    each) fewer do: one that large leaves nothing of itself behind.
    """
    return [make() for _ in range(max(1, min(8, ROTATION // nbytes)))]


DTYPES = (torch.float32, torch.bfloat16)


def is_timed(dtype: torch.dtype, is_important: bool, quick: bool) -> bool:
    """Whether a shape is: in bfloat16 on the CPU the important ones only."""
    has_time = not quick and (dtype is torch.float32 or torch.cuda.is_available())
    return has_time or is_important


def suffix(dtype: torch.dtype) -> str:
    """What a case's name says of its dtype."""
    return "" if dtype is torch.float32 else f", {str(dtype).removeprefix('torch.')}"


def eighths(*size: int, dtype: torch.dtype) -> Tensor:
    """Random multiples of 1/8, whose sums of products are exact in float32: all sides find the same
    signs and the same winners, in whatever order they add."""
    drawn = torch.randint(-8, 9, size, device=machine.device(), dtype=torch.int8)
    return drawn.to(dtype).div_(8)


def compiled(function: Callable) -> Callable:
    """torch.compile's best for one shape. Calls before this one are forgotten: they would share
    their code, which would turn general, then eager."""
    torch._dynamo.reset()
    tuned = {"mode": "max-autotune-no-cudagraphs"} if torch.cuda.is_available() else {}
    return torch.compile(function, dynamic=False, fullgraph=True, **tuned)


def passes(
    case: Case,
    sides: dict[str, tuple[Callable[..., Tensor], list[Batch]]],
    backward: float = 1.0,
    trained: bool = True,
) -> Iterator[Case]:
    """The case forward, backward, and both; on a GPU forward and both as CUDA graphs, too.

    Args:
        case: named, with the flops and bytes of its forward pass.
        sides: name → a function and its batches. Of the arguments, leaves that require gradients
            are those whose gradients are compared.
        backward: flops and bytes of the backward pass, as multiples of the forward pass's.
        trained: whether there is a backward pass.
    """
    modes = [("forward", _forward, 1.0)]
    if trained:
        modes.append(("backward", _backward, backward))
        modes.append(("forward+backward", _forward_backward, 1.0 + backward))
    plain = [
        replace(
            case,
            mode=mode,
            sides={side: build(*work) for side, work in sides.items()},
            flops=times * case.flops,
            bytes=times * case.bytes,
        )
        for mode, build, times in modes
    ]
    yield from plain
    if torch.cuda.is_available():
        for whole, (mode, build, _) in zip(plain, modes, strict=True):
            if build is _backward:  # a graph cannot leave out what comes first
                continue
            # Of calls that begin with the first batch: those above have gone on to others.
            graphs = {side: graphed(build(*work)) for side, work in sides.items()}
            yield replace(whole, mode=f"{mode}, graph", sides=graphs)


def _forward(function: Callable[..., Tensor], batches: list[Batch]):
    turn = itertools.cycle([arguments for arguments, _ in batches])

    def once():
        with torch.no_grad():
            return [function(*next(turn))]

    return once


def _backward(function: Callable[..., Tensor], batches: list[Batch]) -> Sequel:
    turn = itertools.cycle(
        [
            (arguments, grad, [a for a in arguments if isinstance(a, Tensor) and a.requires_grad])
            for arguments, grad in batches
        ]
    )

    def forward():
        arguments, grad, leaves = next(turn)
        return function(*arguments), grad, leaves

    def backward(output, grad, leaves):
        output.backward(grad)
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:  # gone before the next call, as in a training
            leaf.grad = None
        return gradients

    return Sequel(forward, backward)


def _forward_backward(function: Callable[..., Tensor], batches: list[Batch]):
    return _backward(function, batches).__call__
