"""accelerate(model): an existing network on the fused kernels.

What is fused is fused inside the modules that call it: an `nn.Sequential`, or a module with a
`forward` of its own, gets a class in which that `forward` calls the kernels. The layers stay what
and where they are, with their parameters.
"""

from __future__ import annotations

import copy

from torch import nn

from fastnet import modules
from fastnet.acceleration import chains, tracing
from fastnet.acceleration.classes import TRACED, Accelerated, Forward, accelerated
from fastnet.acceleration.guards import Untraceable
from fastnet.acceleration.report import Report, accelerate_report

__all__ = ["Report", "accelerate", "accelerate_report"]


def accelerate(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    r"""Puts an existing network on the fused kernels: Linear→ReLU, Conv2d→ReLU→MaxPool2d (or
    Conv2d→MaxPool2d→ReLU) and CrossEntropyLoss, wherever it calls them.

    Found are modules in `nn.Sequential`, nested or not, and in a `forward` of its own (traced with
    torch.fx, once for training and once for evaluation) modules as well as `F.relu`, `torch.relu`,
    `x.relu()`, `F.max_pool2d` and `F.cross_entropy`. A `forward` that cannot be traced, because
    what it does depends on its input's values, stays as it is; what it calls is looked at all the
    same. `accelerate_report` tells what became of each layer.

    The result computes what the model does, with the same modules under the same names, and the
    very same parameters and buffers: an optimizer made before still steps it. A layer runs fused
    only while nothing can tell: not with hooks on it or on its ReLU, not parametrized, not where
    somebody else uses the result between. All of this is looked at in each call, so hooks can be
    added, and layers replaced, afterwards.

    A `forward` is traced only where a trace says it all: with no `with`, `try` or `print`, no
    random numbers of its own, no attribute set, no question about an input's type. What it read
    from attributes is kept; setting one of them later brings the written `forward` back, with a
    warning. Globals, and attributes of submodules, that it read are kept without one.

    Args:
        model: any module.
        inplace: change `model` itself. Otherwise it stays as it is, and the result is a copy, which
            shares its parameters and buffers.

    Returns:
        The model, or the copy; of the same class but for `forward`.

    Raises:
        TypeError: for what is no module.
        RuntimeError: for a model that cannot be copied, with inplace=False.

    Example:
        >>> model = fastnet.accelerate(torchvision.models.vgg11())
        >>> print(fastnet.accelerate_report(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, not {type(model).__name__}")
    if not inplace:
        model = _copy(model)
    for module in model.modules():
        if type(module) is nn.CrossEntropyLoss:
            module.__class__ = modules.CrossEntropyLoss
        elif (cls := _accelerated_class(module)) is not None:
            module.__class__ = cls
            vars(module)[TRACED] = True
    return model


def _copy(model: nn.Module) -> nn.Module:
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        copied = copy.deepcopy(model, dict(shared))
        if any(id(tensor) not in shared for tensor in (*copied.parameters(), *copied.buffers())):
            raise TypeError("its own way of being copied copies the parameters, too")
    except Exception as error:
        raise RuntimeError(
            f"accelerate: this {type(model).__name__} cannot be copied ({error}); "
            "accelerate(model, inplace=True) needs no copy"
        ) from error
    return copied


def _accelerated_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that it should have; None where nothing is gained."""
    if isinstance(module, Accelerated):
        return None
    if chains.is_sequential(module):
        flat = chains.flatten(module._modules.values())
        gains = any(chains.fuse(flat, at).count for at in chains.layers(flat))
        return accelerated(type(module), None) if gains else None
    try:
        tracing.check_is_ours(module)
        traces = [tracing.trace(module, type(module), training) for training in (True, False)]
        changed = [tracing.rewrite(trace) for trace in traces]
        if not any(changed):
            return None
        reads = traces[0].reads | traces[1].reads
        lists = (nn.ModuleList, nn.ModuleDict)
        lengths = tuple((n, len(m)) for n, m in module.named_children() if isinstance(m, lists))
        codes = [tracing.code(trace.graph) for trace in traces]
        return accelerated(type(module), Forward(*codes, reads, lengths))
    except Untraceable:
        return None
