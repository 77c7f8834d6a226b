"""What a training step is: of classes, of values, of a copy of the input, of two adversaries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastnet import functional, optim
from fastnet.data import Batches, Samples
from fastnet.graphs import GraphedStep
from fastnet.recipes import plots
from fastnet.recipes.recipe import Recipe, Settings
from fastnet.recipes.runtime import Runtime

Measures = dict[str, Tensor]  # means over a batch, by the name they get in the metrics

Step = Callable[[Tensor, Tensor, float], Measures]

# Torch's optimizers, and fastnet's of the same.
QUICK = {torch.optim.Adam: optim.Adam, torch.optim.SGD: optim.SGD}


class Task:
    """A network in training: its parts with their optimizers, a step, a measurement, a picture.

    Args:
        recipe, settings, runtime: what is trained, how and where.
        shape: of one input.
        classes: how many there are.
    """

    shown = 18  # of the test set, in an overview
    watched = "test_loss"  # what ReduceLROnPlateau looks at

    def __init__(
        self,
        recipe: Recipe,
        settings: Settings,
        runtime: Runtime,
        shape: tuple[int, ...],
        classes: int,
    ) -> None:
        self.recipe, self.runtime = recipe, runtime
        torch.manual_seed(settings.seed)
        backend = "torch" if settings.backend == "compile" else settings.backend
        is_fused = backend == "fastnet" and recipe.loss is F.cross_entropy
        self.loss = functional.cross_entropy if is_fused else recipe.loss
        optimizer = recipe.optimizer
        if backend == "fastnet" and optimizer.func in QUICK:
            optimizer = partial(QUICK[optimizer.func], **optimizer.keywords)
        if settings.lr is not None:
            optimizer = partial(optimizer, lr=settings.lr)
        options = {"weights": settings.weights} if recipe.pretrained else {}
        with runtime.in_turn():
            self.network = recipe.model(shape, classes, backend, **options).to(runtime.device)
        if recipe.channels_last:
            self.network.to(memory_format=torch.channels_last)
        compiled = settings.compile or settings.backend == "compile"
        self.scaler = runtime.scaler()
        # What steps call, and what evaluations do.
        self.parallel: list[nn.Module] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        for part in self.parts():
            if compiled:
                part.compile()
            self.parallel.append(runtime.parallel(part))
            self.optimizers.append(optimizer([p for p in part.parameters() if p.requires_grad]))
        schedules = (settings.schedule.of(optimizer) for optimizer in self.optimizers)
        self.schedulers = [schedule for schedule in schedules if schedule is not None]

    def parts(self) -> list[nn.Module]:
        """The networks that have an optimizer each."""
        return [self.network]

    def step(self, inputs: Tensor, targets: Tensor, weight: float = 1.0) -> Measures:
        """Forward, loss, backward, optimizer step.

        Args:
            inputs, targets: a batch, or this process's share of it.
            weight: of the share (see `Batches.weight`).
        """
        raise NotImplementedError

    def measure(self, inputs: Tensor, targets: Tensor) -> Measures:
        """What is told of a batch of the test set. Called without gradients, in eval mode."""
        raise NotImplementedError

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)

    def end_epoch(self, row: dict) -> None:
        """Sets the next epoch's learning rates.

        Args:
            row: the epoch's, of the metrics.
        """
        for scheduler in self.schedulers:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(row[self.watched])
            else:
                scheduler.step()

    def overview(
        self, title: str, history: list[dict], pictures: Samples, samples: Samples
    ) -> Figure:
        """A picture of the whole training.

        Args:
            title: to stand above.
            history: one row an epoch.
            pictures: a few of the test set.
            samples: the same as the network takes them.
        """
        raise NotImplementedError

    def epoch_picture(self, samples: Samples) -> Figure | None:  # noqa: ARG002
        """What the network makes of a few test samples, or of nothing, after an epoch."""
        return None

    @torch.no_grad()
    def inputs(self, samples: Samples) -> Tensor:
        """Normalised, on the device."""
        data = self.recipe.data
        batch, _ = next(iter(Batches(samples, len(samples), data.mean, data.std)))
        return batch.to(self.runtime.device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        for name in ("optimizers", "schedulers"):
            for own, saved in zip(getattr(self, name), state[name], strict=True):
                own.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])


class Regression(Task):
    """One network and one loss of its output and the targets."""

    def step(self, inputs: Tensor, targets: Tensor, weight: float = 1.0) -> Measures:
        with self.runtime.autocast():
            output = self.parallel[0](inputs)
            loss = self.loss(output, targets)
        self.update(self.optimizers[0], loss if weight == 1.0 else loss * weight)
        self.scaler.update()
        return self.judge(output.detach(), targets, loss.detach())

    def measure(self, inputs: Tensor, targets: Tensor) -> Measures:
        with self.runtime.autocast():
            output = self.network(inputs)
            loss = self.loss(output, targets)
        return self.judge(output, targets, loss)

    def judge(self, output: Tensor, targets: Tensor, loss: Tensor) -> Measures:  # noqa: ARG002
        return {"loss": loss}

    def overview(self, title, history, pictures, samples) -> Figure:  # noqa: ARG002
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        figure.suptitle(title)
        plots.learning_curves(history, figure.subfigures(1, 1))
        return figure


class Classification(Regression):
    """Targets are classes, and the largest output is the answer."""

    def judge(self, output: Tensor, targets: Tensor, loss: Tensor) -> Measures:
        return {"loss": loss, "accuracy": self.recipe.accuracy(output, targets)}

    @torch.no_grad()
    def predict(self, samples: Samples) -> Tensor:
        """The answers, `(N,)`."""
        self.network.eval()
        return self.network(self.inputs(samples)).argmax(1).cpu()

    def overview(self, title, history, pictures, samples) -> Figure:
        answers = self.predict(samples)
        return plots.overview(
            title, history, pictures.inputs, pictures.targets, answers, pictures.classes
        )


class Reconstruction(Regression):
    """The network shall give its input back."""

    shown = 10

    def step(self, inputs: Tensor, targets: Tensor, weight: float = 1.0) -> Measures:  # noqa: ARG002
        return super().step(inputs, inputs, weight)

    def measure(self, inputs: Tensor, targets: Tensor) -> Measures:  # noqa: ARG002
        return super().measure(inputs, inputs)

    @torch.no_grad()
    def with_copies(self, samples: Samples) -> Tensor:
        """Pictures, and after them what the network makes of them, uint8."""
        self.network.eval()
        copies = plots.to_pixels(self.network(self.inputs(samples)), self.recipe.data)
        return torch.cat([samples.inputs, copies])

    def epoch_picture(self, samples: Samples) -> Figure:
        return plots.picture_grid(self.with_copies(samples), columns=len(samples))

    def overview(self, title, history, pictures, samples) -> Figure:  # noqa: ARG002
        both = self.with_copies(samples)
        return plots.with_pictures(title, history, both, "above: given, below: given back")


class Adversaries(Task):
    """A generator of pictures from noise, and a discriminator that shall tell them from real ones.

    The recipe's loss has two halves: `discriminator` of the logits of real and of made pictures,
    and `generator` of those of made ones.
    """

    SHOWN = 40
    watched = "test_generator_loss"

    def parts(self) -> list[nn.Module]:
        return [self.network.generator, self.network.discriminator]

    def noise(self, count: int, seed: int | None = None) -> Tensor:
        shape = (count, *self.network.latent_shape)
        if seed is None:
            return torch.randn(shape, device=self.runtime.device)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(
            self.runtime.device
        )

    def step(self, inputs: Tensor, targets: Tensor, weight: float = 1.0) -> Measures:  # noqa: ARG002
        generator, discriminator = self.parallel
        of_generator, of_discriminator = self.optimizers
        with self.runtime.autocast():
            made = generator(self.noise(len(inputs)))
            real_logits, made_logits = discriminator(inputs), discriminator(made.detach())
            discriminator_loss = self.loss.discriminator(real_logits, made_logits)
        self.update(of_discriminator, discriminator_loss * weight)

        # Its gradients are wanted for the pictures alone, and go to no other process.
        judge = self.network.discriminator.requires_grad_(False)
        with self.runtime.autocast():
            generator_loss = self.loss.generator(judge(made))
        self.update(of_generator, generator_loss * weight)
        judge.requires_grad_(True)
        self.scaler.update()
        return {
            "discriminator_loss": discriminator_loss.detach(),
            "generator_loss": generator_loss.detach(),
        }

    def measure(self, inputs: Tensor, targets: Tensor) -> Measures:  # noqa: ARG002
        """How many of the real and of the made pictures the discriminator takes for real."""
        loss = self.loss
        with self.runtime.autocast():
            real = self.network.discriminator(inputs)
            made = self.network.discriminator(self.network(self.noise(len(inputs))))
        shares = {"real": real, "made": made}
        return {
            "discriminator_loss": loss.discriminator(real, made),
            "generator_loss": loss.generator(made),
            **{
                f"{name}_taken_for_real": (logits > loss.threshold).mean(dtype=torch.float32)
                for name, logits in shares.items()
            },
        }

    @torch.no_grad()
    def made(self) -> Tensor:
        """Pictures of always the same noise, uint8."""
        self.network.eval()
        return plots.to_pixels(self.network(self.noise(self.SHOWN, seed=0)), self.recipe.data)

    def epoch_picture(self, samples: Samples) -> Figure:  # noqa: ARG002
        return plots.picture_grid(self.made(), columns=10)

    def overview(self, title, history, pictures, samples) -> Figure:  # noqa: ARG002
        return plots.with_pictures(title, history, self.made(), "made from noise")


def step_in_graph(task: Task) -> Step:
    """The task's step, in a graph where one can be: on a GPU, in one process, and without a scaler,
    which looks at gradients from the host."""
    possible = (
        task.runtime.device.type == "cuda"
        and task.runtime.world_size == 1
        and task.runtime.amp is not torch.float16
    )
    return GraphedStep(task.step, task.optimizers) if possible else task.step
