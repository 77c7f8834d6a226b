"""What a trace of `forward` would lose, and how it is noticed.

torch.fx runs `forward` once, on stand-ins for its inputs, and writes down the calls of torch. What
Python does beside them happens then, and never again; so whatever is not plainly without effect is
refused.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import gc
import itertools
import logging
import operator
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from fastnet.acceleration.conditions import (
    Conditions,
    Untraceable,
    is_constant,
    is_library,
    is_own,
    is_plain,
    look_up,
)

# Builtins that depend on nothing but their arguments, and ask no stand-in for what it is not. Of a
# stand-in's type isinstance asks by `__class__`, which stand-ins answer.
# fmt: off
HARMLESS = {
    "abs", "all", "any", "bool", "dict", "enumerate", "filter", "float", "getattr",
    "hasattr", "int", "isinstance", "len", "list", "map", "max", "min", "range", "reversed",
    "round", "set", "slice", "sorted", "sum", "super", "tuple", "zip",
} | {name for name in dir(builtins) if name.endswith(("Error", "Exception", "Warning"))}
# Where `@torch.no_grad()` and the like put a function under a `with`; and checkpointing, which is
# lost likewise.
WRAPPERS = {"torch.utils._contextlib", "torch.amp.autocast_mode", "torch.utils.checkpoint"}
# Questions about the moment, whose answer would be kept.
MOMENTARY = {
    "time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns",
    "process_time", "now", "utcnow", "today",
}
# torch's, but for the one that Python always answers alike.
MOMENTARY_OF_TORCH = re.compile(r"(?!is_scripting$)((is|are|get|has|current)_|.*_enabled$)")
# And about parameters.
MOMENTARY_ATTRIBUTES = {"grad", "requires_grad", "is_leaf", "grad_fn"}
# Of Python's own modules those that are called for what they do or find outside.
OUTSIDE = {"logging", "warnings", "_warnings", "_io", "os", "posix", "subprocess", "threading"}
# What a list, a dict or a set is changed by.
MUTATING = {
    "append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse", "update",
    "setdefault", "popitem", "add", "discard", "appendleft", "extendleft", "popleft", "rotate",
}
# fmt: on


@functools.cache
def _objection(code: types.CodeType) -> str | None:
    """What in a function's own Python a trace would lose or freeze."""
    steps = list(dis.get_instructions(code))
    for before, step in zip([None, *steps], steps, strict=False):
        name = step.opname
        if name in ("SETUP_WITH", "BEFORE_WITH") or (
            name == "LOAD_SPECIAL" and "enter" in step.argrepr
        ):
            return f"there is a `with` in {code.co_name}"
        if name in ("PUSH_EXC_INFO", "SETUP_FINALLY"):
            return f"there is a `try` in {code.co_name}"
        if name.startswith("MATCH_"):
            return f"there is a `match` in {code.co_name}"
        if name in ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR"):
            return f"{code.co_name} {'sets' if 'STORE' in name else 'deletes'} {step.argval}"
        if name == "IMPORT_NAME" and not is_library(step.argval):
            return f"{code.co_name} imports {step.argval}"
        if name == "LOAD_ATTR" and step.argval in MOMENTARY_ATTRIBUTES:
            return f"{code.co_name} asks for {step.argval}"
        if name == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None):
            return f"{code.co_name} asks whether two things are the same"
    return None


@functools.cache
def _names_of_globals(code: types.CodeType) -> list[tuple[str, tuple[str, ...]]]:
    """Those in a function, each with the attributes that are read of it, one of the other."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    found = []
    for at, step in enumerate(steps):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            reads = itertools.takewhile(
                lambda after: after.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")), steps[at + 1 :]
            )
            found.append((step.argval, tuple(read.argval for read in reads)))
    return found


def _forbidden_builtin(code: types.CodeType, names: dict) -> str | None:
    for name, _ in _names_of_globals(code):
        if name not in names and name not in HARMLESS and hasattr(builtins, name):
            return f"{code.co_name} calls {name}"
    return None


def _objection_to_globals(
    frame: types.FrameType, reads: dict[tuple[str, str], object]
) -> str | None:
    """What a function reads that is not its own, and may be another thing the next time. What can
    be compared then is added to `reads`, by module and name."""
    code, names = frame.f_code, frame.f_globals
    for name, attributes in _names_of_globals(code):
        if name not in names:  # one of the builtins
            continue
        home, path, value, shown = names.get("__name__", ""), name, names[name], name
        for attribute in attributes:
            if isinstance(value, types.ModuleType):
                home, path = value.__name__, attribute
            elif isinstance(value, (type, types.FunctionType)):
                path += f".{attribute}"
            else:
                break
            value, shown = getattr(value, attribute, None), f"{shown}.{attribute}"
        if is_plain(value):
            if look_up(sys.modules.get(home), path) is not value:
                return f"{code.co_name} reads {shown}, which cannot be imported"
            reads[home, path] = value
            continue
        if isinstance(value, types.ModuleType):
            home = value.__name__
        if is_library(home) and not home.startswith("torch.backends"):
            continue
        if not is_constant(value) and not isinstance(value, (Tensor, logging.Logger)):
            return f"{code.co_name} reads {shown}, a {type(value).__name__}"
    for name in code.co_freevars:
        value = frame.f_locals.get(name)
        is_library_module = isinstance(value, types.ModuleType) and is_library(value.__name__)
        # `__class__` is there for super().
        if name != "__class__" and not (
            is_constant(value) or is_library_module or isinstance(value, Tensor)
        ):
            return (
                f"{code.co_name} reads {name}, a {type(value).__name__} of the function around it"
            )
    return None


def _state() -> tuple:
    """What a call of torch depends on beside its arguments."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_any_autocast_enabled(),
    )


def _random_states() -> tuple:
    numpy = sys.modules.get("numpy")
    return (
        random.getstate(),
        torch.get_rng_state(),
        None if numpy is None else numpy.random.get_state(),
    )


def _restore(states: tuple) -> bool:
    """Returns whether anybody has drawn from them."""
    now = _random_states()
    drawn = repr(now[0]) != repr(states[0]) or not torch.equal(now[1], states[1])
    random.setstate(states[0])
    torch.set_rng_state(states[1])
    if states[2] is not None:
        drawn |= now[2][2] != states[2][2] or (now[2][1] != states[2][1]).any()
        sys.modules["numpy"].random.set_state(states[2])
    return bool(drawn)


def _is_asked_by_forward(frame: types.FrameType | None) -> bool:
    """Whether it is a `forward` that looks at a module, or what it has called of torch, but not
    what traces it."""
    while frame is not None:
        home = frame.f_globals.get("__name__") or ""
        if not is_library(home):
            return True
        if home.startswith("torch.fx.") or is_own(home):
            return False
        frame = frame.f_back
    return False


@dataclass
class Reads:
    """What was read during a trace: conditions, and globals, by module and name."""

    conditions: dict[str, object] = field(default_factory=dict)
    globals: dict[tuple[str, str], object] = field(default_factory=dict)


@contextlib.contextmanager
def watch_python(module: nn.Module, shell: nn.Module) -> Iterator[Reads]:
    """Runs a trace of `shell.forward`, and refuses what a graph would not do again.

    Yields what was read, which is complete when it is over.

    Raises:
        Untraceable: for that; at once, before anything is changed, where it can.
    """
    children = list(shell.modules())[1:]
    attributes = [(owner, dict(vars(owner))) for owner in (shell, *children)]
    kept = {id(value) for _, values in attributes[1:] for value in values.values()}
    states = _random_states()
    reads, conditions = Reads(), Conditions(module, shell)
    asks_types = False
    refused: list[str] = []

    def refuse(reason):
        refused.append(reason)
        raise Untraceable(reason)

    def profile(frame, event, called):
        nonlocal asks_types
        home = frame.f_globals.get("__name__") or ""
        reason = None
        if event == "call":
            reason = objection_to_call(frame, home)
            asks_types |= not is_library(home) and "isinstance" in frame.f_code.co_names
        elif event == "c_call" and not is_library(home):
            reason = objection_to_builtin(called)
        if reason:
            refuse(reason)

    def objection_to_call(frame, home):
        code = frame.f_code
        if not is_library(home):
            return (
                _objection(code)
                or _forbidden_builtin(code, frame.f_globals)
                or _objection_to_globals(frame, reads.globals)
            )
        if home in WRAPPERS:
            return f"it goes through {home}, which a graph leaves out"
        if is_library(frame.f_back.f_globals.get("__name__") or ""):
            return None
        package = home.partition(".")[0]
        is_momentary = code.co_name in MOMENTARY or (
            package == "torch"
            and not home.startswith(("torch.nn.", "torch.fx."))
            and MOMENTARY_OF_TORCH.match(code.co_name)
        )
        return f"it calls {code.co_name} of {home}" if is_momentary or package in OUTSIDE else None

    def objection_to_builtin(called):
        name, owner = getattr(called, "__name__", ""), getattr(called, "__self__", None)
        if isinstance(owner, Tensor):
            return f"it calls {name} of a tensor that is no input"
        if name in MOMENTARY or MOMENTARY_OF_TORCH.match(name):
            return f"it calls {name}"
        if name in MUTATING and id(owner) in kept:
            return f"it calls {name} of a {type(owner).__name__} that a module keeps"
        home = owner.__name__ if isinstance(owner, types.ModuleType) else type(owner).__module__
        return f"it calls {name} of {home}" if home in OUTSIDE else None

    def watch(self, name):
        if _is_asked_by_forward(sys._getframe(1)):
            try:
                conditions.read(self, name)
            except Untraceable as reason:
                refuse(str(reason))
        return super(nn.Module, self).__getattribute__(name)

    outer = sys.getprofile()
    # Or what runs when garbage is collected would be taken for a part of forward.
    collects = gc.isenabled()
    gc.disable()
    nn.Module.__getattribute__ = watch
    sys.setprofile(profile)
    try:
        yield reads
    finally:
        sys.setprofile(outer)
        del nn.Module.__getattribute__
        if collects:
            gc.enable()
        for owner, before in attributes:
            now = vars(owner)
            for name in {**before, **now}:
                if name == "training" and owner is not shell:
                    continue
                if name.startswith("_tensor_constant"):
                    refused.append("it makes a tensor from no input of its own")
                elif name not in now or name not in before or now[name] is not before[name]:
                    refused.append(f"it sets {'self' if owner is shell else '…'}.{name}")
            if owner is not shell:
                before["training"] = now["training"]
                now.clear()
                now.update(before)
        if _restore(states):
            refused.append("it draws random numbers for no input")
    if refused:
        raise Untraceable(refused[0])
    reads.conditions = {**conditions.holds, **(conditions.types if asks_types else {})}


class Unregistered:
    """A base of classes that a parent's `__init_subclass__` shall not hear of."""

    def __init_subclass__(cls, **_options) -> None:
        pass


def subclass(written: type[nn.Module], base: type, members: dict[str, object]) -> type[nn.Module]:
    """`written` with other members, under its own name; `base` comes before it."""
    return types.new_class(
        written.__name__, (base, written), exec_body=lambda body: body.update(members)
    )


# Who may ask a stand-in what it is: what makes the graph.
ASKERS = ("torch.fx.", "torch.overrides", "torch.utils._pytree", "torch.nn.parameter")


class Input(fx.Proxy):
    """The stand-in for a tensor. What it cannot answer truly, it refuses to answer."""

    def _ask(self, question: str) -> None:
        caller = sys._getframe(2).f_globals.get("__name__") or ""
        if is_own(caller) or caller.startswith(ASKERS):
            return
        raise fx.proxy.TraceError(f"it asks for {question} of an input")

    @property
    def __class__(self):
        # What isinstance(x, Tensor) comes to ask, once type(x) is not it.
        self._ask("the type")
        return Input

    def __hash__(self):
        self._ask("the hash")
        return super().__hash__()

    def __str__(self):
        self._ask("the text")
        return super().__repr__()

    __repr__ = __str__

    def __format__(self, spec):
        self._ask("the text")
        return super().__format__(spec)

    def __getattr__(self, name):
        if not hasattr(Tensor, name):
            raise AttributeError(f"a tensor has no attribute {name!r}")
        return _Attribute(self, name)

    def __setattr__(self, name, value):
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise fx.proxy.TraceError(f"it sets the {name} of a tensor")
        super().__setattr__(name, value)


class _Attribute(Input, fx.proxy.Attribute):
    """Of a stand-in: called, or itself a value, such as x.shape."""

    def __getattr__(self, name):
        return _Attribute(self, name)


def _in_place(function: Callable) -> Callable:
    # Without these, Python makes `a = a + b` of `a += b`, and whoever else holds a sees no change.
    def apply(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or",
              "xor", "lshift", "rshift"):  # fmt: skip
    setattr(Input, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class Tracer(fx.Tracer):
    """Traces one module's `forward`: submodules are calls."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.state = _state()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Input(node, self)

    def create_node(self, *args, **kwargs):
        if _state() != self.state:
            raise fx.proxy.TraceError("it switches gradients or autocast")
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj):  # noqa: ARG002
        raise Untraceable(
            "it branches on its input (an `if` or `assert` on a tensor or its shape), which "
            "torch.fx cannot follow"
        )

    def call_module(self, m, forward, args, kwargs):
        for given in (*args, *kwargs.values()):
            if isinstance(given, (list, dict, set)):
                raise fx.proxy.TraceError(f"it passes a {type(given).__name__} to a module")
        return super().call_module(m, forward, args, kwargs)

    def create_arg(self, a):
        # A graph would hold the plain kind, or the text that repr gives.
        plain = (bool, int, float, complex, str, tuple, list, dict, torch.Size)
        if isinstance(a, plain[:-1]) and type(a) not in plain and not (
            hasattr(a, "_fields") or type(a).__module__.startswith("torch.fx")
        ):  # fmt: skip
            raise fx.proxy.TraceError(f"it uses a {type(a).__name__}")
        return super().create_arg(a)
