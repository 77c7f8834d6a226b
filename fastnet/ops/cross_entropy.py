"""cross_entropy: log-softmax and negative log-likelihood, in one pass over the logits each way."""

from __future__ import annotations

import math
import sys
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnet import _library

_forward = torch.ops.fastnet.cross_entropy_forward.default
_backward = torch.ops.fastnet.cross_entropy_backward.default
_backward_out = torch.ops.fastnet.cross_entropy_backward.out

# As torch numbers them, which is how the raw ops take them.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NAMES = {number: name for name, number in REDUCTIONS.items()}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels sum in, and what a loss and the class weights come in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@torch.library.register_fake("fastnet::cross_entropy_forward")
def fake_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    class_dim = 0 if logits.dim() == 1 else 1
    row_sizes = [size for d, size in enumerate(logits.shape) if d != class_dim]
    per_row = 3 if target.is_floating_point() or label_smoothing > 0 else 2
    dtype = accumulate_dtype(logits.dtype)
    return (
        logits.new_empty(row_sizes if reduction == 0 else (), dtype=dtype),
        logits.new_empty((per_row * math.prod(row_sizes) + 1,), dtype=dtype),
    )


@torch.library.register_fake("fastnet::cross_entropy_backward")
def fake_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return torch.empty_like(logits)


@torch.library.register_fake("fastnet::cross_entropy_backward.out")
def fake_backward_out(*arguments, out: Tensor) -> None:
    return None


class KeptMemory:
    """The memory of the last large gradient on the CPU, for the next one of that layout once nobody
    else holds it.

    Given back to the system and fetched anew at every step, a few hundred megabytes cost several
    times what the kernel does: page faults, and on a virtual machine the host's as well.
    """

    MIN_BYTES = 2 << 20  # a huge page

    def __init__(self) -> None:
        self._kept: Tensor | None = None
        self._alone: tuple | None = None
        self._lock = threading.Lock()

    @staticmethod
    def _state(tensor: Tensor) -> tuple:
        """Whatever changes when somebody else holds the memory, shares it or takes it away."""
        storage = tensor.untyped_storage()
        return (
            torch._C._storage_Use_Count(storage._cdata),
            sys.getrefcount(storage),
            storage.is_shared(),
            storage.nbytes(),
            storage.data_ptr(),
        )

    def take(self, like: Tensor) -> Tensor | None:
        """Memory for a tensor like this one, if there is any."""
        with self._lock:
            kept = self._kept
            fits = (
                kept is not None
                and kept.shape == like.shape
                and kept.stride() == like.stride()
                and kept.dtype is like.dtype
            )
            return kept.detach() if fits and self._state(kept) == self._alone else None

    def release(self) -> None:
        """Gives it back to the system."""
        with self._lock:
            self._kept = self._alone = None

    def keep(self, tensor: Tensor) -> Tensor:
        """Keeps the memory of a tensor that nobody else has seen yet. Returns what to show them."""
        with self._lock:
            self._kept, self._alone = tensor, self._state(tensor)
            return tensor.detach()


MEMORY = KeptMemory()


def evaluate(logits: Tensor, target: Tensor, *options) -> Tensor:
    """The loss alone, where no gradient is wanted: without what a Function costs."""
    return _forward(logits, target, *options)[0]


def apply(logits: Tensor, target: Tensor, weight: Tensor | None, *options) -> Tensor:
    """The loss with its gradient.

    Args:
        logits, target, weight: as the kernels take them.
        options: reduction, ignore_index, label_smoothing.
    """
    if _library.NODES is None or torch.compiler.is_compiling() or _is_kept(logits):
        return CrossEntropy.apply(logits, target, weight, *options)
    return _library.NODES.cross_entropy(logits, target, weight, *options)


def _is_kept(logits: Tensor) -> bool:
    """Whether the gradient's memory is kept for the next one."""
    return logits.is_cpu and logits.nbytes >= KeptMemory.MIN_BYTES


class CrossEntropy(torch.autograd.Function):
    """Saves the logits, and two numbers a row. The target has no gradient."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        loss, statistics = _forward(
            logits, target, weight, reduction, ignore_index, label_smoothing
        )
        ctx.save_for_backward(logits, target, weight, statistics)
        ctx.options = (reduction, ignore_index, label_smoothing)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        logits, target, weight, statistics = ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            (gradient,) = differentiate(grad_loss, logits, target, weight, *ctx.options)
            return gradient, None, None, None, None, None
        arguments = (grad_loss, logits, target, weight, statistics, *ctx.options)
        is_kept = not torch.compiler.is_compiling() and _is_kept(logits)
        gradient = MEMORY.take(logits) if is_kept else None
        if gradient is not None:
            _backward_out(*arguments, out=gradient)
        else:
            gradient = _backward(*arguments)
            if is_kept:
                gradient = MEMORY.keep(gradient)
        return gradient, None, None, None, None, None


def differentiate(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor]:
    """The gradient, where somebody wants to differentiate it, or to map over it: by native
    operators, which torch knows how to."""
    with torch.enable_grad():
        # An alias: the logits' own hooks and history are for whoever called us to go through.
        alias = logits.view_as(logits)
        wide = alias.to(grad_loss.dtype)
        loss = F.cross_entropy(
            wide,
            target.to(wide.dtype) if target.is_floating_point() else target,
            weight,
            ignore_index=ignore_index,
            reduction=NAMES[reduction],
            label_smoothing=label_smoothing,
        )
        return torch.autograd.grad(loss, alias, grad_loss, create_graph=True)
