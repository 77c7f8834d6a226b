"""The one training loop behind every recipe."""

from __future__ import annotations

import csv
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import fastnet
from fastnet.data import Batches, Samples
from fastnet.errors import FastnetError
from fastnet.recipes.events import event_log
from fastnet.recipes.files import (
    load_checkpoint,
    make_folder,
    save_checkpoint,
    write_json,
    write_whole,
)
from fastnet.recipes.recipe import NO_MEASURES, Recipe, Settings
from fastnet.recipes.runtime import ONE_PROCESS, PRECISIONS, Runtime
from fastnet.recipes.tasks import Measures, Step, Task, step_in_graph
from fastnet.trainer import MLPTrainer


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Attributes:
        task: with the trained network; in the first process with the best weights, where the
            recipe keeps those.
        history: one row an epoch, as in metrics.csv.
        checkpoint: the file to resume from.
        train_set, test_set: as the network takes them.
    """

    task: Task
    history: list[dict]
    checkpoint: Path
    train_set: Samples
    test_set: Samples


def train(
    recipe: Recipe,
    settings: Settings,
    train_set: Samples,
    test_set: Samples,
    out: Path,
    runtime: Runtime = ONE_PROCESS,
    on_epoch: Callable[[Task, list[dict], Samples], None] | None = None,
) -> Result:
    """Trains, and after every epoch writes `checkpoint.pt` and the metrics into a folder.

    The same seed gives the same run, and a resumed one goes on as if it had not stopped, on the CPU
    bit for bit: whatever is random in an epoch follows from the seed, the epoch and the process.

    Args:
        recipe, settings, runtime: what to train, how and where.
        train_set, test_set: as the recipe's data set has them.
        out: the folder.
        on_epoch: called with the task, the rows so far, and the test set, after every epoch, in
            the first process.

    Raises:
        FastnetError: for a folder, checkpoint or choice that cannot be used.
    """
    if runtime.is_first:
        make_folder(out)
    data = (train_set, test_set)
    with runtime.in_turn():
        if recipe.prepare is not None:
            train_set, test_set = (
                recipe.prepare(recipe, settings, runtime, samples, out / f"{part}-features")
                for part, samples in (("training", train_set), ("test", test_set))
            )
    shape, classes = tuple(train_set.inputs.shape[1:]), len(train_set.classes)
    task = recipe.task(recipe, settings, runtime, shape, classes)
    _check_batches(task, len(train_set), settings.batch_size)
    shuffle = torch.Generator()
    checkpoint, best = out / "checkpoint.pt", out / "best.pt"
    identity = _identity(settings, runtime, train_set, test_set)
    history: list[dict] = []
    if settings.resume:
        history = _restore(checkpoint, recipe.name, identity, task)
        done = len(history)
        if done < settings.epochs:
            _say(runtime, f"going on from epoch {done} in {checkpoint}")
        else:
            _say(
                runtime,
                f"nothing to do: {checkpoint} has {done} epoch{'s' if done > 1 else ''} already, "
                f"and --epochs {settings.epochs} counts them all",
            )
    trainer = native_trainer(task) if settings.native else None
    step = step_in_graph(task)
    if runtime.is_first and history:
        write_json(out / "config.json", configuration(recipe, settings, runtime, data))
        write_metrics(out, history)  # a run that was killed may have left them an epoch behind
    content = {
        "recipe": recipe.name,
        "dataset": recipe.data.name,
        "settings": identity,
        "input_shape": shape,
        "classes": train_set.classes,
    }

    train_batches = Batches(
        train_set.to(runtime.device),
        settings.batch_size,
        recipe.data.mean,
        recipe.data.std,
        shuffle,
        augment=recipe.augment if settings.augment else None,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    test_on_device = test_set.to(runtime.device)
    events = out / "tensorboard" if settings.tensorboard and runtime.is_first else None
    with event_log(events, len(history) + 1) as log:
        for epoch in range(len(history) + 1, settings.epochs + 1):
            shuffle.manual_seed(_derived(settings.seed, epoch))
            torch.manual_seed(_derived(settings.seed, epoch, runtime.rank))
            rates = [optimizer.param_groups[0]["lr"] for optimizer in task.optimizers]
            start = time.perf_counter()
            if trainer is None:
                measures = _train_epoch(task, settings, step, train_batches, epoch)
            else:
                measures = _native_epoch(trainer, train_batches)
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            runtime.share_buffers(task.network)
            row = {
                "epoch": epoch,
                **{f"train_{name}": value for name, value in measures.items()},
                **{f"test_{name}": value for name, value in evaluate(task, test_on_device).items()},
                "learning_rate": rates[0],
                "seconds": seconds,
            }
            history.append(row)
            task.end_epoch(row)
            if not runtime.is_first:
                continue
            state = {**content, **task.state_dict(), "history": history}
            # Another run's would be taken for this one's, but stays until there is one of this.
            if epoch == 1:
                best.unlink(missing_ok=True)
            if recipe.keep_best and row is max(history, key=lambda row: row["test_accuracy"]):
                save_checkpoint(best, {**content, "model": state["model"], "history": history})
            save_checkpoint(checkpoint, state)
            if epoch == 1:
                write_json(out / "config.json", configuration(recipe, settings, runtime, data))
            write_metrics(out, history)
            log(row)
            tqdm.write(f"epoch {epoch}/{settings.epochs}: {describe(row)}")
            if on_epoch is not None:
                on_epoch(task, history, test_set)
    if recipe.keep_best and best.is_file() and runtime.is_first:
        task.network.load_state_dict(load_checkpoint(best, recipe.name)["model"])
    return Result(task, history, checkpoint, train_set, test_set)


def _train_epoch(
    task: Task, settings: Settings, step: Step, batches: Batches, epoch: int
) -> dict[str, float]:
    """One pass through the training set. Returns the means over its samples."""
    task.network.train()
    means = _Means(task.runtime)
    quiet = None if task.runtime.is_first else True
    with tqdm(batches, desc=f"epoch {epoch}", unit="batch", leave=False, disable=quiet) as bar:
        for number, (inputs, targets) in enumerate(bar):
            weight = batches.weight(number)
            measures = step(inputs, targets, weight)
            means.add(measures, len(targets) if weight else 0)
            due = settings.log_every and (number + 1) % settings.log_every == 0
            if due and task.runtime.is_first:
                done = min((number + 1) * settings.batch_size, len(batches.samples))
                losses = ", ".join(
                    f"{name.replace('_', ' ')} {value.item():.6f}"
                    for name, value in measures.items()
                    if name.endswith("loss")
                )
                bar.write(f"epoch {epoch} [{done}/{len(batches.samples)}] {losses}")
    return means.values()


@torch.no_grad()
def evaluate(task: Task, samples: Samples) -> dict[str, float]:
    """The means over a test set."""
    task.network.eval()
    runtime, data = task.runtime, task.recipe.data
    share = {"rank": runtime.rank, "world_size": runtime.world_size}
    batches = Batches(samples, task.recipe.test_batch_size, data.mean, data.std, **share)
    means = _Means(runtime)
    for number, (inputs, targets) in enumerate(batches):
        means.add(task.measure(inputs, targets), len(targets) if batches.weight(number) else 0)
    return means.values()


class _Means:
    """Weighted means of measures, over batches and processes, with nothing read back before the
    end."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.totals: dict[str, Tensor] = {}
        self.count = 0

    def add(self, measures: Measures, count: int) -> None:
        self.count += count
        for name, value in measures.items():
            if name not in self.totals:
                self.totals[name] = torch.zeros((), dtype=torch.float64, device=value.device)
            # Of weight 0 it may be anything, also NaN.
            if count:
                self.totals[name].add_(value, alpha=count)

    def values(self) -> dict[str, float]:
        count = torch.tensor(float(self.count), dtype=torch.float64)
        sums = torch.stack([*self.totals.values(), count.to(self.runtime.device)])
        *sums, count = self.runtime.sum(sums).tolist()
        return {name: total / count for name, total in zip(self.totals, sums, strict=True)}


