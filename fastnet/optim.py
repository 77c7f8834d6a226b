"""Adam, AdamW and SGD of torch.optim, with a `step` that takes little beyond its arithmetic.

Of a network as small as MnistNet torch's step takes as long as the backward pass, nearly all of it
in Python and in torch's operators. Here it is one call of a kernel. Arguments, state, state dicts,
hooks, schedulers and results are those of torch.optim, whose classes these are.

The kernel takes float32 parameters in the CPU's memory, whose state is there already: the first
step is torch's own where there is a state to make, and so is every step with `amsgrad`,
`maximize`, `differentiable`, `capturable`, dampening, tensors for numbers, hooks, a profiler,
gradients that are sparse or lie otherwise than their parameter, or under another torch than fastnet
was built with.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters that have a gradient.

        Args:
            closure: computes the loss anew, with its gradients.

        Returns:
            The closure's result; None without one.
        """
        if NODES is None or self._is_watched():
            return super().step(closure)
        loss = None
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
            super().step()
        return loss

    # Torch would wrap it to call hooks and tell profilers. Where there are any, its own step does.
    step.hooked = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Takes the gradients from the parameters, or sets them to zero."""
        if not set_to_none or torch.compiler.is_compiling() or torch.autograd._profiler_enabled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _is_watched(self) -> bool:
        """Whether more than an update is asked for: hooks, a profile, a trace, a scaler."""
        return bool(
            torch.compiler.is_compiling()
            or torch.autograd._profiler_enabled()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or getattr(self, "grad_scale", None) is not None
            or getattr(self, "found_inf", None) is not None
        )

    def _patch_step_function(self) -> None:
        # Called when an optimizer is made or loaded. Torch's own step is as if it had made one of
        # its own.
        super()._patch_step_function()
        if not getattr(self.native.step, "hooked", False):
            self.native.step = self.profile_hook_step(self.native.step)
            self.native.step.hooked = True


class _QuickAdam(_QuickStep):
    def _numbers(self, group: dict) -> Numbers | None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if (
            group["amsgrad"]
            or group["maximize"]
            or group["capturable"]
            or group["differentiable"]
            or not isinstance(lr, (float, int))
            or not isinstance(beta1, float)
            or not isinstance(beta2, float)
        ):
            return None
        is_decoupled = group.get("decoupled_weight_decay", False)
        return mlp.ADAM, lr, beta1, beta2, group["eps"], group["weight_decay"], is_decoupled, False


class Adam(_QuickAdam, torch.optim.Adam):
    """`torch.optim.Adam`, with a quicker step."""

    native = torch.optim.Adam


class AdamW(_QuickAdam, torch.optim.AdamW):
    """`torch.optim.AdamW`, with a quicker step."""

    native = torch.optim.AdamW


class SGD(_QuickStep, torch.optim.SGD):
    """`torch.optim.SGD`, with a quicker step."""

    native = torch.optim.SGD

    def _numbers(self, group: dict) -> Numbers | None:
        lr, momentum = group["lr"], group["momentum"]
        if (
            group["dampening"]
            or group["maximize"]
            or group["differentiable"]
            or not isinstance(lr, (float, int))
        ):
            return None
        kind = mlp.MOMENTUM if momentum else mlp.SGD
        return kind, lr, momentum, 0.0, 0.0, group["weight_decay"], False, group["nesterov"]
