"""Adam, AdamW and SGD of torch.optim, with a `step` that takes little beyond its arithmetic.

In a network as small as MnistNet torch's step takes as long as the backward pass, nearly all of it
in Python and in torch's operators. Here it is one call of a kernel. These are subclasses of
torch.optim's: arguments, state, state dicts, hooks and schedulers are the same, and so are results,
to within rounding.

The kernel takes float32 parameters in the CPU's memory, whose state is there already: the first
step is torch's own where there is a state to make, and so is every step with `amsgrad`,
`maximize`, `differentiable`, `capturable`, dampening, tensors for numbers, hooks, a profiler,
gradients that are sparse or lie otherwise than their parameter, tensors that lie in each other's
memory, counts of steps that are no float32, or under another torch than fastnet was built with.
Hooks that a closure registers are called from the next step on.
"""

from __future__ import annotations

import inspect
from typing import ClassVar

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fastnet._library import NODES
from fastnet.ops import mlp

__all__ = ["SGD", "Adam", "AdamW"]

# Of a group: which optimizer (csrc/optimizer.h), lr, beta1 or momentum, beta2, eps, weight_decay,
# whether that is decoupled, and whether momentum is Nesterov's.
Numbers = tuple[int, float, float, float, float, float, bool, bool]


class _QuickStep(torch.optim.Optimizer):
    """Before an optimizer of torch's among the bases of a class."""

    native: ClassVar[type[torch.optim.Optimizer]]

    def _numbers(self, group: dict) -> Numbers | None:
        """None where only torch can take the group's step."""
        raise NotImplementedError

    def step(self, *args, **kwargs) -> float | None:
        """Updates the parameters that have a gradient.

        Args:
            closure: computes the loss anew, with its gradients; optional.

        Returns:
            The closure's result; None without one.
        """
        is_usual = len(args) + len(kwargs) <= 1 and not kwargs.keys() - {"closure"}
        if NODES is None or not is_usual or self._is_watched():
            return self._native_step(*args, **kwargs)
        loss, closure = None, (*args, *kwargs.values(), None)[0]
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = []
        for group in self.param_groups:
            numbers = self._numbers(group)
            if numbers is None:
                break
            groups.append((group["params"], numbers))
        if len(groups) < len(self.param_groups) or not NODES.optimizer_step(groups, self.state):
            self._native_step()
        return loss

    # Torch would wrap it to call hooks and tell profilers. Where there are any, its own step does.
    step.hooked = True
    step.__signature__ = inspect.signature(torch.optim.Optimizer.step)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Takes the gradients from the parameters, or sets them to zero."""
        if not set_to_none or NODES is None or torch.compiler.is_compiling() or NODES.is_observed():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _is_watched(self) -> bool:
        """Whether more than an update is asked for: hooks, a profile, a trace, a scaler."""
        return bool(
            torch.compiler.is_compiling()
            or NODES.is_observed()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or type(self)._init_group is not self.native._init_group  # another one's, to be called
            or getattr(self, "grad_scale", None) is not None
            or getattr(self, "found_inf", None) is not None
        )

    def _native_step(self, *args, **kwargs) -> float | None:
        step = self.native.step
        if type(self).step is not _QuickStep.step:  # which torch has wrapped to call the hooks
            step = step.__wrapped__
        return step(self, *args, **kwargs)

    def _patch_step_function(self) -> None:
        # Called when an optimizer is made or loaded. Torch's own step is as if it had made one of
        # its own.
        super()._patch_step_function()
        if not getattr(self.native.step, "hooked", False):
            self.native.step = self.profile_hook_step(self.native.step)
            self.native.step.hooked = True


class Adam(_QuickStep, torch.optim.Adam):
    """`torch.optim.Adam` whose step is one call of a kernel for float32 parameters on the CPU, and
    torch's own for all else (see the module's docstring). Arguments and errors are torch's.

    Example:
        >>> optimizer = fastnet.optim.Adam(model.parameters(), lr=1e-3)
    """

    native = torch.optim.Adam

    def _numbers(self, group: dict) -> Numbers | None:
        if group["amsgrad"] or group["maximize"] or group["capturable"] or group["differentiable"]:
            return None
        numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        return (mlp.ADAM, *numbers, group.get("decoupled_weight_decay", False), False)


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW`, as `Adam` is `torch.optim.Adam`.

    Example:
        >>> optimizer = fastnet.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    """

    native = torch.optim.AdamW


class SGD(_QuickStep, torch.optim.SGD):
    """`torch.optim.SGD`, as `Adam` is `torch.optim.Adam`.

    Example:
        >>> optimizer = fastnet.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    """

    native = torch.optim.SGD

    def _numbers(self, group: dict) -> Numbers | None:
        if group["dampening"] or group["maximize"] or group["differentiable"]:
            return None
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        kind = mlp.MOMENTUM if momentum else mlp.SGD
        return kind, lr, momentum, 0.0, 0.0, decay, False, group["nesterov"]
