"""Finds chains of layers in a `forward` written in Python, with torch.fx.

Only the module's own `forward` is traced: its submodules stay calls, and are looked at by
themselves. What a trace would get wrong without a word is refused here with one.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import importlib
import inspect
import random
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastnet import functional
from fastnet.acceleration import chains

RELUS = {torch.relu, torch.relu_, F.relu, F.relu_}
MAX_POOLS = {torch.max_pool2d, F.max_pool2d}
PLAIN_ATTRIBUTES = frozenset(vars(nn.Module()))


class Untraceable(Exception):  # noqa: N818  it is a verdict
    """Says why."""


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
        reads: the attributes that `forward` read, whose values stand in the graph.
    """

    graph: fx.Graph
    chains: list[Chain]
    reads: frozenset[str]


def check_is_ours(module: nn.Module) -> None:
    """Refuses modules whose `forward` is not for us to trace."""
    if not any(module.children()):
        raise Untraceable("it has no submodules")
    if "forward" in vars(module):
        raise Untraceable("its forward has been replaced")
    if isinstance(module, torch.jit.ScriptModule):
        raise Untraceable("it is compiled by torch.jit")
    if type(module).forward is nn.Module.forward:
        raise Untraceable("it has none")
    if type(module).__module__.startswith("torch.nn."):
        raise Untraceable("it is one of torch's own")


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
    reads: set[str] = set()

    def watch(self, name):
        value = written.__getattribute__(self, name)
        fixed = not (callable(value) or isinstance(value, (Tensor, nn.Module)))
        if fixed and name not in PLAIN_ATTRIBUTES and not name.startswith("__"):
            reads.add(name)
        return value

    body = {"written": written.forward}
    exec(f"def forward(self, {names}): return written(self, {names})", body)
    members = {"forward": body["forward"], "__getattribute__": watch}
    watched = types.new_class(written.__name__, (written,), exec_body=lambda ns: ns.update(members))
    # A shell around the same parameters and submodules, on which forward may do what it likes.
    shell = object.__new__(watched)
    vars(shell).update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(shell)[name] = dict(vars(module)[name])
    modes = {child: child.training for child in module.modules()}
    vars(shell)["training"] = training
    with _watch_python(shell):
        try:
            for child in modes:
                child.training = training
            graph = _Tracer().trace(shell)
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")
            raise Untraceable(f"{type(error).__name__}: {first_line}") from error
        finally:
            for child, mode in modes.items():
                child.training = mode
    return Trace(graph, find_chains(graph, module), frozenset(reads))


@contextlib.contextmanager
def _watch_python(shell: nn.Module) -> Iterator[None]:
    """Refuses what forward does beside calling torch, since a graph does not do it again.

    That is: setting attributes, filling lists and dictionaries of the module, making tensors,
    drawing random numbers, printing, and `with`, of which the graph would only hold what is inside.
    """
    attributes = dict(vars(shell))
    filled = [(k, v, copy.copy(v)) for k, v in attributes.items() if type(v) in (list, dict, set)]
    random_states = _random_states()
    refused = []

    def profile(frame, event, called):
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] == "torch" and module not in DECORATORS:
            return
        if event == "call" and _has_with(frame.f_code):
            refused.append(f"there is a `with` in {frame.f_code.co_name}")
        elif event == "c_call" and called is print:
            refused.append("it prints")

    outer = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(outer)
        for name, container, content in filled:
            if _ids(container) != _ids(content):
                container.clear()
                (container.extend if type(container) is list else container.update)(content)
                refused.append(f"it fills self.{name}")
    if refused:
        raise Untraceable(refused[0])
    for name, value in vars(shell).items():
        if name.startswith("_tensor_constant"):
            raise Untraceable("it makes a tensor from no input of its own")
        if name not in attributes or attributes[name] is not value:
            raise Untraceable(f"it sets self.{name}")
    if _random_states() != random_states:
        raise Untraceable("it draws random numbers for no input")


