"""Reads a network as what MLPTrainer trains: linear layers, and which of them ReLU follows."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastnet import modules
from fastnet.acceleration import chains, tracing
from fastnet.acceleration.conditions import Untraceable, written_class


@dataclass(frozen=True)
class Layer:
    """A linear layer and whether ReLU follows it."""

    linear: nn.Linear
    relu: bool


def read_layers(model: nn.Module) -> list[Layer]:
    """The linear layers of a network that is nothing but linear layers and ReLU.

    Raises:
        ValueError: for anything else, by name.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    layers: list[Layer] = []
    ended = ""
    for step in _operations(model):
        name = step if isinstance(step, str) else type(step).__name__
        if ended:
            raise _refusal(f"{name} follows {ended}")
        if isinstance(step, nn.Linear):
            if any(step is layer.linear for layer in layers):
                raise _refusal("one layer is used twice")
            if layers and layers[-1].linear.out_features != step.in_features:
                raise _refusal(
                    f"a layer gives {layers[-1].linear.out_features} values, and the next takes "
                    f"{step.in_features}"
                )
            check_layer(step, layers[0].linear.weight.device if layers else step.weight.device)
            layers.append(Layer(step, False))
        elif step == "ReLU" and layers and not layers[-1].relu:
            layers[-1] = Layer(layers[-1].linear, True)
        elif step == "log-softmax" and layers:
            ended = name
        elif not (step == "flatten" and not layers):
            raise _refusal(f"{name} stands {'after' if layers else 'before'} a layer")
    if not layers:
        raise _refusal("there is no linear layer in it")
    if layers[-1].relu:
        raise _refusal("ReLU follows the last layer, whose results must be logits")
    parameters = {id(p) for layer in layers for p in layer.linear.parameters()}
    others = [name for name, p in model.named_parameters() if id(p) not in parameters]
    if others:
        raise _refusal(f"parameters {', '.join(others)} are of no linear layer in it")
    return layers


def _refusal(what: str) -> ValueError:
    return ValueError(f"MLPTrainer trains linear layers with ReLU between, and {what}")


def check_layer(linear: nn.Linear, device: torch.device) -> None:
    """Refuses a layer whose parameters are not plain float32 on this device, all to be trained."""
    if device.type not in ("cpu", "cuda"):
        raise _refusal(f"{linear} is on {device}, not on the CPU or a GPU")
    for name, parameter in linear.named_parameters():
        if parameter.dtype is not torch.float32 or parameter.device != device:
            raise _refusal(
                f"{name} of {linear} is {parameter.dtype} on {parameter.device}, not float32 on "
                f"{device}"
            )
        if not parameter.requires_grad:
            raise _refusal(f"{name} of {linear} is frozen")
        if not parameter.is_contiguous():
            raise _refusal(f"{name} of {linear} is not contiguous")
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise _refusal(f"{name} of {linear} has hooks on its gradient")
    if linear.weight.shape != (linear.out_features, linear.in_features):
        raise _refusal(f"the weight of {linear} is {tuple(linear.weight.shape)}")


def check_apart(parameters: list[nn.Parameter]) -> None:
    """Refuses parameters that share memory: a gradient is applied where it is computed, and theirs
    would have to be added first."""
    ranges = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in parameters)
    if any(before[1] > after[0] for before, after in itertools.pairwise(ranges)):
        raise _refusal("two of its parameters share memory")


def signature(model: nn.Module) -> list[tuple]:
    """What changes when a module is replaced, given hooks, or told to do otherwise by a number, a
    word or a flag of its own."""
    return [
        (name, id(m), type(m), chains.has_hooks(m), _flags(m)) for name, m in model.named_modules()
    ]


def _flags(module: nn.Module) -> dict[str, object]:
    kinds = (bool, int, float, str, tuple, type(None))
    flags = {name: value for name, value in vars(module).items() if type(value) in kinds}
    flags.pop("training", None)  # in which both do the same
    return flags


def _operations(module: nn.Module) -> Iterator[nn.Linear | str]:
    """What a network does, one thing after the other."""
    kind = written_class(module)
    if hasattr(module, "_orig_mod"):
        raise _refusal("this is compiled: give it the network before torch.compile")
    if chains.has_hooks(module):
        raise _refusal(f"{kind.__name__} has hooks")
    if chains.is_sequential(module):
        for child in module._modules.values():  # children() leaves out what comes twice
            yield from _operations(child)
    elif kind in (nn.Linear, modules.Linear):
        yield module
        if getattr(module, "activation", None) == "relu":
            yield "ReLU"
    elif kind is nn.ReLU:
        yield "ReLU"
    elif kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        yield "flatten"
    elif kind is nn.LogSoftmax and module.dim in (1, -1):
        yield "log-softmax"
    elif kind is not nn.Identity:
        if not any(module.children()):
            raise _refusal(f"{kind.__name__} is in it")
        try:
            tracing.check_is_ours(module)
            graphs = [tracing.trace(module, kind, mode).graph for mode in (True, False)]
        except Untraceable as reason:
            raise _refusal(f"{kind.__name__} cannot be read: {reason}") from None
        if str(graphs[0]) != str(graphs[1]):
            raise _refusal(f"{kind.__name__} does in training what it does not in evaluation")
        yield from _traced_operations(graphs[0], module)


def _traced_operations(graph: fx.Graph, module: nn.Module) -> Iterator[nn.Linear | str]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        raise _refusal(f"{type(module).__name__} takes {len(placeholders)} inputs")
    (value,) = placeholders
    while True:
        users = [user for user in value.users if not _is_batch_size(user)]
        if len(users) != 1:
            raise _refusal(f"the result of {value} is used {len(users)} times")
        (node,) = users
        if node.op == "output":
            if node.args[0] is not value:
                raise _refusal(f"{type(module).__name__} returns more than one tensor")
            return
        step = tracing.step_of(node, module)
        if isinstance(step, nn.Module):
            yield from _operations(step)
        elif step == chains.RELU:
            yield "ReLU"
        elif _is_flatten(node):
            yield "flatten"
        elif _is_log_softmax(node):
            yield "log-softmax"
        else:
            raise _refusal(f"{getattr(node.target, '__name__', node.target)} is called")
        value = node


def _is_batch_size(node: fx.Node) -> bool:
    """x.size(0), x.shape[0], and x.shape itself where nothing else is taken from it."""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    if node.op == "call_function" and node.target is getattr and node.args[1] == "shape":
        return all(
            user.op == "call_function" and user.target is operator.getitem and user.args[1] == 0
            for user in node.users
        )
    return node.op == "call_function" and node.target is operator.getitem and node.args[1] == 0


def _is_flatten(node: fx.Node) -> bool:
    """Whether it makes one row of each image, if the next layer takes it at all."""
    if node.target in ("flatten", torch.flatten):
        return node.args[1:] == (1,) or dict(node.kwargs) == {"start_dim": 1}
    if node.op != "call_method" or node.target not in ("view", "reshape"):
        return False
    shape = node.args[1:]
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if len(shape) != 2 or isinstance(shape[1], fx.Node):
        return False
    return shape[0] == -1 or (isinstance(shape[0], fx.Node) and _is_batch_size(shape[0]))


def _is_log_softmax(node: fx.Node) -> bool:
    if node.target not in (F.log_softmax, torch.log_softmax, "log_softmax"):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dim in (1, -1) and node.kwargs.get("dtype") is None
