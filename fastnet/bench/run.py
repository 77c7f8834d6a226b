"""What `fastnet bench` does."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

import torch

from fastnet.bench import OPS, harness, machine, results
from fastnet.bench.harness import Case
from fastnet.errors import FastnetError


def bench(
    ops: Iterable[str] = (),
    threads: Iterable[int] = (),
    quick: bool = False,
    out: Path | None = results.RESULTS,
    check: bool = False,
) -> bool:
    """Times benchmarks, with every number of threads.

    Args:
        ops: of `OPS`; none: all of them.
        threads: none: all that torch takes, and one; on a GPU one.
        quick: the most important shapes only.
        out: the folder of the results file; None writes none.
        check: compares with that file instead of writing it.

    Returns:
        Whether all was well: every case timed, and no ratio fallen.

    Raises:
        FastnetError: for a name that is none of them.
    """
    ops = tuple(ops) or OPS
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise FastnetError(
            f"There is no benchmark {', '.join(unknown)}; there are: {', '.join(OPS)}."
        )
    most = 1 if torch.cuda.is_available() else torch.get_num_threads()
    benchmarks = {op: importlib.import_module(f"fastnet.bench.{op}") for op in ops}
    good = True
    for count in tuple(threads) or sorted({most, 1}, reverse=True):
        torch.set_num_threads(count)
        announce()
        for benchmark in benchmarks.values():
            good = time_cases(benchmark.cases(quick), out, check) and good
    return good


def announce() -> None:
    """Says what is measured on, and what it can do."""
    use_one_precision()
    limits, versions = machine.limits(), machine.versions()
    print(
        f"{versions['device']}, torch {versions['torch']}, {torch.get_num_threads()} threads: "
        f"at most {limits.gflops:,.0f} GFLOP/s (a large product), {limits.gbs:,.0f} GB/s (a copy)",
        flush=True,
    )


def use_one_precision() -> None:
    """On all sides: by default only torch's convolutions would round to 10 bits."""
    torch.backends.cudnn.allow_tf32 = False


def time_cases(cases: Iterable[Case], out: Path | None, check: bool = False) -> bool:
    """Verifies, times, prints and writes. Returns whether all was well."""
    good = True
    for case in cases:
        try:
            rows = harness.run(case)
        except Exception as error:  # a difference, memory that is too small, a compiler's fault
            named = f"{case.op} {case.case} {case.mode}: "
            reason = str(error).removeprefix(named).strip().split("\n")[0]
            if not isinstance(error, (AssertionError, RuntimeError)):
                reason = f"{type(error).__name__}: {reason}"
            print(f"NOT TIMED  {named}{reason}", flush=True)
            good = False
            continue
        finally:
            del case  # its memory is wanted for the next one
        print(results.table(rows), flush=True)
        if check:
            fallen = results.fallen(rows, out or results.RESULTS)
            print("".join(f"FALLEN  {line}\n" for line in fallen), end="", flush=True)
            good = good and not fallen
        elif out is not None:
            results.save(rows, out)
    return good


def bench_network(model: str, batch: int, channels: int, size: int) -> None:
    """Times a training step of a network of one's own, as it is and accelerated.

    Args:
        model: torchvision:NAME, or MODULE:CALLABLE.
        batch, channels, size: of its pictures.

    Raises:
        FastnetError: for a name that is no network, or one that does not classify such pictures.
    """
    from fastnet.bench import accelerate

    shape = (batch, channels, size, size)
    case = accelerate.step_of(f"{model}, {'x'.join(map(str, shape))}", model, shape)
    time_cases([case], out=None)