# Where `@torch.no_grad()` and `@torch.autocast(...)` put a function under a `with`.
DECORATORS = {"torch.utils._contextlib", "torch.amp.autocast_mode"}


@functools.cache
def _has_with(code: types.CodeType) -> bool:
    return any(
        step.opname in ("SETUP_WITH", "BEFORE_WITH")
        or (step.opname == "LOAD_SPECIAL" and "enter" in step.argrepr)
        for step in dis.get_instructions(code)
    )


def _ids(container: list | dict | set) -> list[int]:
    values = container.values() if isinstance(container, dict) else ()
    ids = [id(item) for item in (*container, *values)]
    return sorted(ids) if isinstance(container, set) else ids


def _random_states() -> list:
    states = [random.getstate(), torch.get_rng_state().tolist()]
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states.append((kind, keys.tolist(), *rest))
    return states


class _Input(fx.Proxy):
    @property
    def __class__(self):
        # What isinstance(x, Tensor) comes to ask once type(x) is not it. torch's own code may.
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "torch":
            return _Input
        raise fx.proxy.TraceError("it asks for the type of an input")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Input(node, self)


def find_chains(graph: fx.Graph, module: nn.Module) -> list[Chain]:
    """Every chain that begins with a call of a submodule, each as long as it goes."""
    found, inside = [], set()
    for node in graph.nodes:
        if node.op != "call_module" or node in inside or _step(node, module) is None:
            continue
        nodes, steps = [node], [_step(node, module)]
        end = ""
        while not end:
            users = list(nodes[-1].users)
            if len(users) != 1:
                end = f"its result is used {len(users)} times"
            elif (step := _step(users[0], module)) is None:
                what = users[0]
                name = getattr(what.target, "__name__", str(what.target))
                end = "it is the result" if what.op == "output" else f"{name} follows it"
            else:
                nodes.append(users[0])
                steps.append(step)
        inside.update(nodes)
        found.append(Chain(nodes, steps, end))
    return found


def _step(node: fx.Node, module: nn.Module) -> chains.Step | None:
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
    """Puts chains in the place of what they fuse, and fastnet's cross-entropy in that of torch's.

    Returns whether there was anything.
    """
    graph = trace.graph
    changed = False
    for chain in trace.chains:
        for first, last in _fused_spans(chain):
            nodes, steps = chain.nodes[first : last + 1], chain.steps[first : last + 1]
            # Where the first one stood: nothing that might follow it has happened yet.
            with graph.inserting_before(nodes[0]):
                called = tuple(
                    graph.get_attr(node.target) if isinstance(step, nn.Module) else step
                    for node, step in zip(nodes, steps, strict=True)
                )
                run = graph.call_function(chains.run, (called, nodes[0].args[0]))
            nodes[-1].replace_all_uses_with(run)
            for node in reversed(nodes):
                graph.erase_node(node)
            changed = True
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.cross_entropy:
            options = dict(node.kwargs)
            if options.pop("size_average", None) is None and options.pop("reduce", None) is None:
                node.target, node.kwargs = functional.cross_entropy, options
                changed = True
    return changed


def _fused_spans(chain: Chain) -> list[tuple[int, int]]:
    """First and last step of what is fused across steps. What is fused within one step, a
    Sequential, is that one's own affair."""
    flat, origins = [], []
    for at, step in enumerate(chain.steps):
        inner = chains.flatten([step])
        flat += inner
        origins += [at] * len(inner)
    spans: list[tuple[int, int]] = []
    for at in chains.layers(flat):
        count = chains.fuse(flat, at).count
        first, last = origins[at], origins[at + max(count, 1) - 1]
        if first == last:
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
    names = compile(source.src, "graph", "exec").co_consts
    used = {name for part in names if isinstance(part, types.CodeType) for name in part.co_names}
    imports = []
    for name, value in sorted(source.globals.items()):
        if name not in used:
            continue
        if isinstance(value, types.ModuleType):
            module, path = value.__name__, ""
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
