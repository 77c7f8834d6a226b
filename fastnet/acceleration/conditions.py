"""What a `forward` read of its modules, as conditions.

While they hold, a trace says what it does.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import sys
import sysconfig
import types
from pathlib import Path

import torch
from torch import Tensor, nn

# A tuple of these, too, is known by its value.
PLAIN_TYPES = (
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size,
    torch.memory_format, torch.layout,
)  # fmt: skip
REGISTRIES = ("_parameters", "_buffers", "_modules")


class Untraceable(Exception):  # noqa: N818  it is a verdict
    """A `forward` stays as it is written; the text says why."""


class Absent:
    """Stands for what is read where there is nothing."""


def is_own(module: str) -> bool:
    return module.startswith("fastnet.acceleration")


def is_library(module: str) -> bool:
    """Whether this is Python's or torch's, or what traces."""
    package = module.partition(".")[0]
    return package == "torch" or _is_of_python(package) or is_own(module)


@functools.cache
def _folders_of_python() -> tuple[Path, ...]:
    """The standard library's; compiled modules may have one of their own."""
    compiled = sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})
    return Path(sysconfig.get_path("stdlib")).resolve(), Path(compiled).resolve()


@functools.cache
def _is_of_python(package: str) -> bool:
    """Whether it is in the standard library. A user's own package may have a name from there, as
    `code` and `platform` are: where it was found decides."""
    if package not in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module made by hand
        return False
    if spec is None or spec.origin is None:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    origin = Path(spec.origin).resolve()
    return not {"site-packages", "dist-packages"}.intersection(origin.parts) and any(
        map(origin.is_relative_to, _folders_of_python())
    )


def is_plain(value: object) -> bool:
    """Whether equal values are the same to everybody."""
    parts = value if type(value) is tuple else (value,)
    return all(type(part) in PLAIN_TYPES or isinstance(part, enum.Enum) for part in parts)


def is_constant(value: object) -> bool:
    """Whether it can be told later that something still is this."""
    if isinstance(value, float) and value != value:
        return False
    if type(value) is tuple:
        return all(map(is_constant, value))
    return is_plain(value) or _keeps_nothing(value)


def is_same(now: object, then: object) -> bool:
    """Whether a constant is what it was: by its value where it is plain, itself elsewhere."""
    if type(now) is not type(then):
        return False
    if type(now) is tuple:
        return len(now) == len(then) and all(map(is_same, now, then))
    return now == then if is_plain(then) else now is then


def identity(value: object) -> object:
    """Equal where `is_same` says so, of constants, and of tuples of them: 1 is not True here."""
    if isinstance(value, tuple):
        return type(value), *map(identity, value)
    return type(value), repr(value) if isinstance(value, (float, complex)) else value


def _keeps_nothing(value: object) -> bool:
    """Whether it can be called, and has nothing of its own that a call could depend on."""
    kind = type(value)
    if isinstance(value, type):
        return not any(
            not callable(member) and not hasattr(member, "__get__") and not name.startswith("_")
            for base in value.__mro__
            if not is_library(base.__module__)
            for name, member in vars(base).items()
        )
    if not callable(value) or isinstance(value, (nn.Module, types.MethodType)):
        return False
    if isinstance(value, functools.partial):
        return all(map(is_constant, (value.func, *value.args, *value.keywords.values())))
    if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
        return isinstance(value.__self__, (types.ModuleType, type, type(None)))
    is_written_in_python = isinstance(kind.__call__, types.FunctionType)
    return is_library(kind.__module__) or not is_written_in_python


def written_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, of an accelerated one the class as it was written."""
    return getattr(module, "_fastnet_written", type(module))


def find(module: nn.Module, name: str) -> object:
    """An attribute as it is stored: of a method the function, of a property itself. Of a class
    method one that is bound, and so another one each time."""
    values = module.__dict__
    if name in values:
        return values[name]
    value = getattr(type(module), name, Absent)
    if value is not Absent:
        return value
    for place in REGISTRIES:
        if name in values[place]:
            return values[place][name]
    return Absent


def look_up(owner: object, path: str) -> object:
    """What a module has under a name with dots; None where it has nothing."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def value_of(owner: str, name: str) -> str:
    """The condition of an attribute with a value that can be compared."""
    return f"find({owner}, {name!r})"


class Conditions:
    """Gathers conditions while a shell around a module is traced.

    Attributes:
        holds: expressions in `self`, and their values. One that looks into a submodule comes after
            those that say it is there.
        types: the same of the submodules' classes, which matter to who asks for them only.
    """

    def __init__(self, module: nn.Module, shell: nn.Module) -> None:
        self.holds: dict[str, object] = {}
        self.types: dict[str, object] = {}
        self._paths: dict[int, list[str]] = {id(shell): [""]}
        for path, child in module.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(child), []).append(path)

    def read(self, module: nn.Module, name: str) -> None:
        """Notes that `forward` reads an attribute.

        Raises:
            Untraceable: where it cannot be told later whether it is the same.
        """
        if name.startswith("__") and name not in ("__class__", "__dict__"):
            return
        # Modules that forward makes itself, as slices of lists are, are in no path.
        for path in self._paths.get(id(module), ()):
            self._read(path, module, name)

    def _read(self, path: str, module: nn.Module, name: str) -> None:
        owner, values = "self", vars(module)
        for part in path.split(".") if path else ():
            self.holds[f"{owner}._modules.get({part!r}) is not None"] = True
            owner += f"._modules[{part!r}]"
        homes = (kind.__module__ for kind in type(module).__mro__ if name in vars(kind))
        if name == "training":
            if path:  # the module itself is traced in both modes
                self.holds[f"{owner}.training is self.training"] = True
        elif name in REGISTRIES:
            self.holds[f"tuple({owner}.{name})"] = tuple(values[name])
            for entry in values[name]:
                self._read(path, module, entry)
        elif name == "__class__" and path:
            self.holds[f"written_class({owner})"] = written_class(module)
        elif name.startswith("__") or name in values or not is_library(next(homes, "")):
            self._read_value(path, owner, module, name)

    def _read_value(self, path: str, owner: str, module: nn.Module, name: str) -> None:
        value, values = find(module, name), vars(module)
        if isinstance(value, (Tensor, nn.Module)):
            places = {**{place: values[place] for place in REGISTRIES}, "__dict__": values}
            for place, found in places.items():
                if found.get(name) is value:
                    self.holds[f"{owner}.{place}.get({name!r}) is not None"] = True
            if isinstance(value, nn.Module):
                self.types[f"written_class({owner}._modules.get({name!r}))"] = written_class(value)
        elif not name.startswith("__") and is_constant(value):
            self.holds[value_of(owner, name)] = value
        elif not isinstance(value, property):  # what one reads is seen where it does
            shown = ".".join(filter(None, ("self", path, name)))
            raise Untraceable(f"it reads {shown}, a {type(value).__name__}")
