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
    "process_time",
}
# fmt: on


class Untraceable(Exception):  # noqa: N818  it is a verdict
    """A `forward` stays as it is written; the text says why."""


def _is_own(module: str) -> bool:
    return module.startswith("fastnet.acceleration")


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
        if name == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None):
            return f"{code.co_name} asks whether two things are the same"
    return None


def _forbidden_builtin(code: types.CodeType, names: dict) -> str | None:
    for step in dis.get_instructions(code):
        name = step.argval
        if (
            step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
            and name not in names
            and name not in HARMLESS
            and hasattr(builtins, name)
        ):
            return f"{code.co_name} calls {name}"
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
def watch_python(shell: nn.Module) -> Iterator[None]:
    """Runs a trace of `shell.forward`, and refuses what a graph would not do again.

    Raises:
        Untraceable: for that.
    """
    children = list(shell.modules())[1:]
    attributes = [(module, dict(vars(module))) for module in (shell, *children)]
    states = _random_states()
    refused: list[str] = []

    def profile(frame, event, called):
        module = frame.f_globals.get("__name__") or ""
        package = module.partition(".")[0]
        if package == "torch" or package in sys.stdlib_module_names or _is_own(module):
            if event == "call" and module in WRAPPERS:
                refused.append(f"it goes through {module}, which a graph leaves out")
        elif event == "call":
            code = frame.f_code
            refused.extend(filter(None, (_objection(code),)))
            refused.extend(filter(None, (_forbidden_builtin(code, frame.f_globals),)))
        elif event == "c_call":
            if getattr(called, "__name__", "") in MOMENTARY:
                refused.append(f"it calls {called.__name__}")
            elif isinstance(getattr(called, "__self__", None), Tensor):
                refused.append(f"it calls {called.__name__} of a tensor that is no input")

    outer = sys.getprofile()
    # Or what runs when garbage is collected would be taken for a part of forward.
    collects = gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        yield
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
