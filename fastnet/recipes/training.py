"""The one training loop behind every recipe."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastnet.data import Batches, Dataset, ImageSet
from fastnet.errors import FastnetError
from fastnet.recipes.files import load_checkpoint, make_folder, save_checkpoint, write_whole
from fastnet.trainer import MLPTrainer


@dataclass(frozen=True)
class Recipe:
    """What makes one training different from another."""

    name: str
    summary: str
    model: Callable[..., nn.Module]  # takes backend=
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    loss: Callable[[Tensor, Tensor], Tensor]
    datasets: tuple[Dataset, ...]  # the first one is used unless another is chosen
    epochs: int
    batch_size: int
    test_batch_size: int

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


@dataclass(frozen=True)
class Result:
    model: nn.Module
    history: list[dict]  # one row an epoch, as in metrics.csv
    checkpoint: Path


def train(
    recipe: Recipe, settings: Settings, train_set: ImageSet, test_set: ImageSet, out: Path
) -> Result:
    """Trains, and after every epoch writes `out/checkpoint.pt` and `out/metrics.csv`.

    The same seed gives the same run, and a resumed one goes on bit for bit as if it had not
    stopped.

    Raises:
        FastnetError: for a folder or checkpoint that cannot be used.
    """
    make_folder(out)
    checkpoint_path = out / "checkpoint.pt"
    torch.manual_seed(settings.seed)
    model = recipe.model(backend=settings.backend)
    optimizer = recipe.optimizer(model.parameters())
    shuffle = torch.Generator().manual_seed(settings.seed)
    history: list[dict] = []
    if settings.resume:
        saved = load_checkpoint(checkpoint_path, recipe.name)
        history = _restore(
            saved, checkpoint_path, _identity(settings, train_set), model, optimizer, shuffle
        )
        tqdm.write(f"going on from epoch {len(history)} in {checkpoint_path}")
        if len(history) >= settings.epochs:
            tqdm.write(f"nothing to do: --epochs is {settings.epochs}")

    batches = Batches(train_set, settings.batch_size, recipe.data.mean, recipe.data.std, shuffle)
    trainer = native_trainer(recipe, model, optimizer) if settings.native else None
    for epoch in range(len(history) + 1, settings.epochs + 1):
        start = time.perf_counter()
        if trainer is None:
            train_loss = _train_epoch(recipe, settings, model, optimizer, batches, epoch)
        else:
            train_loss = _native_epoch(trainer, batches)
        seconds = time.perf_counter() - start
        test_loss, test_accuracy = evaluate(recipe, model, test_set)
        history.append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "seconds": seconds,
            }
        )
        save_checkpoint(
            checkpoint_path,
            {
                "recipe": recipe.name,
                "settings": _identity(settings, train_set),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "shuffle": shuffle.get_state(),
                "random": torch.get_rng_state(),
                "history": history,
            },
        )
        write_whole(out / "metrics.csv", lambda path: _write_metrics(path, history))
        tqdm.write(
            f"epoch {epoch}/{settings.epochs}: training loss {train_loss:.4f}, test loss "
            f"{test_loss:.4f}, test accuracy {test_accuracy:.2%}, {seconds:.2f} s"
        )
    return Result(model, history, checkpoint_path)


def _train_epoch(recipe, settings, model, optimizer, batches, epoch) -> float:
    """One pass through the training set. Returns the mean loss over its pictures."""
    model.train()
    total = torch.zeros((), dtype=torch.float64)
    with tqdm(batches, desc=f"epoch {epoch}", unit="batch", leave=False) as bar:
        for number, (pictures, targets) in enumerate(bar, 1):
            loss = train_step(recipe, model, optimizer, pictures, targets)
            total += loss.detach() * len(targets)
            if settings.log_every and number % settings.log_every == 0:
                done = min(number * settings.batch_size, len(batches.images))
                bar.write(f"epoch {epoch} [{done}/{len(batches.images)}] loss {loss.item():.6f}")
    return (total / len(batches.images)).item()


def native_trainer(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer
) -> MLPTrainer:
    """The recipe's training as a native loop.

    Raises:
        FastnetError: for a network that has none.
    """
    if recipe.loss not in (F.cross_entropy, F.nll_loss):
        raise FastnetError(f"--native trains with cross-entropy, which {recipe.name} does not.")
    try:
        return MLPTrainer(model, optimizer)
    except ValueError as reason:
        raise FastnetError(f"--native cannot train {recipe.name}: {reason}.") from reason


def _native_epoch(trainer: MLPTrainer, batches: Batches) -> float:
    (epoch,) = trainer.fit(
        batches.images.images,
        batches.images.labels,
        batches.batch_size,
        mean=batches.mean,
        std=batches.std,
        generator=batches.generator,
    )
    return epoch.loss


def train_step(recipe, model, optimizer, pictures, targets) -> Tensor:
    """Forward, loss, backward, optimizer step. Returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = recipe.loss(model(pictures), targets)
    loss.backward()
    optimizer.step()
    return loss


