"""The fused ops as functions, with the signatures and the results of torch.nn.functional."""

from __future__ import annotations

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastnet import _library, ops
from fastnet._library import CUDA_STATUS
from fastnet.ops.conv_relu_pool import convolved_size
from fastnet.ops.cross_entropy import REDUCTIONS, accumulate_dtype

# This file is on the path of every call, and its Python is felt at the sizes that fastnet is for:
# the checks below are the quick ones for each question (a property of 0.1 µs, not one of 0.6).

_CPU_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})
_CUDA_DTYPES = _CPU_DTYPES | {torch.float16} if CUDA_STATUS == "loaded" else frozenset()
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})

_unsafe_view = torch.ops.aten._unsafe_view.default

# Logits below which cross_entropy on the CPU goes to the native operators, with and without a
# gradient, where the quick way in C++ does not take it: under torch.compile and under another torch
# than that of the build at all, elsewhere where the logits are not two-dimensional, the targets no
# class indices, or classes have weights. A call's own cost decides there, and a node of autograd in
# Python, with torch.ops twice, costs 25 µs more than torch's own in C++, however quick the kernel
# (see benchmarks/results).
SMALL_LOGITS, SMALL_LOGITS_FORWARD = 16_384, 4_096


def _are_operators_watched() -> bool:
    """Whether somebody looks at torch's own functions or operators: a mode of torch.overrides, but
    for a default device's, or torch.utils.flop_counter. (To tell that one of others it has to be
    imported, which takes longer than to import fastnet.)"""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._len_torch_function_stack() > 0
        and any(type(m) is not DeviceContext for m in _get_current_function_mode_stack())
    ) or (
        torch._C._len_torch_dispatch_stack() > 0
        and any(
            type(m).__module__ == "torch.utils.flop_counter"
            for m in _get_current_dispatch_mode_stack()
        )
    )


