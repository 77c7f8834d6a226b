"""python -m benchmarks [OP ...]: times, prints, and writes benchmarks/results/<device>.csv."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import accelerate, harness

OPS = (
    "linear_relu",
    "cross_entropy",
    "conv_relu_pool",
    "accelerate",
    "mnist_net",
    "mlp_trainer",
    "recipes",
)


def main(
    ops: Annotated[list[str] | None, typer.Argument(help=f"Of: {', '.join(OPS)}.")] = None,
    threads: Annotated[str, typer.Option(help="Thread counts, with commas.")] = "",
    quick: Annotated[bool, typer.Option(help="The most important shapes only.")] = False,
    save: Annotated[bool, typer.Option(help="Write the results file.")] = True,
    out: Annotated[Path, typer.Option(help="Where the results file is.")] = harness.RESULTS,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Write nothing; fail where a ratio is a fifth below the file's."
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Time a network of yours: torchvision:NAME, or MODULE:CALLABLE."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a batch, for --model.")] = 8,
    size: Annotated[int, typer.Option(min=1, help="Their height and width.")] = 224,
    channels: Annotated[int, typer.Option(min=1, help="And their channels.")] = 3,
) -> None:
    """Time the ops, or a network, against native torch."""
    if model is not None:
        shape = (batch, channels, size, size)
        case = accelerate.step_of(f"{model}, {'x'.join(map(str, shape))}", model, shape)
        print(harness.table(harness.run(case)))
        return
    unknown = set(ops or ()) - set(OPS)
    if unknown:
        raise typer.BadParameter(f"no benchmark {', '.join(unknown)}; there are: {', '.join(OPS)}")
    most = 1 if torch.cuda.is_available() else torch.get_num_threads()
    counts = [int(t) for t in threads.split(",")] if threads else sorted({most, 1}, reverse=True)
    print(f"{harness.device_name()}, torch {torch.__version__}")
    failed = False
    for count in counts:
        torch.set_num_threads(count)
        for op in ops or OPS:
            for case in importlib.import_module(f"benchmarks.{op}").cases(quick):
                try:
                    rows = harness.run(case)
                except AssertionError as difference:
                    print(f"NOT TIMED  {difference}", flush=True)
                    failed = True
                    continue
                print(harness.table(rows), flush=True)
                if check:
                    fallen = harness.fallen(rows, out)
                    print("".join(f"FALLEN  {line}\n" for line in fallen), end="", flush=True)
                    failed = failed or bool(fallen)
                elif save:
                    harness.save(rows, out)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
