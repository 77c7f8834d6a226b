"""What became of each layer of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastnet import modules
from fastnet.acceleration import chains, tracing
from fastnet.acceleration.classes import Accelerated, class_for
from fastnet.acceleration.conditions import Untraceable, written_class

FUSED_MODULES = (modules.Linear, modules.ConvReLUPool2d, modules.CrossEntropyLoss)
LAYERS = (nn.Linear, nn.Conv2d, nn.CrossEntropyLoss)


@dataclass(frozen=True)
class Row:
    """A layer: its name in the model, its class, and with what it is fused, or why it is not."""

    name: str
    layer: str
    fused: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What became of the layers of a model. `print` shows it as a table, and so does a notebook.

    Attributes:
        rows: a `Row` for each Linear, Conv2d and CrossEntropyLoss, in the model's order.
        untraceable: of modules whose `forward` could not be traced, by name, why.
    """

    rows: tuple[Row, ...]
    untraceable: dict[str, str]

    @property
    def fused(self) -> int:
        """How many are."""
        return sum(bool(row.fused) for row in self.rows)

    def __str__(self) -> str:
        header = Row("layer", "class", "fused with", "not fused, because")
        cells = [(row.name, row.layer, row.fused, row.reason) for row in (header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        lines.append(f"{self.fused} of {len(self.rows)} layers are fused.")
        lines += [
            f"The forward of {name} runs as written: {reason}."
            for name, reason in self.untraceable.items()
        ]
        return "\n".join(lines)

    __repr__ = __str__  # as a notebook shows it


def accelerate_report(model: nn.Module) -> Report:
    """Lists every Linear, Conv2d and CrossEntropyLoss of a model: fused with what, or why not.

    Args:
        model: what `accelerate` returned. Of another model it says what is fused as it stands.

    Returns:
        A `Report`, to be printed or read.

    Example:
        >>> report = fastnet.accelerate_report(fastnet.accelerate(model))
        >>> [row.name for row in report.rows if not row.fused]
    """
    outcomes: dict[nn.Module, tuple[str, str]] = {}
    untraceable: dict[str, str] = {}
    for name, module in model.named_modules():
        if not any(module.children()):
            continue
        try:
            found = _chains(module)
            class_for(module)  # which may refuse what can be traced
            for steps, end in found:
                _judge(steps, end, isinstance(module, Accelerated), outcomes)
        except Untraceable as reason:
            if any(isinstance(child, LAYERS) for child in module.modules()):
                untraceable[_named(name, module)] = str(reason)
    rows = []
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS):
            continue
        if isinstance(module, FUSED_MODULES):
            fused, reason = "fastnet's own module", ""
            if isinstance(module, nn.CrossEntropyLoss):  # torch's own, before accelerate
                fused = "softmax, as fastnet.CrossEntropyLoss"
            elif isinstance(module, nn.Linear) and module.activation is None:
                fused, reason = "", "it has no activation"
        else:
            fused, reason = outcomes.get(module, ("", "no forward that could be traced calls it"))
        rows.append(Row(_named(name, module), type(module).__name__, fused, reason))
    return Report(tuple(rows), untraceable)


def _named(name: str, module: nn.Module) -> str:
    return name or type(module).__name__


def _chains(module: nn.Module) -> list[tuple[list[chains.Step], str]]:
    """The chains that a module runs, and what comes after each."""
    if chains.is_sequential(module):
        return [(chains.flatten(module._modules.values()), "nothing follows it")]
    tracing.check_is_ours(module)
    if isinstance(module, Accelerated) and module._fastnet_changed():
        raise Untraceable("something that it reads was set after accelerate(model)")
    found = tracing.trace(module, written_class(module), module.training).chains
    return [(chains.flatten(chain.steps), chain.end) for chain in found]


def _judge(
    steps: list[chains.Step],
    end: str,
    is_accelerated: bool,
    outcomes: dict[nn.Module, tuple[str, str]],
) -> None:
    """Adds what becomes of the layers in a chain. What is fused anywhere counts as fused."""
    for at in chains.layers(steps):
        layer = steps[at]
        if outcomes.get(layer, ("",))[0]:
            continue
        fused = chains.fuse(steps, at, end)
        if fused.count < 2:
            still = "; it runs on functional.linear" if is_accelerated and fused.count else ""
            outcomes[layer] = ("", fused.reason + still)
        elif is_accelerated:
            names = [chains.name_of(step) for step in steps[at + 1 : at + fused.count]]
            outcomes[layer] = (", ".join(names), "")
        else:
            outcomes[layer] = ("", "accelerate(model) would fuse it")