@torch.no_grad()
def evaluate(recipe: Recipe, model: nn.Module, images: ImageSet) -> tuple[float, float]:
    """The mean loss and the share of right answers."""
    model.eval()
    loss, right = 0.0, 0
    for pictures, targets in Batches(
        images, recipe.test_batch_size, recipe.data.mean, recipe.data.std
    ):
        output = model(pictures)
        loss += recipe.loss(output, targets).item() * len(targets)
        right += (output.argmax(1) == targets).sum().item()
    return loss / len(images), right / len(images)


@torch.no_grad()
def predict(recipe: Recipe, model: nn.Module, images: ImageSet, count: int) -> Tensor:
    """The predicted classes of the first `count` pictures."""
    model.eval()
    pictures, _ = next(iter(Batches(images, count, recipe.data.mean, recipe.data.std)))
    return model(pictures).argmax(1)


def step_times(
    recipe: Recipe, settings: Settings, images: ImageSet, backends: Iterable[str], turns: int = 15
) -> dict[str, float]:
    """Seconds a training step takes on each backend: medians, the backends taking turns.

    A turn is twenty steps long, as a training has its caches to itself too.
    """
    batches = list(Batches(images, settings.batch_size, recipe.data.mean, recipe.data.std))
    batches = [batch for batch in batches if len(batch[1]) == settings.batch_size] or batches
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    sides = []
    for backend in times:
        model = recipe.model(backend=backend)
        sides.append((times[backend], model, recipe.optimizer(model.parameters())))
    for turn in range(turns + 1):
        for taken, model, optimizer in sides:
            for step in range(20):
                start = time.perf_counter()
                train_step(recipe, model, optimizer, *batches[(20 * turn + step) % len(batches)])
                if turn > 0:  # the first one warms up
                    taken.append(time.perf_counter() - start)
    return {backend: statistics.median(taken) for backend, taken in times.items()}


def _identity(settings: Settings, train_set: ImageSet) -> dict[str, int | str]:
    """What must be the same for a resumed training to be the one that was begun."""
    return {
        "--seed": settings.seed,
        "--batch-size": settings.batch_size,
        "--backend": settings.backend,
        "--native": settings.native,
        "data": f"{len(train_set):,} pictures of {train_set.source}",
    }


def _restore(saved, path, identity, model, optimizer, shuffle) -> list[dict]:
    """Puts everything back as it was; returns the history."""
    try:
        for name, value in identity.items():
            before = saved["settings"].get(name, False)  # of before there was --native
            if before != value:
                raise FastnetError(
                    f"{path} was trained with {name} {before}, not {value}: "
                    "resume with that, or name another folder with --out."
                )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        shuffle.set_state(saved["shuffle"])
        torch.set_rng_state(saved["random"])
        return saved["history"]
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise FastnetError(f"{path} holds another network than this recipe's ({error}).") from error


def _write_metrics(path: Path, history: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
