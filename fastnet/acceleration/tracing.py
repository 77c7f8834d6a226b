"""Finds chains of layers in a `forward` written in Python, with torch.fx.

Only the module's own `forward` is traced: its submodules stay calls, and are looked at by
themselves. What a trace would get wrong without a word is refused here with one.
"""

from __future__ import annotations

import importlib
import inspect
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastnet import functional
from fastnet.acceleration import chains
from fastnet.acceleration.conditions import REGISTRIES, Untraceable, written_class
from fastnet.acceleration.guards import Tracer, Unregistered, subclass, watch_python

RELUS = {torch.relu, torch.relu_, F.relu, F.relu_}
MAX_POOLS = {torch.max_pool2d, F.max_pool2d}


@dataclass(frozen=True)
class Code:
    """Source of a function, and where the global names in it come from.

    Text only, so that what is made of it can be pickled, and made again.
    """

    text: str
    imports: tuple[tuple[str, str, str], ...]  # name, module, name in that module or ""

    def globals(self) -> dict[str, object]:
        return {name: _imported(module, path) for name, module, path in self.imports}


@dataclass
class Chain:
    """Steps of which each one's only use is the next."""

    nodes: list[fx.Node]
    steps: list[chains.Step]
    end: str  # what comes after, for people


@dataclass
class Trace:
    """A `forward` as a graph, for training or for evaluation.

    Attributes:
        graph: its operations, with calls of submodules.
        chains: the layers in it and what follows them.
        conditions: expressions in `self` and their values, of what `forward` read.
        globals: and the globals that it read, by module and name, with their values.
    """

    graph: fx.Graph
    chains: list[Chain]
    conditions: dict[str, object]
    globals: dict[tuple[str, str], object]


def check_is_ours(module: nn.Module) -> None:
    """Refuses modules whose `forward` is not for us to trace."""
    kind = written_class(module)
    if not any(module.children()):
        raise Untraceable("it has no submodules")
    if "forward" in vars(module):
        raise Untraceable("its forward has been replaced")
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        raise Untraceable("it is compiled already")
    if kind.forward is nn.Module.forward:
        raise Untraceable("it has none")
    if kind.__module__.startswith("torch.nn."):
        raise Untraceable("it is one of torch's own")
    check_is_pickled_plainly(kind)
    if any(type(child).__call__ is not nn.Module.__call__ for child in module.modules()):
        raise Untraceable("something in it has a __call__ of its own")


def check_is_pickled_plainly(kind: type[nn.Module]) -> None:
    reduces = (kind.__reduce__, object.__reduce__), (kind.__reduce_ex__, object.__reduce_ex__)
    if any(own is not plain for own, plain in reduces):
        raise Untraceable("it has a way of its own to be pickled")