def native_trainer(task: Task) -> MLPTrainer:
    """The task as a native loop.

    Raises:
        FastnetError: for a task that has none.
    """
    recipe, runtime = task.recipe, task.runtime
    if recipe.loss not in (F.cross_entropy, F.nll_loss):
        raise FastnetError(f"--native trains with cross-entropy, which {recipe.name} does not.")
    if runtime.amp or runtime.world_size > 1:
        raise FastnetError("--native trains in float32, in one process.")
    try:
        return MLPTrainer(task.network, task.optimizers[0])
    except ValueError as reason:
        raise FastnetError(f"--native cannot train {recipe.name}: {reason}.") from reason


def _native_epoch(trainer: MLPTrainer, batches: Batches) -> dict[str, float]:
    (epoch,) = trainer.fit(
        batches.samples.inputs,
        batches.samples.targets,
        batches.batch_size,
        mean=batches.mean,
        std=batches.std,
        generator=batches.generator,
    )
    return {"loss": epoch.loss, "accuracy": epoch.accuracy}


def measures_of(row: dict) -> dict[str, str]:
    """What a row of the metrics measures, for people."""
    return {
        name.replace("_", " "): f"{value:.4f}" if name.endswith("loss") else f"{value:.2%}"
        for name, value in row.items()
        if name not in NO_MEASURES
    }


