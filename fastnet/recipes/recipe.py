"""What makes one training different from another, and what a user chooses for a run of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastnet.data import Dataset, Samples
from fastnet.errors import FastnetError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastnet.recipes.runtime import Runtime
    from fastnet.recipes.tasks import Task

# fastnet's fused layers, torch's own, and torch's own under torch.compile.
BACKENDS = ("fastnet", "torch", "compile")
# What each of them is told, and what it calls that.
SCHEDULERS = {
    "none": {},
    "StepLR": {"step_size": "step_size", "gamma": "gamma"},
    "MultiStepLR": {"milestones": "milestones", "gamma": "gamma"},
    "ExponentialLR": {"gamma": "gamma"},
    "ReduceLROnPlateau": {"gamma": "factor", "patience": "patience"},
}
# The columns of the metrics that measure no network.
NO_MEASURES = ("epoch", "learning_rate", "seconds")


@dataclass(frozen=True)
class Schedule:
    """A learning-rate scheduler of torch.optim.lr_scheduler, stepped after every epoch."""

    name: str = "none"
    step_size: int = 7  # StepLR
    milestones: tuple[int, ...] = ()  # MultiStepLR
    gamma: float = 0.1  # all of them
    patience: int = 10  # ReduceLROnPlateau

    def __post_init__(self) -> None:
        if self.name not in SCHEDULERS:
            raise FastnetError(
                f"--scheduler must be one of {', '.join(SCHEDULERS)}, not {self.name!r}."
            )
        if self.name == "MultiStepLR" and not self.milestones:
            raise FastnetError("--scheduler MultiStepLR needs --milestones, such as 10,20.")
        below = 1 if self.name == "ReduceLROnPlateau" else math.inf
        if not 0 < self.gamma < below:
            raise FastnetError(f"--gamma must be above 0 and below {below}, not {self.gamma}.")

    def of(self, optimizer: torch.optim.Optimizer):
        """The scheduler of an optimizer; None for none."""
        if self.name == "none":
            return None
        options = {theirs: getattr(self, ours) for ours, theirs in SCHEDULERS[self.name].items()}
        return getattr(torch.optim.lr_scheduler, self.name)(optimizer, **options)


def share_of_right_answers(output: Tensor, targets: Tensor) -> Tensor:
    return (output.argmax(1) == targets).mean(dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named training.

    Attributes:
        name, summary: for `fastnet list`.
        task: what a step and a measurement are.
        model: makes the network from the shape of an input, the number of classes and a backend
            ("fastnet" or "torch"); with `pretrained` also from `weights=`.
        optimizer: of the parameters: a class and its options. Adam and SGD of torch.optim are
            fastnet's own on the backend "fastnet".
        loss: of the network's output and the targets; the mean over the batch. Of two adversaries
            it has two halves (see `tasks.Adversaries`). `F.cross_entropy` is fastnet's own on the
            backend "fastnet".
        accuracy: of the same, where the targets are classes.
        datasets: the first one is used unless another is chosen.
        epochs, batch_size, test_batch_size: unless others are chosen.
        schedule: of the learning rate, unless another is chosen.
        channels_last: whether to keep filters so, which suits convolutions that stay torch's.
        keep_best: whether the weights of the best test accuracy are what a run results in.
        pretrained: whether there are weights to start from (`--weights`).
        augment: changes uint8 pictures `(batch, ...)`, on request (`--augment`).
        prepare: makes of a set what is trained on, and keeps it in a file.
        report: lines to print about the trained network.
        pictures: file names, and what draws them of the trained network and the test set.
    """

    name: str
    summary: str
    task: type[Task]
    model: Callable[..., nn.Module]
    optimizer: partial[torch.optim.Optimizer]
    loss: Callable[[Tensor, Tensor], Tensor]
    datasets: tuple[Dataset, ...]
    epochs: int
    batch_size: int
    test_batch_size: int = 1000
    accuracy: Callable[[Tensor, Tensor], Tensor] = share_of_right_answers
    schedule: Schedule = Schedule()
    channels_last: bool = False
    keep_best: bool = False
    pretrained: bool = False
    augment: Callable[[Tensor], Tensor] | None = None
    prepare: Callable[[Recipe, Settings, Runtime, Samples, Path], Samples] | None = None
    report: Callable[[nn.Module], str] | None = None
    pictures: Mapping[str, Callable[[nn.Module, Samples], Figure]] = field(default_factory=dict)

    @property
    def data(self) -> Dataset:
        return self.datasets[0]

    def on(self, name: str) -> Recipe:
        """The same on another of its data sets.

        Raises:
            FastnetError: where it has none of that name.
        """
        for dataset in self.datasets:
            if dataset.name == name:
                return replace(self, datasets=(dataset,))
        names = ", ".join(dataset.name for dataset in self.datasets)
        raise FastnetError(f"--dataset must be one of {names} for {self.name}, not {name!r}.")

    def settings(self, *, schedule: Mapping[str, object] | None = None, **chosen) -> Settings:
        """What is chosen, and the recipe's own where nothing is (None).

        Args:
            schedule: attributes of `Schedule`.
            chosen: attributes of `Settings`.

        Raises:
            FastnetError: for a value that no training takes, or an option that is not for this one.
        """
        own = {"epochs": self.epochs, "batch_size": self.batch_size}
        given = {name: value for name, value in chosen.items() if value is not None}
        rates = {name: value for name, value in (schedule or {}).items() if value is not None}
        settings = Settings(**{**own, **given}, schedule=replace(self.schedule, **rates))
        for option in rates.keys() - {"name", *SCHEDULERS[settings.schedule.name]}:
            raise FastnetError(
                f"--{option.replace('_', '-')} is for other schedulers than "
                f"{settings.schedule.name}: choose one with --scheduler."
            )
        if settings.augment and self.augment is None:
            raise FastnetError(f"--augment: there is nothing of the kind for {self.name}.")
        if "weights" in given and not self.pretrained:
            raise FastnetError(f"--weights: there are none to start {self.name} from.")
        return settings


@dataclass(frozen=True)
class Settings:
    """What a user chooses for one run."""

    epochs: int
    batch_size: int
    seed: int = 0
    backend: str = "fastnet"
    log_every: int = 10
    resume: bool = False
    native: bool = False  # epochs as one native loop: see fastnet.MLPTrainer
    compile: bool = False
    tensorboard: bool = False
    augment: bool = False
    weights: str = "imagenet"
    lr: float | None = None  # the optimizer's; None: the recipe's
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise FastnetError(f"--lr must be above 0 and finite, not {self.lr}.")
        if self.backend not in BACKENDS:
            raise FastnetError(
                f"--backend must be one of {', '.join(BACKENDS)}, not {self.backend!r}."
            )
        if self.native and self.backend != "fastnet":
            raise FastnetError(
                f"--native is fastnet's own loop, and has no --backend {self.backend}."
            )
        if self.native and (self.compile or self.augment):
            raise FastnetError(
                "--native cannot be combined with --compile or --augment: leave them out."
            )
