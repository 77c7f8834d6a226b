"""python -m benchmarks.kernels: the CPU kernels beside torch's, called from C++ in a loop.

What is timed has neither Python nor autograd in it, on either side, but all that autograd would
call, the results' memory included. Compiles `kernels.cpp` first, which takes half a minute.
"""

from __future__ import annotations

import functools
import math
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import typer

import fastnet
from fastnet.bench import results, run
from fastnet.bench.harness import FASTNET, Case
from fastnet.bench.passes import eighths, rotation
from fastnet.errors import FastnetError

LOGITS = ((16, 10), (64, 10), (256, 10), (1024, 10), (64, 100), (64, 1000), (1024, 1000))
# Batch, in_features, out_features, whether the input's gradient is wanted, and how many outputs of
# a hundred the ReLU lets through: the backward pass need not multiply the rest.
LAYERS = (
    (64, 784, 28, False, 50),
    (64, 784, 300, False, 25),
    (64, 784, 300, False, 50),
    (64, 784, 300, False, 75),
    (64, 300, 100, True, 50),
    (256, 1024, 1024, True, 25),
    (256, 1024, 1024, True, 50),
    (256, 1024, 1024, True, 75),
)
# Numbers that one call of a side goes through, so that its own start costs nothing.
WORK = 200_000


@functools.cache
def compiled() -> ModuleType:
    """`kernels.cpp`.

    Raises:
        FastnetError: where fastnet was built with another torch, and its kernels cannot be called.
    """
    if fastnet.build_info()["autograd"] != "C++":
        raise FastnetError(
            f"fastnet was built with torch {fastnet.build_info()['torch_built_with']}, not with "
            f"{torch.__version__}: build it anew (make build) to time its kernels from C++."
        )
    from torch.utils import cpp_extension

    # Where ninja is, in an environment that is not active.
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))
    source = Path(__file__).with_suffix(".cpp")
    folder = source.parents[1] / "build" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        "fastnet_kernels",
        [str(source)],
        extra_cflags=["-std=c++20", "-O2"],
        build_directory=str(folder),
    )


def cases() -> Iterator[Case]:
    """Each named as the benchmark that it is a case of, under the op "kernels"."""
    for shape in LOGITS:
        yield loss(*shape)
    for shape in LAYERS:
        yield layer(*shape)


def loss(N: int, C: int) -> Case:
    """Cross-entropy of class indices."""
    torch.manual_seed(0)
    batches = rotation(lambda: (torch.randn(N, C), torch.randint(C, (N,))), 4 * N * C)
    kernels, repeats = compiled(), math.ceil(WORK / (N * C))
    return Case(
        op="kernels",
        case=f"cross_entropy: {N}x{C}",
        mode="C++",
        sides={
            "eager": lambda: kernels.cross_entropy_torch(batches, repeats),
            FASTNET: lambda: kernels.cross_entropy_fastnet(batches, repeats),
        },
        bytes=8.0 * N * C,
        repeats=repeats,
    )


def layer(M: int, K: int, N: int, needs_input: bool, live: int = 50) -> Case:
    """Linear+ReLU, of whose outputs `live` of a hundred are above zero."""
    torch.manual_seed(0)
    draw = functools.partial(eighths, dtype=torch.float32)
    weight = draw(N, K)
    # As many are above zero as numbers of a normal distribution, which sums of products are nearly.
    deviation = weight.var() * math.sqrt(K)
    bias = draw(N) + deviation * torch.special.ndtri(torch.tensor(live / 100))
    batches = rotation(lambda: (draw(M, K), weight, bias, draw(M, N)), 4 * M * (K + N))
    kernels, repeats = compiled(), math.ceil(WORK / (M * (K + N)))
    return Case(
        op="kernels",
        case=f"linear_relu: {M}x{K}->{N}"
        + (", input gradient" if needs_input else "")
        + (f", {live} % live" if live != 50 else ""),
        mode="C++",
        sides={
            "eager": lambda: kernels.linear_relu_torch(batches, needs_input, repeats),
            FASTNET: lambda: kernels.linear_relu_fastnet(batches, needs_input, repeats),
        },
        flops=(2.0 + needs_input) * 2 * M * K * N,
        repeats=repeats,
    )


def main(
    save: Annotated[bool, typer.Option(help="Write the results file.")] = True,
    out: Annotated[Path, typer.Option(help="The results file's folder.")] = results.RESULTS,
) -> None:
    """Time the CPU kernels from C++, with all threads and with one."""
    good = True
    for threads in sorted({torch.get_num_threads(), 1}, reverse=True):
        torch.set_num_threads(threads)
        run.announce()
        good = run.time_cases(cases(), out if save else None) and good
    if not good:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
