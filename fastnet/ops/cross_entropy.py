"""cross_entropy: log-softmax and negative log-likelihood, in one pass over the logits each way, or
in one for both."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnet import _library

_forward = torch.ops.fastnet.cross_entropy_forward.default
_backward = torch.ops.fastnet.cross_entropy_backward.default
_backward_out = torch.ops.fastnet.cross_entropy_backward.out
_with_gradient = torch.ops.fastnet.cross_entropy_with_gradient.default
_reads_once = torch.ops.fastnet.cross_entropy_reads_once.default
_scale = torch.ops.fastnet.cross_entropy_scale.default

# As torch numbers them, which is how the raw ops take them.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NAMES = {number: name for name, number in REDUCTIONS.items()}

LARGE = 2 << 20  # bytes of which a copy is felt
LARGE_ON_GPU = 128 << 20  # bytes that no GPU's cache holds


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


@torch.library.register_fake("fastnet::cross_entropy_with_gradient")
def fake_with_gradient(logits: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=accumulate_dtype(logits.dtype)), torch.empty_like(logits)


@torch.library.register_fake("fastnet::cross_entropy_with_gradient.out")
def fake_with_gradient_out(logits: Tensor, *arguments, out: Tensor) -> Tensor:
    return logits.new_empty((), dtype=accumulate_dtype(logits.dtype))


@torch.library.register_fake("fastnet::cross_entropy_scale")
def fake_scale(gradient: Tensor, factor: Tensor, target: Tensor, ignore_index: int) -> None:
    return None


def apply(logits: Tensor, target: Tensor, weight: Tensor | None, *options) -> Tensor:
    """The loss with its gradient; where none will be asked for, without what that needs.

    Args:
        logits, target, weight: as the kernels take them.
        options: reduction, ignore_index, label_smoothing.
    """
    if _library.NODES is not None and not torch.compiler.is_compiling():
        return _library.NODES.cross_entropy(logits, target, weight, *options)
    if _library.is_recorded() and logits.requires_grad:
        return CrossEntropy.apply(logits, target, weight, *options)
    return _forward(logits, target, weight, *options)[0]


def _is_traced() -> bool:
    """Whether a call is recorded or only pretended: then it must say the same whatever is in
    memory, and whatever the loss's own gradient is."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _makes_gradient(logits: Tensor, target: Tensor, reduction: int, label_smoothing: float) -> bool:
    """Whether the forward pass makes the gradient, too, so that every logit is read once, and of
    most layouts every exponential computed once.

    The backward pass multiplies it by the loss's own gradient, nearly always 1: half types would
    be rounded before that. On a GPU, exponentials take no time, but memory does.
    """
    if _is_traced() or reduction == REDUCTIONS["none"]:
        return False
    if logits.is_cpu:
        return logits.dtype in (torch.float32, torch.float64)
    return logits.nbytes >= LARGE_ON_GPU and _reads_once(logits, target, label_smoothing)


def run_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, with the rows' statistics or the gradient."""
    arguments = (logits, target, weight, reduction, ignore_index, label_smoothing)
    if not _makes_gradient(logits, target, reduction, label_smoothing):
        return *_forward(*arguments), None
    loss, gradient = _with_gradient(*arguments)
    return loss, None, gradient


def gradient_of(
    grad_loss: Tensor,
    logits: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor | None,
    gradient: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor]:
    """The logits' gradient, from what the forward pass has left. Where that is the gradient, and
    the loss's own is finite, it is without the logits."""
    options = (reduction, ignore_index, label_smoothing)
    if _library.is_differentiated():
        return differentiate(grad_loss, logits, target, weight, *options)
    if gradient is None:
        return (_backward(grad_loss, logits, target, weight, statistics, *options),)
    if type(grad_loss) is not Tensor or _library.is_batched(grad_loss) or _is_traced():
        return ((gradient * grad_loss).to(gradient.dtype),)
    if not gradient.is_cpu:
        return (_scaled_on_gpu(gradient, grad_loss, target, ignore_index),)
    factor = grad_loss.item()
    if not math.isfinite(factor):  # which would not leave alone the rows that are ignored
        (gradient,) = differentiate(grad_loss, logits, target, weight, *options)
        return (gradient.detach(),)
    # In its place only where nobody wants it any more.
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return (gradient * factor,)
    if factor == 1:
        return (gradient,)
    return (gradient.mul_(factor) if gradient.nbytes >= LARGE else gradient * factor,)


def _scaled_on_gpu(gradient: Tensor, factor: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The gradient times a number that the host need not wait for. In its place only where nobody
    wants it any more."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    _scale(gradient, factor, target, ignore_index)
    return gradient


class CrossEntropy(torch.autograd.Function):
    """Saves the logits, and two numbers a row or the gradient. The target has no gradient."""

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
        ctx.options = (reduction, ignore_index, label_smoothing)
        loss, statistics, gradient = run_forward(logits, target, weight, *ctx.options)
        ctx.save_for_backward(logits, target, weight, statistics, gradient)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        (gradient,) = gradient_of(grad_loss, *ctx.saved_tensors, *ctx.options)
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
