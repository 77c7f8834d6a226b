"""linear_cross_entropy: cross_entropy(linear(input, weight, bias), target), in chunks of rows.

The logits of a chunk are made, turned into loss and, in their place, gradient by the raw ops of
cross_entropy, multiplied into the gradients of input, weight and bias, and forgotten, before the
next chunk's are made. So the (N, C) logits and their gradient never stand in memory whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnet import _library
from fastnet.ops import cross_entropy
from fastnet.ops.cross_entropy import NAMES, REDUCTIONS, accumulate_dtype

_linear_out = torch.ops.fastnet.linear_forward.out
_linear_backward_out = torch.ops.fastnet.linear_backward.out

# Whether these have a faster product of float32 matrices than torch's own.
HAS_OWN_PRODUCTS = _library.build_info()["cpu_products"] != "torch"

# Logits of one chunk: large enough for the products to be at their peak, and for the weight's
# gradient, which every chunk adds to, to be read and written seldom.
CHUNK_BYTES = 32 << 20
MIN_ROWS = 32


class Options(NamedTuple):
    """What goes through to cross_entropy, in the raw ops' terms."""

    class_weight: Tensor | None
    reduction: int
    ignore_index: int
    label_smoothing: float


def chunk_rows(N: int, C: int, element_size: int) -> int:
    rows = max(MIN_ROWS, CHUNK_BYTES // (C * element_size) // MIN_ROWS * MIN_ROWS)
    return min(N, rows)


def sweep(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: Options,
    grad_loss: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Goes through the chunks once. With `grad_loss` (a value, or one a row) it also makes those
    of the gradients of input, weight and bias that are needed.

    Returns:
        The losses' sum, or one a row for reduction none, in the accumulate type; the gradients.
    """
    N, C = input.shape[0], weight.shape[0]
    wide = accumulate_dtype(input.dtype)
    per_row = options.reduction == REDUCTIONS["none"]
    raw = options._replace(reduction=REDUCTIONS["none" if per_row else "sum"])
    losses: list[Tensor] = []
    gradients: list[Tensor | None] = [None, None, None]
    if grad_loss is not None:
        # Sums over chunks; half types would lose a little at each.
        gradients = [
            torch.empty_like(input, memory_format=torch.contiguous_format) if needs[0] else None,
            torch.zeros_like(weight, dtype=wide) if needs[1] else None,
            torch.zeros(C, dtype=wide, device=weight.device) if needs[2] else None,
        ]
    grad_input, grad_weight, grad_bias = gradients
    step = chunk_rows(N, C, input.element_size())
    is_own = (
        HAS_OWN_PRODUCTS
        and input.is_cpu
        and input.dtype is torch.float32
        and weight.is_contiguous()  # or it would be copied for every chunk
        # Modes of torch's know of one output called "out", and not of two that are written to.
        and (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0)
    )
    # The same memory for every chunk. Left to an allocator, it might grow with each.
    memory = input.new_empty((step, C))
    for first in range(0, N, step):
        rows = slice(first, first + step)
        x = input[rows]
        logits = memory[: x.shape[0]]
        if is_own:
            _linear_out(x, weight, bias, out=logits)
        elif bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        loss, statistics = cross_entropy._forward(logits, target[rows], *raw)
        losses.append(loss)
        if grad_loss is None:
            continue
        grad_logits = logits
        cross_entropy._backward_out(
            grad_loss[rows] if per_row else grad_loss, logits, target[rows], raw[0], statistics,
            *raw[1:], out=grad_logits,
        )  # fmt: skip
        if is_own:
            of_input = None if grad_input is None else grad_input[rows]
            _linear_backward_out(
                grad_logits, x, weight, grad_input=of_input, grad_weight=grad_weight
            )
        else:
            if grad_input is not None:
                torch.mm(grad_logits, weight, out=grad_input[rows])
            if grad_weight is not None:
                if grad_weight.dtype is x.dtype:
                    grad_weight.addmm_(grad_logits.t(), x)
                else:
                    grad_weight += grad_logits.t() @ x
        if grad_bias is not None:
            grad_bias += grad_logits.sum(0, dtype=wide)
    total = torch.cat(losses) if per_row else torch.stack(losses).sum()
    return total, [g if g is None else g.to(input.dtype) for g in gradients]


def divisor(target: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """What the mean divides by, known before any logits are."""
    if target.is_floating_point():
        return torch.full((), target.shape[0], dtype=dtype, device=target.device)
    counts = target != options.ignore_index
    if options.class_weight is None:
        return counts.sum(dtype=dtype)
    # An ignored class may be no class. Others that are none are found by the kernels.
    index = target.clamp(0, options.class_weight.shape[0] - 1)
    return torch.where(counts, options.class_weight[index], 0).sum()


def apply(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options) -> Tensor:
    """The loss with its gradients; where none will be asked for, without what they need.

    Args:
        input, weight, target, bias: as the kernels take them.
        options: class_weight, reduction, ignore_index, label_smoothing.

    Returns:
        The loss, in the accumulate type.
    """
    trained = (input, weight) if bias is None else (input, weight, bias)
    if _library.is_recorded() and any(tensor.requires_grad for tensor in trained):
        return LinearCrossEntropy.apply(input, weight, target, bias, *options)
    options = Options(*options)
    loss, _ = sweep(input, weight, target, bias, options, None, (False, False, False))
    if options.reduction == REDUCTIONS["mean"]:
        loss = loss / divisor(target, options, loss.dtype)
    return loss


class LinearCrossEntropy(torch.autograd.Function):
    """For a scalar loss the gradients are made along with it, for an upstream gradient of 1, and
    scaled and given away by the first backward; another one makes them anew. One loss per row, and
    float16, whose small gradients would vanish before a GradScaler's factor reaches them, leave
    them to the backward altogether.
    """

    @staticmethod
    def forward(ctx, input, weight, target, bias, class_weight, reduction, ignore_index,
                label_smoothing):  # fmt: skip
        options = Options(class_weight, reduction, ignore_index, label_smoothing)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        wide = accumulate_dtype(input.dtype)
        by = divisor(target, options, wide) if reduction == REDUCTIONS["mean"] else None
        grad_loss = None
        if reduction != REDUCTIONS["none"] and input.dtype is not torch.float16:
            one = torch.ones((), dtype=wide, device=input.device)
            grad_loss = one if by is None else one / by
        loss, gradients = sweep(input, weight, target, bias, options, grad_loss, needs)
        ctx.options = (reduction, ignore_index, label_smoothing)
        ctx.needs = needs
        saved = [input, weight, target, bias, class_weight, by]
        ctx.made = None
        if grad_loss is not None:
            if torch.compiler.is_compiling():  # a graph owns what it saves
                saved += gradients
            else:
                ctx.made = gradients
        ctx.save_for_backward(*saved)
        return loss if by is None else loss / by

    @staticmethod
    def backward(ctx, grad_loss):
        input, weight, target, bias, class_weight, by, *saved = ctx.saved_tensors
        options = Options(class_weight, *ctx.options)
        made, ctx.made = ctx.made, None
        is_batched = _library.is_batched(grad_loss)
        native = (input, weight, target, bias, options, ctx.needs, grad_loss)
        if _library.is_differentiated():
            gradients = _native_gradients(*native, create_graph=True)
        elif saved:
            gradients = [None if g is None else (g * grad_loss).to(g.dtype) for g in saved]
        elif made is not None and is_batched:
            gradients = [None if g is None else g * grad_loss for g in made]
        elif is_batched or (made is not None and grad_loss.is_cpu and not grad_loss.isfinite()):
            # A factor that is not finite would not leave alone the rows that are ignored.
            gradients = _native_gradients(*native, create_graph=False)
        elif made is not None:
            gradients = made
            if not grad_loss.is_cpu or grad_loss.item() != 1:
                gradients = [None if g is None else g.mul_(grad_loss) for g in made]
        else:
            by_row = grad_loss if by is None else grad_loss / by
            _, gradients = sweep(input, weight, target, bias, options, by_row, ctx.needs)
        grad_input, grad_weight, grad_bias = gradients
        return grad_input, grad_weight, None, grad_bias, None, None, None, None


def _native_gradients(input, weight, target, bias, options, needs, grad_loss, *, create_graph):
    """By operators that torch can differentiate again, or map over."""
    with torch.enable_grad():
        # Aliases: each one's own hooks and history, maybe through one another, are for whoever
        # called us to go through.
        x, w, b = (None if t is None else t.view_as(t) for t in (input, weight, bias))
        logits = F.linear(x, w, b).to(grad_loss.dtype)
        loss = F.cross_entropy(
            logits,
            target.to(logits.dtype) if target.is_floating_point() else target,
            options.class_weight,
            ignore_index=options.ignore_index,
            reduction=NAMES[options.reduction],
            label_smoothing=options.label_smoothing,
        )
        leaves = [t for t, wanted in zip((x, w, b), needs, strict=True) if wanted]
        made = iter(torch.autograd.grad(loss, leaves, grad_loss, create_graph=create_graph))
    return [next(made) if wanted else None for wanted in needs]