def _has_kernels(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the fused ops take these: dtype, device, dense memory, and .backward()'s autograd.

    Tensor subclasses have behaviour of their own; torch.func, torch.jit's tracing and forward-mode
    derivatives need operators that they know.
    """
    return (
        type(input) in _PLAIN_TYPES
        and type(weight) in _PLAIN_TYPES
        and input.dtype in (_CPU_DTYPES if input.is_cpu else _CUDA_DTYPES if input.is_cuda else ())
        and input.layout is torch.strided
        and weight.layout is torch.strided
        and weight.device == input.device
        and (
            bias is None
            or (
                type(bias) in _PLAIN_TYPES
                and bias.dtype is weight.dtype
                and bias.device == input.device
            )
        )
        and (input.is_cpu or _library.is_built_for(input.device.index))
        and not input.is_nested
        and not _are_operators_watched()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._get_tracing_state()
        and forward_ad._current_level < 0
    )


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Computes :math:`\mathrm{relu}(x W^T + b)` in one kernel, and its gradients in one more.

    The result and the gradients are those of `torch.relu(F.linear(input, weight, bias))`, to within
    rounding. What the kernels do not cover (other dtypes and devices, sparse tensors, a bias that
    broadcasts) goes to those two operators.

    Args:
        input: `(*, in_features)`, any number of leading dimensions, also none; any strides.
        weight: `(out_features, in_features)`.
        bias: `(out_features)`, or None.

    All three have one dtype: float32, float64 or bfloat16, on CUDA also float16; half types are
    summed in float32. Under autocast they are cast as those of `F.linear` are.

    Returns:
        `(*, out_features)`, of the input's dtype.

    Raises:
        RuntimeError: where shapes, dtypes or devices do not fit together.
    """
    if _library.NODES is not None and not torch.compiler.is_compiling():
        output = _library.NODES.quick_linear_relu(input, weight, bias)
        if output is not None:
            return output
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)
    if (
        _has_kernels(input, weight, bias)
        and weight.dim() == 2
        and (bias is None or (bias.dim() == 1 and bias.size(0) == weight.size(0)))
        and input.dim() > 0
    ):
        return ops.linear_relu.apply(input, weight, bias)
    return torch.relu(F.linear(input, weight, bias))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with less overhead for a small layer, and on some processors a faster product for
    a large one.

    The last layer of a small network, to its classes, takes a few microseconds of arithmetic and
    some tens in autograd's nodes and transposed views. Here it is one kernel forward and one
    backward, of one node.

    That is so on the CPU, under the torch that fastnet was built with, for float32 of up to 64
    million multiply-adds, for float64 of up to 16 million, and for bfloat16 of up to as many if
    there are at most 32 rows or outputs; for float32 also beyond, if the weight has more than 8
    million elements (its gradient then lies in huge pages), and for any size on AMD's Zen 5, where
    there is a better product than torch's own. All else goes to `F.linear`.

    Args:
        input: `(*, in_features)`, any number of leading dimensions, also none; any strides.
        weight: `(out_features, in_features)`.
        bias: `(out_features)`, or None.

    All three have one dtype, any that `F.linear` takes.

    Returns:
        `(*, out_features)`, of the input's dtype.

    Raises:
        RuntimeError: as `F.linear` does, where shapes, dtypes or devices do not fit together.
    """
    if _library.NODES is not None and not torch.compiler.is_compiling():
        output = _library.NODES.quick_linear(input, weight, bias)
        if output is not None:
            return output
    return F.linear(input, weight, bias)


def conv_relu_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    pool_kernel_size: int | tuple[int, int] = 2,
    pool_stride: int | tuple[int, int] | None = None,
    pool_padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    r"""Computes `F.max_pool2d(F.relu(F.conv2d(input, weight, bias)))` without the activations at
    full resolution, and its gradients without the three quarters of them that are zero.

    Takes what the three functions take, except a dilation of the windows and their indices, with
    the same result to within rounding, in the same memory format. All convolutions under windows of
    2 x 2 side by side are fused, on the CPU by kernels of fastnet's own for filters of 3 x 3 and
    5 x 5 without stride, dilation or groups; other windows and dtypes go to the three functions. In
    float32 and bfloat16 these kernels mostly multiply in Winograd's form, which rounds otherwise
    than the direct one: 3 x 3 of up to four channels to about 2e-7 of the largest output, unless an
    element exceeds 10,000; 3 x 3 and 5 x 5 of more channels to within 1.5e-6 of it, unless an
    element exceeds both 256 and 256 times most others.

    Args:
        input: `(N, in_channels, H, W)` or `(in_channels, H, W)`; any strides. float32, float64 or
            bfloat16, on CUDA also float16; half types are summed in float32. Under autocast cast as
            that of `F.conv2d` is.
        weight: `(out_channels, in_channels / groups, kernel height, kernel width)`.
        bias: `(out_channels)`, or None.
        stride, padding, dilation, groups: of the convolution, as in `F.conv2d`, with "same" and
            "valid".
        pool_kernel_size, pool_stride, pool_padding, ceil_mode: of the windows, as in
            `F.max_pool2d`.

    Returns:
        `(N, out_channels, P, Q)`, or without N where input is, of the input's dtype.

    Raises:
        RuntimeError, ValueError: where the three functions raise them.

    Example:
        >>> images = torch.randn(64, 3, 32, 32)
        >>> conv_relu_pool2d(images, torch.randn(32, 3, 3, 3), padding=1).shape
        torch.Size([64, 32, 16, 16])
    """
    if _library.NODES is not None and not torch.compiler.is_compiling():
        output = _library.NODES.quick_conv_relu_pool(
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            pool_kernel_size,
            pool_stride,
            pool_padding,
            ceil_mode,
        )
        if output is not None:
            return output
    given = (input, weight, bias)
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)
    if (
        _has_kernels(input, weight, bias)
        and input.dim() in (3, 4)
        and weight.dim() == 4
        and input.dtype is weight.dtype
        and (bias is None or (bias.dim() == 1 and bias.size(0) == weight.size(0)))
        and _pair(pool_kernel_size) == (2, 2)
        and (pool_stride is None or _pair(pool_stride) == (2, 2))
        and _pair(pool_padding) == (0, 0)
    ):
        strides, dilations = _pair(stride), _pair(dilation)
        paddings = _padding(padding, weight, strides, dilations)
        if paddings is not None and _is_convolution(
            input, weight, strides, paddings, dilations, groups, ceil_mode
        ):
            batch = input if input.dim() == 4 else input.unsqueeze(0)
            output = ops.conv_relu_pool.apply(
                batch, weight, bias, strides, paddings, dilations, groups
            )
            if input.dim() == 4:
                return output
            # Max-pooling of three dimensions gives a contiguous result, whatever the convolution's.
            # No view: one that was made under no_grad may not be written to where gradients are on.
            return _unsafe_view(output.contiguous(), output.shape[1:])
    z = F.conv2d(*given, stride, padding, dilation, groups)
    return F.max_pool2d(
        torch.relu(z), pool_kernel_size, pool_stride, pool_padding, ceil_mode=ceil_mode
    )


def _pair(value: int | tuple[int, int]) -> tuple[int, ...]:
    if type(value) is int:
        return (value, value)
    if isinstance(value, bool):
        return ()  # which the native functions refuse
    try:
        pair = tuple(map(operator.index, value))
    except TypeError:
        return (operator.index(value),) * 2  # of numpy's integers, or a tensor of one
    return pair * 2 if len(pair) == 1 else pair


def _padding(
    padding: int | tuple[int, int] | str,
    weight: Tensor,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...] | None:
    """In numbers; None where that needs more on one side than on the other, or is an error."""
    if padding == "valid":
        return (0, 0)
    if padding != "same":
        return None if isinstance(padding, str) else _pair(padding)
    if stride != (1, 1) or len(dilation) != 2:
        return None
    total = [d * (kernel - 1) for d, kernel in zip(dilation, weight.shape[2:], strict=True)]
    return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)


def _is_convolution(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    ceil_mode: bool,
) -> bool:
    """Whether these fit together, and leave whole windows of 2 x 2 to pool. What does not is the
    native functions' to compute, or to refuse."""
    if (
        any(len(pair) != 2 for pair in (stride, padding, dilation))
        or isinstance(groups, bool)
        or not isinstance(ceil_mode, bool)
        or min(*stride, *dilation, groups) < 1
        or min(padding) < 0
        or 0 in weight.shape
        or 0 in input.shape[-2:]
        or weight.size(0) % groups
        or input.size(-3) != weight.size(1) * groups
    ):
        return False
    size = convolved_size(input, weight, stride, padding, dilation)
    return all(s >= 2 and not (ceil_mode and s % 2) for s in size)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Computes softmax, logarithm and negative log-likelihood in one pass over the logits.

    The gradient takes one more pass, or is computed in the same one: for "mean" and "sum", on the
    CPU in float32 and float64, on a GPU in float32 and bfloat16 from 128 MB of logits on.

    Takes what `F.cross_entropy` takes, except the deprecated `size_average` and `reduce`, with the
    same result to within rounding. What the kernels do not cover (float16 on the CPU, targets that
    want a gradient or are uint8, sparse tensors) goes to that function. So does, on the CPU, what
    is too small to gain (below 16,384 logits, or 4,096 where no gradient is wanted), unless it is
    of the plain kind that C++ takes: two-dimensional logits, class indices, and no weights.

    Args:
        input: the logits, `(C)`, `(N, C)` or `(N, C, d1, ...)`; any strides. float32, float64 or
            bfloat16, on CUDA also float16; half types are summed in float32.
        target: class indices, of `input`'s shape without `C`, int64; or probabilities, of `input`'s
            shape and dtype.
        weight: a factor for every class, `(C)`, of `input`'s dtype; or None.
        ignore_index: a target that counts neither in the loss nor in the mean.
        reduction: "none" for one loss per target, "mean" (over the targets' weights) or "sum".
        label_smoothing: the share of every target that is spread over all classes, in [0, 1].

    Returns:
        The loss, of `input`'s dtype; under autocast float32. A scalar, or for "none" of the shape
        of class indices.

    Raises:
        IndexError: for a target that is no class, on the CPU. On CUDA the kernel stops with a
            device-side assertion.
        RuntimeError, ValueError: where `F.cross_entropy` raises them.

    Example:
        >>> logits = torch.randn(64, 10, requires_grad=True)
        >>> cross_entropy(logits, torch.randint(10, (64,))).backward()
    """
    number = REDUCTIONS.get(reduction) if type(reduction) is str else None
    if (
        _library.NODES is not None
        and weight is None
        and number is not None
        and not torch.compiler.is_compiling()
    ):
        loss = _library.NODES.quick_cross_entropy(
            input, target, number, ignore_index, label_smoothing
        )
        if loss is not None:
            return loss
    native = functools.partial(
        F.cross_entropy,
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if number is None or not _are_plain(input, target, weight, ignore_index):
        return native()
    wants_gradient = input.requires_grad and _library.is_recorded()
    if input.is_cpu and input.numel() < (SMALL_LOGITS if wants_gradient else SMALL_LOGITS_FORWARD):
        return native()
    dtype = loss_dtype = input.dtype  # the class weights' dtype is the loss's
    wide = accumulate_dtype(dtype)
    if torch._C._is_any_autocast_enabled() and _is_autocast(input.device.type):
        # To float32. The kernels read half types and give float32: no copy of the logits is made.
        loss_dtype = wide
        if weight is not None:
            weight = weight.to(wide)
        if target.is_floating_point() and target.dtype is not dtype:
            input, target = input.to(wide), target.to(wide)
    if (
        0 <= label_smoothing <= 1
        and _has_kernels(input, target, None)
        and _is_target(target, input, ignore_index)
        and (weight is None or _is_class_weight(weight, input, loss_dtype))
    ):
        if weight is not None:
            weight = weight.to(wide)
        loss = ops.cross_entropy.apply(
            input, target, weight, number, ignore_index, float(label_smoothing)
        )
        return loss if loss_dtype is wide else loss.to(loss_dtype)
    return native()


def _are_plain(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int = -100
) -> bool:
    """Whether these are what they are said to be, and not what stands for them in a trace. All else
    is the native function's, to take or to refuse."""
    return (
        type(input) in _PLAIN_TYPES
        and type(target) in _PLAIN_TYPES
        and (weight is None or type(weight) in _PLAIN_TYPES)
        and type(ignore_index) is int
        and -(1 << 63) <= ignore_index < 1 << 63
    )


def _is_target(target: Tensor, logits: Tensor, ignore_index: int) -> bool:
    """Whether the kernels take it: class indices or probabilities, of the fitting shape."""
    shape = logits.shape
    if 0 in shape or not shape:
        return False
    if target.dtype is torch.int64:
        rows = target.shape
        if len(shape) == 2:
            return len(rows) == 1 and rows[0] == shape[0]
        return rows == (shape[:1] + shape[2:] if len(shape) > 1 else ())
    return (
        target.dtype is logits.dtype
        and target.shape == shape
        and ignore_index < 0
        and not (target.requires_grad and torch.is_grad_enabled())
    )


def _is_class_weight(weight: Tensor, logits: Tensor, dtype: torch.dtype) -> bool:
    return (
        weight.layout is torch.strided
        and weight.dtype is dtype
        and weight.device == logits.device
        and weight.dim() == 1
        and weight.shape[0] == logits.shape[0 if logits.dim() == 1 else 1]
        and not weight.requires_grad
    )


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Computes `cross_entropy(F.linear(input, weight, bias), target, class_weight, ...)` in chunks
    of rows, so that the logits and their gradient never exist in memory as a whole.

    For last layers with very many classes. For a scalar loss the gradients are computed along with
    it, a chunk at a time; for reduction "none" and for float16 the logits are computed twice. What
    the kernels do not cover goes through the two functions.

    Args:
        input: `(N, in_features)` or `(in_features)`; float32, float64 or bfloat16, on CUDA also
            float16.
        weight: `(C, in_features)`, as in `nn.Linear`.
        target: class indices `(N)` or `()`, or probabilities `(N, C)` or `(C)`.
        bias: `(C)` or None.
        class_weight, ignore_index, reduction, label_smoothing: as `weight` and the others of
            `cross_entropy`.

    Returns:
        The loss, as from `cross_entropy`.

    Raises:
        ValueError: for an input of other dimensions.
        IndexError, RuntimeError, ValueError: as the two functions do.

    Example:
        >>> features, weight = torch.randn(2048, 512), torch.randn(32000, 512, requires_grad=True)
        >>> linear_cross_entropy(features, weight, torch.randint(32000, (2048,))).backward()
    """
    if isinstance(input, Tensor) and input.dim() not in (1, 2):
        raise ValueError(
            "linear_cross_entropy: input must be (N, in_features) or (in_features), but is "
            f"{tuple(input.shape)}; flatten the leading dimensions, and those of target"
        )

    def two_ops() -> Tensor:
        return cross_entropy(
            F.linear(input, weight, bias),
            target,
            class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    number = REDUCTIONS.get(reduction) if type(reduction) is str else None
    if (
        number is None
        or not _are_plain(input, weight, bias)
        or not _are_plain(input, target, class_weight, ignore_index)
    ):
        return two_ops()
    x, w, b, factors = input, weight, bias, class_weight
    loss_dtype, wide = x.dtype, accumulate_dtype(x.dtype)
    if torch._C._is_any_autocast_enabled() and _is_autocast(x.device.type):
        x, w, b = _autocast(x, w, b)
        loss_dtype = wide = accumulate_dtype(x.dtype)
        if factors is not None:
            factors = factors.to(wide)
    if (
        input.dim() == 2
        and 0 <= label_smoothing <= 1
        and w.dim() == 2
        and x.shape[1] == w.shape[1]
        and x.dtype is w.dtype
        and (b is None or b.shape == w.shape[:1])
        and _has_kernels(x, w, b)
        and _has_kernels(x, target, None)
        and 0 not in w.shape
        # On logits that are not there yet, of which shape and dtype are known.
        and _is_target(target, x.new_empty(()).expand(x.shape[0], w.shape[0]), ignore_index)
        and (factors is None or _is_class_weight(factors, w.t(), loss_dtype))
    ):
        if factors is not None:
            factors = factors.to(wide)
        loss = ops.linear_cross_entropy.apply(
            x, w, target, b, factors, number, ignore_index, float(label_smoothing)
        )
        return loss.to(loss_dtype)
    return two_ops()


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts as autocast does for operators on its lower-precision list."""
    device = next(t for t in tensors if t is not None).device.type
    if not _is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if t is not None and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )
