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
import logging
import operator
import random
import sys
import types
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn

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
    "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "time",
    "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns",
    "process_time", "now", "utcnow", "today",
    "is_compiling", "is_dynamo_compiling", "is_exporting",
    "is_initialized", "get_rank", "get_world_size", "get_num_threads",
}
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
PLAIN_TYPES = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


class Untraceable(Exception):  # noqa: N818  it is a verdict
    """A `forward` stays as it is written; the text says why."""


def _is_own(module: str) -> bool:
    return module.startswith("fastnet.acceleration")


def _is_library(module: str) -> bool:
    """Whether this is Python's or torch's, or what traces."""
    package = module.partition(".")[0]
    return package == "torch" or package in sys.stdlib_module_names or _is_own(module)


def is_plain(value: object) -> bool:
    """Whether it can be told later that something still has this value."""
    parts = value if type(value) is tuple else (value,)
    return all(type(part) in PLAIN_TYPES or callable(part) for part in parts)


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
        if name in ("STORE_GLOBAL", "DELETE_GLOBAL", "DELETE_ATTR"):
            return f"{code.co_name} sets or deletes {step.argval}"
        if name == "LOAD_ATTR" and step.argval in MOMENTARY_ATTRIBUTES:
            return f"{code.co_name} asks for {step.argval}"
        if name == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None):
            return f"{code.co_name} asks whether two things are the same"
    return None


@functools.cache
def _names_of_globals(code: types.CodeType) -> list[tuple[str, str | None]]:
    """Those in a function, each with the attribute that is read of it, if one is."""
    steps = list(dis.get_instructions(code))
    return [
        (step.argval, after.argval if after and after.opname.startswith("LOAD_ATTR") else None)
        for step, after in zip(steps, [*steps[1:], None], strict=True)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    ]


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
    for name, attribute in _names_of_globals(code):
        if name not in names:  # one of the builtins
            continue
        owner, value, shown = sys.modules.get(names.get("__name__", "")), names[name], name
        if isinstance(value, types.ModuleType):
            if attribute is None or _is_library(value.__name__):
                continue
            owner, name, value = value, attribute, getattr(value, attribute, None)
            shown = f"{shown}.{name}"
        if callable(value) or isinstance(value, (Tensor, types.ModuleType, logging.Logger)):
            continue
        if not is_plain(value):
            return f"{code.co_name} reads {shown}, a {type(value).__name__}"
        if owner is None or vars(owner).get(name, reads) is not value:
            return f"{code.co_name} reads {shown}, which cannot be imported"
        reads[owner.__name__, name] = value
    for name in code.co_freevars:
        value = frame.f_locals.get(name)
        if not is_plain(value) and not isinstance(value, (Tensor, types.ModuleType)):
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


@contextlib.contextmanager
def watch_python(shell: nn.Module) -> Iterator[dict[tuple[str, str], object]]:
    """Runs a trace of `shell.forward`, and refuses what a graph would not do again.

    Yields the globals that were read, by module and name, when it is over.

    Raises:
        Untraceable: for that.
    """
    children = list(shell.modules())[1:]
    attributes = [(module, dict(vars(module))) for module in (shell, *children)]
    kept = {id(value) for _, values in attributes[1:] for value in values.values()}
    states = _random_states()
    reads: dict[tuple[str, str], object] = {}
    refused: list[str] = []

    def profile(frame, event, called):
        module = frame.f_globals.get("__name__") or ""
        if event == "call":
            refused.extend(filter(None, (objection_to_call(frame, module),)))
        elif event == "c_call" and not _is_library(module):
            refused.extend(filter(None, (objection_to_builtin(called),)))

    def objection_to_call(frame, module):
        code = frame.f_code
        if not _is_library(module):
            return (
                _objection(code)
                or _forbidden_builtin(code, frame.f_globals)
                or _objection_to_globals(frame, reads)
            )
        if module in WRAPPERS:
            return f"it goes through {module}, which a graph leaves out"
        caller = frame.f_back.f_globals.get("__name__") or ""
        is_outside = module.partition(".")[0] in OUTSIDE or code.co_name in MOMENTARY
        return (
            f"it calls {code.co_name} of {module}"
            if is_outside and not _is_library(caller)
            else None
        )

    def objection_to_builtin(called):
        name, owner = getattr(called, "__name__", ""), getattr(called, "__self__", None)
        if name in MOMENTARY:
            return f"it calls {name}"
        if isinstance(owner, Tensor):
            return f"it calls {name} of a tensor that is no input"
        if name in MUTATING and id(owner) in kept:
            return f"it calls {name} of a {type(owner).__name__} that a module keeps"
        home = owner.__name__ if isinstance(owner, types.ModuleType) else type(owner).__module__
        return f"it calls {name} of {home}" if home in OUTSIDE else None

    outer = sys.getprofile()
    # Or what runs when garbage is collected would be taken for a part of forward.
    collects = gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        yield reads
    finally:
        sys.setprofile(outer)
        if collects:
            gc.enable()
        for module, before in attributes:
            now = vars(module)
            for name in {**before, **now}:
                if name == "training" and module is not shell:
                    continue
                if name.startswith("_tensor_constant"):
                    refused.append("it makes a tensor from no input of its own")
                elif name not in now or name not in before or now[name] is not before[name]:
                    refused.append(f"it sets {'self' if module is shell else '…'}.{name}")
            if module is not shell:
                before["training"] = now["training"]
                now.clear()
                now.update(before)
        if _restore(states):
            refused.append("it draws random numbers for no input")
    if refused:
        raise Untraceable(refused[0])


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
        if _is_own(caller) or caller.startswith(ASKERS):
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
