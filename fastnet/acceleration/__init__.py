"""accelerate(model): an existing network on the fused kernels.

What is fused is fused inside the modules that call it: an `nn.Sequential`, or a module with a
`forward` of its own, gets a class in which that `forward` calls the kernels. The layers stay what
and where they are, with their parameters.
"""

from __future__ import annotations

import copy
import warnings

from torch import nn

from fastnet import modules
from fastnet.acceleration.classes import TRACED, Accelerated, class_for
from fastnet.acceleration.conditions import Untraceable
from fastnet.acceleration.report import FUSED_MODULES, Report, accelerate_report

__all__ = ["Report", "accelerate", "accelerate_report"]


def accelerate(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    r"""Puts an existing network on the fused kernels: Linear→ReLU, Conv2d→ReLU→MaxPool2d (or
    Conv2d→MaxPool2d→ReLU) and CrossEntropyLoss, wherever it calls them. Other Linear layers that it
    finds there run on `functional.linear` (under the torch that fastnet was built with).

    Found are modules in `nn.Sequential`, nested or not, and in a `forward` of its own (traced with
    torch.fx, once for training and once for evaluation) modules as well as `F.relu`, `torch.relu`,
    `x.relu()`, `F.max_pool2d` and `F.cross_entropy`. A `forward` that cannot be traced (see below)
    stays as it is; what it calls is looked at all the same. `accelerate_report` tells what became
    of each layer.

    The result computes what the model does, with the same modules under the same names, and the
    very same parameters and buffers: an optimizer made before still steps it. A layer runs fused
    only while nothing can tell: not with hooks on it or on its ReLU, not parametrized, not where
    somebody else uses the result between. All of this is looked at in each call, so hooks can be
    added, and layers replaced, afterwards.

    A `forward` is traced only where a trace says it all: with no `with`, `try`, `print` or log, no
    random numbers of its own, nothing set or appended to, no question about an input's type or the
    state of the moment. What else it read is looked at in each call: attributes of its own, of its
    class and of submodules, which of these there are and in which mode, and globals. While any of
    it is another than it was, the written `forward` runs. Setting such a number of the module's own
    warns of it; calling this again traces it anew. This is not safe while another thread runs a
    model: tracing takes hold of `nn.Module` meanwhile.

    Args:
        model: any module.
        inplace: change `model` itself. Otherwise it stays as it is, and the result is a copy, which
            shares its parameters and buffers.

    Returns:
        The model, or the copy; of the same class but for `forward`. A UserWarning says where
        nothing in it is changed.

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
            continue
        try:
            cls = class_for(module)
        except Untraceable:  # it stays as it is; accelerate_report says why
            continue
        if cls is not None:
            module.__class__ = cls
            vars(module)[TRACED] = True
    if not any(isinstance(module, (Accelerated, *FUSED_MODULES)) for module in model.modules()):
        warnings.warn(
            f"fastnet: accelerate found nothing to fuse in this {type(model).__name__}, which runs "
            "as it did; print(fastnet.accelerate_report(model)) says why, layer by layer.",
            stacklevel=2,
        )
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
