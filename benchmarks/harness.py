"""How everything is timed.

A case has sides: ways to compute the same thing. All are checked against each other before any is
timed. They then take turns of about ten milliseconds each until the time is up, and every call's
time is kept: so each side sees the same machine, and keeps its caches for a while, as it would in
a training. What is reported is the median, with the 20th and 80th percentile.
"""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import fastnet
from fastnet.errors import FastnetError

RESULTS = Path(__file__).parent / "results"
FASTNET = "fastnet"

# A compiled side that silently went on as eager would be no rival.
torch._dynamo.config.fail_on_recompile_limit_hit = True


@dataclass
class Case:
    """One thing to compute, in several ways.

    Attributes:
        op: what is timed; the benchmark's file has this name.
        case: the shape, for people.
        mode: "forward", "forward+backward", "operators" (both, without autograd), "step", "epoch".
        sides: name → function without arguments that does it once and returns tensors to compare.
        flops: floating-point operations of one call; 0 where they say little.
        bytes: what one call must at least read and write; 0 where it says little.
        tolerance: largest difference allowed, relative to the largest value.
        seconds: how long to measure, all sides together.
    """

    op: str
    case: str
    mode: str
    sides: dict[str, Callable[[], Iterable[torch.Tensor]]]
    flops: float = 0
    bytes: float = 0
    tolerance: float = 1e-5
    seconds: float = 2.0


@dataclass
class Row:
    """A line of the results file: one side of one case. Times are in microseconds."""

    op: str
    case: str
    mode: str
    threads: int
    side: str
    median_us: float
    p20_us: float
    p80_us: float
    gflops: float
    gbs: float  # GB/s, from the bytes that must be moved
    ratio: float  # the best other side's median over this one's; only for fastnet
    calls: int
    device: str
    torch: str
    fastnet: str
    commit: str
    date: str

    @property
    def key(self) -> tuple:
        return (self.op, self.case, self.mode, str(self.threads), self.side)


def run(case: Case) -> list[Row]:
    """Verifies and times a case."""
    verify(case)
    timer = measure_cuda if torch.cuda.is_available() else measure
    taken = timer(case.sides, case.seconds)
    medians = {side: percentile(times, 0.5) for side, times in taken.items()}
    best_other = min((m for side, m in medians.items() if side != FASTNET), default=float("nan"))
    return [
        Row(
            op=case.op,
            case=case.case,
            mode=case.mode,
            threads=torch.get_num_threads(),
            side=side,
            median_us=round(medians[side] * 1e6, 2),
            p20_us=round(percentile(times, 0.2) * 1e6, 2),
            p80_us=round(percentile(times, 0.8) * 1e6, 2),
            gflops=round(case.flops / medians[side] / 1e9, 1),
            gbs=round(case.bytes / medians[side] / 1e9, 1),
            ratio=round(best_other / medians[side], 3) if side == FASTNET else float("nan"),
            calls=len(times),
            **_where(),
        )
        for side, times in taken.items()
    ]


def verify(case: Case) -> None:
    """Compares every side's result with the first one's, several times, as inputs rotate."""
    for _ in range(3):
        results = {side: list(function()) for side, function in case.sides.items()}
        (first, expected), *others = results.items()
        for side, actual in others:
            for got, wanted in zip(actual, expected, strict=True):
                scale = wanted.abs().max().clamp_min(1e-30)
                error = ((got - wanted).abs().max() / scale).item()
                if not error <= case.tolerance:
                    raise AssertionError(
                        f"{case.op} {case.case} {case.mode}: {side} differs from {first} by "
                        f"{error:.3g}, more than {case.tolerance:.3g}; not timed"
                    )


