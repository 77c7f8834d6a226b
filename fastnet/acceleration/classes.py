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
from fastnet.acceleration.chains import LEAST_GAIN, sequential_forward
from fastnet.acceleration.conditions import (
    find,
    identity,
    is_plain,
    is_same,
    look_up,
    value_of,
    written_class,
)
from fastnet.acceleration.guards import Unregistered, subclass
from fastnet.acceleration.tracing import Code, required_arguments

# In the __dict__ of modules whose forward was traced. One that their class makes anew lacks it, and
# runs as written.
TRACED = "_fastnet_traced"


class Forward(NamedTuple):
    """A traced `forward`: its code in training and in evaluation; and what it read, as expressions
    in `self` and as globals, of a module and by name, each with the value that it had."""

    training: Code
    evaluation: Code
    conditions: tuple[tuple[str, object], ...]
    globals: tuple[tuple[tuple[str, str], object], ...]


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
        self._fastnet_change(name, functools.partial(super().__setattr__, name, value))

    def __delattr__(self, name):
        self._fastnet_change(name, functools.partial(super().__delattr__, name))

    def _fastnet_change(self, name, change):
        """Says so where `forward` is no longer fused for it."""
        forward = self._fastnet_forward
        reads = dict(forward.conditions) if forward else {}
        is_fused = value_of("self", name) in reads and not self._fastnet_changed()
        old = getattr(self, name, None) if is_fused else None
        change()
        if is_fused and self._fastnet_changed():
            warnings.warn(
                f"fastnet: {type(self).__name__}.{name} was {old!r} when its forward was fused, "
                f"and is now {getattr(self, name, None)!r}: it runs as written until it is that "
                "again, or accelerate(model) looks at it anew.",
                stacklevel=3,
            )

    def _fastnet_changed(self):
        """Whether something that `forward` read is not what it was."""
        return False


def _new(written: type[nn.Module], forward: Forward | None) -> nn.Module:
    return object.__new__(accelerated(written, forward))


def accelerated(written: type[nn.Module], forward: Forward | None) -> type[nn.Module]:
    """`written` with its `forward` in chains; with that of `nn.Sequential` where none is given."""
    key = written, identity(forward)
    if key not in _classes:
        _classes[key] = _make(written, forward)
    return _classes[key]


_classes: dict[tuple, type[nn.Module]] = {}


def _make(written: type[nn.Module], forward: Forward | None) -> type[nn.Module]:
    members = {
        "__module__": written.__module__,
        "__qualname__": written.__qualname__,
        "__doc__": written.__doc__,
        "_fastnet_written": written,
        "_fastnet_forward": forward,
        "forward": sequential_forward,
    }
    if forward is not None:
        changed = _changed(written, forward)
        members["_fastnet_changed"] = changed
        members["forward"] = _function(written, forward, changed)
    return subclass(written, Accelerated, members)


def class_for(module: nn.Module) -> type[nn.Module] | None:
    """The class that accelerates a module; None where nothing is gained.

    Raises:
        Untraceable: where its `forward` must stay as it is.
    """
    kind = written_class(module)
    if isinstance(module, Accelerated):
        is_somebodys_subclass = type(module) is not accelerated(kind, module._fastnet_forward)
        if is_somebodys_subclass or not module._fastnet_changed():
            return None
    if chains.is_sequential(module):
        flat = chains.flatten(module._modules.values())
        gains = any(chains.fuse(flat, at).count >= LEAST_GAIN for at in chains.layers(flat))
        if gains:
            tracing.check_is_pickled_plainly(kind)
        return accelerated(kind, None) if gains else None
    tracing.check_is_ours(module)
    traces = [tracing.trace(module, kind, training) for training in (True, False)]
    if not any([tracing.rewrite(trace) for trace in traces]):  # noqa: C419  both are rewritten
        return None
    codes = [tracing.code(trace.graph) for trace in traces]
    conditions = traces[0].conditions | traces[1].conditions
    around = traces[0].globals | traces[1].globals
    return accelerated(kind, Forward(*codes, tuple(conditions.items()), tuple(around.items())))


def _changed(written: type[nn.Module], forward: Forward) -> types.FunctionType:
    """Whether one of the values that `forward` read is another one: a function of the module."""
    names = {"written_class": written_class, "find": find, "look_up": look_up, "is_same": is_same}
    names |= {"written": written, "forward": written.forward}
    differs = [f"{TRACED!r} not in self.__dict__", "written.forward is not forward"]
    conditions = list(forward.conditions)
    for (home, path), value in forward.globals:
        names[f"home_{len(names)}"] = importlib.import_module(home)
        conditions.append((f"look_up(home_{len(names) - 1}, {path!r})", value))
    for expression, value in conditions:
        if value is None or type(value) is bool:
            differs.append(f"({expression}) is not {value}")
            continue
        known = f"value_{len(names)}"
        names[known] = value
        # What is_same says, without a call where there is but one value.
        if type(value) is tuple:
            differs.append(f"not is_same({expression}, {known})")
        elif is_plain(value):
            differs.append(f"type(now := {expression}) is not type({known}) or now != {known}")
        else:
            differs.append(f"{expression} is not {known}")
    text = f"def changed(self):\n    return {' or '.join(differs)}\n"
    return _execute(f"{written.__name__}, what forward read", text, names, "changed")


def _function(
    written: type[nn.Module], forward: Forward, changed: types.FunctionType
) -> types.FunctionType:
    """A `forward` of the written one's signature. It is the written one where a call gives
    something else than a tensor, or an optional argument, for which nothing was traced, and where
    something that it read has changed."""
    names = {
        "_changed": changed,
        "_Tensor": Tensor,
        "_kind": written,
        "_training": _compiled(written, "training", forward.training),
        "_evaluation": _compiled(written, "evaluation", forward.evaluation),
    }
    signature = inspect.signature(written.forward)
    module, *_ = signature.parameters
    shown, passed, differs = [], [], [f"_changed({module})"]
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
    given = ", ".join([module, *required])
    text = f"""def forward{inspect.Signature(shown)}:
    if {" or ".join(differs)}:
        return _kind.forward({", ".join(passed)})
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


def _execute(
    title: str, text: str, names: dict[str, object], function: str = "forward"
) -> types.FunctionType:
    title = f"<{title} {next(_count)}>"
    # Kept for tracebacks, which show the lines.
    linecache.cache[title] = (len(text), None, text.splitlines(keepends=True), title)
    exec(compile(text, title, "exec"), names)
    return names[function]
