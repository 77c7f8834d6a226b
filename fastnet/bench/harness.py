"""How everything is timed.

A case has sides: ways to compute the same thing. All are checked against each other before any is
timed. They then take turns of about ten milliseconds each until the time is up, and the time of
every call but the first in a turn is kept: so each side sees the same machine, and keeps its caches
for a while, as it would in a training. What is reported is the median, with the 20th and 80th
percentile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fastnet import _library
from fastnet.bench import machine, memory
from fastnet.bench.results import FASTNET, FORMATS, Row

# Where every side's call takes so long, in seconds, it is alone in its turn. Elsewhere the first in
# a turn does not count: it finds the caches as the other side left them, and of a virtual machine
# memory that the host has taken back meanwhile, whose return takes longer than a large layer.
LONG = 2.0
# And one this short, of which several are timed where one would tell little.
SHORT = 0.05


@dataclass(frozen=True)
class Sequel:
    """What is to be timed without what has to come first: a backward pass without its forward.

    Attributes:
        before: gives the arguments of `then`.
        then: what is timed.
    """

    before: Callable[[], tuple]
    then: Callable[..., Iterable[torch.Tensor]]

    def __call__(self) -> Iterable[torch.Tensor]:
        return self.then(*self.before())


@dataclass
class Case:
    """One thing to compute, in several ways.

    Attributes:
        op: what is timed; the benchmark's file has this name.
        case: the shape, for people.
        mode: "forward", "backward", "forward+backward", "operators" (both, without autograd), "C++"
            (also without Python), "step", "epoch".
        sides: name → function without arguments that does it once and returns tensors to compare;
            of a `Sequel`, only what follows is timed.
        flops: floating-point operations of one call; 0 where they say little.
        bytes: what one call must at least read and write; 0 where it says little.
        dtype: in which the machine's limit for `flops` is measured.
        tolerance: largest difference allowed, relative to the largest value.
        compared: the sides whose results are compared, where those that are timed run too long for
            their rounding not to part them.
        repeats: how often one call of a side does it; `flops` and `bytes` are those of once.
        seconds: how long to measure, all sides together; by default about 25 calls of each, in
            one second to three.
        series: what this is a point of ("ladder", "width", "784->28"), to be drawn as a curve.
        x: where on that curve: bytes, units, pictures in a batch.
    """

    op: str
    case: str
    mode: str
    sides: dict[str, Callable[[], Iterable[torch.Tensor]]]
    flops: float = 0
    bytes: float = 0
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5
    compared: dict[str, Callable[[], Iterable[torch.Tensor]]] | None = None
    repeats: int = 1
    seconds: float | None = None
    series: str = ""
    x: float = 0


def run(case: Case) -> list[Row]:
    """Verifies and times a case."""
    # A compiled side that silently went on as eager would be no rival.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    seconds = verify(case)
    if case.seconds is not None:
        seconds = case.seconds
    spaces = {side: _space(case, function) for side, function in case.sides.items()}
    timer = measure_cuda if torch.cuda.is_available() else measure
    taken = {
        side: [each / case.repeats for each in times]
        for side, times in timer(case.sides, seconds).items()
    }
    medians = {side: percentile(times, 0.5) for side, times in taken.items()}
    others = [m for side, m in medians.items() if not side.startswith(FASTNET)]
    best_other = min(others, default=float("nan"))
    ours = min((side for side in FORMATS if side in medians), key=medians.get, default="")
    limits = machine.limits(case.dtype)
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
            gflops=round(case.flops / medians[side] / 1e9, 4),
            gbs=round(case.bytes / medians[side] / 1e9, 4),
            gflops_limit=round(limits.gflops, 1),
            gbs_limit=round(limits.gbs, 1),
            peak_mb=spaces[side][0],
            saved_mb=spaces[side][1],
            ratio=round(best_other / medians[side], 3) if side == ours else float("nan"),
            calls=len(times),
            series=case.series,
            x=case.x,
            **machine.versions(),
        )
        for side, times in taken.items()
    ]


def _space(case: Case, once: Callable) -> tuple[float, float]:
    """Megabytes at the peak, and kept by autograd; NaN for what torch does not allocate, for a
    backward pass, which begins with memory full, and for epochs, which would be many thousand
    allocations to count."""
    if case.mode == "epoch" or isinstance(once, Sequel):
        return float("nan"), float("nan")
    if _library.NODES is not None:
        _library.NODES.release_memory()  # or the gradient would be in memory that is there already
    both = memory.peak_bytes(once), memory.saved_bytes(once)
    return tuple(round(b / 1e6, 6) if both[0] else float("nan") for b in both)


def verify(case: Case) -> float:
    """Compares every side's result with the first one's, two or three times, as inputs rotate.

    Returns the seconds that a case of such calls should be measured for.

    Raises:
        AssertionError: where they differ by more than the case allows.
    """
    for turn in range(3):
        start = time.perf_counter()
        sides = case.compared or case.sides
        results = {side: list(function()) for side, function in sides.items()}
        seconds = time.perf_counter() - start
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
        if turn > 0 and seconds > 3:  # an epoch, or so large that there is no other batch
            break
    return min(max(0.4 if torch.cuda.is_available() else 1.0, 25 * seconds), 3.0)


def measure(sides: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, the sides taking turns. The first turn of each only warms up."""
    clock = time.perf_counter
    taken: dict[str, list[float]] = {side: [] for side in sides}
    warm_until = clock() + seconds / 4
    end = warm_until + seconds
    turn, least_calls = 0, 1
    # Of calls longer than all that seven, or as many as half a minute has, but three.
    while clock() < end or turn < 4 or (turn < 8 and clock() < end + 30):
        warm = turn > 0 and clock() > warm_until
        longest = []
        for side, function in sides.items():
            before, then = _parts(function)
            turn_end = clock() + 0.01
            times: list[float] = []
            while clock() < turn_end or len(times) < least_calls:
                arguments = before()
                start = clock()
                then(*arguments)
                times.append(clock() - start)
                del arguments
            longest.append(max(times))
            if warm:
                taken[side] += times[least_calls - 1 :]
        if turn == 0 and min(longest) < LONG:
            least_calls = 2
        turn += 1
    return taken


