"""Classes of accelerated modules: the class as written, with another `forward`."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import linecache
import types
import warnings
from typing import NamedTuple

from torch import Tensor, nn

from fastnet.acceleration import chains, tracing
from fastnet.acceleration.chains import sequential_forward
from fastnet.acceleration.guards import Unregistered, subclass
from fastnet.acceleration.tracing import Code, required_arguments

# In the __dict__ of modules whose forward was traced. One that their class makes anew lacks it, and
# runs as written.
TRACED = "_fastnet_traced"


class Forward(NamedTuple):
    """A traced `forward`: its code in training and in evaluation, the attributes and the globals
    whose values stand in it, and the lengths of the lists of modules."""

    training: Code
    evaluation: Code
    reads: frozenset[str]
    globals: frozenset[tuple[str, str, object]]  # module, name, value
    lengths: tuple[tuple[str, int], ...]


class Accelerated(Unregistered):
    """What every accelerated module is besides. Its class has the written one's name."""

    _fastnet_written: type[nn.Module]
    _fastnet_forward: Forward | None  # None: the module is a Sequential

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        if "_fastnet_written" not in vars(type(self)):  # somebody's subclass of it
            return reduced
        # Such a class cannot be imported: it is made again from what it was made of.
        return (_new, (self._fastnet_written, self._fastnet_forward), *reduced[2:])

    def __setattr__(self, name, value):
        self._fastnet_changes(name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name):
        self._fastnet_changes(name, None)
        super().__delattr__(name)

    def _fastnet_changes(self, name, value):
        forward = self._fastnet_forward
        if forward is None or name not in forward.reads or TRACED not in self.__dict__:
            return
        old = getattr(self, name, None)
        if old is value or (type(old) is type(value) and callable(old) is False and old == value):
            return
        del self.__dict__[TRACED]
        warnings.warn(
            f"fastnet: {type(self).__name__}.{name} was {old!r} when its forward was fused, and is "
            f"now {value!r}: it runs as written from here on. Set it before accelerate(model).",
            stacklevel=3,
        )


def _new(written: type[nn.Module], forward: Forward | None) -> nn.Module:
    return object.__new__(accelerated(written, forward))


@functools.cache
def accelerated(written: type[nn.Module], forward: Forward | None) -> type[nn.Module]:
    """`written` with its `forward` in chains; with that of `nn.Sequential` where none is given."""
    members = {
        "__module__": written.__module__,
        "__qualname__": written.__qualname__,
        "__doc__": written.__doc__,
        "_fastnet_written": written,
        "_fastnet_forward": forward,
        "forward": sequential_forward if forward is None else _function(written, forward),
    }
    return subclass(written, Accelerated, members)


def class_for(module: nn.Module) -> type[nn.Module] | None:
    """The class that accelerates a module; None where nothing is gained.

    Raises:
        Untraceable: where its `forward` must stay as it is.
    """
    if isinstance(module, Accelerated):
        return None
    kind = type(module)
    if chains.is_sequential(module):
        flat = chains.flatten(module._modules.values())
        gains = any(chains.fuse(flat, at).count > 1 for at in chains.layers(flat))
        return accelerated(kind, None) if gains else None
    tracing.check_is_ours(module)
    traces = [tracing.trace(module, kind, training) for training in (True, False)]
    if not any([tracing.rewrite(trace) for trace in traces]):  # noqa: C419  both are rewritten
        return None
    lists = (nn.ModuleList, nn.ModuleDict)
    lengths = tuple((n, len(m)) for n, m in module.named_children() if isinstance(m, lists))
    codes = [tracing.code(trace.graph) for trace in traces]
    reads = traces[0].reads | traces[1].reads
    around = traces[0].globals | traces[1].globals
    return accelerated(kind, Forward(*codes, reads, around, lengths))


def _function(written: type[nn.Module], forward: Forward) -> types.FunctionType:
    """A `forward` of the written one's signature. It is the written one where a call gives
    something else than a tensor, or an optional argument, for which nothing was traced, and where
    a global has another value than it had."""
    names = {
        "_Tensor": Tensor,
        "_written": written.forward,
        "_training": _compiled(written, "training", forward.training),
        "_evaluation": _compiled(written, "evaluation", forward.evaluation),
    }
    signature = inspect.signature(written.forward)
    module, *_ = signature.parameters
    shown, passed, differs = [], [], [f"{TRACED!r} not in {module}.__dict__"]
    for name, parameter in signature.parameters.items():
        parameter = parameter.replace(annotation=parameter.empty)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            differs.append(name)
        elif parameter.default is not parameter.empty:
            names[f"_default_{name}"] = parameter.default
            parameter = parameter.replace(default=_Name(f"_default_{name}"))
            differs.append(f"{name} is not _default_{name}")
        shown.append(parameter)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        keyword = f"{name}=" if parameter.kind is parameter.KEYWORD_ONLY else ""
        passed.append(stars.get(parameter.kind, keyword) + name)
    required = required_arguments(written.forward)
    differs += [f"not isinstance({name}, _Tensor)" for name in required]
    differs += [f"len({module}.{name}) != {length}" for name, length in forward.lengths]
    for count, (home, name, value) in enumerate(sorted(forward.globals, key=lambda g: g[:2])):
        names[f"_home_{count}"] = importlib.import_module(home)
        names[f"_type_{count}"], names[f"_value_{count}"] = type(value), value
        now = f"getattr(_home_{count}, {name!r}, None)"
        differs.append(f"type({now}) is not _type_{count} or {now} != _value_{count}")
    given = ", ".join([module, *required])
    text = f"""def forward{inspect.Signature(shown)}:
    if {" or ".join(differs)}:
        return _written({", ".join(passed)})
    if {module}.training:
        return _training({given})
    return _evaluation({given})
"""
    return _execute(f"{written.__name__}.forward", text, names)


class _Name(str):
    """A name where `inspect.Signature` shows a default value."""

    __repr__ = str.__str__


def _compiled(written: type[nn.Module], mode: str, code: Code) -> types.FunctionType:
    return _execute(f"{written.__name__}.forward, {mode}", code.text, code.globals())


_count = itertools.count()


def _execute(title: str, text: str, names: dict[str, object]) -> types.FunctionType:
    title = f"<{title} {next(_count)}>"
    # Kept for tracebacks, which show the lines.
    linecache.cache[title] = (len(text), None, text.splitlines(keepends=True), title)
    exec(compile(text, title, "exec"), names)
    return names["forward"]
