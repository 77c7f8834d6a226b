"""Runs modules one after the other, with a fused kernel wherever some of them make one.

A chain is looked at anew in every call, and what it finds there decides: a layer that has been
given hooks or a parametrization since, or been replaced, runs as it is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnet import _library, functional, modules
from fastnet.acceleration.conditions import written_class

# A step is a module; or, for a ReLU called as a function, RELU or RELU_IN_PLACE; or, for pooling
# called as one, (kernel_size, stride, padding, dilation, ceil_mode).
RELU, RELU_IN_PLACE = "relu", "relu_"
Pool = tuple
Step = nn.Module | str | Pool


# As long as nobody has put another there.
FORWARDS = {
    kind: kind.forward for kind in (nn.Linear, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Sequential)
}


# How many steps in one call are worth a class of its own: a Linear alone is quicker only with nodes
# in C++.
LEAST_GAIN = 2 if _library.NODES is None else 1


class Fused(NamedTuple):
    """What `fuse` found: how many steps are one call, and which windows are pooled in it.

    One step is a Linear with which nothing is fused, no step a layer that runs as it is written,
    both for `reason`.
    """

    count: int
    pool: Pool | None = None
    reason: str = ""


def run(steps: Iterable[Step], input: Tensor) -> Tensor:
    """Does one step after the other."""
    steps = flatten(steps)
    at = 0
    while at < len(steps):
        step = steps[at]
        if isinstance(step, (nn.Linear, nn.Conv2d)):
            fused = fuse(steps, at)
            if fused.count:
                if fused.pool is None:
                    call = functional.linear if fused.count == 1 else functional.linear_relu
                    input = call(input, step.weight, step.bias)
                else:
                    kernel_size, stride, padding, _, ceil_mode = fused.pool
                    input = modules.conv_relu_pool(
                        step, input, kernel_size, stride, padding, ceil_mode
                    )
                at += fused.count
                continue
        if step == RELU:
            input = torch.relu(input)
        elif step == RELU_IN_PLACE:
            input = torch.relu_(input)
        elif isinstance(step, tuple):
            kernel_size, stride, padding, dilation, ceil_mode = step
            input = F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
        else:
            input = step(input)
        at += 1
    return input


def sequential_forward(self: nn.Sequential, input: Tensor) -> Tensor:
    """`nn.Sequential.forward` as a chain."""
    written = self._fastnet_written.forward
    # Tools that trace with stand-ins look for the modules.
    if written is not FORWARDS[nn.Sequential] or not isinstance(input, Tensor):
        return written(self, input)
    return run(self._modules.values(), input)


def is_sequential(module: object) -> bool:
    """Whether it only runs its children one after the other."""
    if not isinstance(module, nn.Sequential) or "forward" in module.__dict__:
        return False
    kind = type(module)
    return (
        kind.forward in (FORWARDS[nn.Sequential], sequential_forward)
        and written_class(module).forward is FORWARDS[nn.Sequential]
        and kind.__call__ is nn.Module.__call__
        and kind.__iter__ is nn.Sequential.__iter__
    )


def flatten(steps: Iterable[Step]) -> list[Step]:
    """The steps, in the place of each `nn.Sequential` its own."""
    flat: list[Step] = []
    for step in steps:
        if is_sequential(step) and not has_hooks(step):
            flat += flatten(step._modules.values())
        else:
            flat.append(step)
    return flat


def layers(steps: Sequence[Step]) -> list[int]:
    """Where layers stand that might be fused."""
    return [at for at, step in enumerate(steps) if isinstance(step, (nn.Linear, nn.Conv2d))]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling it does more than its class's `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def fuse(steps: Sequence[Step], at: int, end: str = "nothing follows it") -> Fused:
    """Whether the layer `steps[at]` and what follows it are one fused call.

    `end` says what comes after the last step.
    """
    layer = steps[at]
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    if type(layer) is not kind or kind.forward is not FORWARDS[kind]:
        return Fused(0, reason=f"it is a {type(layer).__name__}, not a plain {kind.__name__}")
    if has_hooks(layer):
        return Fused(0, reason="it has hooks")

    def follows(after: int) -> str:
        return f"{name_of(steps[after])} follows it" if after < len(steps) else end

    relu = _is_relu(steps, at + 1)
    if kind is nn.Linear:
        return Fused(2) if relu else Fused(1, reason=follows(at + 1))
    pool = _pool(steps, at + 2 if relu else at + 1)
    if pool is None:
        if relu:
            return Fused(0, reason=f"ReLU follows it, then no max-pooling ({follows(at + 2)})")
        return Fused(0, reason=follows(at + 1))
    if not relu and not _is_relu(steps, at + 2):
        return Fused(0, reason=f"max-pooling follows it, then no ReLU ({follows(at + 2)})")
    kernel_size, stride, padding, dilation, _ = pool
    if stride is None:
        stride = kernel_size
    if not (_all(kernel_size, 2) and _all(stride, 2) and _all(padding, 0) and _all(dilation, 1)):
        return Fused(
            0,
            reason=f"max-pooling by {kernel_size}, stride {stride}, padding {padding}, dilation "
            f"{dilation}: the kernels pool windows of 2 x 2 side by side",
        )
    return Fused(3, pool)


def _is_plain(step: Step, kind: type[nn.Module]) -> bool:
    return type(step) is kind and kind.forward is FORWARDS[kind] and not has_hooks(step)


def _is_relu(steps: Sequence[Step], at: int) -> bool:
    if at >= len(steps):
        return False
    step = steps[at]
    if isinstance(step, nn.Module):
        return _is_plain(step, nn.ReLU)
    return step in (RELU, RELU_IN_PLACE)


def _pool(steps: Sequence[Step], at: int) -> Pool | None:
    """The windows, if this step pools without more."""
    if at >= len(steps):
        return None
    step = steps[at]
    if isinstance(step, tuple):
        return step
    if not _is_plain(step, nn.MaxPool2d) or step.return_indices:
        return None
    return (step.kernel_size, step.stride, step.padding, step.dilation, step.ceil_mode)


def _all(value: int | Sequence[int], wanted: int) -> bool:
    return value == wanted or value in ((wanted, wanted), [wanted, wanted], (wanted,), [wanted])


def name_of(step: Step) -> str:
    """For people."""
    if isinstance(step, nn.Module):
        return type(step).__name__
    return "MaxPool2d" if isinstance(step, tuple) else "ReLU"