def required_arguments(forward: types.FunctionType) -> list[str]:
    """The names of those that a call must give."""
    _self, *parameters = inspect.signature(forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    names = []
    for parameter in required:
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            names.append(parameter.name)
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable(f"its argument {parameter.name} is {parameter.kind.description}")
    if not names:
        raise Untraceable("it has no argument by name")
    return names


def trace(module: nn.Module, written: type[nn.Module], training: bool) -> Trace:
    """Traces `written.forward` on this module, with optional arguments left out.

    Raises:
        Untraceable: where the graph would not be, or may not be, what `forward` does.
    """
    names = ", ".join(required_arguments(written.forward))
    body = {"written": written.forward}
    exec(f"def forward(self, {names}): return written(self, {names})", body)
    watched = subclass(written, Unregistered, {"forward": body["forward"]})
    # A shell around the same parameters and submodules, on which forward may do what it likes.
    shell = object.__new__(watched)
    vars(shell).update(vars(module))
    for name in REGISTRIES:
        vars(shell)[name] = dict(vars(module)[name])
    modes = [(child, child.training) for child in module.modules()]
    vars(shell)["training"] = training
    with watch_python(module, shell) as reads:
        try:
            for child, _ in modes:
                child.training = training
            graph = Tracer().trace(shell)
            if any(child.training is not training for child, _ in modes):
                raise fx.proxy.TraceError("it switches between training and evaluation")
        except Untraceable:
            raise
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")
            raise Untraceable(f"{type(error).__name__}: {first_line}") from error
        finally:
            for child, mode in modes:
                child.training = mode
    return Trace(graph, find_chains(graph, module), reads.conditions, reads.globals)


NO_CALLS = ("placeholder", "get_attr")


def find_chains(graph: fx.Graph, module: nn.Module) -> list[Chain]:
    """Every chain that begins with a call of a submodule, each as long as it goes."""
    found, inside = [], set()
    order = {node: at for at, node in enumerate(n for n in graph.nodes if n.op not in NO_CALLS)}
    for node in graph.nodes:
        if node.op != "call_module" or node in inside:
            continue
        if (first := step_of(node, module)) is None:
            continue
        nodes, steps = [node], [first]
        end = ""
        while not end:
            users = list(nodes[-1].users)
            if len(users) != 1:
                end = f"its result is used {len(users)} times"
            elif (step := step_of(users[0], module)) is None:
                what = users[0]
                name = getattr(what.target, "__name__", str(what.target))
                end = "it is the result" if what.op == "output" else f"{name} follows it"
            elif order[users[0]] != order[nodes[-1]] + 1:
                # Run together they would change places with it, and random numbers with them.
                end = "something else is called before its result is used"
            else:
                nodes.append(users[0])
                steps.append(step)
        inside.update(nodes)
        found.append(Chain(nodes, steps, end))
    return found


def step_of(node: fx.Node, module: nn.Module) -> chains.Step | None:
    """A node as a step of a chain, if it is one: one tensor in, one out, nothing else."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    options = node.kwargs
    if node.op == "call_module":
        plain = len(node.args) == 1 and not options
        return module.get_submodule(node.target) if plain else None
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return chains.RELU
    if node.op != "call_function":
        return None
    if node.target in RELUS:
        return chains.RELU
    if node.target in MAX_POOLS:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = dict(zip(names, node.args[1:], strict=False)) | options
        windows = (
            given["kernel_size"],
            given.get("stride"),
            given.get("padding", 0),
            given.get("dilation", 1),
            given.get("ceil_mode", False),
        )
        if not given.get("return_indices") and not any(map(_is_computed, windows)):
            return windows
    return None


def _is_computed(value: object) -> bool:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(part, fx.Node) for part in parts)


def rewrite(trace: Trace) -> bool:
    """Puts chains in the place of what they fuse, and of each Linear alone, and fastnet's
    cross-entropy in that of torch's.

    Returns whether anything is gained.
    """
    graph = trace.graph
    changed = False
    for chain in trace.chains:
        for first, last in _fused_spans(chain):
            nodes, steps = chain.nodes[first : last + 1], chain.steps[first : last + 1]
            # Where the first one stood: nothing that might follow it has happened yet.
            with graph.inserting_before(nodes[0]):
                called = tuple(map(_as_written, nodes, steps))
                run = graph.call_function(chains.run, (called, nodes[0].args[0]))
            nodes[-1].replace_all_uses_with(run)
            for node in reversed(nodes):
                graph.erase_node(node)
            changed = changed or len(nodes) >= chains.LEAST_GAIN
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.cross_entropy:
            options = dict(node.kwargs)
            if options.pop("size_average", None) is None and options.pop("reduce", None) is None:
                node.target, node.kwargs = functional.cross_entropy, options
                changed = True
    return changed


def _as_written(node: fx.Node, step: chains.Step) -> fx.Node | chains.Step:
    """A step as it is called in the graph; where it is not fused after all, it shows whether a ReLU
    writes to its input."""
    if isinstance(step, nn.Module):
        return node.graph.get_attr(node.target)
    given = node.args[1:] or (node.kwargs.get("inplace", False),)
    is_in_place = node.target in (torch.relu_, F.relu_, "relu_") or given[0]
    return chains.RELU_IN_PLACE if step == chains.RELU and is_in_place else step


def _fused_spans(chain: Chain) -> list[tuple[int, int]]:
    """First and last step of what is fused across steps, and of each Linear alone. What is fused
    within one step, a Sequential, is that one's own affair."""
    flat, origins = [], []
    for at, step in enumerate(chain.steps):
        inner = chains.flatten([step])
        flat += inner
        origins += [at] * len(inner)
    spans: list[tuple[int, int]] = []
    for at in chains.layers(flat):
        count = chains.fuse(flat, at).count
        first, last = origins[at], origins[at + max(count, 1) - 1]
        is_alone = count == 1 and chain.steps[first] is flat[at]
        if first == last and not is_alone:
            continue
        if spans and spans[-1][1] == first:
            first = spans.pop()[0]
        spans.append((first, last))
    return spans


def code(graph: fx.Graph) -> Code:
    """The graph's source.

    Raises:
        Untraceable: where it calls what cannot be imported by name.
    """
    source = graph.python_code("self")
    try:
        names = compile(source.src, "graph", "exec").co_consts
    except SyntaxError as error:
        raise Untraceable(f"Python cannot say a name in it: {error.text}") from error
    used = {name for part in names if isinstance(part, types.CodeType) for name in part.co_names}
    imports = []
    for name, value in sorted(source.globals.items()):
        if name not in used:
            continue
        if isinstance(value, types.ModuleType):
            module, path = value.__name__, ""
        elif isinstance(value, float):  # inf and nan, which torch.fx writes by name
            module, path = "math", name
        else:
            module = getattr(value, "__module__", None) or ""
            path = getattr(value, "__qualname__", "")
        try:
            known = _imported(module, path) is value
        except (ImportError, AttributeError, ValueError):
            known = False
        if not known:
            raise Untraceable(f"it calls {name}, which cannot be imported by its name")
        imports.append((name, module, path))
    return Code(source.src, tuple(imports))


def _imported(module: str, path: str) -> object:
    value = importlib.import_module(module)
    for part in path.split(".") if path else ():
        value = getattr(value, part)
    return value