def measure_cuda(sides: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """As `measure`, by the GPU's own clock: a turn is a train of calls, long enough to fill it.

    Where the host is slower than the GPU, this is the host's time, as it is in a training.
    """
    taken: dict[str, list[float]] = {side: [] for side in sides}

    def turn(function, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before, then = _parts(function)
        prepared = [before() for _ in range(calls)]
        torch.cuda.synchronize()
        start.record()
        for arguments in prepared:
            then(*arguments)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    calls = {}
    for side, function in sides.items():
        turn(function, 1)
        once = turn(function, 1)
        if once < SHORT:
            once = turn(function, 5)
        # What is prepared for all calls of a turn is in memory at once.
        most = 16 if isinstance(function, Sequel) else 1000
        calls[side] = max(1, min(most, int(0.01 / once)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 3:
        for side, function in sides.items():
            taken[side].append(turn(function, calls[side]))
    return taken


def _parts(function: Callable) -> tuple[Callable, Callable]:
    if isinstance(function, Sequel):
        return function.before, function.then
    return tuple, function  # no arguments


def graphed(once: Callable[[], Iterable[torch.Tensor]]) -> Callable[[], Iterable[torch.Tensor]]:
    """The same work captured in a CUDA graph at its first call: launches without Python, dispatch
    or autograd."""
    replay = None

    def first_or_replay():
        nonlocal replay
        replay = replay or _captured(once)
        return replay()

    return first_or_replay


def _captured(once: Callable[[], Iterable[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
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