def describe(row: dict) -> str:
    """A row of the metrics as words."""
    shown = [f"{name} {value}" for name, value in measures_of(row).items()]
    return ", ".join([*shown, duration(row["seconds"])])


def duration(seconds: float) -> str:
    """A time for people: three digits of it, in ms below a second."""
    seconds = float(f"{seconds:.3g}")
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    # 1.23, 12.3 and 123; below 1 as many more as there are zeros.
    decimals = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:.{max(decimals, 0)}f} {unit}"


def _derived(seed: int, *parts: int) -> int:
    """A seed that differs wherever the parts do."""
    return random.Random(f"{seed} {parts}").getrandbits(63)


def _say(runtime: Runtime, words: str) -> None:
    if runtime.is_first:
        tqdm.write(words)


def _check_batches(task: Task, samples: int, batch_size: int) -> None:
    """Of one sample BatchNorm1d has no statistics, and would say so in the midst of an epoch."""
    if not any(isinstance(module, nn.BatchNorm1d) for module in task.network.modules()):
        return
    for size in {min(batch_size, samples), samples % batch_size} - {0}:
        if size // task.runtime.world_size < 2:
            raise FastnetError(
                f"--batch-size {batch_size} leaves a batch of {size} of {samples} samples, and "
                "BatchNorm needs two or more in each process: choose another."
            )


def configuration(
    recipe: Recipe, settings: Settings, runtime: Runtime, data: tuple[Samples, Samples]
) -> dict:
    """What was chosen for a run, and what it ran on, for `config.json`."""
    return {
        "recipe": recipe.name,
        "dataset": recipe.data.name,
        "train_set": f"{len(data[0]):,} of {data[0].source}",
        "test_set": f"{len(data[1]):,} of {data[1].source}",
        "settings": asdict(settings),
        "device": str(runtime.device),
        "amp": None if runtime.amp is None else str(runtime.amp),
        "processes": runtime.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastnet": fastnet.__version__,
    }


def _identity(
    settings: Settings, runtime: Runtime, train_set: Samples, test_set: Samples
) -> dict[str, int | str]:
    """What must be the same for a resumed training to be the one that was begun."""
    return {
        "data": f"{len(train_set):,} samples (sha256 {train_set.fingerprint()})",
        "test data": f"{len(test_set):,} samples (sha256 {test_set.fingerprint()})",
        "--seed": settings.seed,
        "--batch-size": settings.batch_size,
        "--lr": settings.lr,
        "--backend": settings.backend,
        "--native": settings.native,
        "--augment": settings.augment,
        "--weights": settings.weights,
        "--compile": settings.compile,
        "--amp": str(runtime.amp).removeprefix("torch."),
        "the schedule": str(settings.schedule),
        "processes": runtime.world_size,
    }


def _restore(path: Path, recipe: str, identity: dict, task: Task) -> list[dict]:
    """Puts everything back as it was; returns the history."""
    if not path.is_file():
        raise FastnetError(
            f"There is no checkpoint {path} to go on from: leave out --resume, or name the folder "
            "of one with --out."
        )
    saved = load_checkpoint(path, recipe)
    try:
        # A checkpoint that is older than --lr has the recipe's.
        begun = {"--lr": None, **saved["settings"]}
        for name, value in identity.items():
            if begun[name] != value:
                raise FastnetError(
                    f"{path} was trained {_resumable(name, begun[name], value)}, or name another "
                    "folder with --out."
                )
        task.load_state_dict(saved)
        return saved["history"]
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise FastnetError(f"{path} holds another network than this recipe's ({error}).") from error


def _resumable(name: str, begun: int | str | None, chosen: int | str | None) -> str:
    """With what a training was begun and shall go on, in words that can be typed."""
    # "None" stands for no precision in checkpoints.
    if begun is False or begun in (None, "None"):
        return f"without {name}: leave it out"
    if begun is True:
        return f"with {name}: add it"
    if name == "--amp":
        options = {str(dtype).removeprefix("torch."): name for name, dtype in PRECISIONS.items()}
        begun, chosen = options[begun], options.get(chosen)
    if chosen is None:
        return f"with {name} {begun}: add it"
    return f"with {name} {begun}, not {chosen}: resume with that"


def write_metrics(out: Path, history: list[dict]) -> None:
    """The rows as `metrics.csv` and as `metrics.json`."""

    def as_csv(path: Path) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(history[0]))
            writer.writeheader()
            writer.writerows(history)

    write_whole(out / "metrics.csv", as_csv)
    write_json(out / "metrics.json", history)