def measure(sides: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, the sides taking turns. The first turn of each only warms up."""
    clock = time.perf_counter
    taken: dict[str, list[float]] = {side: [] for side in sides}
    warm_until = clock() + seconds / 4
    end = warm_until + seconds
    turn = 0
    while clock() < end or turn < 4:
        warm = turn > 0 and clock() > warm_until
        for side, function in sides.items():
            turn_end = clock() + 0.01
            calls = 0
            while calls < 2 or clock() < turn_end:
                start = clock()
                function()
                elapsed = clock() - start
                # The first call of a turn finds the caches as the other side left them.
                if warm and calls > 0:
                    taken[side].append(elapsed)
                calls += 1
        turn += 1
        if clock() > end + 4 * seconds and all(taken.values()):
            break
    return taken


def measure_cuda(sides: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """As `measure`, by the GPU's own clock: a turn is a train of calls, long enough to fill it.

    Where the host is slower than the GPU, this is the host's time, as it is in a training.
    """
    taken: dict[str, list[float]] = {side: [] for side in sides}

    def turn(function, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    calls = {}
    for side, function in sides.items():
        turn(function, 3)
        calls[side] = max(2, min(1000, int(0.01 / turn(function, 5))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 5:
        for side, function in sides.items():
            taken[side].append(turn(function, calls[side]))
    return taken


def graphed(once: Callable[[], Iterable[torch.Tensor]]) -> Callable[[], Iterable[torch.Tensor]]:
    """The same work captured in a CUDA graph: launches without Python, dispatch or autograd."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = list(once())

    def replay():
        graph.replay()
        return results

    return replay


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def table(rows: list[Row]) -> str:
    """One line a case: every side's median, and fastnet's ratio to the best of the others."""
    lines = []
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.key[:4], []).append(row)
    for (op, case, mode, threads), sides in cases.items():
        times = "  ".join(f"{row.side} {_time(row.median_us)}" for row in sides)
        ratio = next((row.ratio for row in sides if row.side == FASTNET), float("nan"))
        lines.append(f"{op:14} {case:34} {mode:17} {threads} threads  {ratio:5.2f}x  {times}")
    return "\n".join(lines)


def save(rows: list[Row], folder: Path = RESULTS) -> Path:
    """Puts the rows into this device's file, in place of earlier ones of the same case and side."""
    path = folder / f"{device_slug()}.csv"
    kept: dict[tuple, dict] = {}
    if path.exists():
        with path.open(newline="") as file:
            for old in csv.DictReader(file):
                key = tuple(old[name] for name in ("op", "case", "mode", "threads", "side"))
                kept[key] = old
    for row in rows:
        kept[row.key] = asdict(row)
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
    return path


def fallen(rows: list[Row], folder: Path = RESULTS, share: float = 0.8) -> list[str]:
    """Says which of fastnet's ratios have fallen below a share of those in this device's file.

    Cases that the file does not have are no news.
    """
    path = folder / f"{device_slug()}.csv"
    if not path.exists():
        raise FastnetError(f"There is no {path} to compare with: run without --check first.")
    with path.open(newline="") as file:
        before = {
            tuple(old[name] for name in ("op", "case", "mode", "threads", "side")): old["ratio"]
            for old in csv.DictReader(file)
        }
    return [
        f"{row.op} {row.case} {row.mode}, {row.threads} threads: {row.ratio:.2f}, was "
        f"{float(before[row.key]):.2f}"
        for row in rows
        if row.side == FASTNET and row.key in before
        if row.ratio < share * float(before[row.key])
    ]


def device_name() -> str:
    """The GPU where there is one, else the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = found.group(1).strip() if found else name
    isa = fastnet.build_info()["cpu_isa"]
    return f"{name}, {torch.get_num_threads()} cores, {isa}"


_DEVICE = device_name()


def device_slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", _DEVICE.lower()).strip("-")


def _where() -> dict[str, str]:
    root = Path(__file__).parent.parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": _DEVICE,
        "torch": torch.__version__,
        "fastnet": fastnet.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def _time(microseconds: float) -> str:
    if microseconds < 1e3:
        return f"{microseconds:.1f} µs"
    if microseconds < 1e6:
        return f"{microseconds / 1e3:.2f} ms"
    return f"{microseconds / 1e6:.2f} s"
