"""Reads an optimizer as what MLPTrainer applies: which one it is, its numbers and its state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fastnet import optim
from fastnet.mlp_layers import Layer
from fastnet.ops import mlp

# What they are made by, of the parameters and of some of these numbers.
OPTIMIZERS = {
    "adam": (partial(torch.optim.Adam, fused=True), ("lr", "weight_decay", "betas", "eps")),
    "sgd": (torch.optim.SGD, ("lr", "momentum", "weight_decay")),
}


ADAMS = (torch.optim.Adam, optim.Adam)
SGDS = (torch.optim.SGD, optim.SGD)


def optimizer_of(
    chosen: str | torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    given: Mapping[str, object],
) -> torch.optim.Optimizer:
    """The optimizer that is chosen, made of the numbers given where it is chosen by name.

    Raises:
        ValueError: for a name that is none, or numbers that it does not take.
    """
    if isinstance(chosen, torch.optim.Optimizer):
        if given:
            raise ValueError(f"{', '.join(given)}: the optimizer has its own; set it there")
        return chosen
    if not isinstance(chosen, str) or chosen not in OPTIMIZERS:
        raise ValueError(f'optimizer must be "adam" or "sgd", not {chosen!r}')
    make, takes = OPTIMIZERS[chosen]
    for name in given:
        if name not in takes:
            raise ValueError(f'{name} is none of "{chosen}", which takes {", ".join(takes)}')
    return make(parameters, **{"lr": 1e-3, **given})


def read_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> tuple[int, tuple[float, ...]]:
    """Which one it is, by its number in csrc/mlp.h; and lr, beta1, beta2, eps and weight_decay.

    Raises:
        ValueError: for other parameters than these, and for options that are not trained natively.
    """
    if type(optimizer) not in (*ADAMS, *SGDS):
        raise ValueError(
            f"MLPTrainer applies Adam and SGD of torch.optim or fastnet.optim, not "
            f"{type(optimizer).__name__}"
        )
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    hooks += (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    if any(hooks):
        raise ValueError("the optimizer has hooks, which a native step does not call")
    if len(optimizer.param_groups) != 1:
        raise ValueError(
            f"the optimizer must have one group of parameters, not {len(optimizer.param_groups)}"
        )
    (group,) = optimizer.param_groups
    if {id(p) for p in group["params"]} != {id(p) for p in parameters}:
        raise ValueError("the optimizer must have just the model's parameters")
    for name in ("amsgrad", "maximize", "nesterov", "dampening", "decoupled_weight_decay"):
        if group.get(name):
            raise ValueError(f"MLPTrainer has no {name}={group[name]!r}")
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if type(optimizer) in ADAMS:
        return mlp.ADAM, (lr, *map(float, group["betas"]), float(group["eps"]), decay)
    momentum = float(group["momentum"])
    return mlp.MOMENTUM if momentum else mlp.SGD, (lr, momentum, 0.0, 0.0, decay)


def state_of(
    optimizer: torch.optim.Optimizer, layers: Sequence[Layer], kind: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The optimizer's own tensors, made as it makes them where it has not stepped yet: the first
    and the second of every weight and bias, an empty one for a bias that is not there; and counts
    of steps.

    Raises:
        ValueError: for a state that is not as the optimizer itself would have it.
    """
    if kind == mlp.SGD:
        return [], [], []
    names = ("exp_avg", "exp_avg_sq") if kind == mlp.ADAM else ("momentum_buffer",)
    parameters = [p for layer in layers for p in (layer.linear.weight, layer.linear.bias)]
    _check_state(optimizer, [p for p in parameters if p is not None], kind, names)
    device = layers[0].linear.weight.device
    none = torch.empty(0, dtype=torch.float32, device=device)
    (group,) = optimizer.param_groups
    # With the parameters only where a kernel counts.
    counts_on = device if group.get("fused") or group.get("capturable") else "cpu"
    lists: tuple[list[Tensor], ...] = ([], [])
    steps = []
    for parameter in parameters:
        if parameter is None:
            for states in lists[: len(names)]:
                states.append(none)
            continue
        state = optimizer.state[parameter]
        # Tensors that a step of torch's may write to, also under inference_mode.
        with torch.inference_mode(False):
            if kind == mlp.ADAM:
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=counts_on)
                steps.append(state["step"])
            for name, states in zip(names, lists, strict=False):
                if state.get(name) is None:
                    state[name] = torch.zeros_like(parameter, requires_grad=False)
                states.append(state[name])
    return *lists, steps


def _check_state(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    kind: int,
    names: tuple[str, ...],
) -> None:
    taken = set()
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if kind == mlp.ADAM:
            step = state.get("step", torch.zeros((), dtype=torch.float32, device="cpu"))
            if not isinstance(step, Tensor) or step.dtype is not torch.float32:
                raise ValueError(f"the optimizer's step must be a float32 tensor, not {step!r}")
            taken.add(step.item())
        for name in names:
            value = state.get(name)
            if value is not None and not (
                value.shape == parameter.shape
                and value.dtype is torch.float32
                and value.device == parameter.device
                and value.is_contiguous()
            ):
                raise ValueError(
                    f"the optimizer's {name} must be {tuple(parameter.shape)}, float32 and "
                    f"contiguous, but is {tuple(value.shape)}, {value.dtype}"
                )
    if len(taken) > 1:
        raise ValueError(
            f"the optimizer has stepped some parameters {min(taken):.0f} times and others "
            f"{max(taken):.0f} times"
        )
